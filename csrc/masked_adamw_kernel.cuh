// The CUDA kernel of masked_adamw_ and apply_updates_: one launch steps many parameters. No torch.
//
// A block takes one chunk of one task: a range of the compact state.
#pragma once

#include <cuda_runtime.h>

#include <climits>
#include <vector>

#include "masked_adamw_stepper.cuh"

namespace sparse_cl {

constexpr int kSegment = 2 * kBlock;  // weights whose active positions a warp lists at a time: 64 a lane

// A launch copies its whole argument, also for one task: few enough to make that cheap, enough to fill a GPU.
constexpr int kMaxTasks = CUDART_VERSION >= 12010 ? 64 : 32;

struct Work {
  Task task;
  uint32_t span, tail;  // length of a chunk, and of the last one
};

template <typename T>
struct Launch {
  Hyper<T> hyper;
  const float *lr, *grad_scale, *found_inf;  // null where absent
  bool maximize;
  int32_t tasks;
  uint32_t first_chunk[kMaxTasks + 1];
  Work work[kMaxTasks];
};
static_assert(sizeof(Launch<double>) <= (CUDART_VERSION >= 12010 ? 32764 : 4096), "kernel argument too large");

template <typename T>
constexpr size_t shared_bytes(bool elements) {
  return kMaxCohorts * sizeof(Cohort<T>) + (elements ? kWarps * kSegment * sizeof(uint16_t) : 0);
}

// The `count` entries from `start`, for all kinds but kElements.
template <typename P, typename G, Mode kMode>
__device__ void step_placed(const Stepper<P, G, kMode>& stepper, const Task& task, int64_t start, uint32_t count) {
  const Places places(task, start);
  constexpr uint32_t kN = kWide<P>;
  const uint32_t whole = Stepper<P, G, kMode>::is_wide(task) ? count / kN * kN : 0;
  for (uint32_t i = threadIdx.x * kN; i < whole; i += kThreads * kN) stepper.step_wide(start + i, places(i));
  for (uint32_t i = whole + threadIdx.x; i < count; i += kThreads * kUnroll)
    stepper.step_gathered(start + i, kThreads, (count - i + kThreads - 1) / kThreads,
                          [&](int k) { return places(i + k * kThreads); });
}

// The last block of weights from `low` that has no more than `entry` active ones before it: it holds that entry.
__device__ __forceinline__ int64_t block_of(const int64_t* ranks, int64_t low, int64_t blocks, int64_t entry) {
  for (int64_t high = blocks - 1; low < high;) {
    const int64_t middle = low + (high - low + 1) / 2;
    if (load(ranks + middle).x[0] <= entry)
      low = middle;
    else
      high = middle - 1;
  }
  return low;
}

// The `count` entries from `start` of an element mask. Warps work on their own, so that none waits for another's loads,
// and find their weights by rank, so that each has as many entries wherever these lie.
template <typename P, typename G, Mode kMode>
__device__ void step_elements(const Stepper<P, G, kMode>& stepper, const Task& task, uint16_t* lists, int64_t start,
                              uint32_t count) {
  const uint32_t* bits = task.at<const uint32_t>(task.index);
  const int64_t* ranks = task.at<const int64_t>(task.ranks);
  const int64_t words = (task.numel + 31) / 32, blocks = (task.numel + kBlock - 1) / kBlock;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const uint32_t share = (count + kWarps - 1) / kWarps;
  const uint32_t begin = share * warp < count ? share * warp : count;
  int64_t entry = start + begin;
  const int64_t end = start + (begin + share < count ? begin + share : count);
  uint16_t* list = lists + warp * kSegment;
  for (int64_t block = 0; entry < end;) {
    // The next block most often, but past a gap far from it.
    if (block == 0 || load(ranks + block + 1).x[0] <= entry) block = block_of(ranks, block, blocks, entry);
    const int64_t base = block * kBlock, word = base / 32 + 2 * lane;
    const uint32_t low = word < words ? load(bits + word).x[0] : 0;
    const uint32_t high = word + 1 < words ? load(bits + word + 1).x[0] : 0;
    uint64_t active = low | static_cast<uint64_t>(high) << 32;
    const int own = __popcll(active);
    int through = own;  // active entries up to and with this lane's
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const int below = __shfl_up_sync(0xFFFFFFFFu, through, distance);
      if (lane >= distance) through += below;
    }
    const int total = __shfl_sync(0xFFFFFFFFu, through, 31);
    for (int slot = through - own; active; active &= active - 1)
      list[slot++] = static_cast<uint16_t>(64 * lane + __ffsll(static_cast<long long>(active)) - 1);
    __syncwarp();
    const int skipped = static_cast<int>(entry - load(ranks + block).x[0]);
    const int taken = total - skipped < end - entry ? total - skipped : static_cast<int>(end - entry);
    // In the order of the state, so that its accesses coalesce and those to the weights ascend.
    for (int i = lane; i < taken; i += 32 * kUnroll)
      stepper.step_gathered(entry + i, 32, (taken - i + 31) / 32,
                            [&](int k) { return Spot{base + list[skipped + i + 32 * k], 0}; });
    __syncwarp();
    entry += taken;
    block += kSegment / kBlock;
  }
}

