// One instance of the kernel without tensor cores: compiled once for each dtype, size and number of
// stages.
#include "kernels/cuda/attention_plain.cuh"
#include "kernels/cuda/launch.h"

namespace apr::APR_GPU {
namespace {

using Number = APR_NUMBER;
using Shape = PlainShape<Number, APR_DIM, APR_STAGES>;

void run(const AttentionWork& work, const Launch& launch) {
  start(attention_plain<Number, APR_DIM, APR_STAGES>, launch, work);
}

#define APR_TEXT_(x) #x
#define APR_TEXT(x) APR_TEXT_(x)

}  // namespace

extern const Instance APR_INSTANCE;
const Instance APR_INSTANCE{APR_TEXT(APR_INSTANCE), kNumber<Number>,     APR_DIM,
                            Shape::kRows,           APR_STAGES,          false,
                            Shape::kThreads,        Shape::kSharedBytes, run};

}  // namespace apr::APR_GPU
