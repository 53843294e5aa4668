// The CUDA kernel of masked_adamw_: one launch steps many parameters. No torch.
//
// A block takes one chunk of one task. A chunk is a range of the compact state, or of weights for element masks, whose
// active entries have no direct address.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <climits>
#include <vector>

#include "blocks.cuh"
#include "masked_adamw.h"

namespace sparse_cl {

constexpr int kMaxCohorts = 256;
constexpr int kSegment = 2048;  // weights whose active positions a warp lists at a time: 64 a lane
constexpr int kUnroll = 4;      // entries that a thread has in flight where wide accesses are impossible

// What fits the kernel argument: 32764 bytes, before CUDA 12.1 4096.
#if CUDART_VERSION >= 12010
constexpr int kMaxTasks = 320;
#else
constexpr int kMaxTasks = 36;
#endif

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

// Rates of the entries that share a step count, before their gain.
template <typename T>
struct Cohort {
  T step_size, rsqrt_correction;
  int32_t step;
};

template <typename T>
constexpr size_t shared_bytes(bool elements) {
  return kMaxCohorts * sizeof(Cohort<T>) + (elements ? kWarps * kSegment * sizeof(uint16_t) : 0);
}

// Elements of a 16-byte access to the parameter.
template <typename P>
constexpr int kWide = 16 / sizeof(P);

struct Spot {
  int64_t position;  // in the parameter
  int32_t unit;      // active row or column
};

// Steps entries of one task.
template <typename P, typename G>
class Stepper {
  using T = typename Storage<P>::acc;

 public:
  __device__ Stepper(const Task& task, const Hyper<T>& hyper, const Cohort<T>* cohorts, double lr, T grad_factor)
      : hyper_(hyper),
        cohorts_(cohorts),
        param_(static_cast<P*>(task.param)),
        grad_(static_cast<const G*>(task.grad)),
        exp_avg_(task.at<T>(task.exp_avg)),
        exp_avg_sq_(task.at<T>(task.exp_avg_sq)),
        max_exp_avg_sq_(task.at<T>(task.max_exp_avg_sq)),
        master_(task.at<T>(task.master)),
        gain_(task.at<const float>(task.gain)),
        cohort_(task.at<const uint8_t>(task.cohort)),
        scope_(task.scope),
        compact_grad_(task.compact_grad),
        seed_(task.seed),
        shrink_(static_cast<T>(lr * hyper.weight_decay)),
        grad_factor_(grad_factor) {}

  // Whether entries of this task may be stepped kWide at a time.
  static __device__ bool is_wide(const Task& task) {
    auto aligned = [](const void* p, size_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; };
    constexpr int kN = kWide<P>;
    return task.scope != Scope::kPerEntry && (task.kind == Kind::kDense || task.inner % kN == 0) &&
           aligned(task.param, alignof(Pack<P, kN>)) && aligned(task.grad, alignof(Pack<G, kN>)) &&
           aligned(task.state, alignof(Pack<T, kN>));
  }

  // kWide entries of one unit, consecutive in the state and in the parameter.
  __device__ void step_wide(int64_t entry, const Spot& spot) const {
    constexpr int kN = kWide<P>;
    Pack<P, kN> param{};
    Pack<T, kN> max_exp_avg_sq{}, master{};
    if (master_)
      master = load<kN>(master_ + entry);
    else
      param = load<kN>(param_ + spot.position);
    const Pack<G, kN> grad = load<kN>(grad_ + (compact_grad_ ? entry : spot.position));
    Pack<T, kN> exp_avg = load<kN>(exp_avg_ + entry), exp_avg_sq = load<kN>(exp_avg_sq_ + entry);
    if (max_exp_avg_sq_) max_exp_avg_sq = load<kN>(max_exp_avg_sq_ + entry);
    const T gain = gain_of(spot.unit);
    const Cohort<T> cohort = cohorts_[cohort_of(entry, spot.unit)];
#pragma unroll
    for (int k = 0; k < kN; ++k)
      param.x[k] = step(param.x[k], grad.x[k], exp_avg.x[k], exp_avg_sq.x[k], max_exp_avg_sq.x[k], master.x[k], gain,
                        cohort, entry + k);
    store<kN>(param_ + spot.position, param);
    store<kN>(exp_avg_ + entry, exp_avg);
    store<kN>(exp_avg_sq_ + entry, exp_avg_sq);
    if (max_exp_avg_sq_) store<kN>(max_exp_avg_sq_ + entry, max_exp_avg_sq);
    if (master_) store<kN>(master_ + entry, master);
  }

