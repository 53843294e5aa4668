// masked_adamw_ and apply_updates_ on the CPU.
#include "masked_adamw.h"

#include <algorithm>
#include <cstring>

#include "cpu_level.h"
#include "masked_adamw_args.h"
#include "masked_adamw_cpu.h"

namespace sparse_cl {
namespace {

// Entries that a thread takes at a time: enough to hide the cost of handing them out.
constexpr int64_t kGrain = 32768;

StepItems step_items(CpuLevel level) {
#ifdef SPARSE_CL_X86_LEVELS
  switch (level) {
    case CpuLevel::kAvx512:
      return step_items_avx512;
    case CpuLevel::kAvx2:
      return step_items_avx2;
    default:
      break;
  }
#endif
  (void)level;
  return step_items_baseline;
}

StepItems step_items(DType dtype, Kind kind) {
  static const StepItems best = step_items(cpu_level()), streams = step_items(cpu_level_of_streams());
  return dtype == DType::kFloat32 && (kind == Kind::kDense || kind == Kind::kRows) ? streams : best;
}

// Work items of a task and how many make a chunk.
struct Items {
  int64_t count, per_chunk;
};

Items items_of(const Task& task) {
  auto chunk = [](int64_t cost) { return std::max<int64_t>(1, kGrain / std::max<int64_t>(1, cost)); };
  switch (task.kind) {
    case Kind::kDense:
      return {task.numel, kGrain};
    case Kind::kRows:
      return {task.units, chunk(task.inner)};
    case Kind::kColumns:
      return {task.inner ? task.numel / task.inner : 0, chunk(task.inner)};
    default:
      return {(task.numel + kBlock - 1) / kBlock, kGrain / kBlock};
  }
}

double value_of(const Tensor& t) {
  return static_cast<double>(*static_cast<const float*>(t.data_ptr()));
}

void run(Call& call, Step step) {
  for (const Bucket& bucket : call.buckets) {
    step.mode = bucket.mode;
    std::vector<int64_t> start{0};  // first chunk of each task
    for (const Task& task : bucket.tasks) {
      const Items items = items_of(task);
      start.push_back(start.back() + (items.count + items.per_chunk - 1) / items.per_chunk);
    }
    torch::stable::parallel_for(0, start.back(), 1, [&](int64_t begin, int64_t end) {
      size_t t = std::upper_bound(start.begin(), start.end(), begin) - start.begin() - 1;
      for (int64_t chunk = begin; chunk < end;) {
        while (start[t + 1] <= chunk) ++t;
        const Task& task = bucket.tasks[t];
        const Items items = items_of(task);
        // Gathered entries are grouped from the start of a range, and the last few of a group are stepped by other
        // instructions: there, ranges must not depend on the number of threads.
        const bool grouped = task.kind == Kind::kElements && task.scope == Scope::kShared;
        const int64_t last = grouped ? chunk + 1 : std::min(end, start[t + 1]);
        step_items(bucket.dtype, task.kind)(task, bucket.dtype, bucket.float_grad, step,
                                            (chunk - start[t]) * items.per_chunk,
                                            std::min((last - start[t]) * items.per_chunk, items.count));
        chunk = last;
      }
    });
    if (step.mode == Mode::kAdd) continue;
    for (const Task& task : bucket.tasks)
      for (int16_t c = 0; c < task.cohorts; ++c) ++task.steps()[c];
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
  if (found_inf && value_of(*found_inf) != 0) {
    for (const Bucket& bucket : call.buckets)
      for (const Task& task : bucket.tasks)
        if (task.update) std::memset(task.update, 0, task.entries() * (bucket.dtype == DType::kFloat64 ? 8 : 4));
    return;
  }
  const double sign = maximize ? -1.0 : 1.0;
  run(call, {Mode::kAdamw, lr_tensor ? value_of(*lr_tensor) : lr, beta1, beta2, eps, weight_decay,
             grad_scale ? sign / value_of(*grad_scale) : sign});
}

void apply_updates_(const TensorList& params, const TensorList& states, const TensorList& updates, Tensor layout,
                    std::optional<Tensor> found_inf) {
  check_scalar("apply_updates_", found_inf, "found_inf", params);
  Call call = make_call(params, nullptr, states, updates, layout);
  if (!found_inf || value_of(*found_inf) == 0) run(call, Step{});
}

}  // namespace
}  // namespace sparse_cl

STABLE_TORCH_LIBRARY_IMPL(sparse_cl, CPU, m) {
  m.impl("masked_adamw_", TORCH_BOX(&sparse_cl::FromHandles<&sparse_cl::masked_adamw_>::call));
  m.impl("apply_updates_", TORCH_BOX(&sparse_cl::FromHandles<&sparse_cl::apply_updates_>::call));
}
