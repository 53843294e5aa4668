// The CPU kernel of masked_adamw_. Compiled once for each CPU level, with SPARSE_CL_STEP_ITEMS naming its entry;
// so everything else here has internal linkage, or the linker could keep the copy that only the newest CPUs run.
#include <algorithm>
#include <numeric>
#include <type_traits>

#include "masked_adamw_cpu.h"
#ifdef __AVX2__
#include "masked_adamw_lanes.h"
#endif

namespace sparse_cl {
namespace {

constexpr int64_t kBuffer = 512;  // entries gathered at a time; they stay in the first-level cache

// Contiguous active entries of one parameter, or gathered copies of them.
template <typename P, typename G, bool kByRow>
struct Span {
  using acc = typename Storage<P>::acc;
  P* param;
  const G* grad;
  acc *exp_avg, *exp_avg_sq, *max_exp_avg_sq, *master;  // by row, exp_avg_sq is the one of all these entries
  const uint8_t* cohort;                                // one an entry, or null
  const float* gain;                                    // one an entry, or null
  int64_t first;                                        // index of the first entry in the compact state
  int64_t size;

  // The `count` entries from entry `begin` of these.
  Span part(int64_t begin, int64_t count) const {
    auto from = [begin](auto* x) { return x ? x + begin : nullptr; };
    return {param + begin,        grad + begin, from(exp_avg), kByRow ? exp_avg_sq : from(exp_avg_sq),
            from(max_exp_avg_sq), from(master), from(cohort),  from(gain),
            first + begin,        count};
  }
};

template <typename T>
struct Rule {
  Hyper<T> hyper;
  T grad_factor;
  uint32_t seed;
  int32_t cohorts;
  int32_t step[256];
  Rates<T> rates[256];

  Rule(const Task& task, const Step& s)
      : hyper{s.lr,           s.beta1,        s.beta2,    std::log(s.beta1), std::log(s.beta2),
              s.weight_decay, T(1 - s.beta1), T(s.beta2), T(1 - s.beta2),    T(s.eps)},
        grad_factor(static_cast<T>(s.grad_factor)),
        seed(task.seed),
        cohorts(task.cohorts) {
    for (int32_t c = 0; c < cohorts; ++c) {
      step[c] = task.steps()[c] + (s.mode == Mode::kAdd ? 0 : 1);
      rates[c] = sparse_cl::rates<T>(hyper, hyper.lr, step[c], T(1));
    }
  }

