// Sixteen float32 lanes, see masked_adamw_lanes.h. Division and square root are 2/3 of the arithmetic of a step and
// would keep bfloat16 parameters from running at memory bandwidth; here each is a 14-bit estimate and one Newton step,
// good to about one unit in the last place.
#pragma once

#include <immintrin.h>

#include "dispatch.h"

namespace sparse_cl {
namespace {

constexpr int64_t kLanes = 16;
// Entries by which software prefetch runs ahead of the hardware's, which stops at pages.
constexpr int64_t kAhead = 512, kTwoFourAhead = 0;
constexpr bool kEstimates = true;  // division and square root round otherwise than those of one number
constexpr int64_t kGap = 0;        // prefetches only the lines of gathered entries
using Floats = __m512;
using Mask = __mmask16;
typedef uint32_t Ints __attribute__((vector_size(64)));

inline Floats floats(float x) {
  return _mm512_set1_ps(x);
}
inline Ints ints(uint32_t x) {
  return Ints(_mm512_set1_epi32(static_cast<int32_t>(x)));
}
inline Ints lane_numbers() {
  return Ints{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
}

inline __m256i half_lanes(const void* x) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(x));
}
inline Floats load_lanes(const float* x) {
  return _mm512_loadu_ps(x);
}
inline Floats load_lanes(const BFloat16* x) {
  return Floats(Ints(_mm512_cvtepu16_epi32(half_lanes(x))) << 16);
}
inline Floats load_lanes(const Float16* x) {
  return _mm512_cvtph_ps(half_lanes(x));
}

inline void store_lanes(float* to, Floats x) {
  _mm512_storeu_ps(to, x);
}
// Stored values lie in the low bits of each 32-bit lane.
template <typename P>
inline void store_lanes(P* to, Ints stored) {
  if constexpr (sizeof(P) == 4)
    _mm512_storeu_si512(to, __m512i(stored));
  else
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(__m512i(stored)));
}
inline Ints float16_lanes(Floats x) {
  return Ints(_mm512_cvtepu16_epi32(_mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)));
}

inline Floats add_product(Floats a, Floats b, Floats c) {  // a + b c
  return _mm512_fmadd_ps(b, c, a);
}
inline Floats subtract_product(Floats a, Floats b, Floats c) {  // a - b c
  return _mm512_fnmadd_ps(b, c, a);
}
inline Floats adamw_quotient(Floats m, Floats v, Floats rsqrt_correction, Floats eps) {
  const Floats r = _mm512_rsqrt14_ps(v);
  const Floats s = v * r;
  const Floats root = add_product(s, subtract_product(v, s, s), r * floats(0.5f));
  const Floats divisor = add_product(eps, root, rsqrt_correction);
  const Floats y = _mm512_rcp14_ps(divisor);
  const Floats q = m * y;
  const Floats quotient = add_product(q, subtract_product(m, q, divisor), y);
  // Estimates fail on zero, subnormals, infinity, NaN and negative numbers. The other lanes keep theirs: what a lane
  // becomes must not depend on which entries lie beside it.
  const Mask fails = _mm512_fpclass_ps_mask(v, 0xFF);
  if (__builtin_expect(!fails, 1)) return quotient;
  return _mm512_mask_div_ps(quotient, fails, m, add_product(eps, _mm512_sqrt_ps(v), rsqrt_correction));
}

inline bool any(Mask mask) {
  return mask;
}
inline Mask greater(Ints a, Ints b) {  // both below 2^31
  return _mm512_cmpgt_epi32_mask(__m512i(a), __m512i(b));
}
inline Mask is_nan(Floats x) {
  return _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
}
inline Mask less_or_nan(Floats a, Floats b) {  // a < b, or b alone is NaN
  return _mm512_cmp_ps_mask(a, b, _CMP_NGE_UQ) & _mm512_cmp_ps_mask(a, a, _CMP_ORD_Q);
}
inline Ints select(Mask mask, Ints yes, Ints no) {
  return Ints(_mm512_mask_mov_epi32(__m512i(no), mask, __m512i(yes)));
}

inline Floats gather(const float* from, const int32_t* at) {
  return _mm512_i32gather_ps(_mm512_loadu_si512(at), from, 4);
}
// 16-bit values.
template <typename P>
inline Floats gather(const P* from, const int32_t* at) {
  P x[kLanes];
  for (int k = 0; k < kLanes; ++k) x[k] = from[at[k]];
  return load_lanes(x);
}
inline void scatter(float* to, const int32_t* at, Ints stored) {
  _mm512_i32scatter_epi32(to, _mm512_loadu_si512(at), __m512i(stored), 4);
}
template <typename P>
inline void scatter(P* to, const int32_t* at, Ints stored) {
  P x[kLanes];
  store_lanes(x, stored);
  for (int k = 0; k < kLanes; ++k) to[at[k]] = x[k];
}

// The 16 of 32 values that `bits` names, 8 in each half.
inline Floats compact(Floats low, Floats high, uint32_t bits) {
  const Floats a = _mm512_maskz_compress_ps(bits & 0xFFFF, low);
  const Floats b = _mm512_maskz_compress_ps(bits >> 16, high);
  return _mm512_insertf32x8(a, _mm512_castps512_ps256(b), 1);
}

// Puts them back, and leaves the others.
template <typename P>
inline void store_expanded(P* to, uint32_t bits, Ints stored) {
  const __m512i upper = _mm512_castsi256_si512(_mm512_extracti32x8_epi32(__m512i(stored), 1));
  auto store = [](P* at, Mask where, __m512i lanes) {
    lanes = _mm512_maskz_expand_epi32(where, lanes);
    if constexpr (sizeof(P) == 4)
      _mm512_mask_storeu_epi32(at, where, lanes);
    else
      _mm256_mask_storeu_epi16(at, where, _mm512_cvtepi32_epi16(lanes));
  };
  store(to, bits & 0xFFFF, __m512i(stored));
  store(to + kLanes, bits >> 16, upper);
}

}  // namespace
}  // namespace sparse_cl
