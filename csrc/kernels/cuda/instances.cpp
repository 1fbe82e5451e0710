// The list of attention kernels that are compiled, one translation unit each, in ascending order of
// what they ask for. CMakeLists.txt has the same list.
#include "kernels/cuda/layout.h"

namespace apr::APR_GPU {

#define APR_FOR_ALL(one) \
  APR_EACH(one, bf16)    \
  APR_EACH(one, fp16)
#define APR_EACH(one, number)                                                                      \
  one(small_##number##_64_16_4) one(small_##number##_64_32_4) one(small_##number##_128_16_2)       \
      one(small_##number##_128_16_3) one(small_##number##_128_32_2) one(small_##number##_128_32_3) \
          one(small_##number##_256_16_2) one(wide_##number##_64_128_8)                             \
              one(wide_##number##_128_128_5) one(wide_##number##_256_128_2)

#define APR_DECLARE(name) extern const Instance name;
#define APR_LIST(name) &name,
APR_FOR_ALL(APR_DECLARE)

const std::vector<const Instance*>& instances() {
  static const std::vector<const Instance*> all{APR_FOR_ALL(APR_LIST)};
  return all;
}

}  // namespace apr::APR_GPU
