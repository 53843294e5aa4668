// What every CUDA op needs of the device it runs on.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

namespace sparse_cl {

inline void check_cuda(cudaError_t error, const char* what) {
  STD_TORCH_CHECK(error == cudaSuccess, what, ": ", cudaGetErrorString(error));
}

// torch's own: restoring a device by cudaSetDevice would create a context, half a gigabyte, where there is none.
using torch::stable::accelerator::DeviceGuard;

inline cudaStream_t current_stream(int device) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

// Launches `kernel` with `argument` by value.
template <typename Kernel, typename Argument>
void launch_kernel(Kernel* kernel, const Argument& argument, uint32_t blocks, int threads, size_t shared,
                   cudaStream_t stream, const char* name) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  check_cuda(cudaLaunchKernelEx(&config, kernel, argument), name);
}

}  // namespace sparse_cl
