// The AdamW step by vectors of kLanes entries. What differs between instruction sets is in lanes_*.h.
#pragma once

#ifdef __AVX512F__
#include "lanes_avx512.h"
#else
#include "lanes_avx2.h"
#endif

#include <algorithm>
#include <type_traits>

#include "masked_adamw.h"

namespace sparse_cl {
namespace {

constexpr int64_t kGatherAhead = 32;  // entries by which prefetch runs ahead: no hardware sees where they lie

inline Ints random_lanes(uint32_t key, uint32_t first) {
  Ints x = (ints(first) + lane_numbers()) ^ ints(key);
  x = (x ^ (x >> 16)) * ints(0x7FEB352D);
  x = (x ^ (x >> 15)) * ints(0x846CA68B);
  return x ^ (x >> 16);
}

// What is stored for x, in the low bits of each 32-bit lane.
template <typename P, bool kStochastic>
inline Ints stored_lanes(Floats x, uint32_t key, uint32_t first) {
  const Ints bits = Ints(x);
  if constexpr (sizeof(P) == 4) {
    return bits;
  } else if constexpr (std::is_same_v<P, Float16>) {
    return float16_lanes(x);
  } else if constexpr (kStochastic) {
    const Mask out = greater(bits & ints(0x7FFFFFFF), ints(0x7F7F0000));
    const Ints rounded = (bits + (random_lanes(key, first) & ints(0xFFFF))) >> 16;
    return any(out) ? select(out, stored_lanes<P, false>(x, key, first), rounded) : rounded;
  } else {
    const Ints nearest = (bits + ints(0x7FFF) + ((bits >> 16) & ints(1))) >> 16;
    return select(is_nan(x), ints(0x7FC0), nearest);
  }
}

// adamw.h's update of entries that share their rates.
struct LaneUpdate {
  Floats beta1, one_minus_beta1, beta2, one_minus_beta2, eps, decay, step_size, rsqrt_correction, factor;
  bool nearer_old;

  LaneUpdate(const Hyper<float>& h, const Rates<float>& r, float grad_factor)
      : beta1(floats(1 - h.one_minus_beta1)),
        one_minus_beta1(floats(h.one_minus_beta1)),
        beta2(floats(h.beta2_t)),
        one_minus_beta2(floats(h.one_minus_beta2)),
        eps(floats(h.eps)),
        decay(floats(r.decay)),
        step_size(floats(r.step_size)),
        rsqrt_correction(floats(r.rsqrt_correction)),
        factor(floats(grad_factor)),
        nearer_old(h.one_minus_beta1 < 0.5f) {}

