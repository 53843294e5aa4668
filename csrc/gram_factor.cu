// gram_factor on CUDA.
#include "device.cuh"
#include "gram_factor_args.h"
#include "gram_factor_kernel.cuh"

namespace sparse_cl {
namespace {

template <bool kShared>
void launch_gram_factor(const GramFactorLaunch& launch, uint32_t batch, size_t shared, int most, cudaStream_t stream) {
  // The same value in each call: that of another thread's would be in force by the time of the launch.
  check_cuda(cudaFuncSetAttribute(gram_factor_kernel<kShared>, cudaFuncAttributeMaxDynamicSharedMemorySize, most),
             "cudaFuncSetAttribute");
  launch_kernel(gram_factor_kernel<kShared>, launch, batch, kGramThreads, shared, stream, "gram_factor");
}

std::tuple<torch::stable::Tensor, torch::stable::Tensor> gram_factor(torch::stable::Tensor gram,
                                                                     torch::stable::Tensor squared_norms, double rtol) {
  const GramFactorCall call = make_gram_factor_call(gram, squared_norms);
  if (call.batch == 0) return call.result();
  const int device = gram.get_device_index();
  const DeviceGuard guard(device);
  int most = 0;
  check_cuda(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "cudaDeviceGetAttribute");
  const size_t most_shared = static_cast<size_t>(most);
  const int k = static_cast<int>(call.k);
  STD_TORCH_CHECK(call.k < 46341 && gram_shared_bytes(k, false) <= most_shared && call.batch <= INT32_MAX,
                  "gram_factor: too many columns for this GPU: ", call.k);
  const bool in_shared = gram_shared_bytes(k, true) <= most_shared;
  const GramFactorLaunch launch{static_cast<const double*>(call.gram.data_ptr()),
                                static_cast<const double*>(call.squared_norms.data_ptr()),
                                static_cast<double*>(call.factor.data_ptr()),
                                static_cast<int64_t*>(call.rank.data_ptr()),
                                residual_floor(call.k),
                                rtol * rtol,
                                k,
                                in_shared ? gram_shared_stride(k) : k};
  const uint32_t batch = static_cast<uint32_t>(call.batch);
  const cudaStream_t stream = current_stream(device);
  const size_t shared = gram_shared_bytes(k, in_shared);
  in_shared ? launch_gram_factor<true>(launch, batch, shared, most, stream)
            : launch_gram_factor<false>(launch, batch, shared, most, stream);
  return call.result();
}

}  // namespace
}  // namespace sparse_cl

STABLE_TORCH_LIBRARY_IMPL(sparse_cl, CUDA, m) {
  m.impl("gram_factor", TORCH_BOX(&sparse_cl::gram_factor));
}
