// What a CUDA thread does with the entries of a task: finds them, steps them, some at a time. No torch.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "blocks.cuh"
#include "masked_adamw.h"

namespace sparse_cl {

constexpr int kUnroll = 4;  // entries that a thread has in flight where wide accesses are impossible

// Rates of the entries that share a step count, before their gain.
template <typename T>
struct Cohort {
  T step_size, rsqrt_correction;
  int32_t step;
};

// Entries of a wide access: 16 bytes of the state, so that a warp's accesses to it are contiguous, and as many weights.
template <typename P>
constexpr int kWide = 16 / sizeof(typename Storage<P>::acc);

struct Spot {
  int64_t position;  // in the parameter
  int32_t unit;      // active row or column
};

// Where the entries from `start` of a state lie, for all kinds but kElements.
class Places {
 public:
  __device__ Places(const Task& task, int64_t start)
      : kind_(task.kind),
        index_(task.at<const int32_t>(task.index)),
        start_(start),
        inner_(task.inner),
        rows_(start, kind_ == Kind::kRows      ? task.inner
                     : kind_ == Kind::kColumns ? task.units
                                               : 1) {}

  __device__ Spot operator()(uint32_t offset) const {
    const int64_t entry = start_ + offset;
    if (kind_ == Kind::kDense) return {entry, 0};
    if (kind_ == Kind::kTwoFour) {
      const int group = static_cast<int>(entry / 2 % 8) * 4;
      const uint32_t four = static_cast<uint32_t>(load(index_ + entry / 16).x[0]) >> group & 15u;
      const int within = entry % 2 ? 31 - __clz(static_cast<int>(four)) : __ffs(static_cast<int>(four)) - 1;
      return {entry / 16 * 32 + group + within, 0};
    }
    int64_t row, column;
    rows_.at(offset, row, column);
    if (kind_ == Kind::kRows) {
      const int64_t place = index_ ? load(index_ + row).x[0] : row;
      return {place * inner_ + column, static_cast<int32_t>(row)};
    }
    return {row * inner_ + load(index_ + column).x[0], static_cast<int32_t>(column)};
  }

 private:
  const Kind kind_;
  const int32_t* const index_;
  const int64_t start_, inner_;
  const Rows rows_;
};

// Steps entries of one task.
template <typename P, typename G, Mode kMode>
class Stepper {
  using T = typename Storage<P>::acc;
  static constexpr bool kByRow = kMode == Mode::kByRow, kMoments = kMode != Mode::kAdd, kMax = kMode == Mode::kAmsgrad;

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
        update_(static_cast<T*>(task.update)),
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
    const bool whole = task.kind == Kind::kDense || (task.kind == Kind::kRows && task.inner % kN == 0);
    return whole && task.scope != Scope::kPerEntry && aligned(task.param, alignof(Pack<P, kN>)) &&
           aligned(task.grad, alignof(Pack<G, kN>)) && aligned(task.state, alignof(Pack<T, kN>)) &&
           aligned(task.update, alignof(Pack<T, kN>));
  }

  // kWide entries of one unit, consecutive in the state and in the parameter.
  __device__ void step_wide(int64_t entry, const Spot& spot) const {
    constexpr int kN = kWide<P>;
    Pack<T, kN> old, exp_avg{}, exp_avg_sq{}, max_exp_avg_sq{}, next;
    Pack<P, kN> param{};
    if (master_)
      old = load<kN>(master_ + entry);
    else
      param = load<kN>(param_ + spot.position);
    const Pack<G, kN> grad = load<kN>(grad_ + (compact_grad_ ? entry : spot.position));
    if constexpr (kMoments) {
      exp_avg = load<kN>(exp_avg_ + entry);
      if constexpr (!kByRow) exp_avg_sq = load<kN>(exp_avg_sq_ + entry);
    }
    if constexpr (kByRow) {
      const T second = load(exp_avg_sq_ + spot.unit).x[0];
#pragma unroll
      for (int k = 0; k < kN; ++k) exp_avg_sq.x[k] = second;
    }
    if constexpr (kMax) max_exp_avg_sq = load<kN>(max_exp_avg_sq_ + entry);
    const Cohort<T> cohort = cohorts_[cohort_of(entry, spot.unit)];
    const T gain = gain_of(spot.unit);
#pragma unroll
    for (int k = 0; k < kN; ++k) {
      if (!master_) old.x[k] = Storage<P>::load(param.x[k]);
      next.x[k] = after(old.x[k], grad.x[k], exp_avg.x[k], exp_avg_sq.x[k], max_exp_avg_sq.x[k], gain, cohort);
      if (update_)
        next.x[k] -= old.x[k];
      else
        param.x[k] = stored(next.x[k], cohort.step, entry + k);
    }
    if constexpr (kMoments) {
      store(exp_avg_ + entry, exp_avg);
      if constexpr (!kByRow) store(exp_avg_sq_ + entry, exp_avg_sq);
    }
    if constexpr (kMax) store(max_exp_avg_sq_ + entry, max_exp_avg_sq);
    if (update_ || master_) store((update_ ? update_ : master_) + entry, next);
    if (!update_) store(param_ + spot.position, param);
  }

