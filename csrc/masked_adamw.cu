// masked_adamw_ on CUDA.
#include <memory>

#include "device.cuh"
#include "masked_adamw_args.h"
#include "masked_adamw_kernel.cuh"

namespace sparse_cl {
namespace {

const float* data_of(const std::optional<Tensor>& t) {
  return t ? static_cast<const float*>(t->data_ptr()) : nullptr;
}

void masked_adamw_(const TensorList& params, const TensorList& grads, const TensorList& states, Tensor layout,
                   double lr, std::optional<Tensor> lr_tensor, double beta1, double beta2, double eps,
                   double weight_decay, bool maximize, std::optional<Tensor> grad_scale,
                   std::optional<Tensor> found_inf) {
  check_scalar(lr_tensor, "lr_tensor", params);
  check_scalar(grad_scale, "grad_scale", params);
  check_scalar(found_inf, "found_inf", params);
  Call call = make_call(params, grads, states, layout);
  if (call.buckets.empty()) return;
  const int device = params.view(0).device_index;
  const DeviceGuard guard(device);
  const cudaStream_t stream = current_stream(device);

  for (const Bucket& bucket : call.buckets) {
    dispatch(bucket.dtype, bucket.float_grad, [&](auto param, auto grad) {
      using P = decltype(param);
      using T = typename Storage<P>::acc;
      const auto launch = std::make_unique<Launch<T>>();
      launch->hyper = make_hyper<T>(lr, beta1, beta2, eps, weight_decay);
      launch->lr = data_of(lr_tensor);
      launch->grad_scale = data_of(grad_scale);
      launch->found_inf = data_of(found_inf);
      launch->maximize = maximize;
      plan_launches(bucket.tasks, *launch, [&](uint32_t blocks, size_t shared) {
        launch_kernel(masked_adamw_kernel<P, decltype(grad)>, *launch, blocks, kThreads, shared, stream,
                      "masked_adamw_");
      });
    });
  }
  call.finish();
}

}  // namespace
}  // namespace sparse_cl

STABLE_TORCH_LIBRARY_IMPL(sparse_cl, CUDA, m) {
  m.impl("masked_adamw_", TORCH_BOX(&sparse_cl::masked_adamw_));
}
