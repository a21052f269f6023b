// RowStats: what one row of logits (or any part of it) becomes, and the one merge that joins two parts.
//
// With x the raw logit and y_j = (x_j - max) / temperature, every sum leaves out ONE occurrence of the maximum,
// whose own term is known (e^0 = 1, y = 0):
//
//   max         largest raw logit; -inf: nothing finite seen
//   sum_exp_m1        sum' e^y          L = log1p(sum_exp_m1), lse = max / temperature + L
//   sum_xexp    sum  y e^y        H = L - sum_xexp / (1 + sum_exp_m1)
//   target      raw logit of the target; -inf: it is not in this part.   logprob = (target - max) / temperature - L
//   sum_exp2_m1       sum' e^{2y}       sum_j p_j^2 = (1 + sum_exp2_m1) / (1 + sum_exp_m1)^2
//   sum_xexp2   sum  y e^{2y}     with the above: what a policy-gradient step on the target does to the entropy
//   sum_x2exp   sum  y^2 e^y      Var_p(log p) = E[y^2] - E[y]^2
//
// Numerics. Both terms of H are >= 0, so nothing cancels. Leaving the maximum out keeps the digits of a peaked row:
// there 1 + sum_exp_m1 rounds to 1, but sum_exp_m1 itself (1e-7, say) still has 24 bits, and so have L and H. `max` and `target`
// stay raw, so the subtraction comes before the division by the temperature and an offset of 1e4 costs nothing. Where a
// difference of logits overflows fp32, y is beyond -3e38 / 1e30 and e^y = 0 all the same; who wants y itself, as logprob
// does, has to subtract halves.
//
// A row that holds a NaN or a +inf has sum_exp_m1 = NaN, and merge passes it on. A part without a finite logit is the default
// RowStats; merging it changes nothing.
//
// Host and device share this file: C++17, no torch, no Python.
#pragma once

#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define ENTCOV_HD __host__ __device__ __forceinline__
#else
#define ENTCOV_HD inline
#endif

namespace entcov {

struct RowStats {
  float max = -INFINITY;
  float sum_exp_m1 = 0.0f;
  float sum_xexp = 0.0f;
  float target = -INFINITY;
  // Only filled when moments are asked for; zero otherwise.
  float sum_exp2_m1 = 0.0f;
  float sum_xexp2 = 0.0f;
  float sum_x2exp = 0.0f;
};

constexpr int kRowStatsFields = 4;         // without moments
constexpr int kRowStatsMomentsFields = 7;  // with them

// The columns of a shard, and how its rows are read.
struct RowSpec {
  int64_t vocab_start;  // token id of column 0, >= 0
  int64_t vocab_size;   // of the whole row: tokens from here on are padding and do not exist
  float inv_temperature;
  int64_t ignore_index;  // rows with this target are not read: all zeros