  Rates<T> with_gain(int32_t c, T gain) const {
    const T rate = gain * static_cast<T>(hyper.lr);
    return {T(1) - rate * static_cast<T>(hyper.weight_decay), gain * rates[c].step_size, rates[c].rsqrt_correction};
  }
};

// One entry's moments, and what `param` becomes.
template <Mode kMode, typename T>
inline __attribute__((always_inline)) T advanced(T param, T grad, T& exp_avg, T& exp_avg_sq, T& max_exp_avg_sq,
                                                 const Hyper<T>& hyper, const Rates<T>& r) {
  if constexpr (kMode != Mode::kByRow)
    return adamw<T, kMode == Mode::kAmsgrad>(param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, hyper, r);
  average(exp_avg, grad, hyper);
  return descend(param, exp_avg, exp_avg_sq, hyper, r);
}

// Entries that differ in step count or gain.
template <Mode kMode, bool kMaster, typename P, typename G, typename T>
void step_varying(const Span<P, G, kMode == Mode::kByRow>& s, const Rule<T>& rule) {
  constexpr bool kAmsgrad = kMode == Mode::kAmsgrad, kByRow = kMode == Mode::kByRow;
  for (int64_t i = 0; i < s.size; ++i) {
    const int32_t c = s.cohort ? s.cohort[i] : 0;
    const Rates<T> r = rule.with_gain(c, s.gain ? static_cast<T>(s.gain[i]) : T(1));
    const T old = kMaster ? s.master[i] : Storage<P>::load(s.param[i]);
    T unused = 0;
    const T grad = static_cast<T>(Storage<G>::load(s.grad[i])) * rule.grad_factor;
    const T now = advanced<kMode>(old, grad, s.exp_avg[i], s.exp_avg_sq[kByRow ? 0 : i],
                                  kAmsgrad ? s.max_exp_avg_sq[i] : unused, rule.hyper, r);
    const uint64_t entry = static_cast<uint64_t>(s.first + i);
    if (kMaster) s.master[i] = now;
    if (kMaster || !Storage<P>::kNarrow) {
      s.param[i] = Storage<P>::store(now);
    } else {
      const uint32_t key = random_key(rule.seed, rule.step[c], static_cast<uint32_t>(entry >> 32));
      s.param[i] = Storage<P>::store_stochastic(now, random_bits(key, static_cast<uint32_t>(entry)));
    }
  }
}

// Entries that share their rates, as vector code.
template <Mode kMode, bool kMaster, typename P, typename G, typename T>
void step_uniform(const Span<P, G, kMode == Mode::kByRow>& s, const Rule<T>& rule, int32_t cohort,
                  const Rates<T>& rates) {
  constexpr bool kAmsgrad = kMode == Mode::kAmsgrad, kByRow = kMode == Mode::kByRow;
  P* __restrict param = s.param;
  const G* __restrict grad = s.grad;
  T* __restrict exp_avg = s.exp_avg;
  T* __restrict exp_avg_sq = s.exp_avg_sq;
  T* __restrict max_exp_avg_sq = s.max_exp_avg_sq;
  T* __restrict master = s.master;
  const Hyper<T> hyper = rule.hyper;
  const Rates<T> r = rates;
  const T factor = rule.grad_factor;
  const uint32_t lower = static_cast<uint32_t>(s.first);
  const uint32_t key = random_key(rule.seed, rule.step[cohort], static_cast<uint32_t>(s.first >> 32));
  const int64_t size = s.size;
  int64_t begin = 0;
#ifdef __AVX2__
  if constexpr (kHasLanes<P, kMaster>)
    begin = step_lanes<kMaster, kByRow>(param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, master, size,
                                        LaneUpdate(hyper, r, factor), key, lower);
#endif
#pragma omp simd
  for (int64_t i = begin; i < size; ++i) {
    const T old = kMaster ? master[i] : Storage<P>::load(param[i]);
    T m = exp_avg[i], v = exp_avg_sq[kByRow ? 0 : i], v_max = kAmsgrad ? max_exp_avg_sq[i] : T(0);
    const T g = static_cast<T>(Storage<G>::load(grad[i])) * factor;
    const T now = advanced<kMode>(old, g, m, v, v_max, hyper, r);
    exp_avg[i] = m;
    if (!kByRow) exp_avg_sq[i] = v;
    if (kAmsgrad) max_exp_avg_sq[i] = v_max;
    if (kMaster) master[i] = now;
    if (kMaster || !Storage<P>::kNarrow)
      param[i] = Storage<P>::store(now);
    else
      param[i] = Storage<P>::store_stochastic(now, random_bits(key, lower + static_cast<uint32_t>(i)));
  }
}

// The mean of squares of a row, times `weight`. Sixteen sums, whatever the instructions, so that all levels agree in
// every bit; `weight` comes first, as a square alone may overflow.
template <typename G, typename T>
T mean_square(const G* grad, int64_t size, T factor, T weight) {
  constexpr int64_t kSums = 16;
  weight /= static_cast<T>(size);
  T sums[kSums]{};
  auto add = [&](int64_t i, int64_t k) {
    const T g = static_cast<T>(Storage<G>::load(grad[i + k])) * factor;
    sums[k] += weight * g * g;
  };
  int64_t i = 0;
  for (; i + kSums <= size; i += kSums)
    for (int64_t k = 0; k < kSums; ++k) add(i, k);
  for (int64_t k = 0; i + k < size; ++k) add(i, k);
  return std::accumulate(sums, sums + kSums, T(0));
}

// Adds updates, which stand where gradients do.
template <bool kMaster, typename P, typename G, typename T>
void add_updates(const Span<P, G, false>& s, const Rule<T>& rule, int32_t shared_cohort) {
  for (int64_t i = 0; i < s.size; ++i) {
    const T now = (kMaster ? s.master[i] : Storage<P>::load(s.param[i])) + static_cast<T>(Storage<G>::load(s.grad[i]));
    if (kMaster) s.master[i] = now;
    if (kMaster || !Storage<P>::kNarrow) {
      s.param[i] = Storage<P>::store(now);
    } else {
      const uint64_t entry = static_cast<uint64_t>(s.first + i);
      const int32_t step = rule.step[s.cohort ? s.cohort[i] : shared_cohort];
      const uint32_t key = random_key(rule.seed, step, static_cast<uint32_t>(entry >> 32));
      s.param[i] = Storage<P>::store_stochastic(now, random_bits(key, static_cast<uint32_t>(entry)));
    }
  }
}

// Writes base + the index of each set bit, and returns how many there are. Up to 64 values are overwritten: writing
// eight at a time whether or not they are wanted costs less than a branch that is often mispredicted.
inline int64_t positions_of(uint64_t word, int32_t base, int32_t* out) {
  const int64_t count = __builtin_popcountll(word);
  for (int64_t n = 0; n < count; n += 8)
    for (int k = 0; k < 8; ++k) {
      out[n + k] = base + __builtin_ctzll(word | (uint64_t{1} << 63));
      word &= word - 1;
    }
  return count;
}

template <Mode kMode, bool kMaster, typename P, typename G>
struct Kernel {
  using T = typename Storage<P>::acc;
  static constexpr bool kAdd = kMode == Mode::kAdd, kByRow = kMode == Mode::kByRow;
  using Spanned = Span<P, G, kByRow>;