template <typename P, typename G, Mode kMode>
__global__ void __launch_bounds__(kThreads, sizeof(typename Storage<P>::acc) == 8 ? 1 : 3)
    masked_adamw_kernel(const Launch<typename Storage<P>::acc> __grid_constant__ launch) {
  using T = typename Storage<P>::acc;
  extern __shared__ __align__(16) unsigned char shared_memory[];
  Cohort<T>* cohorts = reinterpret_cast<Cohort<T>*>(shared_memory);
  uint16_t* lists = reinterpret_cast<uint16_t*>(cohorts + kMaxCohorts);

  const int number = task_of_block(launch.first_chunk, launch.tasks);
  const Work& work = launch.work[number];
  const Task& task = work.task;
  const uint32_t chunk = blockIdx.x - launch.first_chunk[number];
  const uint32_t last_chunk = launch.first_chunk[number + 1] - launch.first_chunk[number] - 1;
  const int64_t start = static_cast<int64_t>(chunk) * work.span;
  const uint32_t count = chunk == last_chunk ? work.tail : work.span;

  if (launch.found_inf && *launch.found_inf != 0) {
    if (task.update)
      for (uint32_t i = threadIdx.x; i < count; i += kThreads) static_cast<T*>(task.update)[start + i] = 0;
    return;
  }

  // An update is added by the counts that the step which made it has advanced.
  constexpr int kAdvance = kMode == Mode::kAdd ? 0 : 1;
  const double lr = launch.lr ? *launch.lr : launch.hyper.lr;
  for (int c = threadIdx.x; c < task.cohorts; c += kThreads) {
    const int32_t step = task.steps()[c] + kAdvance;
    const Rates<T> r = rates<T>(launch.hyper, lr, step, T(1));
    cohorts[c] = {r.step_size, r.rsqrt_correction, step};
  }
  __syncthreads();
  // The last block to read the counts advances them. atomicInc wraps the ticket to 0, and its result is needed only at
  // the end.
  uint32_t readers = 0;
  if (kAdvance && threadIdx.x == 0) {
    __threadfence();
    readers = atomicInc(task.ticket(), last_chunk);
  }

  T grad_factor = launch.maximize ? T(-1) : T(1);
  if (launch.grad_scale) grad_factor /= static_cast<T>(*launch.grad_scale);
  const Stepper<P, G, kMode> stepper(task, launch.hyper, cohorts, lr, grad_factor);
  if (task.kind == Kind::kElements)
    step_elements(stepper, task, lists, start, count);
  else
    step_placed(stepper, task, start, count);

  if (kAdvance && threadIdx.x == 0 && readers == last_chunk) {
    __threadfence();
    for (int c = 0; c < task.cohorts; ++c) task.steps()[c] = cohorts[c].step;
  }
}

