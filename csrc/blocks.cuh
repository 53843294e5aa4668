// How CUDA kernels share many parameters out to blocks and read them. No torch.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace sparse_cl {

#ifndef SPARSE_CL_CUDA_THREADS
#define SPARSE_CL_CUDA_THREADS 256
#endif
#ifndef SPARSE_CL_NOTE_ACCESS  // tests/cuda_emulation counts bytes by it
#define SPARSE_CL_NOTE_ACCESS(address, bytes, written)
#endif
constexpr int kThreads = SPARSE_CL_CUDA_THREADS;
constexpr int kWarps = kThreads / 32;

// The last of `tasks` whose first chunk is not after this block.
__device__ inline int task_of_block(const uint32_t* first_chunk, int tasks) {
  int low = 0, high = tasks - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (first_chunk[middle] <= blockIdx.x)
      low = middle;
    else
      high = middle - 1;
  }
  return low;
}

template <typename S, int N>
struct alignas(N * sizeof(S) < 16 ? N * sizeof(S) : 16) Pack {
  S x[N];
};

template <int N = 1, typename S>
__device__ __forceinline__ Pack<S, N> load(const S* from) {
  SPARSE_CL_NOTE_ACCESS(from, N * sizeof(S), false);
  return *reinterpret_cast<const Pack<S, N>*>(from);
}

template <int N, typename S>
__device__ __forceinline__ void store(S* to, const Pack<S, N>& pack) {
  SPARSE_CL_NOTE_ACCESS(to, N * sizeof(S), true);
  *reinterpret_cast<Pack<S, N>*>(to) = pack;
}

// Divides offsets from `start` into rows of `inner`; 32-bit arithmetic past the first row.
class Rows {
 public:
  __device__ Rows(int64_t start, int64_t inner) : row_(start / inner), column_(start % inner), inner_(inner) {}

  __device__ void at(uint32_t offset, int64_t& row, int64_t& column) const {
    const int64_t rest = inner_ - column_;
    row = row_;
    column = column_ + offset;
    if (offset >= rest) {  // so inner fits 32 bits, or the quotient is 0
      const uint32_t past = offset - static_cast<uint32_t>(rest);
      const uint32_t inner = inner_ > UINT32_MAX ? UINT32_MAX : static_cast<uint32_t>(inner_);
      row += 1 + past / inner;
      column = past % inner;
    }
  }

 private:
  int64_t row_, column_, inner_;
};

}  // namespace sparse_cl