  const Task& task;
  const Rule<T> rule;
  P* const param;
  const G* const grad;
  T *const exp_avg, *const exp_avg_sq, *const max_exp_avg_sq, *const master;
  const int32_t* const index;
  const float* const gain;
  const uint8_t* const cohort;

  Kernel(const Task& t, const Step& s)
      : task(t),
        rule(t, s),
        param(static_cast<P*>(t.param)),
        grad(static_cast<const G*>(t.grad)),
        exp_avg(t.at<T>(t.exp_avg)),
        exp_avg_sq(t.at<T>(t.exp_avg_sq)),
        max_exp_avg_sq(t.at<T>(t.max_exp_avg_sq)),
        master(t.at<T>(t.master)),
        index(t.at<int32_t>(t.index)),
        gain(t.at<float>(t.gain)),
        cohort(t.at<uint8_t>(t.cohort)) {}

  // Entries [first, first + size) of the compact state, whose values are at p and g.
  Spanned span(P* p, const G* g, int64_t first, int64_t size) const {
    auto from = [first](T* section) { return section ? section + first : nullptr; };
    return {p, g, from(exp_avg), from(exp_avg_sq), from(max_exp_avg_sq), from(master), nullptr, nullptr, first, size};
  }

  const uint8_t* entry_cohort(int64_t first) const { return task.scope == Scope::kPerEntry ? cohort + first : nullptr; }

  void step(const Spanned& s, int32_t shared_cohort, const Rates<T>& rates) const {
    if constexpr (kAdd) return add_updates<kMaster>(s, rule, shared_cohort);
    if (!task.update) return advance<kMaster>(s, shared_cohort, rates);
    // As a step of masters that stand where the update is to be.
    P unused[kBuffer];
    T old[kBuffer];
    for (int64_t i = 0; i < s.size; i += kBuffer) {
      T* const update = static_cast<T*>(task.update) + s.first + i;
      Spanned part = s.part(i, std::min(kBuffer, s.size - i));
      for (int64_t k = 0; k < part.size; ++k)
        old[k] = update[k] = kMaster ? part.master[k] : Storage<P>::load(part.param[k]);
      part.param = unused;
      part.master = update;
      advance<true>(part, shared_cohort, rates);
      for (int64_t k = 0; k < part.size; ++k) update[k] -= old[k];
    }
  }

