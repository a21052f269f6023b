// logits_grad of ../kernels.h, which has the formula: one pass, one exponential per logit.
//
// Memory. Reads sizeof(storage) bytes per logit and about 44 bytes per row, writes sizeof(storage) bytes per logit. The
// logits of rows whose incoming gradients are 0 are not read. Parallelisation: one thread per row.
//
// Numerics. A logit of -inf has e^y = 0 exactly and a finite y, so its gradient is 0. The target's column is computed
// separately in double: 1 - p is -expm1(log p), which keeps its digits as p -> 1.
//
// The statistics contain the target's logit of the forward pass, with all its bits. A different target's logit shows
// that the logits were written after the forward pass: the gradient would be wrong, so the first such row is an error.
#include <algorithm>
#include <cmath>
#include <cstdio>

#include "dispatch.h"

namespace entcov::cpu {
namespace {

struct LogitsGradArgs {
  Logits logits;
  const int64_t* target;
  RowSpec spec;
  const float* stats;
  int fields;
  RowGrads grads;
  const float* clamp;
  void* grad;
  int64_t grad_row_stride;
  int64_t* changed;  // the first row whose target's logit differs from `stats`; not checked if grad is logits
};

template <class D, bool kEntropy, bool kClamped>
struct LogitsGradOp {
  using storage = typename D::storage;
  using Args = LogitsGradArgs;

  struct Coefficients {
    float max, inv_temperature, a, b;       // a and b: of e^y and y e^y
    float threshold, tie_weight, a_k, b_k;  // a_k and b_k: the same for kept tokens
  };

  template <int W>
  static ENTCOV_INLINE f32<W> element(f32<W> x, const Coefficients& c) {
    f32<W> y = (x - c.max) * c.inv_temperature;
    const f32<W> e = exp_nonpositive<W>(y);
    f32<W> factor = splat<W>(c.a);
    if constexpr (kEntropy) factor = y * c.b + c.a;
    if constexpr (kClamped) {
      f32<W> w = x == splat<W>(c.threshold) ? splat<W>(c.tie_weight) : f32<W>{};
      w = x > splat<W>(c.threshold) ? splat<W>(1.0f) : w;
      factor += w * (y * c.b_k + c.a_k);
    }
    return e * factor;
  }

  // Atomic minimum: *changed = min(*changed, t).
  static void report(int64_t* changed, int64_t t) {
    int64_t seen = __atomic_load_n(changed, __ATOMIC_RELAXED);
    while (t < seen && !__atomic_compare_exchange_n(changed, &seen, t, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
    }
  }

  template <int W>
  static ENTCOV_INLINE void row(const Args& a, int64_t t) {
    storage* g = static_cast<storage*>(a.grad) + t * a.grad_row_stride;
    const int64_t width = a.logits.width, n = a.spec.columns(width);
    const double g_lp = a.grads.logprob ? a.grads.logprob[t] : 0.0;
    const double g_h = kEntropy ? a.grads.entropy[t] : 0.0;
    const double g_k = kClamped ? a.grads.clamped_entropy[t] : 0.0;
    if (a.target[t] == a.spec.ignore_index || (g_lp == 0 && g_h == 0 && g_k == 0)) {
      std::fill_n(g, width, storage(0));
      return;
    }
    const storage* x = a.logits.row<storage>(t);
    const float* s = a.stats + t * a.fields;
    const double inv_t = a.spec.inv_temperature, sum = 1.0 + s[1];
    const double log_sum = std::log1p(double(s[1])), mean_y = s[2] / sum;

    Coefficients c{};
    c.max = s[0];
    c.inv_temperature = a.spec.inv_temperature;
    c.a = float((g_h * mean_y - g_lp) * inv_t / sum);
    c.b = float(-g_h * inv_t / sum);
    double clamp_scale = 0, clamp_offset = 0;
    if constexpr (kClamped) {
      const float* k = a.clamp + t * 4;
      clamp_scale = -g_k * inv_t * std::exp(-double(k[2])), clamp_offset = double(k[3]) - k[2];
      c.threshold = k[0], c.tie_weight = k[1];
      c.a_k = float(clamp_scale * clamp_offset), c.b_k = float(clamp_scale);
    }

    if (std::isnan(c.a + c.b + c.a_k + c.b_k + c.max)) {
      std::fill_n(g, n, narrow_one<D>(NAN));
    } else {
      // The target's column comes first, because grad may overwrite logits.
      const int64_t local = a.spec.column_of(a.target[t]);
      const bool mine = local >= 0 && local < n;
      double at_target = 0;
      if (mine) {
        const float xt = widen_one<D>(x + local);
        if (xt != s[3] && g != x) report(a.changed, t);
        const double y = (double(xt) - c.max) * inv_t, p = std::exp(y - log_sum);
        at_target = -g_lp * std::expm1(y - log_sum) * inv_t;
        if (kEntropy && p > 0) at_target -= g_h * p * (y - mean_y) * inv_t;
        if (kClamped && p > 0) {
          const double w = xt > c.threshold ? 1.0 : xt == c.threshold ? c.tie_weight : 0.0;
          at_target += w * clamp_scale * std::exp(y) * (y + clamp_offset);
        }
      }
      for (int64_t j = 0; j < n; j += 2 * W) {
        f32<W> u, v;
        load<D, W>(x + j, n - j, u, v);
        store<D, W>(g + j, n - j, element<W>(u, c), element<W>(v, c));
      }
      if (mine) g[local] = narrow_one<D>(float(at_target));
    }
    std::fill_n(g + n, width - n, storage(0));
  }
};

}  // namespace

Error logits_grad(const Logits& logits, const int64_t* target, const RowSpec& spec, const float* stats, int fields,
                  const RowGrads& grads, const float* clamp, void* grad, int64_t grad_row_stride, Device threads) {
  int64_t changed = logits.T;
  const LogitsGradArgs args{logits, target, spec, stats, fields, grads, clamp, grad, grad_row_stride, &changed};
  with_dtype(logits.dtype, [&](auto d) {
    using D = decltype(d);
    if (grads.entropy && grads.clamped_entropy) return for_rows<LogitsGradOp<D, true, true>>(args, logits, threads);
    if (grads.entropy) return for_rows<LogitsGradOp<D, true, false>>(args, logits, threads);
    if (grads.clamped_entropy) return for_rows<LogitsGradOp<D, false, true>>(args, logits, threads);
    return for_rows<LogitsGradOp<D, false, false>>(args, logits, threads);
  });
  if (changed == logits.T) return nullptr;
  const float now = with_dtype(logits.dtype, [&](auto d) {
    using D = decltype(d);
    return widen_one<D>(logits.row<typename D::storage>(changed) + spec.column_of(target[changed]));
  });
  static thread_local char message[200];
  snprintf(message, sizeof message,
           "logits must not be changed between forward and backward, which reads them again: in row %lld the target's "
           "logit was %.9g and is %.9g",
           static_cast<long long>(changed), stats[changed * fields + 3], now);
  return message;
}

}  // namespace entcov::cpu
