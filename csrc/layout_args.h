// Checks the layout tensor that ops on masked parameters are given, see FIELDS in sparse_cl/layout.py.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include "dispatch.h"
#include "masked_adamw.h"
#include "tensor_view.h"

namespace sparse_cl {

using torch::stable::Tensor;

// Columns of the layout tensor.
enum Field {
  kFieldKind,
  kFieldUnits,
  kFieldCohorts,
  kFieldScope,
  kFieldSeed,
  kFieldNumel,
  kFieldInner,
  kFieldCompactGrad,
  kFieldByRow,
  kFieldIndex,
  kFieldRanks,
  kFieldGain,
  kFieldCohort,
  kFieldExpAvg,
  kFieldExpAvgSq,
  kFieldMaxExpAvgSq,
  kFieldMaster,
  kFields
};

// The rows of a layout tensor for `count` parameters, kFields numbers each.
inline const int64_t* layout_rows(const Tensor& layout, size_t count, const char* op) {
  const TensorView rows(layout);
  STD_TORCH_CHECK(layout.is_cpu() && rows.dtype == dtype_codes().int64 && rows.contiguous && rows.dim == 2 &&
                      rows.sizes[0] == static_cast<int64_t>(count) && rows.sizes[1] == kFields,
                  op, ": layout: expected a contiguous int64 CPU tensor of shape (", count, ", ",
                  static_cast<int>(kFields), ")");
  return static_cast<const int64_t*>(rows.data);
}

inline DType dtype_of(const TensorView& t, size_t i, const char* op, const char* list) {
  const DTypeCodes& code = dtype_codes();
  if (t.dtype == code.float32) return DType::kFloat32;
  if (t.dtype == code.bfloat16) return DType::kBFloat16;
  if (t.dtype == code.float16) return DType::kFloat16;
  STD_TORCH_CHECK(t.dtype == code.float64, op, ": ", list, "[", i, "]: expected float32, bfloat16, float16 or float64");
  return DType::kFloat64;
}

// Refuses a row of the layout tensor that StateLayout.row() would not make for a parameter of the shape of `t`.
inline void check_row(const int64_t* field, const TensorView& t, size_t i, const char* op, const char* list) {
  int64_t inner = 1;
  for (int64_t d = 1; d < t.dim; ++d) inner *= t.sizes[d];
  STD_TORCH_CHECK(field[kFieldNumel] == t.numel && field[kFieldInner] == inner, op, ": layout[", i,
                  "]: made for another shape than that of ", list, "[", i, "]");
  const int64_t kind = field[kFieldKind], units = field[kFieldUnits], cohorts = field[kFieldCohorts];
  const int64_t scope = field[kFieldScope];
  bool by_unit = false, fits = false;
  switch (kind) {
    case static_cast<int64_t>(Kind::kRows):
      by_unit = true;
      fits = t.dim >= 1 && units <= t.sizes[0];
      break;
    case static_cast<int64_t>(Kind::kColumns):
      by_unit = true;
      fits = t.dim == 2 && units <= t.sizes[1];
      break;
    case static_cast<int64_t>(Kind::kTwoFour):
      fits = t.dim == 2 && t.sizes[1] % 4 == 0;
      break;
    case static_cast<int64_t>(Kind::kDense):
    case static_cast<int64_t>(Kind::kElements):
      fits = units <= t.numel;
      break;
  }
  const bool scope_fits = scope == static_cast<int64_t>(Scope::kShared) ||
                          scope == static_cast<int64_t>(Scope::kPerEntry) ||
                          (by_unit && scope == static_cast<int64_t>(Scope::kPerUnit));
  const int64_t compact = field[kFieldCompactGrad];
  const bool grad_fits = compact == 0 || (by_unit && compact == 1);
  const bool has_rows = t.dim == 2 && t.sizes[0] <= INT32_MAX &&
                        (kind == static_cast<int64_t>(Kind::kDense) || kind == static_cast<int64_t>(Kind::kRows));
  const bool moment_fits =
      field[kFieldByRow] == 0 || (field[kFieldByRow] == 1 && has_rows && field[kFieldMaxExpAvgSq] == 0);
  STD_TORCH_CHECK(
      fits && units >= 0 && scope_fits && grad_fits && moment_fits && cohorts >= 1 && cohorts <= kMaxCohorts, op,
      ": layout[", i, "]: not a row that StateLayout.row() makes");
}

}  // namespace sparse_cl
