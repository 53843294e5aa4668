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
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2"))
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

}  // namespace sparse_cl
