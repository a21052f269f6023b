// RowPass: the CPU's pass over one row of logits. It computes RowStats and, with kAbove, the same sums over the logits
// above a threshold. It reads the row once from memory and computes one exponential per logit; kAbove adds two masked
// additions per vector.
//
// A row is walked in chunks of 2,048 logits. A chunk is summed in one sweep relative to the maximum of the chunks
// before, and its own maximum is found in the same sweep. Only if that is larger, the sums before are rescaled to it,
// and the chunk is summed again from L1, leaving out one occurrence of the maximum. In a row in random order about
// log(chunks) chunks are summed twice.
//
// Numerics. Since many equal terms round in the same direction, chains of fp32 additions are short: 16 in a lane, then
// over the blocks and lanes of a chunk. Chunks are added in double, so the error does not grow with the vocabulary.
#pragma once

#include "dispatch.h"

namespace entcov::cpu {

constexpr int kChunk = 2048;
constexpr int kLaneAdditions = 16;

// The sums of RowStats in double, relative to a maximum, of which one occurrence is left out of the *_m1 sums.
struct Sums {
  double sum_exp_m1 = 0, sum_xexp = 0, sum_exp2_m1 = 0, sum_xexp2 = 0, sum_x2exp = 0;
  double sum_exp_m1_above = 0, sum_xexp_above = 0;  // over the logits above the threshold
};

template <class D, int W, bool kMoments, bool kAbove>
struct RowPass {
  using storage = typename D::storage;

  float inv_temperature, threshold;  // threshold: used with kAbove only
  float max = -INFINITY;
  Sums total;

  explicit RowPass(float inv_temperature, float threshold = 0.0f)
      : inv_temperature(inv_temperature), threshold(threshold) {}

  struct Lanes {
    f32<W> e{}, xe{}, e2{}, xe2{}, x2e{}, e_above{}, xe_above{};

    // kLeaveMaxOut: elements equal to the maximum (shift) are counted instead of added.
    template <bool kLeaveMaxOut>
    ENTCOV_INLINE void add(f32<W> x, float shift, const RowPass& pass, i32<W>& at_max) {
      f32<W> y = (x - shift) * pass.inv_temperature;
      f32<W> w = exp_nonpositive<W>(y);
      if constexpr (kLeaveMaxOut) {
        const i32<W> is_max = x == splat<W>(shift);
        at_max -= is_max;
        w = is_max ? f32<W>{} : w;
      }
      e += w, xe += y * w;
      if constexpr (kMoments) {  // computed apart from xe, so that xe has the same bits as without moments
        const f32<W> w2 = w * w;
        e2 += w2, xe2 += y * w2, x2e += (y * y) * w;
      }
      if constexpr (kAbove) {
        // GCC turns two successive selections of w into scalar code, so with kLeaveMaxOut the second is a product.
        const f32<W> one = splat<W>(1), zero{}, limit = splat<W>(pass.threshold);
        const f32<W> kept = kLeaveMaxOut ? w * (x > limit ? one : zero) : x > limit ? w : zero;
        e_above += kept, xe_above += y * kept;
      }
    }

    ENTCOV_INLINE void add(const Lanes& b) {
      e += b.e, xe += b.xe;
      if constexpr (kMoments) e2 += b.e2, xe2 += b.xe2, x2e += b.x2e;
      if constexpr (kAbove) e_above += b.e_above, xe_above += b.xe_above;
    }

    ENTCOV_INLINE void add_to(Sums& s) const {
      s.sum_exp_m1 += reduce_add<W>(e), s.sum_xexp += reduce_add<W>(xe);
      if constexpr (kMoments)
        s.sum_exp2_m1 += reduce_add<W>(e2), s.sum_xexp2 += reduce_add<W>(xe2), s.sum_x2exp += reduce_add<W>(x2e);
      if constexpr (kAbove) s.sum_exp_m1_above += reduce_add<W>(e_above), s.sum_xexp_above += reduce_add<W>(xe_above);
    }
  };

