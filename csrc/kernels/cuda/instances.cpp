// The attention kernels of this build, as instances.cmake lists them: one translation unit each, in
// ascending order of what they ask for.
#include <instances.h>  // made by instances.cmake

#include "kernels/cuda/layout.h"

namespace apr::APR_GPU {

#define APR_DECLARE(name) extern const Instance name;
#define APR_ADDRESS(name) &name,
APR_INSTANCES(APR_DECLARE)

const std::vector<const Instance*>& instances() {
  static const std::vector<const Instance*> all{APR_INSTANCES(APR_ADDRESS)};
  return all;
}

}  // namespace apr::APR_GPU
