// Storage types and the type that arithmetic on them uses. No torch: the same code runs in every kernel.
#pragma once

#include <cstdint>
#include <cstring>

#include "adamw.h"

namespace sparse_cl {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

enum class DType : uint8_t { kFloat64, kFloat32, kBFloat16, kFloat16 };

template <typename To, typename From>
SPARSE_CL_HD To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast needs equal sizes");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

template <typename T>
struct Storage {  // float and double are stored as they are
  using acc = T;
  static constexpr bool kNarrow = false;
  static SPARSE_CL_HD T load(T x) { return x; }
  static SPARSE_CL_HD T store(T x) { return x; }
  static SPARSE_CL_HD T store_stochastic(T x, uint32_t) { return x; }
};

template <>
struct Storage<BFloat16> {
  using acc = float;
  static constexpr bool kNarrow = true;

  static SPARSE_CL_HD float load(BFloat16 x) { return bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }

  static SPARSE_CL_HD BFloat16 store(float x) {
    const uint32_t bits = bit_cast<uint32_t>(x);
    const uint32_t nearest = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    return {static_cast<uint16_t>(x == x ? nearest : 0x7FC0u)};
  }

  static SPARSE_CL_HD BFloat16 store_stochastic(float x, uint32_t random) {
    const uint32_t bits = bit_cast<uint32_t>(x);
    const bool in_range = (bits & 0x7FFFFFFFu) <= 0x7F7F0000u;  // largest finite bfloat16
    const uint16_t rounded = static_cast<uint16_t>((bits + (random & 0xFFFFu)) >> 16);
    return {in_range ? rounded : store(x).bits};
  }
};

template <>
struct Storage<Float16> {
  using acc = float;
  static constexpr bool kNarrow = true;

  static SPARSE_CL_HD float load(Float16 x) {
    const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
    const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7FFFu) << 13;
    // 2^112 moves the exponent bias from 15 to 127, and makes subnormals of float16 normal.
    const float scaled = bit_cast<float>(magnitude) * 0x1p112f;
    const uint32_t finite = bit_cast<uint32_t>(scaled);
    const uint32_t special = magnitude | 0x7F800000u;
    return bit_cast<float>(sign | (magnitude >= 0x0F800000u ? special : finite));
  }

  static SPARSE_CL_HD Float16 store(float x) {
    const uint32_t bits = bit_cast<uint32_t>(x);
    const uint32_t sign = (bits >> 16) & 0x8000u;
    const uint32_t magnitude = bits & 0x7FFFFFFFu;
    // Adding 0.5 to a number below 2^-14 leaves its float16 subnormal in the low bits, rounded to nearest even.
    const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3F000000u;
    const uint32_t normal = (magnitude - 0x38000000u + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13;
    const uint32_t special = magnitude > 0x7F800000u ? 0x7E00u : 0x7C00u;
    const uint32_t half = magnitude >= 0x477FF000u ? special : (magnitude < 0x38800000u ? subnormal : normal);
    return {static_cast<uint16_t>(sign | half)};
  }

  static SPARSE_CL_HD Float16 store_stochastic(float x, uint32_t random) {
    const uint32_t bits = bit_cast<uint32_t>(x);
    const uint32_t sign = (bits >> 16) & 0x8000u;
    const uint32_t magnitude = bits & 0x7FFFFFFFu;
    const uint32_t low = random & 0x1FFFu;
    // Below 2^-14 the spacing of float16 stays 2^-24, so count in those units; above, carry into the kept bits.
    const bool tiny = magnitude < 0x38800000u;
    const float units = tiny ? bit_cast<float>(magnitude) * 0x1p24f + static_cast<float>(low) * 0x1p-13f : 0.0f;
    const uint32_t subnormal = static_cast<uint32_t>(units);
    const uint32_t normal = (magnitude - 0x38000000u + low) >> 13;
    const bool in_range = magnitude <= 0x477FE000u;  // largest finite float16
    const uint32_t half = tiny ? subnormal : normal;
    return {in_range ? static_cast<uint16_t>(sign | half) : store(x).bits};
  }
};

// Calls f(P{}, G{}) with the storage types of parameter and gradient; the gradient's is the parameter's or float.
template <typename F>
void dispatch(DType param, bool float_grad, F&& f) {
  switch (param) {
    case DType::kFloat64:
      return float_grad ? f(double{}, float{}) : f(double{}, double{});
    case DType::kFloat32:
      return f(float{}, float{});
    case DType::kBFloat16:
      return float_grad ? f(BFloat16{}, float{}) : f(BFloat16{}, BFloat16{});
    case DType::kFloat16:
      return float_grad ? f(Float16{}, float{}) : f(Float16{}, Float16{});
  }
}

}  // namespace sparse_cl