  // Up to kUnroll entries, `stride` apart in the state; spot_of(k) says where entry k of `count` lies.
  template <typename SpotOf>
  __device__ void step_gathered(int64_t entry, int stride, int count, SpotOf spot_of) const {
    int64_t position[kUnroll];
    T gain[kUnroll];
    int cohort[kUnroll];
#pragma unroll
    for (int k = 0; k < kUnroll; ++k)
      if (k < count) {
        const Spot spot = spot_of(k);
        position[k] = spot.position;
        gain[k] = gain_of(spot.unit);
        cohort[k] = cohort_of(entry + k * stride, spot.unit);
      }
    P param[kUnroll]{};
    G grad[kUnroll];
    T exp_avg[kUnroll], exp_avg_sq[kUnroll], max_exp_avg_sq[kUnroll]{}, master[kUnroll]{};
#pragma unroll
    for (int k = 0; k < kUnroll; ++k)
      if (k < count) {
        const int64_t at = entry + k * stride;
        if (master_)
          master[k] = master_[at];
        else
          param[k] = param_[position[k]];
        grad[k] = grad_[compact_grad_ ? at : position[k]];
        exp_avg[k] = exp_avg_[at];
        exp_avg_sq[k] = exp_avg_sq_[at];
        if (max_exp_avg_sq_) max_exp_avg_sq[k] = max_exp_avg_sq_[at];
      }
#pragma unroll
    for (int k = 0; k < kUnroll; ++k)
      if (k < count) {
        const int64_t at = entry + k * stride;
        param_[position[k]] = step(param[k], grad[k], exp_avg[k], exp_avg_sq[k], max_exp_avg_sq[k], master[k], gain[k],
                                   cohorts_[cohort[k]], at);
        exp_avg_[at] = exp_avg[k];
        exp_avg_sq_[at] = exp_avg_sq[k];
        if (max_exp_avg_sq_) max_exp_avg_sq_[at] = max_exp_avg_sq[k];
        if (master_) master_[at] = master[k];
      }
  }

 private:
  __device__ T gain_of(int32_t unit) const { return gain_ ? static_cast<T>(gain_[unit]) : T(1); }

  __device__ int cohort_of(int64_t entry, int32_t unit) const {
    return scope_ == Scope::kShared ? 0 : cohort_[scope_ == Scope::kPerUnit ? unit : entry];
  }

  __device__ __forceinline__ P step(P param, G grad, T& exp_avg, T& exp_avg_sq, T& max_exp_avg_sq, T& master, T gain,
                                    const Cohort<T>& cohort, int64_t entry) const {
    const T g = grad_factor_ * static_cast<T>(Storage<G>::load(grad));
    const T old = master_ ? master : Storage<P>::load(param);
    const Rates<T> rates{T(1) - gain * shrink_, gain * cohort.step_size, cohort.rsqrt_correction};
    const T next = max_exp_avg_sq_ ? adamw<T, true>(old, g, exp_avg, exp_avg_sq, max_exp_avg_sq, hyper_, rates)
                                   : adamw<T, false>(old, g, exp_avg, exp_avg_sq, max_exp_avg_sq, hyper_, rates);
    master = next;
    if (!Storage<P>::kNarrow || master_) return Storage<P>::store(next);
    const uint32_t key = random_key(seed_, cohort.step, static_cast<uint32_t>(entry >> 32));
    return Storage<P>::store_stochastic(next, random_bits(key, static_cast<uint32_t>(entry)));
  }

