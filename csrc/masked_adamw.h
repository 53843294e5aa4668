// What the CPU and CUDA kernels of masked_adamw_ are told. No torch.
#pragma once

#include <cstdint>

#include "dispatch.h"

namespace sparse_cl {

enum class Kind : uint8_t { kDense, kRows, kColumns, kElements, kTwoFour };
enum class Scope : uint8_t { kShared, kPerUnit, kPerEntry };

constexpr int64_t kBlock = 1024;      // weights of an element mask that share one rank; layout.BLOCK
constexpr int64_t kOffsetUnit = 64;   // layout.ALIGNMENT
constexpr int64_t kMaxCohorts = 256;  // layout.MAX_COHORTS

// What is done with active entries: AdamW, with or without the running maximum, or with one second moment a row; or
// adding a given update to them.
enum class Mode : uint8_t { kAdamw, kAmsgrad, kByRow, kAdd };

// One parameter. Sections of the state are offsets into it in units of kOffsetUnit bytes, 0 where absent; the step
// counts (int32) lie at its start, then the ticket of the CUDA kernel, which is 0 between launches. A compact gradient
// holds the active entries alone, in the order of the state. For Mode::kAdd the gradient is the update, compact. A
// dense parameter with one second moment a row is a task of kRows without an index: all rows.
struct Task {
  void* param;
  const void* grad;
  char* state;
  void* update;   // where new - old of each active entry goes, in the order of the state; null: the entries themselves
  int64_t numel;  // of the parameter
  int64_t inner;  // elements a row; for kColumns the number of columns; for kElements of active entries
  int32_t units;  // active rows or columns
  uint32_t index, ranks, gain, cohort, exp_avg, exp_avg_sq, max_exp_avg_sq, master;
  uint32_t seed;
  int16_t cohorts;
  Kind kind;
  Scope scope;
  bool compact_grad;
  bool by_row;  // one second moment an active row

  template <typename T>
  SPARSE_CL_HD T* at(uint32_t offset) const {
    return offset ? reinterpret_cast<T*>(state + offset * kOffsetUnit) : nullptr;
  }
  SPARSE_CL_HD int64_t entries() const {  // active ones
    if (kind == Kind::kRows) return units * inner;
    if (kind == Kind::kColumns) return numel / inner * units;
    return kind == Kind::kElements ? inner : kind == Kind::kTwoFour ? numel / 2 : numel;
  }
  SPARSE_CL_HD int32_t* steps() const { return reinterpret_cast<int32_t*>(state); }
  SPARSE_CL_HD uint32_t* ticket() const { return reinterpret_cast<uint32_t*>(state) + cohorts; }
};

}  // namespace sparse_cl
