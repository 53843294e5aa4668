// active_norm and scale_active_ on CUDA.
#include <memory>

#include "clip_grad_args.h"
#include "clip_grad_kernel.cuh"
#include "device.cuh"

namespace sparse_cl {
namespace {

Tensor active_norm(const TensorList& grads, const TensorList& states, Tensor layout) {
  const ClipCall call = make_clip_call(grads, states, layout, "active_norm");
  const int device = grads.view(0).device_index;
  const DeviceGuard guard(device);
  const cudaStream_t stream = current_stream(device);

  int64_t chunks = 0;
  for (const ClipBucket& bucket : call.buckets) chunks += chunks_of(bucket.tasks);
  Tensor sums = torch::stable::new_empty(grads.tensor(0), {chunks}, torch::headeronly::ScalarType::Double);
  Tensor norm = new_norm(call, grads, layout);
  const auto launch = std::make_unique<ClipLaunch>();
  launch->sums = static_cast<double*>(sums.data_ptr());
  for (const ClipBucket& bucket : call.buckets) {
    dispatch_grad(bucket.dtype, [&](auto grad) {
      plan_clip_launches(bucket.tasks, *launch, [&](uint32_t blocks) {
        launch_kernel(active_norm_kernel<decltype(grad)>, *launch, blocks, kThreads, kSumBytes, stream, "active_norm");
        launch->sums += blocks;
      });
    });
  }
  const NormLaunch last{static_cast<const double*>(sums.data_ptr()), chunks, norm.data_ptr(), call.float64};
  launch_kernel(norm_kernel, last, 1, kThreads, kSumBytes, stream, "active_norm");
  return norm;
}

void scale_active_(const TensorList& grads, const TensorList& states, Tensor layout, Tensor factor) {
  const bool float64 = is_float64_factor(factor, grads);
  ClipCall call = make_clip_call(grads, states, layout, "scale_active_");
  if (call.buckets.empty()) return;
  const int device = grads.view(0).device_index;
  const DeviceGuard guard(device);
  const cudaStream_t stream = current_stream(device);
  const auto launch = std::make_unique<ClipLaunch>();
  launch->factor = factor.data_ptr();
  launch->float64_factor = float64;
  for (const ClipBucket& bucket : call.buckets) {
    dispatch_grad(bucket.dtype, [&](auto grad) {
      plan_clip_launches(bucket.tasks, *launch, [&](uint32_t blocks) {
        launch_kernel(scale_active_kernel<decltype(grad)>, *launch, blocks, kThreads, 0, stream, "scale_active_");
      });
    });
  }
  call.finish();
}

}  // namespace
}  // namespace sparse_cl

STABLE_TORCH_LIBRARY_IMPL(sparse_cl, CUDA, m) {
  m.impl("active_norm", TORCH_BOX(&sparse_cl::FromHandles<&sparse_cl::active_norm>::call));
  m.impl("scale_active_", TORCH_BOX(&sparse_cl::FromHandles<&sparse_cl::scale_active_>::call));
}
