// Eight float32 lanes, see masked_adamw_lanes.h. Every operation rounds as the scalar code does, so that this level
// gives the bits of the baseline: exact division and square root take less time than the memory does.
#pragma once

#include <immintrin.h>

#include <array>

#include "dispatch.h"

namespace sparse_cl {
namespace {

constexpr int64_t kLanes = 8;
// Entries by which software prefetch runs ahead. Measured on Zen 3: none for what is contiguous, where it gains nothing
// and costs a cycle an entry in bfloat16; 10 % less time for 2:4 masks of float32.
constexpr int64_t kAhead = 0, kTwoFourAhead = 256;
constexpr bool kEstimates = false;
// Bytes from one gathered entry to the next, on average, below which the lines between are prefetched too: on Zen 3 to
// touch 56 % of a range's lines takes as long as to touch all, or longer.
constexpr int64_t kGap = 128;
using Floats = __m256;
using Mask = __m256i;
typedef uint32_t Ints __attribute__((vector_size(32)));

inline Floats floats(float x) {
  return _mm256_set1_ps(x);
}
inline Ints ints(uint32_t x) {
  return Ints(_mm256_set1_epi32(static_cast<int32_t>(x)));
}
inline Ints lane_numbers() {
  return Ints{0, 1, 2, 3, 4, 5, 6, 7};
}

inline __m128i half_lanes(const void* x) {
  return _mm_loadu_si128(static_cast<const __m128i*>(x));
}
inline Floats load_lanes(const float* x) {
  return _mm256_loadu_ps(x);
}
inline Floats load_lanes(const BFloat16* x) {
  return Floats(Ints(_mm256_cvtepu16_epi32(half_lanes(x))) << 16);
}
inline Floats load_lanes(const Float16* x) {
  return _mm256_cvtph_ps(half_lanes(x));
}

inline void store_lanes(float* to, Floats x) {
  _mm256_storeu_ps(to, x);
}
// Stored values lie in the low bits of each 32-bit lane.
template <typename P>
inline void store_lanes(P* to, Ints stored) {
  if constexpr (sizeof(P) == 4)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), __m256i(stored));
  else
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm_packus_epi32(_mm256_castsi256_si128(__m256i(stored)),
                                                                      _mm256_extracti128_si256(__m256i(stored), 1)));
}
inline Ints float16_lanes(Floats x) {
  return Ints(_mm256_cvtepu16_epi32(_mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT)));
}

inline Floats add_product(Floats a, Floats b, Floats c) {  // a + b c
  return a + b * c;
}
inline Floats subtract_product(Floats a, Floats b, Floats c) {  // a - b c
  return a - b * c;
}
inline Floats adamw_quotient(Floats m, Floats v, Floats rsqrt_correction, Floats eps) {
  return m / (_mm256_sqrt_ps(v) * rsqrt_correction + eps);
}

inline bool any(Mask mask) {
  return !_mm256_testz_si256(mask, mask);
}
inline Mask greater(Ints a, Ints b) {  // both below 2^31
  return _mm256_cmpgt_epi32(__m256i(a), __m256i(b));
}
inline Mask is_nan(Floats x) {
  return __m256i(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
}
inline Mask less_or_nan(Floats a, Floats b) {  // a < b, or b alone is NaN
  return __m256i(_mm256_and_ps(_mm256_cmp_ps(a, b, _CMP_NGE_UQ), _mm256_cmp_ps(a, a, _CMP_ORD_Q)));
}
inline Ints select(Mask mask, Ints yes, Ints no) {
  return Ints(_mm256_blendv_epi8(__m256i(no), __m256i(yes), mask));
}

inline Floats gather(const float* from, const int32_t* at) {
  return _mm256_setr_ps(from[at[0]], from[at[1]], from[at[2]], from[at[3]], from[at[4]], from[at[5]], from[at[6]],
                        from[at[7]]);
}
// 16-bit values.
template <typename P>
inline Floats gather(const P* from, const int32_t* at) {
  const __m128i x = _mm_setr_epi16(from[at[0]].bits, from[at[1]].bits, from[at[2]].bits, from[at[3]].bits,
                                   from[at[4]].bits, from[at[5]].bits, from[at[6]].bits, from[at[7]].bits);
  return load_lanes(reinterpret_cast<const P*>(&x));
}
template <typename P>
inline void scatter(P* to, const int32_t* at, Ints stored) {
  P x[kLanes];
  store_lanes(x, stored);
  for (int k = 0; k < kLanes; ++k) to[at[k]] = x[k];
}

// For each byte: the positions of its set bits, and how many set bits lie below each bit; a byte each.
struct ByteTables {
  std::array<uint64_t, 256> positions{}, ranks{};
  constexpr ByteTables() {
    for (int byte = 0; byte < 256; ++byte)
      for (uint64_t bit = 0, count = 0; bit < 8; ++bit) {
        ranks[byte] |= count << (8 * bit);
        if (byte >> bit & 1) positions[byte] |= bit << (8 * count++);
      }
  }
};
constexpr ByteTables kByteTables;

inline __m256i bytes_as_lanes(uint64_t bytes) {
  return _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(static_cast<int64_t>(bytes)));
}

// The 8 of 16 values that `bits` names, 4 in each half.
inline Floats compact(Floats low, Floats high, uint32_t bits) {
  const Floats a = _mm256_permutevar8x32_ps(low, bytes_as_lanes(kByteTables.positions[bits & 0xFF]));
  const Floats b = _mm256_permutevar8x32_ps(high, bytes_as_lanes(kByteTables.positions[bits >> 8 & 0xFF]));
  return _mm256_permute2f128_ps(a, b, 0x20);
}

// Puts them back. The others are written as they were: masked stores are slow on AMD's processors before Zen 4.
template <typename P>
inline void store_expanded(P* to, uint32_t bits, Ints stored) {
  const __m256i to_sign = _mm256_setr_epi32(31, 30, 29, 28, 27, 26, 25, 24);
  for (int half = 0; half < 2; ++half, to += kLanes, bits >>= 8) {
    const __m256i rank = _mm256_add_epi32(bytes_as_lanes(kByteTables.ranks[bits & 0xFF]), _mm256_set1_epi32(4 * half));
    const __m256 now = _mm256_castsi256_ps(_mm256_permutevar8x32_epi32(__m256i(stored), rank));
    const __m256 active = _mm256_castsi256_ps(_mm256_sllv_epi32(_mm256_set1_epi32(bits), to_sign));
    __m256 old;
    if constexpr (sizeof(P) == 4)
      old = load_lanes(to);
    else
      old = _mm256_castsi256_ps(_mm256_cvtepu16_epi32(half_lanes(to)));
    store_lanes(to, Ints(_mm256_blendv_ps(old, now, active)));
  }
}

}  // namespace
}  // namespace sparse_cl
