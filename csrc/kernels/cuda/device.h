// What GPU there is, and for which ones this build has kernels.
#pragma once

#include <string>

#include "kernels/cuda/array.h"
#include "kernels/gpu.h"

namespace apr::APR_GPU {

GpuDevice device_of(int index);
std::string built_architectures();
const GpuBackend& backend();

}  // namespace apr::APR_GPU
