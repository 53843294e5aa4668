// The CPU kernel of gram_factor. Compiled once for each CPU level, with SPARSE_CL_GRAM_FACTOR_ONE naming its entry.
#include <algorithm>
#include <cmath>

#include "gram_factor.h"

namespace sparse_cl {
namespace {

constexpr double kClosed = -1.0;  // residual of a column that has been taken or cannot be

// row -= coefficientsᵀ work, for the first `rows` rows of work.
void subtract_product(double* row, const double* coefficients, const double* work, int64_t rows, int64_t stride) {
  for (int64_t first = 0; first < stride; first += kGramTile) {
    double sum[kGramTile];
    for (int64_t t = 0; t < kGramTile; ++t) sum[t] = row[first + t];
    for (int64_t i = 0; i < rows; ++i) {
      const double c = coefficients[i];
      const double* from = work + i * stride + first;
#pragma omp simd
      for (int64_t t = 0; t < kGramTile; ++t) sum[t] -= c * from[t];
    }
    for (int64_t t = 0; t < kGramTile; ++t) row[first + t] = sum[t];
  }
}

}  // namespace

int64_t SPARSE_CL_GRAM_FACTOR_ONE(const double* gram, const double* squared_norms, double rtol, int64_t k,
                                  double* factor, double* scratch) {
  const int64_t stride = gram_factor_stride(k);
  const double least = residual_floor(k), least_relative = rtol * rtol;
  double* const work = scratch;  // k rows
  double* const residual = work + k * stride;
  double* const share = residual + stride;  // of a column's first squared norm that its diagonal is
  double* const scale = share + stride;
  double* const relative = scale + stride;
  double* const coefficients = relative + stride;
  for (int64_t q = 0; q < k; ++q) {
    const double diagonal = gram[q * k + q], norm = squared_norms[q];
    const bool usable = diagonal > 0 && std::isfinite(diagonal) && norm > 0;
    residual[q] = usable ? 1.0 : kClosed;
    scale[q] = usable ? 1 / std::sqrt(diagonal) : 0.0;
    share[q] = usable ? std::min(diagonal / norm, 1.0) : 0.0;
  }

  int64_t rank = 0;
  for (; rank < k; ++rank) {
    double best = 0;
    for (int64_t q = 0; q < k; ++q) {
      const double r = residual[q] * share[q];
      relative[q] = residual[q] > least && r > least_relative ? r : 0.0;
      best = std::max(best, relative[q]);
    }
    if (best <= 0) break;
    int64_t pivot = 0;
    while (relative[pivot] < kPivotShare * best || relative[pivot] <= 0) ++pivot;

    for (int64_t i = 0; i < rank; ++i) {
      coefficients[i] = work[i * stride + pivot];
      work[i * stride + pivot] = 0;
    }
    double* const row = work + rank * stride;
    const double* const from = gram + pivot * k;
    const double pivot_scale = scale[pivot];
    for (int64_t q = 0; q < k; ++q) row[q] = residual[q] > kClosed ? from[q] * pivot_scale * scale[q] : 0.0;
    std::fill(row + k, row + stride, 0.0);
    row[pivot] = 1;
    subtract_product(row, coefficients, work, rank, stride);
    const double inverse = 1 / std::sqrt(residual[pivot]);
    for (int64_t q = 0; q < stride; ++q) row[q] *= inverse;
    for (int64_t q = 0; q < k; ++q)
      residual[q] = residual[q] > kClosed ? std::max(residual[q] - row[q] * row[q], kClosed / 2) : kClosed;
    residual[pivot] = kClosed;
    share[pivot] = kClosed;  // marks it as taken
  }

  for (int64_t q = 0; q < k; ++q) {
    const bool taken = share[q] == kClosed;
    for (int64_t j = 0; j < k; ++j) factor[q * k + j] = taken && j < rank ? scale[q] * work[j * stride + q] : 0.0;
  }
  return rank;
}

}  // namespace sparse_cl
