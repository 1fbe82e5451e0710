// How a compiled attention kernel makes itself known: by the name that instances.cmake gave it.
#pragma once

#include "kernels/cuda/work.h"

#define APR_TEXT_(x) #x
#define APR_TEXT(x) APR_TEXT_(x)

namespace apr::APR_GPU {

template <typename Shape>
constexpr Instance instance_of(DType dtype, int stages, bool wide, bool coded,
                               void (*run)(const AttentionWork&, const Launch&)) {
  return {
      APR_TEXT(APR_INSTANCE), dtype, APR_DIM, Shape::kRows, stages, wide, coded, Shape::kThreads,
      Shape::kSharedBytes,    run};
}

extern const Instance APR_INSTANCE;

}  // namespace apr::APR_GPU
