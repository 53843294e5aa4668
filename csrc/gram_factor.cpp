// gram_factor on the CPU.
#include "gram_factor.h"

#include <algorithm>
#include <vector>

#include "cpu_level.h"
#include "gram_factor_args.h"

namespace sparse_cl {
namespace {

GramFactorOne gram_factor_one() {
#ifdef SPARSE_CL_X86_LEVELS
  switch (cpu_level()) {
    case CpuLevel::kAvx512:
      return gram_factor_one_avx512;
    case CpuLevel::kAvx2:
      return gram_factor_one_avx2;
    default:
      break;
  }
#endif
  return gram_factor_one_baseline;
}

std::tuple<torch::stable::Tensor, torch::stable::Tensor> gram_factor(torch::stable::Tensor gram,
                                                                     torch::stable::Tensor squared_norms, double rtol) {
  static const GramFactorOne one = gram_factor_one();
  const GramFactorCall call = make_gram_factor_call(gram, squared_norms);
  const int64_t k = call.k;
  const auto* grams = static_cast<const double*>(call.gram.data_ptr());
  const auto* norms = static_cast<const double*>(call.squared_norms.data_ptr());
  auto* factors = static_cast<double*>(call.factor.data_ptr());
  auto* ranks = static_cast<int64_t*>(call.rank.data_ptr());
  // A thread is worth waking for some ten thousand products.
  const int64_t grain = std::max<int64_t>(1, 20000 / std::max<int64_t>(1, k * k * k));
  torch::stable::parallel_for(0, call.batch, grain, [&](int64_t begin, int64_t end) {
    std::vector<double> scratch(gram_factor_scratch(k));
    for (int64_t b = begin; b < end; ++b)
      ranks[b] = one(grams + b * k * k, norms + b * k, rtol, k, factors + b * k * k, scratch.data());
  });
  return call.result();
}

}  // namespace
}  // namespace sparse_cl

STABLE_TORCH_LIBRARY_IMPL(sparse_cl, CPU, m) {
  m.impl("gram_factor", TORCH_BOX(&sparse_cl::gram_factor));
}