  const Hyper<T>& hyper_;
  const Cohort<T>* cohorts_;
  P* param_;
  const G* grad_;
  T *exp_avg_, *exp_avg_sq_, *max_exp_avg_sq_, *master_;
  const float* gain_;
  const uint8_t* cohort_;
  Scope scope_;
  bool compact_grad_;
  uint32_t seed_;
  T shrink_, grad_factor_;
};

// The `count` entries from `start`, each where spot_of(offset from start) says.
template <typename P, typename G, typename SpotOf>
__device__ void step_gathered_range(const Stepper<P, G>& stepper, int64_t start, uint32_t count, SpotOf spot_of) {
  for (uint32_t i = threadIdx.x; i < count; i += kThreads * kUnroll)
    stepper.step_gathered(start + i, kThreads, (count - i + kThreads - 1) / kThreads,
                          [&](int k) { return spot_of(i + k * kThreads); });
}

// As step_gathered_range, for entries that lie as in the state within each unit.
template <typename P, typename G, typename SpotOf>
__device__ void step_range(const Stepper<P, G>& stepper, bool wide, int64_t start, uint32_t count, SpotOf spot_of) {
  constexpr int kN = kWide<P>;
  const uint32_t whole = wide ? count / kN * kN : 0;
  for (uint32_t i = threadIdx.x * kN; i < whole; i += kThreads * kN) stepper.step_wide(start + i, spot_of(i));
  step_gathered_range(stepper, start + whole, count - whole, [&](uint32_t i) { return spot_of(whole + i); });
}

// The active entries of the `count` weights from `start`, a multiple of kSegment. Warps work on their own, so that none
// waits for another's loads.
template <typename P, typename G>
__device__ void step_elements(const Stepper<P, G>& stepper, const Task& task, uint16_t* lists, int64_t start,
                              uint32_t count) {
  const uint32_t* bits = task.at<const uint32_t>(task.index);
  const int32_t* ranks = task.at<const int32_t>(task.ranks);
  const int64_t words = (task.numel + 31) / 32;
  const int lane = threadIdx.x % 32;
  uint16_t* list = lists + threadIdx.x / 32 * kSegment;
  for (uint32_t offset = threadIdx.x / 32 * kSegment; offset < count; offset += kWarps * kSegment) {
    const int64_t base = start + offset;
    const int64_t word = base / 32 + 2 * lane;
    const int64_t first = ranks[base / kBlock];
    const uint32_t low = word < words ? bits[word] : 0, high = word + 1 < words ? bits[word + 1] : 0;
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
    // In the order of the state, so that its accesses coalesce and those to the weights ascend.
    for (int i = lane; i < total; i += 32 * kUnroll)
      stepper.step_gathered(first + i, 32, (total - i + 31) / 32,
                            [&](int k) { return Spot{base + list[i + 32 * k], 0}; });
    __syncwarp();
  }
}

template <typename P, typename G>
__global__ void __launch_bounds__(kThreads, 2)
    masked_adamw_kernel(const Launch<typename Storage<P>::acc> __grid_constant__ launch) {
  using T = typename Storage<P>::acc;
  extern __shared__ __align__(16) unsigned char shared_memory[];
  Cohort<T>* cohorts = reinterpret_cast<Cohort<T>*>(shared_memory);
  uint16_t* lists = reinterpret_cast<uint16_t*>(cohorts + kMaxCohorts);

  if (launch.found_inf && *launch.found_inf != 0) return;

  const int number = task_of_block(launch.first_chunk, launch.tasks);
  const Work& work = launch.work[number];
  const Task& task = work.task;
  const uint32_t chunk = blockIdx.x - launch.first_chunk[number];
  const uint32_t last_chunk = launch.first_chunk[number + 1] - launch.first_chunk[number] - 1;

  const double lr = launch.lr ? *launch.lr : launch.hyper.lr;
  for (int c = threadIdx.x; c < task.cohorts; c += kThreads) {
    const int32_t step = task.steps()[c] + 1;
    const Rates<T> r = rates<T>(launch.hyper, lr, step, T(1));
    cohorts[c] = {r.step_size, r.rsqrt_correction, step};
  }
  __syncthreads();
  // The block that is the last to have read the counts may advance them. The ticket is back at 0 then, and its answer
  // is not waited for before the end.
  uint32_t readers = 0;
  if (threadIdx.x == 0) {
    __threadfence();
    readers = atomicInc(task.ticket(), last_chunk);
  }

  T grad_factor = launch.maximize ? T(-1) : T(1);
  if (launch.grad_scale) grad_factor /= static_cast<T>(*launch.grad_scale);
  const Stepper<P, G> stepper(task, launch.hyper, cohorts, lr, grad_factor);
  const int64_t start = static_cast<int64_t>(chunk) * work.span;
  const uint32_t count = chunk == last_chunk ? work.tail : work.span;
  const int32_t* index = task.at<const int32_t>(task.index);

  switch (task.kind) {
    case Kind::kDense:
      step_range(stepper, Stepper<P, G>::is_wide(task), start, count, [&](uint32_t i) { return Spot{start + i, 0}; });
      break;
    case Kind::kRows: {
      const Rows rows(start, task.inner);
      step_range(stepper, Stepper<P, G>::is_wide(task), start, count, [&](uint32_t i) {
        int64_t row, column;
        rows.at(i, row, column);
        return Spot{index[row] * task.inner + column, static_cast<int32_t>(row)};
      });
      break;
    }
    case Kind::kColumns: {
      const Rows rows(start, task.units);
      step_gathered_range(stepper, start, count, [&](uint32_t i) {
        int64_t row, column;
        rows.at(i, row, column);
        return Spot{row * task.inner + index[column], static_cast<int32_t>(column)};
      });
      break;
    }
    case Kind::kElements:
      step_elements(stepper, task, lists, start, count);
      break;
    case Kind::kTwoFour:
      step_gathered_range(stepper, start, count, [&](uint32_t i) {
        const int64_t entry = start + i;
        const int group = static_cast<int>(entry / 2 % 8) * 4;
        const uint32_t four = static_cast<uint32_t>(index[entry / 16]) >> group & 15u;
        const int within = entry % 2 ? 31 - __clz(static_cast<int>(four)) : __ffs(static_cast<int>(four)) - 1;
        return Spot{entry / 16 * 32 + group + within, 0};
      });
      break;
  }

  if (threadIdx.x == 0 && readers == last_chunk) {
    __threadfence();
    for (int c = 0; c < task.cohorts; ++c) task.steps()[c] = cohorts[c].step;
  }
}

inline int64_t entries_of(const Task& task) {
  switch (task.kind) {
    case Kind::kRows:
      return task.units * task.inner;
    case Kind::kColumns:
      return task.numel / task.inner * task.units;
    case Kind::kElements:
      return task.inner;
    case Kind::kTwoFour:
      return task.numel / 2;
    default:
      return task.numel;
  }
}

// Fills `launch` once for each kMaxTasks of the tasks and calls run(blocks, shared memory in bytes).
template <typename T, typename Run>
void plan_launches(const std::vector<Task>& tasks, Launch<T>& launch, Run&& run) {
  int64_t total = 0;
  for (const Task& task : tasks) total += entries_of(task);
  // A few thousand blocks balance the load; past that, larger ones spend less on their start.
  int64_t span = 2048;
  while (span < 16384 && span * 4096 < total) span *= 2;

  bool elements = false;
  launch.tasks = 0;
  launch.first_chunk[0] = 0;
  auto flush = [&] {
    if (launch.tasks) run(launch.first_chunk[launch.tasks], shared_bytes<T>(elements));
    launch.tasks = 0;
    elements = false;
  };
  for (const Task& task : tasks) {
    int64_t length = span, extent = entries_of(task);
    if (task.kind == Kind::kElements) {
      // As many weights as hold `span` active ones on average, in whole rounds of the block's warps.
      constexpr int64_t kRound = kWarps * kSegment;
      length = std::min<int64_t>((span * (task.numel / extent) + kRound - 1) / kRound * kRound, 64 * kRound);
      extent = task.numel;
    }
    const int64_t chunks = (extent + length - 1) / length;
    if (launch.tasks == kMaxTasks || launch.first_chunk[launch.tasks] + chunks > INT_MAX) flush();
    launch.work[launch.tasks] = {task, static_cast<uint32_t>(length),
                                 static_cast<uint32_t>(extent - (chunks - 1) * length)};
    ++launch.tasks;
    launch.first_chunk[launch.tasks] = launch.first_chunk[launch.tasks - 1] + static_cast<uint32_t>(chunks);
    elements = elements || task.kind == Kind::kElements;
  }
  flush();
}

}  // namespace sparse_cl
