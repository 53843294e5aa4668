// Checks what active_norm and scale_active_ are given and turns it into tasks. Nothing has been written when a check
// fails.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <utility>
#include <vector>

#include "clip_grad.h"
#include "layout_args.h"

namespace sparse_cl {

// Gradients of one dtype.
struct ClipBucket {
  DType dtype;
  std::vector<ClipTask> tasks;
};

struct ClipCall {
  std::vector<ClipBucket> buckets;
  std::vector<std::pair<Tensor, Tensor>> copies;  // strided gradient, contiguous stand-in
  bool float64 = false;                           // whether any gradient is

  // Writes stand-ins back to where they came from.
  void finish() {
    for (auto& [strided, contiguous] : copies) torch::stable::copy_(strided, contiguous);
  }
};

// Whether a gradient has the compact shape of a row of the layout tensor, as far as the row alone tells.
inline bool is_compact(const int64_t* field, const TensorView& grad) {
  const int64_t units = field[kFieldUnits], inner = field[kFieldInner];
  if (field[kFieldKind] == static_cast<int64_t>(Kind::kRows))
    return grad.dim >= 1 && grad.sizes[0] == units && grad.numel == units * inner;
  return field[kFieldKind] == static_cast<int64_t>(Kind::kColumns) && grad.dim == 2 && grad.sizes[1] == units &&
         grad.sizes[0] * inner == field[kFieldNumel];
}

inline ClipCall make_clip_call(const TensorList& grads, const TensorList& states, const Tensor& layout,
                               const char* op) {
  STD_TORCH_CHECK(states.size() == grads.size(), op, ": expected as many states as grads (", grads.size(), "), got ",
                  states.size());
  const int64_t* field = layout_rows(layout, grads.size(), op);

  ClipCall call;
  for (size_t i = 0; i < grads.size(); ++i, field += kFields) {
    const TensorView grad = grads.view(i), state = states.view(i);
    STD_TORCH_CHECK(grad.same_place(grads.view(0)) && grad.same_place(state), op, ": grads[", i,
                    "] and its state: expected all on one device");
    STD_TORCH_CHECK(state.dtype == dtype_codes().uint8 && state.contiguous, op, ": states[", i,
                    "]: expected a contiguous uint8 tensor");
    const DType dtype = dtype_of(grad, i, op, "grads");
    call.float64 = call.float64 || dtype == DType::kFloat64;

    const bool compact = field[kFieldCompactGrad] == 1;
    STD_TORCH_CHECK(!compact || is_compact(field, grad), op, ": grads[", i,
                    "]: expected the compact shape that layout[", i, "] says");
    if (!compact) check_row(field, grad, i, op, "grads");

    ClipTask task{grad.data, nullptr, grad.numel, 0, 0, Walk::kAll};
    const Kind kind = compact ? Kind::kDense : static_cast<Kind>(field[kFieldKind]);
    int64_t words = 0;  // of the index
    if (kind == Kind::kRows || kind == Kind::kColumns) {
      words = field[kFieldUnits];
      task.units = static_cast<int32_t>(words);
      task.walk = kind == Kind::kRows ? Walk::kRows : Walk::kColumns;
      // A parameter without entries may have no rows or no columns to divide by.
      task.inner = grad.numel ? grad.numel / grad.sizes[0] : 0;
      task.slots = grad.numel ? words * (kind == Kind::kRows ? task.inner : grad.sizes[0]) : 0;
    } else if (kind != Kind::kDense) {
      words = (grad.numel + 31) / 32;
      task.walk = Walk::kBits;
      if (field[kFieldUnits] == 0) task.slots = 0;
    }
    if (task.slots == 0) continue;
    const int64_t offset = field[kFieldIndex];
    if (words) {
      STD_TORCH_CHECK(offset > 0 && offset % kOffsetUnit == 0 && offset + 4 * words <= state.numel, op, ": states[", i,
                      "]: does not hold what layout[", i, "] says (field ", static_cast<int>(kFieldIndex), ")");
      task.index = reinterpret_cast<const int32_t*>(static_cast<const char*>(state.data) + offset);
    }

    if (!grad.contiguous) {
      const Tensor strided = grads.tensor(i);
      call.copies.emplace_back(strided, torch::stable::contiguous(strided));
      task.grad = call.copies.back().second.data_ptr();
    }
    ClipBucket* bucket = nullptr;
    for (auto& b : call.buckets)
      if (b.dtype == dtype) bucket = &b;
    if (!bucket) bucket = &call.buckets.emplace_back(ClipBucket{dtype, {}});
    bucket->tasks.push_back(task);
  }
  return call;
}

// Checks the factor and says whether it is float64.
inline bool is_float64_factor(const Tensor& factor, const TensorList& grads) {
  const TensorView view(factor);
  STD_TORCH_CHECK(view.numel == 1, "scale_active_: factor: expected one element, got ", view.numel);
  STD_TORCH_CHECK(view.dtype == dtype_codes().float32 || view.dtype == dtype_codes().float64,
                  "scale_active_: factor: expected float32 or float64");
  STD_TORCH_CHECK(grads.empty() || view.same_place(grads.view(0)),
                  "scale_active_: factor: expected it on the gradients' device");
  return view.dtype == dtype_codes().float64;
}

// An uninitialized 0-d norm, on the device of the gradients.
inline Tensor new_norm(const ClipCall& call, const TensorList& grads, const Tensor& layout) {
  using torch::headeronly::ScalarType;
  return torch::stable::new_empty(grads.empty() ? layout : grads.tensor(0), {},
                                  call.float64 ? ScalarType::Double : ScalarType::Float);
}

// Calls f(G{}) with the storage type of gradients.
template <typename F>
void dispatch_grad(DType dtype, F&& f) {
  dispatch(dtype, false, [&](auto grad, auto) { f(grad); });
}

}  // namespace sparse_cl
