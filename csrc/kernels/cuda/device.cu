// What the CUDA runtime says of a device.
#include <map>
#include <mutex>

#include "kernels/cuda/device.h"
#include "kernels/cuda/launch.h"

namespace apr {
namespace cuda {
namespace {

int attribute(cudaDeviceAttr which, int index) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, index), "device attribute");
  return value;
}

}  // namespace

GpuDevice query(int index) {
  return {attribute(cudaDevAttrComputeCapabilityMajor, index) * 10 +
              attribute(cudaDevAttrComputeCapabilityMinor, index),
          attribute(cudaDevAttrMultiProcessorCount, index),
          attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, index),
          attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, index),
          GpuDevice{}.most_part_bytes};
}

GpuDevice device_of(int index) {
  static std::mutex mutex;  // each call of a kernel asks
  static std::map<int, GpuDevice> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(index);
  return found != known.end() ? found->second : known.emplace(index, query(index)).first->second;
}

std::string built_architectures() { return APR_CUDA_ARCHITECTURES; }

}  // namespace cuda

const GpuBackend* cuda_backend() { return &cuda::backend(); }

}  // namespace apr
