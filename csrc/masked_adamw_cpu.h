// Between masked_adamw.cpp, which knows torch, and masked_adamw_kernel.cpp, which is compiled once a CPU level.
#pragma once

#include "masked_adamw.h"

namespace sparse_cl {

struct Step {
  Mode mode;
  double lr, beta1, beta2, eps, weight_decay;
  double grad_factor;  // sign for maximize, over the gradient scale
};

// Steps the work items [begin, end) of a task. An item is an entry (dense), a row (rows, columns), or a block of
// kBlock weights (elements, 2:4). Step counts are read, not advanced.
using StepItems = void (*)(const Task&, DType, bool float_grad, const Step&, int64_t begin, int64_t end);

void step_items_baseline(const Task&, DType, bool float_grad, const Step&, int64_t begin, int64_t end);
void step_items_avx2(const Task&, DType, bool float_grad, const Step&, int64_t begin, int64_t end);
void step_items_avx512(const Task&, DType, bool float_grad, const Step&, int64_t begin, int64_t end);

}  // namespace sparse_cl