  // Of `width` columns, how many exist.
  ENTCOV_HD int64_t columns(int64_t width) const {
    const int64_t left = vocab_size > vocab_start ? vocab_size - vocab_start : 0;
    return left < width ? left : width;
  }
  // The column of a token; -1: it lies before the shard. Any int64 may be a target.
  ENTCOV_HD int64_t column_of(int64_t token) const { return token < vocab_start ? -1 : token - vocab_start; }
  ENTCOV_HD bool is_token(int64_t target) const { return target >= 0 && target < vocab_size; }
};

// e^d below this is 0 in fp32 (the smallest denormal is e^-103.97).
constexpr float kExpFloor = -104.0f;

// How far the maximum of `lo` lies below that of `hi` on the tempered scale (<= 0), and the factor that carries its
// sums over. A part that is empty or out of sight gets factor 0 and distance 0, so that 0 * inf never arises.
struct Shift {
  float distance;
  float factor;
};

ENTCOV_HD Shift shift_between(float lo_max, float hi_max, float inv_temperature) {
  const float d = (lo_max - hi_max) * inv_temperature;
  return d > kExpFloor ? Shift{d, expf(d)} : Shift{0.0f, 0.0f};  // both empty: d is NaN, and this is still right
}

// Joins two parts of a row. Associative and commutative up to rounding; one exponential.
ENTCOV_HD RowStats merge(const RowStats& a, const RowStats& b, float inv_temperature) {
  const bool a_high = a.max >= b.max;
  const RowStats& hi = a_high ? a : b;
  const RowStats& lo = a_high ? b : a;
  const Shift s = shift_between(lo.max, hi.max, inv_temperature);
  const float d = s.distance, k = s.factor, k2 = k * k;
  const float total = 1.0f + lo.sum_exp_m1, total2 = 1.0f + lo.sum_exp2_m1;  // lo's maximum is no longer left out
  RowStats r;
  r.max = hi.max;
  r.sum_exp_m1 = hi.sum_exp_m1 + total * k;
  r.sum_xexp = hi.sum_xexp + (lo.sum_xexp + d * total) * k;
  r.sum_exp2_m1 = hi.sum_exp2_m1 + total2 * k2;
  r.sum_xexp2 = hi.sum_xexp2 + (lo.sum_xexp2 + d * total2) * k2;
  r.sum_x2exp = hi.sum_x2exp + (lo.sum_x2exp + 2.0f * d * lo.sum_xexp + d * d * total) * k;
  r.target = a.target > b.target ? a.target : b.target;
  return r;
}

ENTCOV_HD RowStats load_stats(const float* p, int fields) {
  RowStats s;
  s.max = p[0], s.sum_exp_m1 = p[1], s.sum_xexp = p[2], s.target = p[3];
  if (fields == kRowStatsMomentsFields) s.sum_exp2_m1 = p[4], s.sum_xexp2 = p[5], s.sum_x2exp = p[6];
  return s;
}

// What people want of a whole row, [T] each. logprob null: the row is a shard, and has none of it. collision null: so are
// the two after it, which need the moments.
struct RowOutputs {
  float *logprob, *entropy;
  float *collision, *varentropy, *entropy_drift;
};

// Writes row t, of `fields` statistics, and its outputs. A whole row without a finite logit becomes NaN. Returns whether it
// is NaN.
ENTCOV_HD bool store_row(RowStats s, int64_t t, int fields, float inv_temperature, float* stats,
                         const RowOutputs& out) {
  if (out.logprob) {
    if (s.max == -INFINITY) s.sum_exp_m1 = NAN;
    const float total = 1.0f + s.sum_exp_m1, log_total = log1pf(s.sum_exp_m1), mean = s.sum_xexp / total;
    const float logprob = (0.5f * s.target - 0.5f * s.max) * (2.0f * inv_temperature) - log_total;
    const float entropy = log_total - mean;
    out.logprob[t] = logprob;
    out.entropy[t] = entropy;
    if (out.collision) {
      const float collision = (1.0f + s.sum_exp2_m1) / (total * total);
      // E_p[S] = H sum p^2 + sum p^2 log p;  S_target = p_target (H + log p_target), 0 where logprob is -inf
      const float mean_s = entropy * collision + (s.sum_xexp2 - log_total * (1.0f + s.sum_exp2_m1)) / (total * total);
      const float p = expf(logprob);
      out.collision[t] = collision;
      out.varentropy[t] = s.sum_x2exp / total - mean * mean;
      out.entropy_drift[t] = mean_s - (p == 0.0f ? 0.0f : p * (entropy + logprob));
    }
  }
  float* p = stats + t * fields;
  p[0] = s.max, p[1] = s.sum_exp_m1, p[2] = s.sum_xexp, p[3] = s.target;
  if (fields == kRowStatsMomentsFields) p[4] = s.sum_exp2_m1, p[5] = s.sum_xexp2, p[6] = s.sum_x2exp;
  return s.sum_exp_m1 != s.sum_exp_m1;
}

ENTCOV_HD void store_ignored_row(int64_t t, int fields, float* stats, const RowOutputs& out) {
  for (int i = 0; i < fields; i++) stats[t * fields + i] = 0.0f;
  if (out.logprob) out.logprob[t] = out.entropy[t] = 0.0f;
  if (out.collision) out.collision[t] = out.varentropy[t] = out.entropy_drift[t] = 0.0f;
}

}  // namespace entcov
