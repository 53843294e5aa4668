// The CUDA kernels of active_norm and scale_active_: one launch takes many gradients. No torch.
//
// A block takes one chunk of the slots of one task.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <climits>
#include <vector>

#include "blocks.cuh"
#include "clip_grad.h"

namespace sparse_cl {

// What fits the kernel argument: 32764 bytes, before CUDA 12.1 4096.
#if CUDART_VERSION >= 12010
constexpr int kMaxClipTasks = 512;
#else
constexpr int kMaxClipTasks = 80;
#endif
constexpr int kClipUnroll = 4;  // accesses that a thread has in flight
constexpr size_t kSumBytes = kWarps * sizeof(double);

struct ClipLaunch {
  double* sums;        // of active_norm: one sum of squares a block
  const void* factor;  // of scale_active_
  bool float64_factor;
  int32_t tasks;
  uint32_t span;  // slots of a chunk; a multiple of 32
  uint32_t first_chunk[kMaxClipTasks + 1];
  ClipTask task[kMaxClipTasks];
};
static_assert(sizeof(ClipLaunch) <= (CUDART_VERSION >= 12010 ? 32764 : 4096), "kernel argument too large");

struct NormLaunch {
  const double* sums;
  int64_t count;
  void* norm;
  bool float64;
};

// The sum of `x` over the block, in an order that is always the same; valid in thread 0.
__device__ inline double block_sum(double x) {
  extern __shared__ __align__(16) unsigned char shared_memory[];
  double* sums = reinterpret_cast<double*>(shared_memory);
#pragma unroll
  for (int bits = 16; bits; bits /= 2) x += __shfl_xor_sync(0xFFFFFFFFu, x, bits);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = x;
  __syncthreads();
  double sum = 0;
  if (threadIdx.x == 0)
    for (int warp = 0; warp < kWarps; ++warp) sum += sums[warp];
  return sum;
}

// Where a slot lies, and which of the entries from there are active: bit k for the k-th.
template <typename G>
struct ClipSpot {
  G* at;
  uint32_t active;
};

template <typename G>
class SquareSum {
  using T = typename Storage<G>::acc;

 public:
  template <int N>
  __device__ void operator()(G*, const Pack<G, N>& pack, uint32_t active) {
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const T x = Storage<G>::load(pack.x[k]);
      lanes_[k] += active >> k & 1 ? x * x : T(0);
    }
  }
  __device__ double total() const {
    double sum = 0;
#pragma unroll
    for (T lane : lanes_) sum += lane;
    return sum;
  }

 private:
  T lanes_[16 / sizeof(G)]{};
};

template <typename G>
class Scale {
  using T = typename Storage<G>::acc;

 public:
  __device__ explicit Scale(T factor) : factor_(factor) {}

  template <int N>
  __device__ void operator()(G* at, Pack<G, N>& pack, uint32_t active) const {
#pragma unroll
    for (int k = 0; k < N; ++k)
      if (active >> k & 1) pack.x[k] = Storage<G>::store(Storage<G>::load(pack.x[k]) * factor_);
    store<N>(at, pack);
  }

 private:
  T factor_;
};

// Hands the slots from `begin` to `end` to `visit`, N at a time.
template <int N, typename G, typename Visit, typename SpotOf>
__device__ __forceinline__ void walk_by(Visit& visit, uint32_t begin, uint32_t end, SpotOf spot_of) {
  for (uint32_t i = begin + threadIdx.x * N; i < end; i += kThreads * N * kClipUnroll) {
    Pack<G, N> pack[kClipUnroll];
    ClipSpot<G> spot[kClipUnroll];
#pragma unroll
    for (int u = 0; u < kClipUnroll; ++u) {
      const uint32_t slot = i + u * kThreads * N;
      spot[u] = slot < end ? spot_of(slot) : ClipSpot<G>{nullptr, 0};
      spot[u].active &= (1u << N) - 1;
    }
#pragma unroll
    for (int u = 0; u < kClipUnroll; ++u)
      if (spot[u].active) pack[u] = load<N>(spot[u].at);
#pragma unroll
    for (int u = 0; u < kClipUnroll; ++u)
      if (spot[u].active) visit(spot[u].at, pack[u], spot[u].active);
  }
}

// The same by 16-byte accesses where `wide`.
template <typename G, typename Visit, typename SpotOf>
__device__ __forceinline__ void walk_slots(Visit& visit, bool wide, uint32_t count, SpotOf spot_of) {
  constexpr int kN = 16 / sizeof(G);
  const uint32_t whole = wide ? count / kN * kN : 0;
  walk_by<kN, G>(visit, 0, whole, spot_of);
  walk_by<1, G>(visit, whole, count, spot_of);
}