  template <bool kOwnMaster>
  void advance(const Spanned& s, int32_t shared_cohort, const Rates<T>& rates) const {
    if (s.cohort || s.gain) return step_varying<kMode, kOwnMaster>(s, rule);
    // The random stream changes where the entry index passes 2^32.
    const int64_t to_boundary = (int64_t{1} << 32) - (s.first & 0xFFFFFFFF);
    const int64_t before = std::min(s.size, to_boundary);
    step_uniform<kMode, kOwnMaster>(s.part(0, before), rule, shared_cohort, rates);
    if (before < s.size) step_uniform<kMode, kOwnMaster>(s.part(before, s.size - before), rule, shared_cohort, rates);
  }

  void dense(int64_t begin, int64_t end) const {
    Spanned s = span(param + begin, grad + begin, begin, end - begin);
    s.cohort = entry_cohort(begin);
    step(s, 0, rule.rates[0]);
  }

  void rows(int64_t begin, int64_t end) const {
    for (int64_t r = begin; r < end; ++r) {
      const int64_t at = (index ? index[r] : r) * task.inner, first = r * task.inner;
      Spanned s = span(param + at, grad + (task.compact_grad ? first : at), first, task.inner);
      if constexpr (kByRow) {
        T& second = exp_avg_sq[r];
        second =
            rule.hyper.beta2_t * second + mean_square(s.grad, s.size, rule.grad_factor, rule.hyper.one_minus_beta2);
        s.exp_avg_sq = &second;
      }
      s.cohort = entry_cohort(first);
      const int32_t c = task.scope == Scope::kPerUnit ? cohort[r] : 0;
      const T g = gain ? static_cast<T>(gain[r]) : T(1);
      if (s.cohort && gain) {
        rows_of_both(s, g);
      } else {
        step(s, c, gain ? rule.with_gain(c, g) : rule.rates[c]);
      }
    }
  }

  // A row with a gain whose entries have step counts of their own.
  void rows_of_both(Spanned s, T g) const {
    float repeated[kBuffer];
    std::fill(repeated, repeated + std::min(kBuffer, s.size), static_cast<float>(g));
    for (int64_t i = 0; i < s.size; i += kBuffer) {
      Spanned part = s.part(i, std::min(kBuffer, s.size - i));
      part.gain = repeated;
      step(part, 0, rule.rates[0]);
    }
  }

  // Steps entries that lie at base + position[i]: gathered, stepped as a contiguous span, and put back. Where `next` is
  // not 0, entries at base + next + position[i] follow.
  template <typename Cohort, typename Gain>
  void scattered(int64_t base, [[maybe_unused]] int64_t next, const int32_t* position, int64_t first, int64_t size,
                 Cohort at_cohort, Gain at_gain) const {
    int64_t begin = 0;
#ifdef __AVX2__
    if constexpr (kHasLanes<P, kMaster> && !kAdd)
      if (!at_cohort && !at_gain && !task.compact_grad && !task.update && (first + size) >> 32 == 0) {
        const Spanned s = span(param + base, grad + base, first, size);
        begin = step_gathered<kMaster>(s.param, s.grad, position, s.exp_avg, s.exp_avg_sq, s.max_exp_avg_sq, s.master,
                                       size, next, LaneUpdate(rule.hyper, rule.rates[0], rule.grad_factor),
                                       random_key(rule.seed, rule.step[0], 0), static_cast<uint32_t>(first));
      }
#endif
    P value[kBuffer];
    G slope[kBuffer];
    for (int64_t i = begin; i < size; ++i) value[i] = param[base + position[i]];
    if (!task.compact_grad)
      for (int64_t i = begin; i < size; ++i) slope[i] = grad[base + position[i]];
    const G* const gathered = task.compact_grad ? grad + first : slope;
    Spanned s = span(value + begin, gathered + begin, first + begin, size - begin);
    if (at_cohort) s.cohort = at_cohort + begin;
    if (at_gain) s.gain = at_gain + begin;
    step(s, 0, rule.rates[0]);
    if (task.update) return;
    for (int64_t i = begin; i < size; ++i) param[base + position[i]] = value[i];
  }