// Brings the second moments of rows up to date, a warp for each. A launch's chunks are of rows here.
template <typename P, typename G>
__global__ void __launch_bounds__(kThreads)
    row_moments_kernel(const Launch<typename Storage<P>::acc> __grid_constant__ launch) {
  using T = typename Storage<P>::acc;
  if (launch.found_inf && *launch.found_inf != 0) return;
  const int number = task_of_block(launch.first_chunk, launch.tasks);
  const Task& task = launch.work[number].task;
  const int64_t row = static_cast<int64_t>(blockIdx.x - launch.first_chunk[number]) * kWarps + threadIdx.x / 32;
  if (row >= task.units) return;
  const int32_t* index = task.at<const int32_t>(task.index);
  const int64_t place = task.compact_grad || !index ? row : load(index + row).x[0];
  const G* grad = static_cast<const G*>(task.grad) + place * task.inner;
  T factor = launch.maximize ? T(-1) : T(1);
  if (launch.grad_scale) factor /= static_cast<T>(*launch.grad_scale);
  const T weight = launch.hyper.one_minus_beta2 / static_cast<T>(task.inner);

  constexpr int kN = 16 / sizeof(G);
  T sum = 0;
  auto add = [&](G value) {
    const T g = factor * static_cast<T>(Storage<G>::load(value));
    sum += weight * g * g;  // a square alone may overflow
  };
  const int lane = threadIdx.x % 32;
  const bool wide = reinterpret_cast<uintptr_t>(grad) % 16 == 0;
  const int64_t whole = wide ? task.inner / kN * kN : 0;
  for (int64_t i = lane * kN; i < whole; i += 32 * kN) {
    const Pack<G, kN> pack = load<kN>(grad + i);
#pragma unroll
    for (int k = 0; k < kN; ++k) add(pack.x[k]);
  }
  for (int64_t i = whole + lane; i < task.inner; i += 32) add(load(grad + i).x[0]);
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(0xFFFFFFFFu, sum, distance);
  if (lane == 0) {
    T* second = task.at<T>(task.exp_avg_sq) + row;
    store(second, Pack<T, 1>{launch.hyper.beta2_t * load(second).x[0] + sum});
  }
}

// Fills `launch` once for each kMaxTasks of the tasks and calls run(blocks, shared memory in bytes). Blocks take
// entries, or `rows`.
template <typename T, typename Run>
void plan_launches(const std::vector<Task>& tasks, Launch<T>& launch, bool rows, Run&& run) {
  int64_t total = 0;
  for (const Task& task : tasks) total += task.entries();
  // A few thousand blocks balance the load; past that, larger ones spend less on their start.
  int64_t span = 2048;
  while (span < 16384 && span * 4096 < total) span *= 2;
  if (rows) span = kWarps;

  bool elements = false;
  launch.tasks = 0;
  launch.first_chunk[0] = 0;
  auto flush = [&] {
    if (launch.tasks) run(launch.first_chunk[launch.tasks], shared_bytes<T>(elements));
    launch.tasks = 0;
    elements = false;
  };
  for (const Task& task : tasks) {
    const int64_t entries = rows ? task.units : task.entries(), chunks = (entries + span - 1) / span;
    if (launch.tasks == kMaxTasks || launch.first_chunk[launch.tasks] + chunks > INT_MAX) flush();
    launch.work[launch.tasks] = {task, static_cast<uint32_t>(span),
                                 static_cast<uint32_t>(entries - (chunks - 1) * span)};
    ++launch.tasks;
    launch.first_chunk[launch.tasks] = launch.first_chunk[launch.tasks - 1] + static_cast<uint32_t>(chunks);
    elements = elements || task.kind == Kind::kElements;
  }
  flush();
}

}  // namespace sparse_cl
