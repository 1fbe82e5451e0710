// One instruction set's table of kernels; compiled once for each (APR_ISA).
#if defined(APR_MATRIX)
#include "kernels/cpu/amx.h"
#endif
#include "kernels/cpu/few.h"
#include "kernels/cpu/panels.h"
#include "kernels/cpu/scores.h"

namespace apr::cpu::APR_ISA {
namespace {

inline void reset(const TileJob& job) {
  for (int64_t j = 0; j < round_up(job.lanes, kLaneAlign); ++j) {
    job.max[j] = kNoScore;
    job.sum[j] = 0.f;
  }
}

template <class T, class P>
void attend(const TileJob& job) {
  reset(job);
  if (is_few<P>(job)) return attend_few<T, P>(job);
  attend_panels<T, P>(job);
}

void attend_bfloat16(const TileJob& job) {
#if defined(APR_MATRIX)
  if (fits_matrix(job)) {
    reset(job);
    return attend_matrix(job);
  }
#endif
#if defined(APR_PAIRS)
  if (job.head_dim_k % 2 == 0) return attend<BFloat16, Pairs>(job);
#endif
  attend<BFloat16, Floats<BFloat16>>(job);
}

void merge(MergeJob& job) {
  float max = kNoScore, sum = 0.f;
  for (int64_t i = 0; i < job.parts; ++i) {
    const float m = job.max[i * job.stride];
    max = m > max ? m : max;
  }
  for (int64_t d = 0; d < job.dim; ++d) job.merged[d] = 0.f;
  for (int64_t i = 0; i < job.parts; ++i) {
    const Vec weight = exp2(spread(job.max[i * job.stride] - max));
    const float* part = job.out + i * job.stride * job.dim;
    sum += weight[0] * job.sum[i * job.stride];
    int64_t d = 0;
    for (; d + kWidth <= job.dim; d += kWidth)
      store(job.merged + d, load(job.merged + d) + weight * load(part + d));
    for (; d < job.dim; ++d) job.merged[d] += weight[0] * part[d];
  }
  job.merged_max = max;
  job.merged_sum = sum;
}

}  // namespace

#define APR_TEXT_(x) #x
#define APR_TEXT(x) APR_TEXT_(x)
extern const InstructionSet kTable;
const InstructionSet kTable = {
    APR_TEXT(APR_ISA),
    {attend<Float32, Floats<Float32>>, attend_bfloat16, attend<Float16, Floats<Float16>>},
    merge,
    {load_row<Float32>, load_row<BFloat16>, load_row<Float16>},
    {store_row<Float32>, store_row<BFloat16>, store_row<Float16>},
    encode_row,
    {score_passes<Float32>(), score_passes<BFloat16>(), score_passes<Float16>()}};

}  // namespace apr::cpu::APR_ISA
