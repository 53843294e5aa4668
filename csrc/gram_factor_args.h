// Checks what gram_factor is given and allocates what it returns.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <tuple>
#include <vector>

#include "tensor_view.h"

namespace sparse_cl {

struct GramFactorCall {
  torch::stable::Tensor gram, squared_norms, factor, rank;
  int64_t batch, k;

  std::tuple<torch::stable::Tensor, torch::stable::Tensor> result() const { return {factor, rank}; }
};

inline GramFactorCall make_gram_factor_call(const torch::stable::Tensor& gram,
                                            const torch::stable::Tensor& squared_norms) {
  const TensorView g(gram), s(squared_norms);
  STD_TORCH_CHECK(g.dim >= 2 && g.sizes[g.dim - 1] == g.sizes[g.dim - 2] && g.dtype == dtype_codes().float64,
                  "gram_factor: gram: expected square float64 matrices");
  bool fits = s.dim == g.dim - 1 && s.dtype == g.dtype && s.same_place(g);
  for (int64_t d = 0; d < s.dim && fits; ++d) fits = s.sizes[d] == g.sizes[d];
  STD_TORCH_CHECK(fits, "gram_factor: squared_norms: expected one float64 number a column of gram, on its device");

  const std::vector<int64_t> shape(g.sizes, g.sizes + g.dim), leading(shape.begin(), shape.end() - 2);
  int64_t batch = 1;
  for (int64_t size : leading) batch *= size;
  return {torch::stable::contiguous(gram),
          torch::stable::contiguous(squared_norms),
          torch::stable::new_empty(gram, shape, torch::headeronly::ScalarType::Double),
          torch::stable::new_empty(gram, leading, torch::headeronly::ScalarType::Long),
          batch,
          shape.back()};
}

}  // namespace sparse_cl
