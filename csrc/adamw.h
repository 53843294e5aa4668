// AdamW on one element (Loshchilov & Hutter 2019), shared by the CPU and CUDA kernels. No torch.
#pragma once

#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define SPARSE_CL_HD __host__ __device__ __forceinline__
#else
#define SPARSE_CL_HD inline __attribute__((always_inline))
#endif

namespace sparse_cl {

// What is the same for all parameters of a call. `T` is the accumulate type.
template <typename T>
struct Hyper {
  double lr, beta1, beta2, log_beta1, log_beta2, weight_decay;
  T one_minus_beta1, beta2_t, one_minus_beta2, eps;
};

// What is the same for all entries that share a step count and a gain.
template <typename T>
struct Rates {
  T decay;             // 1 - gain lr wd
  T step_size;         // gain lr / (1 - beta1^t)
  T rsqrt_correction;  // 1 / sqrt(1 - beta2^t)
};

// 1 - beta^t by expm1: in float, 1 - pow(beta, t) loses all digits for beta near 1 and small t.
template <typename T>
SPARSE_CL_HD Rates<T> rates(const Hyper<T>& h, double lr, int32_t t, T gain) {
  const T correction1 = -std::expm1(static_cast<T>(t * h.log_beta1));
  const T correction2 = -std::expm1(static_cast<T>(t * h.log_beta2));
  const T rate = gain * static_cast<T>(lr);
  return {T(1) - rate * static_cast<T>(h.weight_decay), rate / correction1, T(1) / std::sqrt(correction2)};
}

template <typename T>
SPARSE_CL_HD T descend(T param, T exp_avg, T second, const Hyper<T>& h, const Rates<T>& r) {
  return param * r.decay - r.step_size * (exp_avg / (std::sqrt(second) * r.rsqrt_correction + h.eps));
}

// As torch.lerp: from the end that is nearer, or for beta1 = 0 the old average's rounding error would be all of it.
template <typename T>
SPARSE_CL_HD void average(T& exp_avg, T grad, const Hyper<T>& h) {
  const T change = grad - exp_avg;
  exp_avg =
      h.one_minus_beta1 < T(0.5) ? exp_avg + h.one_minus_beta1 * change : grad - (T(1) - h.one_minus_beta1) * change;
}

template <typename T, bool kAmsgrad>
SPARSE_CL_HD T adamw(T param, T grad, T& exp_avg, T& exp_avg_sq, T& max_exp_avg_sq, const Hyper<T>& h,
                     const Rates<T>& r) {
  average(exp_avg, grad, h);
  // The order of torch.addcmul: grad * grad alone would overflow for gradients whose second moment does not.
  exp_avg_sq = h.beta2_t * exp_avg_sq + h.one_minus_beta2 * grad * grad;
  T second = exp_avg_sq;
  if (kAmsgrad) {
    // Written so that a NaN in either operand wins, as torch.maximum has it.
    second = (max_exp_avg_sq < exp_avg_sq || exp_avg_sq != exp_avg_sq) ? exp_avg_sq : max_exp_avg_sq;
    max_exp_avg_sq = second;
  }
  return descend(param, exp_avg, second, h, r);
}

// Mixes 32 bits (constants of C. Wellons' lowbias32).
SPARSE_CL_HD uint32_t hash32(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x7FEB352Du;
  x = (x ^ (x >> 15)) * 0x846CA68Bu;
  return x ^ (x >> 16);
}

// Random stream of one parameter at step t, for entries whose index has these upper 32 bits.
SPARSE_CL_HD uint32_t random_key(uint32_t seed, int32_t t, uint32_t upper) {
  return hash32(hash32(static_cast<uint32_t>(t)) + seed * 0x9E3779B9u + upper * 0x85EBCA6Bu);
}

SPARSE_CL_HD uint32_t random_bits(uint32_t key, uint32_t lower) {
  return hash32(lower ^ key);
}

}  // namespace sparse_cl
