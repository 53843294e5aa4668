// masked_adamw_ and apply_updates_ on CUDA.
#include <type_traits>

#include "device.cuh"
#include "masked_adamw_args.h"
#include "masked_adamw_kernel.cuh"

namespace sparse_cl {
namespace {

const float* data_of(const std::optional<Tensor>& t) {
  return t ? static_cast<const float*>(t->data_ptr()) : nullptr;
}

template <typename P, typename G, typename T>
void launch_all(Mode mode, const std::vector<Task>& tasks, Launch<T>& launch, cudaStream_t stream) {
  const char* op = mode == Mode::kAdd ? "apply_updates_" : "masked_adamw_";
  if (mode == Mode::kByRow)
    plan_launches(tasks, launch, true, [&](uint32_t blocks, size_t) {
      launch_kernel(row_moments_kernel<P, G>, launch, blocks, kThreads, 0, stream, op);
    });
  plan_launches(tasks, launch, false, [&](uint32_t blocks, size_t shared) {
    auto run = [&](auto* kernel) { launch_kernel(kernel, launch, blocks, kThreads, shared, stream, op); };
    if (mode == Mode::kByRow) return run(masked_adamw_kernel<P, G, Mode::kByRow>);
    if constexpr (std::is_same_v<G, T>)
      if (mode == Mode::kAdd) return run(masked_adamw_kernel<P, G, Mode::kAdd>);
    mode == Mode::kAmsgrad ? run(masked_adamw_kernel<P, G, Mode::kAmsgrad>)
                           : run(masked_adamw_kernel<P, G, Mode::kAdamw>);
  });
}

struct Settings {
  double lr, beta1, beta2, eps, weight_decay;
  bool maximize;
  const float *lr_tensor, *grad_scale, *found_inf;
};

void run(const TensorList& params, Call& call, const Settings& s) {
  if (call.buckets.empty()) return;
  const int device = params.view(0).device_index;
  const DeviceGuard guard(device);
  const cudaStream_t stream = current_stream(device);
  for (const Bucket& bucket : call.buckets) {
    dispatch(bucket.dtype, bucket.float_grad, [&](auto param, auto grad) {
      using P = decltype(param);
      using T = typename Storage<P>::acc;
      Launch<T> launch;
      launch.hyper = make_hyper<T>(s.lr, s.beta1, s.beta2, s.eps, s.weight_decay);
      launch.lr = s.lr_tensor;
      launch.grad_scale = s.grad_scale;
      launch.found_inf = s.found_inf;
      launch.maximize = s.maximize;
      launch_all<P, decltype(grad)>(bucket.mode, bucket.tasks, launch, stream);
    });
  }
  call.finish();
}

void masked_adamw_(const TensorList& params, const TensorList& grads, const TensorList& states,
                   const TensorList& updates, Tensor layout, double lr, std::optional<Tensor> lr_tensor, double beta1,
                   double beta2, double eps, double weight_decay, bool maximize, std::optional<Tensor> grad_scale,
                   std::optional<Tensor> found_inf) {
  check_scalar("masked_adamw_", lr_tensor, "lr_tensor", params);
  check_scalar("masked_adamw_", grad_scale, "grad_scale", params);
  check_scalar("masked_adamw_", found_inf, "found_inf", params);
  Call call = make_call(params, &grads, states, updates, layout);
  run(params, call,
      {lr, beta1, beta2, eps, weight_decay, maximize, data_of(lr_tensor), data_of(grad_scale), data_of(found_inf)});
}

void apply_updates_(const TensorList& params, const TensorList& states, const TensorList& updates, Tensor layout,
                    std::optional<Tensor> found_inf) {
  check_scalar("apply_updates_", found_inf, "found_inf", params);
  Call call = make_call(params, nullptr, states, updates, layout);
  Settings settings{};
  settings.found_inf = data_of(found_inf);
  run(params, call, settings);
}

}  // namespace
}  // namespace sparse_cl

STABLE_TORCH_LIBRARY_IMPL(sparse_cl, CUDA, m) {
  m.impl("masked_adamw_", TORCH_BOX(&sparse_cl::FromHandles<&sparse_cl::masked_adamw_>::call));
  m.impl("apply_updates_", TORCH_BOX(&sparse_cl::FromHandles<&sparse_cl::apply_updates_>::call));
}
