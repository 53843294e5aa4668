// active_norm and scale_active_ on the CPU.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>
#include <vector>

#include "clip_grad_args.h"

namespace sparse_cl {
namespace {

// Slots of a chunk, which one thread takes whole: sums do not depend on the number of threads. A multiple of 32.
constexpr int64_t kChunk = 8192;
constexpr int kLanes = 32;  // independent sums, so that the compiler may use vectors

template <typename G>
class SquareSum {
  using T = typename Storage<G>::acc;

 public:
  // Takes the entries at(0) .. at(n - 1) for which on(i).
  template <typename At, typename On>
  void operator()(int64_t n, At at, On on) {
    auto add = [&](T& sum, int64_t i) {
      const T x = Storage<G>::load(at(i)), square = x * x;
      sum += on(i) ? square : T(0);
    };
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes)
      for (int k = 0; k < kLanes; ++k) add(lanes_[k], i + k);
    // By turns: short rows would all fall into the first lanes, and long sums of float32 lose digits.
    for (; i < n; ++i) add(lanes_[turn_++ % kLanes], i);
  }

  double total() const {
    double sum = 0;
    for (T lane : lanes_) sum += lane;
    return sum;
  }

 private:
  T lanes_[kLanes]{};
  uint32_t turn_ = 0;
};

template <typename G>
class Scale {
  using T = typename Storage<G>::acc;
  // Copies of structs keep loops from being vectorized.
  using Raw = std::conditional_t<sizeof(G) == 2, uint16_t, std::conditional_t<sizeof(G) == 4, uint32_t, uint64_t>>;

 public:
  explicit Scale(double factor) : factor_(static_cast<T>(factor)) {}

  template <typename At, typename On>
  void operator()(int64_t n, At at, On on) {
    for (int64_t i = 0; i < n; ++i) {
      Raw old;
      memcpy(&old, &at(i), sizeof(G));
      const Raw next = bit_cast<Raw>(Storage<G>::store(Storage<G>::load(bit_cast<G>(old)) * factor_));
      const Raw chosen = on(i) ? next : old;
      memcpy(&at(i), &chosen, sizeof(G));
    }
  }

 private:
  T factor_;
};

constexpr uint32_t kBit[32] = {1u << 0,  1u << 1,  1u << 2,  1u << 3,  1u << 4,  1u << 5,  1u << 6,  1u << 7,
                               1u << 8,  1u << 9,  1u << 10, 1u << 11, 1u << 12, 1u << 13, 1u << 14, 1u << 15,
                               1u << 16, 1u << 17, 1u << 18, 1u << 19, 1u << 20, 1u << 21, 1u << 22, 1u << 23,
                               1u << 24, 1u << 25, 1u << 26, 1u << 27, 1u << 28, 1u << 29, 1u << 30, 1u << 31};

// Hands the slots from `begin` to `end` of a task to `visit`.
template <typename G, typename Visit>
void walk(const ClipTask& task, int64_t begin, int64_t end, Visit& visit) {
  G* grad = static_cast<G*>(task.grad);
  const int32_t* index = task.index;
  auto always = [](int64_t) { return true; };
  switch (task.walk) {
    case Walk::kAll:
      visit(end - begin, [p = grad + begin](int64_t i) -> G& { return p[i]; }, always);
      break;
    case Walk::kRows:
      for (int64_t n; begin < end; begin += n) {
        const int64_t column = begin % task.inner;
        n = std::min(end - begin, task.inner - column);
        G* p = grad + index[begin / task.inner] * task.inner + column;
        visit(n, [p](int64_t i) -> G& { return p[i]; }, always);
      }
      break;
    case Walk::kColumns:
      for (int64_t n; begin < end; begin += n) {
        const int64_t unit = begin % task.units;
        n = std::min(end - begin, task.units - unit);
        G* row = grad + begin / task.units * task.inner;
        visit(n, [row, at = index + unit](int64_t i) -> G& { return row[at[i]]; }, always);
      }
      break;
    case Walk::kBits:
      for (; begin < end; begin += 32) {
        const uint32_t bits = static_cast<uint32_t>(index[begin / 32]);
        if (bits == 0) continue;
        visit(
            std::min<int64_t>(32, end - begin), [p = grad + begin](int64_t i) -> G& { return p[i]; },
            [bits](int64_t i) { return (bits & kBit[i]) != 0; });
      }
      break;
  }
}

// The first chunk of each task, and at the end the number of chunks.
std::vector<int64_t> first_chunks(const std::vector<ClipTask>& tasks) {
  std::vector<int64_t> first{0};
  for (const ClipTask& task : tasks) first.push_back(first.back() + (task.slots + kChunk - 1) / kChunk);
  return first;
}

// Calls f(task, first slot, end of slots, chunk) for each chunk.
template <typename F>
void for_each_chunk(const std::vector<ClipTask>& tasks, const std::vector<int64_t>& first, F&& f) {
  torch::stable::parallel_for(0, first.back(), 8, [&](int64_t begin, int64_t end) {
    size_t t = std::upper_bound(first.begin(), first.end(), begin) - first.begin() - 1;
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      while (first[t + 1] <= chunk) ++t;
      const int64_t slot = (chunk - first[t]) * kChunk;
      f(tasks[t], slot, std::min(slot + kChunk, tasks[t].slots), chunk);
    }
  });
}

Tensor active_norm(const TensorList& grads, const TensorList& states, Tensor layout) {
  const ClipCall call = make_clip_call(grads, states, layout, "active_norm");
  double total = 0;
  for (const ClipBucket& bucket : call.buckets) {
    const std::vector<int64_t> first = first_chunks(bucket.tasks);
    std::vector<double> sums(first.back());
    dispatch_grad(bucket.dtype, [&](auto grad) {
      using G = decltype(grad);
      for_each_chunk(bucket.tasks, first, [&](const ClipTask& task, int64_t begin, int64_t end, int64_t chunk) {
        SquareSum<G> sum;
        walk<G>(task, begin, end, sum);
        sums[chunk] = sum.total();
      });
    });
    for (double sum : sums) total += sum;
  }
  Tensor norm = new_norm(call, grads, layout);
  if (call.float64)
    *static_cast<double*>(norm.data_ptr()) = std::sqrt(total);
  else
    *static_cast<float*>(norm.data_ptr()) = static_cast<float>(std::sqrt(total));
  return norm;
}

void scale_active_(const TensorList& grads, const TensorList& states, Tensor layout, Tensor factor) {
  const bool float64 = is_float64_factor(factor, grads);
  ClipCall call = make_clip_call(grads, states, layout, "scale_active_");
  const double by = float64 ? *static_cast<const double*>(factor.data_ptr())
                            : static_cast<double>(*static_cast<const float*>(factor.data_ptr()));
  if (by == 1) return;
  for (const ClipBucket& bucket : call.buckets) {
    dispatch_grad(bucket.dtype, [&](auto grad) {
      using G = decltype(grad);
      const std::vector<int64_t> first = first_chunks(bucket.tasks);
      for_each_chunk(bucket.tasks, first, [&](const ClipTask& task, int64_t begin, int64_t end, int64_t) {
        Scale<G> scale(by);
        walk<G>(task, begin, end, scale);
      });
    });
  }
  call.finish();
}

}  // namespace
}  // namespace sparse_cl

STABLE_TORCH_LIBRARY_IMPL(sparse_cl, CPU, m) {
  m.impl("active_norm", TORCH_BOX(&sparse_cl::FromHandles<&sparse_cl::active_norm>::call));
  m.impl("scale_active_", TORCH_BOX(&sparse_cl::FromHandles<&sparse_cl::scale_active_>::call));
}
