// SPARSE_CL_EMULATED_SOURCE, a .cu of csrc, as its op of the namespace sparse_cl_emulated on the CPU.
#include <cuda_runtime.h>
#include <torch/csrc/stable/library.h>

extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return AOTI_TORCH_SUCCESS;
}

// The devices of the emulation are the CPU.
extern "C" AOTITorchError aoti_torch_create_device_guard(int32_t, DeviceGuardHandle* guard) {
  *guard = nullptr;
  return AOTI_TORCH_SUCCESS;
}
extern "C" AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle) {
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

// Starts to count the bytes that kernels move, from 0.
extern "C" __attribute__((visibility("default"))) void emulated_count_bytes() {
  cuda_emulation::counting = true;
  cuda_emulation::bytes_moved = 0;
}
extern "C" __attribute__((visibility("default"))) int64_t emulated_bytes_moved() {
  cuda_emulation::counting = false;
  return cuda_emulation::bytes_moved;
}

STABLE_TORCH_LIBRARY_IMPL(sparse_cl_emulated, CPU, m) {
  register_kernels(m);
}
