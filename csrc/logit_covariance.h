// CovarianceStats: the statistics of one row of two logit tensors, old and new (before and after a step), or of any
// part of the row, and the merge of two parts.
//
// Let x = (logit_old - max_old) / temperature, z = (logit_new - max_new) / temperature, d = z - x (the change of the
// tempered logit up to a constant of the row), U = kChangeUnit / temperature, and sum' as in row_stats.h:
//
//   max_old, sum_exp_m1_old, sum_xexp_old   as RowStats of logits_old: sum' e^x, sum x e^x
//   max_new, sum_exp_m1_new, sum_xexp_new   as RowStats of logits_new: sum' e^z, sum z e^z
//   sum_d                                   sum e^x d / U      E_old[d]   = U sum_d  / (1 + sum_exp_m1_old)
//   sum_xd                                  sum e^x x d / U    E_old[x d] = U sum_xd / (1 + sum_exp_m1_old)
//
//   covariance       Cov_{a~old}(log p_old(a), dz_a) = E_old[x d] - E_old[x] E_old[d]; its negative is the entropy
//                    change to first order
//   KL(old || new)   L_new - L_old - E_old[d]
//   entropy change   H_new - H_old
//
// Numerics. |L_new - L_old| is log1p(|sum_exp_m1_new - sum_exp_m1_old| / (1 + the smaller of the two)), which cancels
// neither for a small step nor for the collapse of a flat row. d is formed from logit_new - logit_old, which is exact
// for a small step, and not from z - x. The logits are first divided by kChangeUnit, a power of 2, so that neither
// their differences nor sums of 2^24 differences overflow: every output that fits fp32 is finite. The division rounds
// only logits whose quotient is denormal, by less than 1e-37.
//
// A column with probability 0 in the old policy (-inf, or e^x = 0) is left out of sum_d and sum_xd, whatever its new
// logit is. A column that only the new logits exclude makes sum_d = -inf: then KL is +inf, and the covariance may be
// infinite or NaN. A NaN or +inf in one of the tensors makes sum_exp_m1 of that tensor, sum_d and sum_xd NaN.
#pragma once

#include "row_stats.h"

namespace entcov {

struct CovarianceStats {
  float max_old = -INFINITY;
  float sum_exp_m1_old = 0.0f;
  float sum_xexp_old = 0.0f;
  float max_new = -INFINITY;
  float sum_exp_m1_new = 0.0f;
  float sum_xexp_new = 0.0f;
  float sum_d = 0.0f;
  float sum_xd = 0.0f;
};

constexpr int kCovarianceFields = 8;
constexpr float kChangeUnit = 67108864.0f;  // 2^26

// The statistics of two parts of a row together. Associative and commutative up to rounding.
ENTCOV_HD CovarianceStats merge(const CovarianceStats& a, const CovarianceStats& b, float inv_temperature) {
  const RowStats before = merge(RowStats{a.max_old, a.sum_exp_m1_old, a.sum_xexp_old},
                                RowStats{b.max_old, b.sum_exp_m1_old, b.sum_xexp_old}, inv_temperature);
  const RowStats after = merge(RowStats{a.max_new, a.sum_exp_m1_new, a.sum_xexp_new},
                               RowStats{b.max_new, b.sum_exp_m1_new, b.sum_xexp_new}, inv_temperature);
  CovarianceStats r;
  r.max_old = before.max, r.sum_exp_m1_old = before.sum_exp_m1, r.sum_xexp_old = before.sum_xexp;
  r.max_new = after.max, r.sum_exp_m1_new = after.sum_exp_m1, r.sum_xexp_new = after.sum_xexp;
  r.sum_d = r.sum_xd = 0.0f * (before.sum_exp_m1 + after.sum_exp_m1);  // 0, or NaN if one of the tensors holds a NaN
  const CovarianceStats* parts[2] = {&a, &b};
  for (const CovarianceStats* p : parts) {
    const Shift s = shift_between(p->max_old, r.max_old, inv_temperature);
    if (!(s.factor > 0.0f)) continue;
    // The change of d, in units of kChangeUnit, from the part's maxima to the merged ones. max_new may be -inf in both.
    constexpr float kUnits = 1.0f / kChangeUnit;
    const float moved = (p->max_new == r.max_new ? 0.0f : p->max_new * kUnits - r.max_new * kUnits) -
                        (p->max_old * kUnits - r.max_old * kUnits);
    const float total = 1.0f + p->sum_exp_m1_old;
    r.sum_d += (p->sum_d + moved * total) * s.factor;
    r.sum_xd +=
        (p->sum_xd + s.distance * p->sum_d + moved * p->sum_xexp_old + s.distance * moved * total) * s.factor;
  }
  return r;
}

ENTCOV_HD CovarianceStats load_covariance_stats(const float* p) {
  return {p[0], p[1], p[2], p[3], p[4], p[5], p[6], p[7]};
}

// The outputs of whole rows, [T] each; all null if the row is a shard.
struct CovarianceOutputs {
  float *covariance, *predicted_entropy_change, *entropy_change, *kl;
};

// Writes the statistics of row t, and its outputs if there are any. A whole row without a finite logit in one of the
// tensors becomes NaN. Returns whether the row is NaN.
ENTCOV_HD bool store_covariance_row(CovarianceStats s, int64_t t, float inv_temperature, float* stats,
                                    const CovarianceOutputs& out) {
  if (out.covariance) {
    if (s.max_old == -INFINITY) s.sum_exp_m1_old = s.sum_d = s.sum_xd = NAN;
    if (s.max_new == -INFINITY) s.sum_exp_m1_new = s.sum_d = s.sum_xd = NAN;
    const float unit = kChangeUnit * inv_temperature;
    const float total_old = 1.0f + s.sum_exp_m1_old, total_new = 1.0f + s.sum_exp_m1_new;
    const float mean_x = s.sum_xexp_old / total_old, mean_d = s.sum_d / total_old;
    const float grown = s.sum_exp_m1_new - s.sum_exp_m1_old;
    const float log_ratio = copysignf(log1pf(fabsf(grown) / fminf(total_old, total_new)), grown);  // L_new - L_old
    const float covariance = (s.sum_xd / total_old - mean_x * mean_d) * unit;
    out.covariance[t] = covariance;
    out.predicted_entropy_change[t] = -covariance;
    out.entropy_change[t] = log_ratio - s.sum_xexp_new / total_new + mean_x;
    out.kl[t] = log_ratio - mean_d * unit;
  }
  float* p = stats + t * kCovarianceFields;
  p[0] = s.max_old, p[1] = s.sum_exp_m1_old, p[2] = s.sum_xexp_old, p[3] = s.max_new;
  p[4] = s.sum_exp_m1_new, p[5] = s.sum_xexp_new, p[6] = s.sum_d, p[7] = s.sum_xd;
  return s.sum_exp_m1_old != s.sum_exp_m1_old || s.sum_exp_m1_new != s.sum_exp_m1_new;
}

ENTCOV_HD void store_masked_row(int64_t t, float* stats, const CovarianceOutputs& out) {
  for (int i = 0; i < kCovarianceFields; i++) stats[t * kCovarianceFields + i] = 0.0f;
  if (out.covariance)
    out.covariance[t] = out.predicted_entropy_change[t] = out.entropy_change[t] = out.kl[t] = 0.0f;
}

}  // namespace entcov