  // Adds n elements to the sums s, relative to `shift`. kLeaveMaxOut = false: returns their maximum, ignoring NaN.
  // true: adds the number of elements equal to `shift` to at_max instead, and the result is -inf.
  template <bool kLeaveMaxOut>
  ENTCOV_INLINE float sweep(const storage* x, int n, float shift, Sums& s, double& at_max) const {
    Lanes lanes;
    f32<W> max_a = splat<W>(-INFINITY), max_b = max_a;
    i32<W> count{};
    for (int block = 0; block < n; block += kLaneAdditions * 2 * W) {
      const int end = n - block < kLaneAdditions * 2 * W ? n : block + kLaneAdditions * 2 * W;
      Lanes a, b;
      for (int j = block; j < end; j += 2 * W) {
        f32<W> u, v;
        load<D, W>(x + j, n - j, u, v);
        if constexpr (!kLeaveMaxOut) max_a = larger<W>(u, max_a), max_b = larger<W>(v, max_b);
        a.template add<kLeaveMaxOut>(u, shift, *this, count);
        b.template add<kLeaveMaxOut>(v, shift, *this, count);
      }
      a.add(b);
      lanes.add(a);
    }
    lanes.add_to(s);
    if constexpr (kLeaveMaxOut)
      for (int k = 0; k < W; k++) at_max += count[k];
    return reduce_max<W>(larger<W>(max_a, max_b));
  }

  static ENTCOV_INLINE float chunk_max(const storage* x, int n) {
    f32<W> m = splat<W>(-INFINITY), u, v;
    for (int j = 0; j < n; j += 2 * W) {
      load<D, W>(x + j, n - j, u, v);
      m = larger<W>(u, m), m = larger<W>(v, m);
    }
    return reduce_max<W>(m);
  }

  // Rescales the sums from `max` to the larger maximum `to`, and adds the term of `max` that was left out.
  ENTCOV_INLINE void rescale(float to) {
    if (max == -INFINITY) return;
    Sums& s = total;
    const double d = (double(max) - double(to)) * inv_temperature, k = std::exp(d);
    if (k == 0) {  // the factor underflows; a NaN stays
      const double nan_or_zero = s.sum_exp_m1 * 0;
      s = Sums{};
      s.sum_exp_m1 = nan_or_zero;
      return;
    }
    const double total = 1 + s.sum_exp_m1, total2 = 1 + s.sum_exp2_m1;
    s.sum_x2exp = (s.sum_x2exp + 2 * d * s.sum_xexp + d * d * total) * k;
    s.sum_xexp = (s.sum_xexp + d * total) * k;
    s.sum_exp_m1 = total * k;
    s.sum_xexp2 = (s.sum_xexp2 + d * total2) * k * k;
    s.sum_exp2_m1 = total2 * k * k;
    if (kAbove && max > threshold) {
      const double total_above = 1 + s.sum_exp_m1_above;
      s.sum_xexp_above = (s.sum_xexp_above + d * total_above) * k;
      s.sum_exp_m1_above = total_above * k;
    }
  }

  // Adds the next n <= kChunk elements of the row.
  ENTCOV_INLINE void add_chunk(const storage* x, int n) {
    float m;
    double at_max = 0;
    if (max == -INFINITY) {
      m = chunk_max(x, n);
    } else {
      Sums s = total;
      m = sweep<false>(x, n, max, s, at_max);
      if (!(m > max)) {
        total = s;
        return;
      }
    }
    rescale(m);
    max = m;
    // Without a finite logit so far, any finite shift works: -inf still adds 0, and NaN adds NaN.
    const float shift = max == -INFINITY ? 0.0f : max;
    sweep<true>(x, n, shift, total, at_max);
    if (max != -INFINITY) at_max -= 1;
    total.sum_exp_m1 += at_max;
    if constexpr (kMoments) total.sum_exp2_m1 += at_max;
    if (kAbove && max > threshold) total.sum_exp_m1_above += at_max;
  }

  // Adds a whole row, and calls each(first, n) for every chunk while it is in L1.
  template <class Each>
  ENTCOV_INLINE void add_row(const storage* x, int64_t columns, Each each) {
    for (int64_t at = 0; at < columns; at += kChunk) {
      const int n = columns - at < kChunk ? int(columns - at) : kChunk;
      add_chunk(x + at, n);
      each(at, n);
    }
    if (max == INFINITY) total.sum_exp_m1 = total.sum_xexp = NAN;
  }

  // RowStats of the row.
  ENTCOV_INLINE RowStats stats(const storage* x, int64_t columns, int64_t target, const RowSpec& spec) const {
    const int64_t column = spec.column_of(target);
    RowStats s;
    s.max = max;
    s.sum_exp_m1 = spec.is_token(target) ? float(total.sum_exp_m1) : NAN;
    s.sum_xexp = float(total.sum_xexp);
    if (column >= 0 && column < columns) s.target = widen_one<D>(x + column);
    if constexpr (kMoments) {
      s.sum_exp2_m1 = float(total.sum_exp2_m1);
      s.sum_xexp2 = float(total.sum_xexp2);
      s.sum_x2exp = float(total.sum_x2exp);
    }
    return s;
  }
};

}  // namespace entcov::cpu