  // `max` may be null. By row, exp_avg_sq is one number, up to date.
  template <bool kByRow = false>
  Floats operator()(Floats param, Floats grad, float* exp_avg, float* exp_avg_sq, float* max) const {
    grad = grad * factor;
    Floats m = load_lanes(exp_avg);
    const Floats change = grad - m;
    m = nearer_old ? add_product(m, one_minus_beta1, change) : subtract_product(grad, beta1, change);
    store_lanes(exp_avg, m);
    if constexpr (kByRow)
      return subtract_product(param * decay, step_size, adamw_quotient(m, floats(*exp_avg_sq), rsqrt_correction, eps));
    Floats v = load_lanes(exp_avg_sq);
    v = add_product(one_minus_beta2 * grad * grad, beta2, v);
    store_lanes(exp_avg_sq, v);
    if (max) {
      const Floats old = load_lanes(max);
      // Not an instruction for the maximum: a NaN in either operand must win.
      v = Floats(select(less_or_nan(old, v), Ints(v), Ints(old)));
      store_lanes(max, v);
    }
    return subtract_product(param * decay, step_size, adamw_quotient(m, v, rsqrt_correction, eps));
  }
};

template <typename P, bool kMaster>
constexpr bool kHasLanes = sizeof(P) < 8 && (kMaster || sizeof(P) == 4 || std::is_same_v<P, BFloat16>);

// Steps the first entries of a span and returns how many: a multiple of kLanes, or all where lanes round otherwise than
// code of one entry, or bits would depend on where a span ends, and so on how a parameter is split over processes.
template <bool kMaster, bool kByRow, typename P, typename G>
int64_t step_lanes(P* param, const G* grad, float* exp_avg, float* exp_avg_sq, float* max, float* master, int64_t size,
                   const LaneUpdate& update, uint32_t key, uint32_t first) {
  const int64_t whole = size / kLanes * kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) {
    if (kAhead) {
      __builtin_prefetch(exp_avg + i + kAhead, 1);
      if (!kByRow) __builtin_prefetch(exp_avg_sq + i + kAhead, 1);
      __builtin_prefetch(param + i + kAhead, 1);
      __builtin_prefetch(grad + i + kAhead, 0);
      if (kMaster) __builtin_prefetch(master + i + kAhead, 1);
    }
    const Floats old = kMaster ? load_lanes(master + i) : load_lanes(param + i);
    const Floats now = update.template operator()<kByRow>(old, load_lanes(grad + i), exp_avg + i,
                                                          exp_avg_sq + (kByRow ? 0 : i), max ? max + i : nullptr);
    if (kMaster) store_lanes(master + i, now);
    store_lanes(param + i, stored_lanes < P, Storage<P>::kNarrow && !kMaster > (now, key, first + i));
  }
  if (!kEstimates || whole == size) return whole;
  const int64_t rest = size - whole;
  P last[kLanes]{};
  G slope[kLanes]{};
  float m[kLanes]{}, v[kLanes]{}, v_max[kLanes]{}, old[kLanes]{};
  auto each = [&](auto copy) {
    copy(exp_avg, m);
    if (!kByRow) copy(exp_avg_sq, v);
    if (max) copy(max, v_max);
    if (kMaster) copy(master, old);
  };
  std::copy_n(param + whole, rest, last);
  std::copy_n(grad + whole, rest, slope);
  each([=](const float* from, float* to) { std::copy_n(from + whole, rest, to); });
  step_lanes<kMaster, kByRow>(last, slope, m, kByRow ? exp_avg_sq : v, max ? v_max : nullptr, old, kLanes, update, key,
                              static_cast<uint32_t>(first + whole));
  std::copy_n(last, rest, param + whole);
  each([=](float* to, const float* from) { std::copy_n(from, rest, to + whole); });
  return size;
}

// Steps the first entries of `size` at param[position[i]], a multiple of kLanes, and returns how many. Where `next` is
// not 0, entries at position[i] + next follow.
template <bool kMaster, typename P, typename G>
int64_t step_gathered(P* param, const G* grad, const int32_t* position, float* exp_avg, float* exp_avg_sq, float* max,
                      float* master, int64_t size, int64_t next, const LaneUpdate& update, uint32_t key,
                      uint32_t first) {
  const int64_t whole = size / kLanes * kLanes;
  auto place = [=](int64_t k) { return k < size ? position[k] : position[k - size] + next; };
  auto prefetch = [=](int64_t at) {
    __builtin_prefetch(param + at, 1);
    __builtin_prefetch(grad + at, 0);
  };
  for (int64_t i = 0; i < whole; i += kLanes) {
    const int64_t ahead = i + kGatherAhead;
    if (ahead + kLanes < (next ? 2 * size : size)) {
      const int64_t begin = place(ahead), end = place(ahead + kLanes);
      if ((end - begin) * static_cast<int64_t>(sizeof(P)) < kLanes * kGap)
        for (int64_t at = begin; at < end; at += 64 / sizeof(P)) prefetch(at);
      else
        for (int64_t k = ahead; k < ahead + kLanes; ++k) prefetch(place(k));
    }
    const Floats old = kMaster ? load_lanes(master + i) : gather(param, position + i);
    const Floats now = update(old, gather(grad, position + i), exp_avg + i, exp_avg_sq + i, max ? max + i : nullptr);
    if (kMaster) store_lanes(master + i, now);
    scatter(param, position + i, stored_lanes < P, Storage<P>::kNarrow && !kMaster > (now, key, first + i));
  }
  return whole;
}

// Steps the kLanes active of 2 kLanes weights; the lowest bits say which.
template <bool kMaster, typename P, typename G>
void step_two_four(P* param, const G* grad, float* exp_avg, float* exp_avg_sq, float* max, float* master, uint32_t bits,
                   const LaneUpdate& update, uint32_t key, uint32_t first) {
  if (kTwoFourAhead && sizeof(P) == 4) {
    __builtin_prefetch(exp_avg + kTwoFourAhead, 1);
    __builtin_prefetch(exp_avg_sq + kTwoFourAhead, 1);
    __builtin_prefetch(param + 2 * kTwoFourAhead, 1);
    __builtin_prefetch(grad + 2 * kTwoFourAhead, 0);
  }
  auto active = [bits](const auto* x) { return compact(load_lanes(x), load_lanes(x + kLanes), bits); };
  const Floats old = kMaster ? load_lanes(master) : active(param);
  const Floats now = update(old, active(grad), exp_avg, exp_avg_sq, max);
  if (kMaster) store_lanes(master, now);
  store_expanded(param, bits, stored_lanes < P, Storage<P>::kNarrow && !kMaster > (now, key, first));
}

}  // namespace
}  // namespace sparse_cl
