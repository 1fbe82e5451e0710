// Starts a kernel: on the GPU, or in the emulator.
#pragma once

#include "kernels/cuda/work.h"

#ifdef APR_EMULATED
#include "kernels/cuda/emulated/emulator.h"
#else
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>
#endif

namespace apr::APR_GPU {

#ifdef APR_EMULATED
template <typename... Parameters, typename... Arguments>
void start(void (*kernel)(Parameters...), const Launch& launch, const Arguments&... arguments) {
  run_grid(launch.kernel, launch.blocks, launch.threads, launch.shared_bytes,
           [&] { kernel(arguments...); });
}
#else
inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::string text = std::string("apr: ") + what + ": " + cudaGetErrorString(error);
  if (error == cudaErrorNoKernelImageForDevice) {
    text += "; this build has kernels for " APR_CUDA_ARCHITECTURES
            ": build with APR_CUDA_ARCHITECTURES for this GPU";
  }
  throw std::runtime_error(text);
}

template <typename... Parameters, typename... Arguments>
void start(void (*kernel)(Parameters...), const Launch& launch, const Arguments&... arguments) {
  if (launch.blocks == 0) return;
  if (launch.shared_bytes > 48 * 1024) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(launch.shared_bytes)),
          "shared memory of a kernel");
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                               cudaSharedmemCarveoutMaxShared),
          "shared memory of a multiprocessor");
  }
  bool overlap = launch.overlap;
  if (overlap) {
    // Code for older GPUs, compiled anew by the driver of a newer one, has no instruction that
    // waits.
    cudaFuncAttributes attributes{};
    check(cudaFuncGetAttributes(&attributes, kernel), "attributes of a kernel");
    overlap = attributes.ptxVersion >= 90;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(launch.blocks));
  config.blockDim = dim3(static_cast<unsigned>(launch.threads));
  config.dynamicSmemBytes = static_cast<size_t>(launch.shared_bytes);
  config.stream = static_cast<cudaStream_t>(launch.stream);
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &attribute;
  config.numAttrs = overlap ? 1 : 0;
  check(cudaLaunchKernelEx(&config, kernel, arguments...), launch.kernel);
}
#endif

}  // namespace apr::APR_GPU
