// SPARSE_CL_EMULATED_SOURCE, a .cu of csrc, as its op of the namespace sparse_cl_emulated on the CPU.
#include <cuda_runtime.h>
#include <torch/csrc/stable/library.h>

extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return AOTI_TORCH_SUCCESS;
}

#pragma push_macro("STABLE_TORCH_LIBRARY_IMPL")
#undef STABLE_TORCH_LIBRARY_IMPL
#define STABLE_TORCH_LIBRARY_IMPL(ns, key, m) static void register_kernels(torch::stable::detail::StableLibrary& m)
#include SPARSE_CL_EMULATED_SOURCE
#pragma pop_macro("STABLE_TORCH_LIBRARY_IMPL")

namespace sparse_cl {
alignas(16) unsigned char shared_memory[cuda_emulation::kSharedMemory];
}

unsigned char* cuda_emulation::shared_memory() {
  return sparse_cl::shared_memory;
}

extern "C" __attribute__((visibility("default"))) int emulated_launches() {
  return cuda_emulation::launches;
}

STABLE_TORCH_LIBRARY_IMPL(sparse_cl_emulated, CPU, m) {
  register_kernels(m);
}
