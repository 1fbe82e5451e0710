// The online softmax in base 2 (Milakov and Gimelshein, arXiv 1805.02867), once for all kernels: a
// running maximum, and the sum of weights 2^(score - maximum) under it.
#pragma once

#include "kernels/cuda/primitives.cuh"

namespace apr::APR_GPU {

// The weight of a score, or of a partial result by its maximum, under a maximum that is no lower.
// Where nothing was seen both are minus infinity, and the weight is 0.
APR_DEVICE float weight_under(float top, float score) {
  return fast_exp2(score - (top == -infinity() ? 0.f : top));
}

// Moves on to the maximum `top`, which is no lower, and to a sum with `added`, which stands under
// it; returns what older sums of values are to be multiplied with.
APR_DEVICE float advance(float& max, float& sum, float top, float added) {
  const float shrink = weight_under(top, max);
  max = top;
  sum = sum * shrink + added;
  return shrink;
}

}  // namespace apr::APR_GPU
