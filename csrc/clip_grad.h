// What the CPU and CUDA kernels of active_norm and scale_active_ are told. No torch.
#pragma once

#include <cstdint>

#include "dispatch.h"

namespace sparse_cl {

enum class Walk : uint8_t { kAll, kRows, kColumns, kBits };

// One gradient. Its slots are its active entries in the order of the state; for kBits all entries, each active where
// its bit is set.
struct ClipTask {
  void* grad;
  const int32_t* index;  // active rows or columns, or words of bits
  int64_t slots;
  int64_t inner;  // kRows: entries a row; kColumns: columns
  int32_t units;  // active rows or columns
  Walk walk;
};

}  // namespace sparse_cl
