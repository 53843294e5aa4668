// Sixteen entries at a time. Division and square root are 2/3 of the arithmetic of a step and would keep bfloat16
// parameters from running at memory bandwidth; here each is a 14-bit estimate and one Newton step, good to about one
// unit in the last place.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <type_traits>

#include "masked_adamw.h"

namespace sparse_cl {
namespace {

constexpr int64_t kLanes = 16;
constexpr int64_t kAhead =
    512;  // entries by which software prefetch runs ahead of the hardware's, which stops at pages

inline __m512 load_lanes(const float* x) {
  return _mm512_loadu_ps(x);
}
inline __m512 load_lanes(const BFloat16* x) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
inline __m512 load_lanes(const Float16* x) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
}

inline __m512i random_lanes(uint32_t key, uint32_t first) {
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  __m512i x = _mm512_xor_si512(_mm512_add_epi32(_mm512_set1_epi32(first), lane), _mm512_set1_epi32(key));
  x = _mm512_mullo_epi32(_mm512_xor_si512(x, _mm512_srli_epi32(x, 16)), _mm512_set1_epi32(0x7FEB352D));
  x = _mm512_mullo_epi32(_mm512_xor_si512(x, _mm512_srli_epi32(x, 15)), _mm512_set1_epi32(0x846CA68B));
  return _mm512_xor_si512(x, _mm512_srli_epi32(x, 16));
}

// What is stored for x, in the low bits of each 32-bit lane.
template <typename P, bool kStochastic>
inline __m512i stored_lanes(__m512 x, uint32_t key, uint32_t first) {
  const __m512i bits = _mm512_castps_si512(x);
  if constexpr (sizeof(P) == 4) {
    return bits;
  } else if constexpr (kStochastic) {
    const __m512i magnitude = _mm512_and_si512(bits, _mm512_set1_epi32(0x7FFFFFFF));
    const __mmask16 out = _mm512_cmpgt_epu32_mask(magnitude, _mm512_set1_epi32(0x7F7F0000));
    const __m512i low = _mm512_and_si512(random_lanes(key, first), _mm512_set1_epi32(0xFFFF));
    __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, low), 16);
    if (out) rounded = _mm512_mask_mov_epi32(rounded, out, stored_lanes<P, false>(x, key, first));
    return rounded;
  } else {
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i nearest =
        _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), odd), 16);
    return _mm512_mask_mov_epi32(nearest, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), _mm512_set1_epi32(0x7FC0));
  }
}
template <>
inline __m512i stored_lanes<Float16, false>(__m512 x, uint32_t, uint32_t) {
  return _mm512_cvtepu16_epi32(_mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

template <typename P>
inline void store_lanes(P* to, __m512i stored) {
  if constexpr (sizeof(P) == 4)
    _mm512_storeu_si512(to, stored);
  else
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(stored));
}
template <typename P>
inline void store_lanes(P* to, __mmask16 where, __m512i stored) {
  if constexpr (sizeof(P) == 4)
    _mm512_mask_storeu_epi32(to, where, stored);
  else
    _mm256_mask_storeu_epi16(to, where, _mm512_cvtepi32_epi16(stored));
}

// adamw.h's update of sixteen entries that share their rates.
struct LaneUpdate {
  __m512 one_minus_beta1, beta2, one_minus_beta2, eps, decay, step_size, rsqrt_correction, factor;

  LaneUpdate(const Hyper<float>& h, const Rates<float>& r, float grad_factor)
      : one_minus_beta1(_mm512_set1_ps(h.one_minus_beta1)),
        beta2(_mm512_set1_ps(h.beta2_t)),
        one_minus_beta2(_mm512_set1_ps(h.one_minus_beta2)),
        eps(_mm512_set1_ps(h.eps)),
        decay(_mm512_set1_ps(r.decay)),
        step_size(_mm512_set1_ps(r.step_size)),
        rsqrt_correction(_mm512_set1_ps(r.rsqrt_correction)),
        factor(_mm512_set1_ps(grad_factor)) {}

  // `max` may be null.
  __m512 operator()(__m512 param, __m512 grad, float* exp_avg, float* exp_avg_sq, float* max) const {
    grad = _mm512_mul_ps(grad, factor);
    __m512 m = _mm512_loadu_ps(exp_avg), v = _mm512_loadu_ps(exp_avg_sq);
    m = _mm512_fmadd_ps(one_minus_beta1, _mm512_sub_ps(grad, m), m);
    v = _mm512_fmadd_ps(beta2, v, _mm512_mul_ps(_mm512_mul_ps(one_minus_beta2, grad), grad));
    _mm512_storeu_ps(exp_avg, m);
    _mm512_storeu_ps(exp_avg_sq, v);
    if (max) {
      const __m512 old = _mm512_loadu_ps(max);
      // Not max_ps: a NaN in either operand must win.
      v = _mm512_mask_mov_ps(old, _mm512_cmp_ps_mask(old, v, _CMP_NGE_UQ) & _mm512_cmp_ps_mask(old, old, _CMP_ORD_Q),
                             v);
      _mm512_storeu_ps(max, v);
    }
    return _mm512_fnmadd_ps(step_size, quotient(m, v), _mm512_mul_ps(param, decay));
  }

  __m512 quotient(__m512 m, __m512 v) const {
    // Estimates fail on zero, subnormals, infinity, NaN and negative numbers.
    if (__builtin_expect(_mm512_fpclass_ps_mask(v, 0xFF), 0))
      return _mm512_div_ps(m, _mm512_fmadd_ps(_mm512_sqrt_ps(v), rsqrt_correction, eps));
    const __m512 r = _mm512_rsqrt14_ps(v);
    const __m512 s = _mm512_mul_ps(v, r);
    const __m512 root = _mm512_fmadd_ps(_mm512_fnmadd_ps(s, s, v), _mm512_mul_ps(r, _mm512_set1_ps(0.5f)), s);
    const __m512 divisor = _mm512_fmadd_ps(root, rsqrt_correction, eps);
    const __m512 y = _mm512_rcp14_ps(divisor);
    const __m512 q = _mm512_mul_ps(m, y);
    return _mm512_fmadd_ps(_mm512_fnmadd_ps(q, divisor, m), y, q);
  }
};

template <typename P, bool kMaster>
constexpr bool kHasLanes = sizeof(P) < 8 && (kMaster || sizeof(P) == 4 || std::is_same_v<P, BFloat16>);

// Steps the first entries of a span, a multiple of kLanes, and returns how many.
template <bool kMaster, typename P, typename G>
int64_t step_lanes(P* param, const G* grad, float* exp_avg, float* exp_avg_sq, float* max, float* master, int64_t size,
                   const LaneUpdate& update, uint32_t key, uint32_t first) {
  const int64_t whole = size / kLanes * kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) {
    __builtin_prefetch(exp_avg + i + kAhead, 1);
    __builtin_prefetch(exp_avg_sq + i + kAhead, 1);
    __builtin_prefetch(param + i + kAhead, 1);
    __builtin_prefetch(grad + i + kAhead, 0);
    if (kMaster) __builtin_prefetch(master + i + kAhead, 1);
    const __m512 old = kMaster ? load_lanes(master + i) : load_lanes(param + i);
    const __m512 now = update(old, load_lanes(grad + i), exp_avg + i, exp_avg_sq + i, max ? max + i : nullptr);
    if (kMaster) _mm512_storeu_ps(master + i, now);
    store_lanes(param + i, stored_lanes < P, Storage<P>::kNarrow && !kMaster > (now, key, first + i));
  }
  return whole;
}

