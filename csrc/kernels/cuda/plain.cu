// One instance of the kernel without tensor cores: compiled once for each dtype, size and number of
// stages.
#include "kernels/cuda/attention_plain.cuh"
#include "kernels/cuda/instance.h"
#include "kernels/cuda/launch.h"

namespace apr::APR_GPU {
namespace {

using Number = APR_NUMBER;
using Shape = PlainShape<Number, APR_DIM, APR_STAGES>;

void run(const AttentionWork& work, const Launch& launch) {
  start(attention_plain<Number, APR_DIM, APR_STAGES>, launch, work);
}

}  // namespace

const Instance APR_INSTANCE = instance_of<Shape>(kNumber<Number>, APR_STAGES, false, false, run);

}  // namespace apr::APR_GPU
