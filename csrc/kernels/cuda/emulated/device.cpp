// Which GPU is emulated: a small one, so that small problems are cut like large ones.
#include "kernels/cuda/device.h"

#include "kernels/cuda/emulated/emulator.h"

namespace apr {
namespace cuda_emulated {
namespace {

GpuDevice emulated{90, 3, 227 * 1024, 228 * 1024, int64_t{1} << 28};

}  // namespace

GpuDevice device_of(int) { return emulated; }
std::string built_architectures() { return "emulated"; }

}  // namespace cuda_emulated

const GpuBackend* emulated_backend() { return &cuda_emulated::backend(); }

void set_emulated_device(const GpuDevice& device, uint64_t seed) {
  cuda_emulated::emulated = device;
  cuda_emulated::emulate_device(device.multiprocessors, seed);
}

}  // namespace apr