// Steps the first entries of `size` at param[position[i]], a multiple of kLanes, and returns how many.
inline int64_t step_gathered(float* param, const float* grad, const int32_t* position, float* exp_avg,
                             float* exp_avg_sq, float* max, int64_t size, const LaneUpdate& update) {
  const int64_t whole = size / kLanes * kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) {
    for (int64_t k = i + 2 * kLanes; k < std::min(i + 3 * kLanes, size); ++k) {
      __builtin_prefetch(param + position[k], 1);
      __builtin_prefetch(grad + position[k], 0);
    }
    const __m512i where = _mm512_loadu_si512(position + i);
    const __m512 now = update(_mm512_i32gather_ps(where, param, 4), _mm512_i32gather_ps(where, grad, 4), exp_avg + i,
                              exp_avg_sq + i, max ? max + i : nullptr);
    _mm512_i32scatter_ps(param, where, now, 4);
  }
  return whole;
}

// Steps the 16 active of 32 weights; `bits` says which.
template <bool kMaster, typename P, typename G>
void step_two_four(P* param, const G* grad, float* exp_avg, float* exp_avg_sq, float* max, float* master, uint32_t bits,
                   const LaneUpdate& update, uint32_t key, uint32_t first) {
  const __mmask16 low = bits & 0xFFFF, high = bits >> 16;
  auto active = [&](const auto* x) {
    const __m512 a = _mm512_maskz_compress_ps(low, load_lanes(x));
    const __m512 b = _mm512_maskz_compress_ps(high, load_lanes(x + kLanes));
    return _mm512_insertf32x8(a, _mm512_castps512_ps256(b), 1);
  };
  const __m512 old = kMaster ? load_lanes(master) : active(param);
  const __m512 now = update(old, active(grad), exp_avg, exp_avg_sq, max);
  if (kMaster) _mm512_storeu_ps(master, now);
  const __m512i stored = stored_lanes < P, Storage<P>::kNarrow && !kMaster > (now, key, first);
  const __m512i upper = _mm512_castsi256_si512(_mm512_extracti32x8_epi32(stored, 1));
  store_lanes(param, low, _mm512_maskz_expand_epi32(low, stored));
  store_lanes(param + kLanes, high, _mm512_maskz_expand_epi32(high, upper));
}

}  // namespace
}  // namespace sparse_cl
