// gram_factor: what its kernels share. No torch. sparse_cl/reference/gram_factor.py says what is computed.
//
// Row i of `work` holds row i of the Cholesky factor where a column has not been taken yet, and column i of the result,
// before scaling, where it has: neither is needed in the other's place, and one product advances both.
#pragma once

#include <cstdint>

namespace sparse_cl {

// A column is taken in its turn unless its squared relative residual is below this share of the largest: orthonormal
// columns keep their order, and a lower share lets the noise of dependent columns grow.
constexpr double kPivotShare = 0.9;

// Squared residual of a unit column that is rounding error of a float64 Gram matrix of k columns.
static inline double residual_floor(int64_t k) {
  return (64 + 4 * static_cast<double>(k)) * 0x1p-52;
}

// One matrix on the CPU. `factor` is (k, k), `scratch` holds gram_factor_scratch(k) doubles.
using GramFactorOne = int64_t (*)(const double* gram, const double* squared_norms, double rtol, int64_t k,
                                  double* factor, double* scratch);

constexpr int64_t kGramTile = 32;  // columns whose sums a CPU keeps in registers

static constexpr int64_t gram_factor_stride(int64_t k) {
  return (k + kGramTile - 1) / kGramTile * kGramTile;
}
static constexpr int64_t gram_factor_scratch(int64_t k) {
  return (k + 4) * gram_factor_stride(k) + k;
}

int64_t gram_factor_one_baseline(const double*, const double*, double, int64_t, double*, double*);
int64_t gram_factor_one_avx2(const double*, const double*, double, int64_t, double*, double*);
int64_t gram_factor_one_avx512(const double*, const double*, double, int64_t, double*, double*);

}  // namespace sparse_cl
