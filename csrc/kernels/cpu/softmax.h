// The online softmax in base 2 (Milakov and Gimelshein, arXiv 1805.02867): a running maximum, and
// the sum of weights 2^(score - maximum) under it; of one row (float), or of a vector of rows.
#pragma once

#include "kernels/cpu/vec.h"

namespace apr::cpu::APR_ISA {
namespace {

inline float exp2(float x) { return exp2(spread(x))[0]; }

// Moves on to the maximum `top`, which is no lower, and to a sum with `added`, which stands under
// it; returns what older sums of values are to be multiplied with.
template <typename V>
inline V advance(V& max, V& sum, V top, V added) {
  const V fix = exp2(max - top);
  max = top;
  sum = sum * fix + added;
  return fix;
}

}  // namespace
}  // namespace apr::cpu::APR_ISA
