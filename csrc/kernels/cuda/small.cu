// One instance of the kernel for few rows: compiled once for each dtype, size and number of stages.
#include "kernels/cuda/attention_small.cuh"
#include "kernels/cuda/instance.h"
#include "kernels/cuda/launch.h"

#ifndef APR_CODED
#define APR_CODED false  // coded.cu
#endif

namespace apr::APR_GPU {
namespace {

using Number = APR_NUMBER;
using Shape = SmallShape<Number, APR_DIM, APR_ROWS / 16, APR_STAGES, APR_CODED>;

void run(const AttentionWork& work, const Launch& launch) {
  start(attention_small<Number, APR_DIM, APR_ROWS / 16, APR_STAGES, APR_CODED>, launch, work);
}

}  // namespace

const Instance APR_INSTANCE =
    instance_of<Shape>(kNumber<Number>, APR_STAGES, false, APR_CODED, run);

}  // namespace apr::APR_GPU
