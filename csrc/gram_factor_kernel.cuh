// The CUDA kernel of gram_factor: a block takes one matrix, a thread some of its columns. No torch.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>

#include "gram_factor.h"

namespace sparse_cl {

#ifndef SPARSE_CL_CUDA_THREADS
#define SPARSE_CL_CUDA_THREADS 256
#endif
constexpr int kGramThreads = SPARSE_CL_CUDA_THREADS;

enum ColumnState : uint8_t { kUnusable, kOpen, kTaken };

struct GramFactorLaunch {
  const double *gram, *squared_norms;  // (batch, k, k), (batch, k)
  double* factor;                      // (batch, k, k)
  int64_t* rank;                       // (batch)
  double least, least_relative;        // squared residuals at which a column is dependent
  int k, stride;                       // columns; length of a row of the work matrix
};

// Rows of an odd length: a column then lies in all banks.
constexpr int gram_shared_stride(int k) {
  return k | 1;
}

constexpr size_t gram_shared_bytes(int k, bool work) {
  const size_t width = static_cast<size_t>(k);
  return (1 + 4 * width + (work ? width * gram_shared_stride(k) : 0)) * sizeof(double) + width;
}

// The first open column whose relative residual is within kPivotShare of the largest, or -1. For one whole warp.
__device__ __forceinline__ int choose_pivot(const double* residual, const double* share, const uint8_t* state,
                                            const GramFactorLaunch& launch) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  auto relative = [&](int q) {
    const double r = residual[q] * share[q];
    return state[q] == kOpen && residual[q] > launch.least && r > launch.least_relative ? r : 0.0;
  };
  double best = 0;
  for (int q = lane; q < launch.k; q += 32) {
    const double r = relative(q);
    best = r > best ? r : best;
  }
  for (int distance = 16; distance; distance /= 2) {
    const double other = __shfl_xor_sync(0xFFFFFFFFu, best, distance);
    best = other > best ? other : best;
  }
  int first = launch.k;
  if (best > 0) {
    for (int q = lane; q < launch.k && first == launch.k; q += 32) {
      const double r = relative(q);
      if (r > 0 && r >= kPivotShare * best) first = q;
    }
  }
  for (int distance = 16; distance; distance /= 2) {
    const int other = __shfl_xor_sync(0xFFFFFFFFu, first, distance);
    first = other < first ? other : first;
  }
  return first < launch.k ? first : -1;
}

// Entry q of the row that `rows` earlier ones are taken from. Four sums hide the latency of an addition.
__device__ __forceinline__ double subtract_product(double entry, const double* coefficients, const double* column,
                                                   int rows, int stride) {
  double sum[4] = {entry, 0, 0, 0};
  int i = 0;
  for (; i + 4 <= rows; i += 4) {
#pragma unroll
    for (int u = 0; u < 4; ++u)
      sum[u] = fma(-coefficients[i + u], column[static_cast<ptrdiff_t>(i + u) * stride], sum[u]);
  }
  for (; i < rows; ++i) sum[0] = fma(-coefficients[i], column[static_cast<ptrdiff_t>(i) * stride], sum[0]);
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

// kShared: the work matrix lies in shared memory. Elsewhere the factor itself holds it, and is turned in place at last.
template <bool kShared>
__global__ void __launch_bounds__(kGramThreads, 1) gram_factor_kernel(const GramFactorLaunch __grid_constant__ launch) {
  extern __shared__ __align__(16) unsigned char shared_memory[];
  const int k = launch.k, stride = launch.stride, thread = static_cast<int>(threadIdx.x);
  const size_t matrix = blockIdx.x, area = static_cast<size_t>(k) * k;
  const double* gram = launch.gram + matrix * area;
  const double* squared_norms = launch.squared_norms + matrix * k;
  double* factor = launch.factor + matrix * area;
  int* chosen = reinterpret_cast<int*>(shared_memory);
  double* residual = reinterpret_cast<double*>(shared_memory) + 1;
  double* share = residual + k;  // of a column's first squared norm that its diagonal is
  double* scale = share + k;
  double* coefficients = scale + k;
  double* work = kShared ? coefficients + k : factor;
  uint8_t* state = reinterpret_cast<uint8_t*>(coefficients + k + (kShared ? static_cast<size_t>(k) * stride : 0));

  for (int q = thread; q < k; q += kGramThreads) {
    const double diagonal = gram[static_cast<size_t>(q) * k + q], norm = squared_norms[q];
    const bool usable = diagonal > 0 && isfinite(diagonal) && norm > 0;
    residual[q] = 1;
    scale[q] = usable ? 1 / sqrt(diagonal) : 0.0;
    share[q] = usable ? (diagonal < norm ? diagonal / norm : 1.0) : 0.0;
    state[q] = usable ? kOpen : kUnusable;
  }
  int rank = 0;
  for (; rank < k; ++rank) {
    __syncthreads();
    if (thread < 32) {
      const int pivot = choose_pivot(residual, share, state, launch);
      if (thread == 0) *chosen = pivot;
    }
    __syncthreads();
    const int pivot = *chosen;
    if (pivot < 0) break;
    const double pivot_scale = scale[pivot], inverse = 1 / sqrt(residual[pivot]);
    for (int i = thread; i < rank; i += kGramThreads) {
      double* entry = work + static_cast<size_t>(i) * stride + pivot;
      coefficients[i] = *entry;
      *entry = 0;
    }
    __syncthreads();
    for (int q = thread; q < k; q += kGramThreads) {
      double entry = 0;
      if (q == pivot)
        entry = 1;
      else if (state[q] == kOpen)
        entry = gram[static_cast<size_t>(pivot) * k + q] * pivot_scale * scale[q];
      entry = subtract_product(entry, coefficients, work + q, rank, stride) * inverse;
      work[static_cast<size_t>(rank) * stride + q] = entry;
      residual[q] -= entry * entry;
      if (q == pivot) state[q] = kTaken;
    }
  }
  __syncthreads();
  auto finished = [&](double entry, int q, int j) { return state[q] == kTaken && j < rank ? scale[q] * entry : 0.0; };
  for (int q = 0; q < k; ++q) {
    // Each thread turns pairs that no other thread reads.
    for (int j = kShared ? thread : q + thread; j < k; j += kGramThreads) {
      const double upper = work[static_cast<size_t>(j) * stride + q];
      if (!kShared) {
        const double lower = work[static_cast<size_t>(q) * stride + j];
        factor[static_cast<size_t>(j) * k + q] = finished(lower, j, q);
      }
      factor[static_cast<size_t>(q) * k + j] = finished(upper, q, j);
    }
  }
  if (thread == 0) launch.rank[matrix] = rank;
}

}  // namespace sparse_cl