  void columns(int64_t begin, int64_t end) const {
    for (int64_t row = begin; row < end; ++row)
      for (int64_t u = 0; u < task.units; u += kBuffer) {
        const int64_t first = row * task.units + u;
        const uint8_t* c = task.scope == Scope::kPerUnit ? cohort + u : entry_cohort(first);
        scattered(row * task.inner, row + 1 < end ? task.inner : 0, index + u, first,
                  std::min<int64_t>(kBuffer, task.units - u), c, gain ? gain + u : nullptr);
      }
  }

  void bits(int64_t begin, int64_t end) const {
    const uint32_t* words = reinterpret_cast<const uint32_t*>(index);
    const int64_t start = begin * kBlock, stop = std::min(end * kBlock, task.numel);
    int64_t first = task.kind == Kind::kElements ? task.at<int64_t>(task.ranks)[begin] : start / 2;
    int32_t position[kBuffer + 64];
    int64_t at = start;
#ifdef __AVX2__
    // The random stream changes where the entry index passes 2^32: leave such huge parameters to the loop below.
    if constexpr (kHasLanes<P, kMaster> && !kAdd)
      if (task.kind == Kind::kTwoFour && task.scope == Scope::kShared && task.numel >> 32 == 0 && !task.update) {
        const LaneUpdate update(rule.hyper, rule.rates[0], rule.grad_factor);
        const uint32_t key = random_key(rule.seed, rule.step[0], 0);
        // Whole words of bits only: the loop below begins with one.
        for (; (at | 31) < stop; at += 2 * kLanes, first += kLanes) {
          const Spanned s = span(param + at, grad + at, first, kLanes);
          step_two_four<kMaster>(s.param, s.grad, s.exp_avg, s.exp_avg_sq, s.max_exp_avg_sq, s.master,
                                 words[at / 32] >> at % 32, update, key, static_cast<uint32_t>(first));
        }
      }
#endif
    while (at < stop) {
      int64_t size = 0;
      for (; at < stop && size <= kBuffer - 64; at += 64) {
        uint64_t word = words[at / 32];
        if (at + 32 < stop) word |= static_cast<uint64_t>(words[at / 32 + 1]) << 32;
        size += positions_of(word, static_cast<int32_t>(at - start), position + size);
      }
      scattered(start, 0, position, first, size, entry_cohort(first), static_cast<const float*>(nullptr));
      first += size;
    }
  }

  void operator()(int64_t begin, int64_t end) const {
    if constexpr (kByRow) return rows(begin, end);
    switch (task.kind) {
      case Kind::kDense:
        return dense(begin, end);
      case Kind::kRows:
        return rows(begin, end);
      case Kind::kColumns:
        return columns(begin, end);
      default:
        return bits(begin, end);
    }
  }
};

}  // namespace

void SPARSE_CL_STEP_ITEMS(const Task& task, DType dtype, bool float_grad, const Step& step, int64_t begin,
                          int64_t end) {
  dispatch(dtype, float_grad, [&](auto p, auto g) {
    using P = decltype(p);
    using G = decltype(g);
    auto run = [&](auto mode) {
      constexpr Mode kMode = decltype(mode)::value;
      task.master ? Kernel<kMode, true, P, G>(task, step)(begin, end)
                  : Kernel<kMode, false, P, G>(task, step)(begin, end);
    };
    if constexpr (std::is_same_v<G, typename Storage<P>::acc>)
      if (step.mode == Mode::kAdd) return run(std::integral_constant<Mode, Mode::kAdd>{});
    if (step.mode == Mode::kAmsgrad)
      run(std::integral_constant<Mode, Mode::kAmsgrad>{});
    else if (step.mode == Mode::kByRow)
      run(std::integral_constant<Mode, Mode::kByRow>{});
    else
      run(std::integral_constant<Mode, Mode::kAdamw>{});
  });
}

}  // namespace sparse_cl
