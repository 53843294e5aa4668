// Which instruction set the CPU kernels use. No torch.
#pragma once

#include <cstdlib>
#include <cstring>

namespace sparse_cl {

enum class CpuLevel { kBaseline, kAvx2, kAvx512 };

inline const char* name_of(CpuLevel level) {
  return level == CpuLevel::kAvx512 ? "avx512" : level == CpuLevel::kAvx2 ? "avx2" : "baseline";
}

// The best level of this machine that was built. SPARSE_CL_CPU_LEVEL=baseline|avx2 lowers it.
inline CpuLevel cpu_level() {
  CpuLevel level = CpuLevel::kBaseline;
#ifdef SPARSE_CL_X86_LEVELS
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2") &&
      __builtin_cpu_supports("f16c"))
    level = CpuLevel::kAvx2;
  if (level == CpuLevel::kAvx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    level = CpuLevel::kAvx512;
#endif
  const char* cap = std::getenv("SPARSE_CL_CPU_LEVEL");
  if (cap && !std::strcmp(cap, "baseline")) return CpuLevel::kBaseline;
  if (cap && !std::strcmp(cap, "avx2") && level == CpuLevel::kAvx512) return CpuLevel::kAvx2;
  return level;
}

// The level for kernels that stream float32. Measured on Zen 4 (AMD's family 19h with AVX-512), where they are faster
// at avx2: 1.02 times torch's fused AdamW against .94 - 1.02 for dense parameters, 15.6 against 14.1 - 15.6 for 5 % of
// the rows, 3.4 against 3.1 - 3.4 for 25 %.
inline CpuLevel cpu_level_of_streams() {
#ifdef SPARSE_CL_X86_LEVELS
  if (cpu_level() == CpuLevel::kAvx512 && __builtin_cpu_is("amdfam19h")) return CpuLevel::kAvx2;
#endif
  return cpu_level();
}

}  // namespace sparse_cl
