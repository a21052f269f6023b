// logit_covariance_grad of ../kernels.h, which has the formula: one pass, two exponentials per column.
//
// Memory. Reads 2 sizeof(storage) bytes per column, writes sizeof(storage). The logits of rows that are masked, or
// whose incoming gradients are 0, are not read. Parallelisation: one thread per row.
//
// Numerics. exp_nonpositive() makes e^x of a logit of -inf exactly 0 and limits x to -88, so no product is NaN.
#include <algorithm>
#include <cmath>

#include "dispatch.h"

namespace entcov::cpu {
namespace {

template <class D>
struct LogitCovarianceGradOp {
  using storage = typename D::storage;
  struct Args {
    Logits logits_old, logits_new;
    const uint8_t* row_mask;
    RowSpec spec;
    const float* stats;
    CovarianceGrads grads;
    void* grad;
    int64_t grad_row_stride;
  };

  struct Coefficients {
    float max_old, max_new, inv_temperature, a_old, b_old, a_new, b_new;
  };

  template <int W>
  static ENTCOV_INLINE f32<W> element(f32<W> u, f32<W> v, const Coefficients& c) {
    f32<W> x = (u - c.max_old) * c.inv_temperature, z = (v - c.max_new) * c.inv_temperature;
    const f32<W> p = exp_nonpositive<W>(x), q = exp_nonpositive<W>(z);
    return p * (x * c.b_old + c.a_old) + q * (z * c.b_new + c.a_new);
  }

  template <int W>
  static ENTCOV_INLINE void row(const Args& a, int64_t t) {
    storage* g = static_cast<storage*>(a.grad) + t * a.grad_row_stride;
    const int64_t width = a.logits_new.width, n = a.spec.columns(width);
    const float inv_temperature = a.spec.inv_temperature;
    const double g_cov = a.grads.covariance ? a.grads.covariance[t] : 0.0;
    const double g_h = a.grads.entropy_change ? a.grads.entropy_change[t] : 0.0;
    const double g_kl = a.grads.kl ? a.grads.kl[t] : 0.0;
    if ((a.row_mask && !a.row_mask[t]) || (g_cov == 0 && g_h == 0 && g_kl == 0)) {
      std::fill_n(g, width, storage(0));
      return;
    }
    const float* s = a.stats + t * kCovarianceFields;
    const double scale_old = inv_temperature / (1.0 + s[1]), mean_x = s[2] / (1.0 + s[1]);
    const double scale_new = inv_temperature / (1.0 + s[4]), mean_z = s[5] / (1.0 + s[4]);
    const Coefficients c{s[0],
                         s[3],
                         inv_temperature,
                         float(scale_old * (-g_kl - g_cov * mean_x)),
                         float(scale_old * g_cov),
                         float(scale_new * (g_kl + g_h * mean_z)),
                         float(-scale_new * g_h)};
    if (std::isnan(c.a_old + c.b_old + c.a_new + c.b_new)) {
      std::fill_n(g, n, narrow_one<D>(NAN));
    } else {
      const storage *old_row = a.logits_old.template row<storage>(t), *new_row = a.logits_new.template row<storage>(t);
      for (int64_t j = 0; j < n; j += 2 * W) {
        f32<W> u0, u1, v0, v1;
        load<D, W>(old_row + j, n - j, u0, u1);
        load<D, W>(new_row + j, n - j, v0, v1);
        store<D, W>(g + j, n - j, element<W>(u0, v0, c), element<W>(u1, v1, c));
      }
    }
    std::fill_n(g + n, width - n, storage(0));
  }
};

}  // namespace

Error logit_covariance_grad(const Logits& logits_old, const Logits& logits_new, const uint8_t* row_mask,
                            const RowSpec& spec, const float* stats, const CovarianceGrads& grads, void* grad,
                            int64_t grad_row_stride, Device threads) {
  with_dtype(logits_new.dtype, [&](auto d) {
    for_rows<LogitCovarianceGradOp<decltype(d)>>(
        {logits_old, logits_new, row_mask, spec, stats, grads, grad, grad_row_stride}, logits_new, threads);
  });
  return nullptr;
}

}  // namespace entcov::cpu
