// Merges attention results over disjoint sets of keys by their log-sum-exp.
#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels/cpu/convert.h"
#include "kernels/cpu/kernels.h"

namespace apr::cpu {

void merge(const MergeParams& params) {
  std::vector<float> sum(params.dim);
  for (int64_t row = 0; row < params.rows; ++row) {
    for (int64_t head = 0; head < params.heads; ++head) {
      const int64_t at = row * params.heads + head;
      float max = -INFINITY;
      for (const float* lse : params.part_lse) max = std::max(max, lse[at]);
      const float reference = max == -INFINITY ? 0.f : max;
      float total = 0.f;
      std::fill(sum.begin(), sum.end(), 0.f);
      dispatch(params.dtype, [&](auto type) {
        using T = decltype(type);
        using Storage = typename T::Storage;
        for (size_t p = 0; p < params.parts.size(); ++p) {
          const float weight = std::exp(params.part_lse[p][at] - reference);
          if (weight == 0.f) continue;
          const Rows& part = params.parts[p];
          const auto* o = static_cast<const Storage*>(part.data) + row * part.row_stride +
                          head * part.head_stride;
          total += weight;
          for (int64_t d = 0; d < params.dim; ++d) sum[d] += weight * T::load(o[d]);
        }
        const float inverse = total == 0.f ? 0.f : 1.f / total;
        auto* out = static_cast<Storage*>(params.out.data) + row * params.out.row_stride +
                    head * params.out.head_stride;
        for (int64_t d = 0; d < params.dim; ++d) out[d] = T::store(sum[d] * inverse);
      });
      params.lse[at] = total == 0.f ? -INFINITY : reference + std::log(total);
    }
  }
}

}  // namespace apr::cpu
