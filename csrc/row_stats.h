// RowStats: the statistics of one row of logits, or of any part of a row, and the merge of two parts.
//
// Let x be the raw logits and y_j = (x_j - max) / temperature. sum' leaves out ONE occurrence of the maximum, whose
// term is known (y = 0, e^y = 1):
//
//   max           largest raw logit; -inf: no finite logit so far
//   sum_exp_m1    sum' e^y         L = log1p(sum_exp_m1), lse = max / temperature + L
//   sum_xexp      sum  y e^y       H = L - sum_xexp / (1 + sum_exp_m1)
//   target        raw logit of the target, -inf if it is not in this part; logprob = (target - max) / temperature - L
//   sum_exp2_m1   sum' e^{2y}      sum_j p_j^2 = (1 + sum_exp2_m1) / (1 + sum_exp_m1)^2
//   sum_xexp2     sum  y e^{2y}    for entropy_drift: how a policy-gradient step on the target changes the entropy
//   sum_x2exp     sum  y^2 e^y     Var_p(log p) = E_p[y^2] - E_p[y]^2
//
// Numerics. Both terms of H are >= 0, so nothing cancels. Leaving out the maximum keeps the digits of a peaked row:
// there 1 + sum_exp_m1 rounds to 1, but sum_exp_m1 (1e-7, say) keeps its 24 bits, and so do L and H. `max` and `target`
// are raw logits, so the subtraction precedes the division by the temperature, and an offset of 1e4 loses no digits. If
// a difference of logits overflows fp32, e^y is 0 either way; logprob needs y itself, so store_row() subtracts halves.
//
// A NaN or +inf in a row makes sum_exp_m1 NaN, and merge propagates it. A part without a finite logit is the default
// RowStats, and merging it changes nothing.
//
// Host and device share this file. It is C++17 and includes neither torch nor Python.
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
  // The moments; 0 where they are not computed.
  float sum_exp2_m1 = 0.0f;
  float sum_xexp2 = 0.0f;
  float sum_x2exp = 0.0f;
};

constexpr int kRowStatsFields = 4;         // without moments
constexpr int kRowStatsMomentsFields = 7;  // with them

// The range of columns of a shard, and how its rows are read.
struct RowSpec {
  int64_t vocab_start;  // token id of column 0, >= 0
  int64_t vocab_size;   // of the whole row; columns of tokens >= vocab_size are padding
  float inv_temperature;
  int64_t ignore_index;  // rows with this target are not read and get zeros

  // The number of columns out of `width` that are not padding.
  ENTCOV_HD int64_t columns(int64_t width) const {
    const int64_t left = vocab_size > vocab_start ? vocab_size - vocab_start : 0;
    return left < width ? left : width;
  }
  // The column of a token, -1 if it lies before the shard. Does not overflow for any int64.
  ENTCOV_HD int64_t column_of(int64_t token) const { return token < vocab_start ? -1 : token - vocab_start; }
  ENTCOV_HD bool is_token(int64_t target) const { return target >= 0 && target < vocab_size; }
};

// For d <= kExpFloor, e^d is 0 in fp32: the smallest denormal is e^-103.28, and half of it is e^-103.97.
constexpr float kExpFloor = -104.0f;

// How sums relative to lo_max are rescaled to hi_max: y changes by `distance` <= 0, and e^y by `factor`. Both are 0 if
// the part is empty or its factor underflows, so that 0 * inf never arises.
struct Shift {
  float distance;
  float factor;
};

ENTCOV_HD Shift shift_between(float lo_max, float hi_max, float inv_temperature) {
  const float d = (lo_max - hi_max) * inv_temperature;
  return d > kExpFloor ? Shift{d, expf(d)} : Shift{0.0f, 0.0f};  // if both are empty, d is NaN and the result is {0, 0}
}

// The statistics of two parts of a row together. Associative and commutative up to rounding; one exponential.
ENTCOV_HD RowStats merge(const RowStats& a, const RowStats& b, float inv_temperature) {
  const bool a_high = a.max >= b.max;
  const RowStats& hi = a_high ? a : b;
  const RowStats& lo = a_high ? b : a;
  const Shift s = shift_between(lo.max, hi.max, inv_temperature);
  const float d = s.distance, k = s.factor, k2 = k * k;
  const float total = 1.0f + lo.sum_exp_m1, total2 = 1.0f + lo.sum_exp2_m1;  // with lo's maximum
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

// The outputs of whole rows, [T] each. logprob and entropy are both null if the row is a shard. collision, varentropy
// and entropy_drift need the moments, and are all null without them.
struct RowOutputs {
  float *logprob, *entropy;
  float *collision, *varentropy, *entropy_drift;
};

// Writes the `fields` statistics of row t, and its outputs if there are any. A whole row without a finite logit becomes
// NaN. Returns whether the row is NaN.
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
      // With S = p (H + log p): E_p[S] = H sum p^2 + sum p^2 log p, and S_target is 0 where logprob is -inf.
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
