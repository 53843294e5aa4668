// Checks what masked_adamw_ and apply_updates_ are given and turns it into tasks. Nothing has been written when a check
// fails.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <optional>
#include <utility>
#include <vector>

#include "layout_args.h"
#include "masked_adamw.h"
#include "tensor_view.h"

namespace sparse_cl {

// Parameters of one dtype and mode whose gradients share a dtype: what one kernel can take.
struct Bucket {
  DType dtype;
  bool float_grad;
  Mode mode;
  std::vector<Task> tasks;
};

struct Call {
  std::vector<Bucket> buckets;
  std::vector<std::pair<Tensor, Tensor>> copies;  // strided parameter, contiguous stand-in
  std::vector<Tensor> keep;                       // contiguous copies of strided gradients

  // Writes stand-ins back to where they came from.
  void finish() {
    for (auto& [strided, contiguous] : copies) torch::stable::copy_(strided, contiguous);
  }
};

// One element on the parameters' device, as float32 bits the kernel can read.
inline void check_scalar(const char* op, const std::optional<Tensor>& t, const char* name, const TensorList& params) {
  if (!t || params.empty()) return;
  const TensorView scalar(*t);
  STD_TORCH_CHECK(scalar.numel == 1, op, ": ", name, ": expected one element, got ", scalar.numel);
  STD_TORCH_CHECK(scalar.dtype == dtype_codes().float32, op, ": ", name, ": expected float32");
  STD_TORCH_CHECK(scalar.same_place(params.view(0)), op, ": ", name, ": expected it on the parameters' device");
}

// Whether a gradient has the shape that a row of the layout tensor asks for.
inline bool grad_shape_fits(const int64_t* field, const TensorView& param, const TensorView& grad) {
  if (!field[kFieldCompactGrad]) return param.same_shape(grad);
  if (grad.dim != param.dim) return false;
  const int64_t cut = field[kFieldKind] == static_cast<int64_t>(Kind::kRows) ? 0 : 1;
  for (int64_t d = 0; d < param.dim; ++d)
    if (grad.sizes[d] != (d == cut ? field[kFieldUnits] : param.sizes[d])) return false;
  return true;
}

// `updates`: where a step writes them, or for `add` what is added; else empty.
inline Call make_call(const TensorList& params, const TensorList* grads, const TensorList& states,
                      const TensorList& updates, const Tensor& layout) {
  const bool add = grads == nullptr;
  const char* op = add ? "apply_updates_" : "masked_adamw_";
  const bool with_updates = add || !updates.empty();
  if (add) grads = &updates;
  STD_TORCH_CHECK(grads->size() == params.size() && states.size() == params.size(), op, ": expected as many ",
                  add ? "updates" : "grads", " and states as params (", params.size(), "), got ", grads->size(),
                  " and ", states.size());
  STD_TORCH_CHECK(!with_updates || updates.size() == params.size(), op, ": expected as many updates as params (",
                  params.size(), ") or none, got ", updates.size());
  const DTypeCodes& code = dtype_codes();
  const int64_t* field = layout_rows(layout, params.size(), op);

  Call call;
  if (params.empty()) return call;
  const TensorView first = params.view(0);
  for (size_t i = 0; i < params.size(); ++i, field += kFields) {
    const TensorView param = params.view(i), grad = grads->view(i), state = states.view(i);
    STD_TORCH_CHECK(add || grad_shape_fits(field, param, grad), op, ": grads[", i, "]: expected the ",
                    field[kFieldCompactGrad] ? "compact " : "", "shape of params[", i, "]");
    STD_TORCH_CHECK(param.same_place(first) && param.same_place(grad) && param.same_place(state), op, ": params[", i,
                    "], its ", add ? "update" : "gradient", " and its state: expected all on one device");
    const DType dtype = dtype_of(param, i, op, "params");
    const bool float_grad = dtype != DType::kFloat32 && grad.dtype == code.float32;
    STD_TORCH_CHECK(add || float_grad || grad.dtype == param.dtype, op, ": grads[", i,
                    "]: expected the dtype of params[", i, "] or float32");
    STD_TORCH_CHECK(state.dtype == code.uint8 && state.contiguous, op, ": states[", i,
                    "]: expected a contiguous uint8 tensor");

    Task task{};
    task.numel = param.numel;
    task.kind = static_cast<Kind>(field[kFieldKind]);
    task.units = static_cast<int32_t>(task.kind == Kind::kRows || task.kind == Kind::kColumns ? field[kFieldUnits] : 0);
    task.cohorts = static_cast<int16_t>(field[kFieldCohorts]);
    task.scope = static_cast<Scope>(field[kFieldScope]);
    task.seed = static_cast<uint32_t>(field[kFieldSeed]);
    check_row(field, param, i, op, "params");
    task.compact_grad = add || field[kFieldCompactGrad] == 1;
    task.by_row = field[kFieldByRow] == 1;
    const bool dense = task.kind == Kind::kDense;
    if (dense && task.by_row) {
      task.kind = Kind::kRows;
      task.units = static_cast<int32_t>(param.sizes[0]);
    }
    if (task.kind == Kind::kRows)
      task.inner = task.numel && param.sizes[0] ? task.numel / param.sizes[0] : 0;
    else if (task.kind == Kind::kColumns)
      task.inner = param.sizes[1];
    else if (task.kind == Kind::kElements)
      task.inner = field[kFieldUnits];
    const int64_t entries = task.numel ? task.entries() : 0;
    if (with_updates) {
      const TensorView update = updates.view(i);
      STD_TORCH_CHECK(update.numel == entries && update.contiguous && update.same_place(param) &&
                          update.dtype == (dtype == DType::kFloat64 ? code.float64 : code.float32),
                      op, ": updates[", i, "]: expected a contiguous tensor of the ", entries,
                      " active entries of params[", i, "] in the dtype of its state, on its device");
      if (!add) task.update = update.data;
    }
    if (entries == 0) continue;

    const int64_t acc_size = dtype == DType::kFloat64 ? 8 : 4;
    const int64_t words = (task.numel + 31) / 32, blocks = (task.numel + kBlock - 1) / kBlock;
    const bool by_unit = task.kind == Kind::kRows || task.kind == Kind::kColumns;
    const int64_t per_unit = by_unit ? task.units : entries;
    int64_t end = 0;  // of the sections, which fill the state: else it was made for another dtype
    auto section = [&](Field f, int64_t bytes, bool required) -> uint32_t {
      const int64_t offset = field[f];
      STD_TORCH_CHECK(offset ? offset % kOffsetUnit == 0 && offset > 0 && offset + bytes <= state.numel : !required, op,
                      ": states[", i, "]: does not hold what layout[", i, "] says (field ", static_cast<int>(f), ")");
      if (offset) end = offset + bytes;
      return static_cast<uint32_t>(offset / kOffsetUnit);
    };
    STD_TORCH_CHECK(4 * (task.cohorts + 1) <= state.numel, op, ": states[", i, "]: too short for its step counts");
    task.index = dense ? 0 : section(kFieldIndex, 4 * (by_unit ? task.units : words), true);
    task.ranks = section(kFieldRanks, 8 * (blocks + 1), task.kind == Kind::kElements);
    task.gain = section(kFieldGain, 4 * static_cast<int64_t>(task.units), false);
    task.cohort =
        section(kFieldCohort, task.scope == Scope::kPerEntry ? entries : per_unit, task.scope != Scope::kShared);
    task.exp_avg = section(kFieldExpAvg, acc_size * entries, true);
    task.exp_avg_sq = section(kFieldExpAvgSq, acc_size * (task.by_row ? task.units : entries), true);
    task.max_exp_avg_sq = section(kFieldMaxExpAvgSq, acc_size * entries, false);
    task.master = section(kFieldMaster, acc_size * entries, false);
    STD_TORCH_CHECK(end == state.numel, op, ": states[", i, "]: expected ", end, " bytes, as layout[", i,
                    "] says, got ", state.numel);

    task.param = param.data;
    if (!param.contiguous) {
      const Tensor strided = params.tensor(i);
      call.copies.emplace_back(strided, torch::stable::contiguous(strided));
      task.param = call.copies.back().second.data_ptr();
    }
    task.grad = grad.data;
    if (!grad.contiguous) {
      call.keep.push_back(torch::stable::contiguous(grads->tensor(i)));
      task.grad = call.keep.back().data_ptr();
    }
    task.state = static_cast<char*>(state.data);

    const Mode mode = add                   ? Mode::kAdd
                      : task.by_row         ? Mode::kByRow
                      : task.max_exp_avg_sq ? Mode::kAmsgrad
                                            : Mode::kAdamw;
    Bucket* bucket = nullptr;
    for (auto& b : call.buckets)
      if (b.dtype == dtype && b.float_grad == float_grad && b.mode == mode) bucket = &b;
    if (!bucket) bucket = &call.buckets.emplace_back(Bucket{dtype, float_grad, mode, {}});
    bucket->tasks.push_back(task);
  }
  return call;
}

template <typename T>
Hyper<T> make_hyper(double lr, double beta1, double beta2, double eps, double weight_decay) {
  return {lr,
          beta1,
          beta2,
          std::log(beta1),
          std::log(beta2),
          weight_decay,
          static_cast<T>(1 - beta1),
          static_cast<T>(beta2),
          static_cast<T>(1 - beta2),
          static_cast<T>(eps)};
}

}  // namespace sparse_cl