// Hands the chunk of this block to `visit`.
template <typename G, typename Visit>
__device__ __forceinline__ void walk_chunk(const ClipLaunch& launch, Visit& visit) {
  const int number = task_of_block(launch.first_chunk, launch.tasks);
  const ClipTask& task = launch.task[number];
  const int64_t start = static_cast<int64_t>(blockIdx.x - launch.first_chunk[number]) * launch.span;
  const int64_t rest = task.slots - start;
  const uint32_t count = rest < launch.span ? static_cast<uint32_t>(rest) : launch.span;
  G* grad = static_cast<G*>(task.grad);
  const int32_t* index = task.index;
  const bool aligned = reinterpret_cast<uintptr_t>(grad) % 16 == 0;

  switch (task.walk) {
    case Walk::kAll:
      walk_slots<G>(visit, aligned, count, [&](uint32_t i) { return ClipSpot<G>{grad + start + i, ~0u}; });
      break;
    case Walk::kRows: {
      const Rows rows(start, task.inner);
      const bool wide = aligned && task.inner % (16 / sizeof(G)) == 0;
      walk_slots<G>(visit, wide, count, [&](uint32_t i) {
        int64_t row, column;
        rows.at(i, row, column);
        return ClipSpot<G>{grad + index[row] * task.inner + column, ~0u};
      });
      break;
    }
    case Walk::kColumns: {
      const Rows rows(start, task.units);
      walk_by<1, G>(visit, 0, count, [&](uint32_t i) {
        int64_t row, unit;
        rows.at(i, row, unit);
        return ClipSpot<G>{grad + row * task.inner + index[unit], ~0u};
      });
      break;
    }
    case Walk::kBits:
      walk_slots<G>(visit, aligned, count, [&](uint32_t i) {
        const int64_t entry = start + i;
        return ClipSpot<G>{grad + entry, static_cast<uint32_t>(index[entry / 32]) >> entry % 32};
      });
      break;
  }
}

template <typename G>
__global__ void __launch_bounds__(kThreads) active_norm_kernel(const ClipLaunch __grid_constant__ launch) {
  SquareSum<G> squares;
  walk_chunk<G>(launch, squares);
  const double sum = block_sum(squares.total());
  if (threadIdx.x == 0) launch.sums[blockIdx.x] = sum;
}

// One block.
__global__ void __launch_bounds__(kThreads) norm_kernel(const NormLaunch __grid_constant__ launch) {
  double sum = 0;
#pragma unroll 8
  for (int64_t i = threadIdx.x; i < launch.count; i += kThreads) sum += launch.sums[i];
  sum = block_sum(sum);
  if (threadIdx.x != 0) return;
  if (launch.float64)
    *static_cast<double*>(launch.norm) = sqrt(sum);
  else
    *static_cast<float*>(launch.norm) = static_cast<float>(sqrt(sum));
}

template <typename G>
__global__ void __launch_bounds__(kThreads) scale_active_kernel(const ClipLaunch __grid_constant__ launch) {
  using T = typename Storage<G>::acc;
  const T factor = launch.float64_factor ? static_cast<T>(*static_cast<const double*>(launch.factor))
                                         : static_cast<T>(*static_cast<const float*>(launch.factor));
  if (factor == T(1)) return;
  Scale<G> scale(factor);
  walk_chunk<G>(launch, scale);
}

// Slots of a chunk: a few thousand blocks balance the load; past that, larger ones spend less on their start.
inline uint32_t clip_span(const std::vector<ClipTask>& tasks) {
  int64_t total = 0;
  for (const ClipTask& task : tasks) total += task.slots;
  uint32_t span = 4096;
  while (span < 65536 && int64_t{span} * 4096 < total) span *= 2;
  return span;
}

// Blocks that all launches for the tasks have together.
inline int64_t chunks_of(const std::vector<ClipTask>& tasks) {
  const int64_t span = clip_span(tasks);
  int64_t chunks = 0;
  for (const ClipTask& task : tasks) chunks += (task.slots + span - 1) / span;
  return chunks;
}

// Fills `launch` once for each kMaxClipTasks of the tasks and calls run(blocks).
template <typename Run>
void plan_clip_launches(const std::vector<ClipTask>& tasks, ClipLaunch& launch, Run&& run) {
  launch.span = clip_span(tasks);
  launch.tasks = 0;
  launch.first_chunk[0] = 0;
  auto flush = [&] {
    if (launch.tasks) run(launch.first_chunk[launch.tasks]);
    launch.tasks = 0;
  };
  for (const ClipTask& task : tasks) {
    const int64_t chunks = (task.slots + launch.span - 1) / launch.span;
    if (launch.tasks == kMaxClipTasks || launch.first_chunk[launch.tasks] + chunks > INT_MAX) flush();
    launch.task[launch.tasks++] = task;
    launch.first_chunk[launch.tasks] = launch.first_chunk[launch.tasks - 1] + static_cast<uint32_t>(chunks);
  }
  flush();
}

}  // namespace sparse_cl