  // Up to kUnroll entries, `stride` apart in the state; spot_of(k) says where entry k of `count` lies.
  template <typename SpotOf>
  __device__ void step_gathered(int64_t entry, int stride, int count, SpotOf spot_of) const {
    int64_t position[kUnroll];
    T gain[kUnroll];
    int cohort[kUnroll], unit[kUnroll]{};
#pragma unroll
    for (int k = 0; k < kUnroll; ++k)
      if (k < count) {
        const Spot spot = spot_of(k);
        position[k] = spot.position;
        gain[k] = gain_of(spot.unit);
        unit[k] = spot.unit;
        cohort[k] = cohort_of(entry + k * stride, spot.unit);
      }
    G grad[kUnroll];
    T old[kUnroll], exp_avg[kUnroll]{}, exp_avg_sq[kUnroll]{}, max_exp_avg_sq[kUnroll]{};
#pragma unroll
    for (int k = 0; k < kUnroll; ++k)
      if (k < count) {
        const int64_t at = entry + k * stride;
        old[k] = master_ ? load(master_ + at).x[0] : Storage<P>::load(load(param_ + position[k]).x[0]);
        grad[k] = load(grad_ + (compact_grad_ ? at : position[k])).x[0];
        if constexpr (kMoments) {
          exp_avg[k] = load(exp_avg_ + at).x[0];
          exp_avg_sq[k] = load(exp_avg_sq_ + (kByRow ? unit[k] : at)).x[0];
        }
        if constexpr (kMax) max_exp_avg_sq[k] = load(max_exp_avg_sq_ + at).x[0];
      }
#pragma unroll
    for (int k = 0; k < kUnroll; ++k)
      if (k < count) {
        const int64_t at = entry + k * stride;
        const Cohort<T> own = cohorts_[cohort[k]];
        const T next = after(old[k], grad[k], exp_avg[k], exp_avg_sq[k], max_exp_avg_sq[k], gain[k], own);
        if constexpr (kMoments) {
          store(exp_avg_ + at, Pack<T, 1>{exp_avg[k]});
          if constexpr (!kByRow) store(exp_avg_sq_ + at, Pack<T, 1>{exp_avg_sq[k]});
        }
        if constexpr (kMax) store(max_exp_avg_sq_ + at, Pack<T, 1>{max_exp_avg_sq[k]});
        if (update_) {
          store(update_ + at, Pack<T, 1>{next - old[k]});
        } else {
          if (master_) store(master_ + at, Pack<T, 1>{next});
          store(param_ + position[k], Pack<P, 1>{stored(next, own.step, at)});
        }
      }
  }

 private:
  __device__ T gain_of(int32_t unit) const { return gain_ ? static_cast<T>(load(gain_ + unit).x[0]) : T(1); }

  __device__ int cohort_of(int64_t entry, int32_t unit) const {
    return scope_ == Scope::kShared ? 0 : load(cohort_ + (scope_ == Scope::kPerUnit ? unit : entry)).x[0];
  }

  // What `old` becomes.
  __device__ __forceinline__ T after(T old, G grad, T& exp_avg, T& exp_avg_sq, T& max_exp_avg_sq, T gain,
                                     const Cohort<T>& cohort) const {
    const T g = static_cast<T>(Storage<G>::load(grad));
    if constexpr (!kMoments) return old + g;
    const Rates<T> rates{T(1) - gain * shrink_, gain * cohort.step_size, cohort.rsqrt_correction};
    if constexpr (kByRow) {
      average(exp_avg, grad_factor_ * g, hyper_);
      return descend(old, exp_avg, exp_avg_sq, hyper_, rates);
    }
    return adamw<T, kMax>(old, grad_factor_ * g, exp_avg, exp_avg_sq, max_exp_avg_sq, hyper_, rates);
  }

  __device__ __forceinline__ P stored(T value, int32_t step, int64_t entry) const {
    if (!Storage<P>::kNarrow || master_) return Storage<P>::store(value);
    const uint32_t key = random_key(seed_, step, static_cast<uint32_t>(entry >> 32));
    return Storage<P>::store_stochastic(value, random_bits(key, static_cast<uint32_t>(entry)));
  }

  const Hyper<T>& hyper_;
  const Cohort<T>* cohorts_;
  P* param_;
  const G* grad_;
  T *exp_avg_, *exp_avg_sq_, *max_exp_avg_sq_, *master_, *update_;
  const float* gain_;
  const uint8_t* cohort_;
  Scope scope_;
  bool compact_grad_;
  uint32_t seed_;
  T shrink_, grad_factor_;
};

}  // namespace sparse_cl
