// sparse_cl._build_info: what was built.
#include <pybind11/pybind11.h>

#include "cpu_level.h"

PYBIND11_MODULE(_build_info, m) {
  m.def("built", [] {
    pybind11::dict info;
    info["cpu_levels"] = SPARSE_CL_CPU_LEVELS;
    info["cpu_level"] = sparse_cl::name_of(sparse_cl::cpu_level());
    info["cuda_architectures"] = SPARSE_CL_CUDA_ARCHITECTURES;
    info["torch_target"] = SPARSE_CL_TORCH_TARGET;
    info["compiler"] = SPARSE_CL_COMPILER;
    return info;
  });
}
