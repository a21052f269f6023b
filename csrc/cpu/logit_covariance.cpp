// Two logit tensors -> CovarianceStats of every row (../logit_covariance.h), in one pass over both with two
// exponentials per column.
//
// Memory. Reads 2 sizeof(storage) bytes per column, writes 32 bytes per row, and 16 more if the rows are whole.
//
// Parallelisation. One thread per row. A row is walked in chunks as in row_pass.h; a chunk is summed a second time if
// it holds a new maximum of either tensor.
//
// Numerics. The order of additions is that of row_pass.h: fp32 within a chunk, double over chunks.
#include "dispatch.h"

namespace entcov::cpu {
namespace {

constexpr int kChunk = 2048;
constexpr int kLaneAdditions = 16;
constexpr float kUnits = 1 / kChangeUnit;  // a logit times kUnits is in the unit of sum_d and sum_xd

struct Sums {
  double sum_exp_m1_old = 0, sum_xexp_old = 0, sum_exp_m1_new = 0, sum_xexp_new = 0, sum_d = 0, sum_xd = 0;
};

// The running maximum of one of the two rows, and the finite value that is subtracted from its logits.
struct Side {
  float max = -INFINITY;
  float shift() const { return max == -INFINITY ? 0.0f : max; }
};

// Rescales the sums to larger maxima; at least one of the two differs from before.
inline void rescale(Sums& s, float old_from, float old_to, float new_from, float new_to, double inv_temperature) {
  const auto factor = [&](float from, float to, double& d) {
    d = from == -INFINITY ? -INFINITY : (double(from) - double(to)) * inv_temperature;
    const double k = std::exp(d);
    if (k == 0) d = 0;
    return k;
  };
  double d_old, d_new;
  const double k_old = factor(old_from, old_to, d_old), k_new = factor(new_from, new_to, d_new);
  const double total_old = 1 + s.sum_exp_m1_old, total_new = 1 + s.sum_exp_m1_new;
  if (k_old > 0) {
    // The change of d, in units of kChangeUnit. new_from and new_to may both be -inf; their difference is then 0.
    const double moved = ((new_from == new_to ? 0 : double(new_from) - double(new_to)) -
                          (old_from == old_to ? 0 : double(old_from) - double(old_to))) *
                         kUnits;
    s.sum_xd = (s.sum_xd + d_old * s.sum_d + moved * s.sum_xexp_old + d_old * moved * total_old) * k_old;
    s.sum_d = (s.sum_d + moved * total_old) * k_old;
  } else {
    s.sum_xd = s.sum_d = 0;
  }
  if (old_from != old_to)
    s.sum_xexp_old = (s.sum_xexp_old + d_old * total_old) * k_old, s.sum_exp_m1_old = total_old * k_old;
  if (new_from != new_to)
    s.sum_xexp_new = (s.sum_xexp_new + d_new * total_new) * k_new, s.sum_exp_m1_new = total_new * k_new;
}

template <class D>
struct CovarianceStatsOp {
  using storage = typename D::storage;
  struct Args {
    Logits logits_old, logits_new;
    const uint8_t* row_mask;
    int64_t num_columns;
    float inv_temperature;
    float* stats;
    CovarianceOutputs outputs;
    NanFlag* nan;
  };

  template <int W>
  struct Lanes {
    f32<W> e_old{}, xe_old{}, e_new{}, ze_new{}, ed{}, xed{};
    i32<W> at_max_old{}, at_max_new{};

    template <bool kLeaveMaxOut>
    ENTCOV_INLINE void add(f32<W> u, f32<W> v, float shift_old, float shift_new, float shift_change,
                           float inv_temperature) {
      f32<W> x = (u - shift_old) * inv_temperature, z = (v - shift_new) * inv_temperature;
      f32<W> p = exp_nonpositive<W>(x), q = exp_nonpositive<W>(z);
      f32<W> d = (v * kUnits - u * kUnits) - shift_change;
      d = p == f32<W>{} ? f32<W>{} : d;
      const f32<W> px = p * x;
      xe_old += px, ze_new += q * z, ed += p * d, xed += px * d;
      if constexpr (kLeaveMaxOut) {
        const i32<W> old_max = u == splat<W>(shift_old), new_max = v == splat<W>(shift_new);
        at_max_old -= old_max, at_max_new -= new_max;
        p = old_max ? f32<W>{} : p, q = new_max ? f32<W>{} : q;
      }
      e_old += p, e_new += q;
    }

    ENTCOV_INLINE void add(const Lanes& b) {
      e_old += b.e_old, xe_old += b.xe_old, e_new += b.e_new, ze_new += b.ze_new, ed += b.ed, xed += b.xed;
      at_max_old += b.at_max_old, at_max_new += b.at_max_new;
    }

    ENTCOV_INLINE void add_to(Sums& s) const {
      s.sum_exp_m1_old += reduce_add<W>(e_old), s.sum_xexp_old += reduce_add<W>(xe_old);
      s.sum_exp_m1_new += reduce_add<W>(e_new), s.sum_xexp_new += reduce_add<W>(ze_new);
      s.sum_d += reduce_add<W>(ed), s.sum_xd += reduce_add<W>(xed);
      for (int k = 0; k < W; k++) s.sum_exp_m1_old += at_max_old[k], s.sum_exp_m1_new += at_max_new[k];
    }
  };

  // Adds n columns to the sums, and sets max_old and max_new to the maxima of these columns.
  template <int W, bool kLeaveMaxOut>
  static ENTCOV_INLINE void sweep(const storage* old_row, const storage* new_row, int n, float shift_old,
                                  float shift_new, float inv_temperature, Sums& s, float& max_old, float& max_new) {
    Lanes<W> lanes;
    f32<W> mo = splat<W>(-INFINITY), mn = mo;
    const float shift_change = shift_new * kUnits - shift_old * kUnits;
    for (int block = 0; block < n; block += kLaneAdditions * W) {
      const int end = n - block < kLaneAdditions * W ? n : block + kLaneAdditions * W;
      Lanes<W> a;
      for (int j = block; j < end; j += 2 * W) {
        f32<W> u0, u1, v0, v1;
        load<D, W>(old_row + j, n - j, u0, u1);
        load<D, W>(new_row + j, n - j, v0, v1);
        mo = larger<W>(u0, mo), mn = larger<W>(v0, mn);
        mo = larger<W>(u1, mo), mn = larger<W>(v1, mn);
        a.template add<kLeaveMaxOut>(u0, v0, shift_old, shift_new, shift_change, inv_temperature);
        a.template add<kLeaveMaxOut>(u1, v1, shift_old, shift_new, shift_change, inv_temperature);
      }
      lanes.add(a);
    }
    lanes.add_to(s);
    max_old = reduce_max<W>(mo), max_new = reduce_max<W>(mn);
  }

  template <int W>
  static ENTCOV_INLINE void row(const Args& a, int64_t t) {
    if (a.row_mask && !a.row_mask[t]) return store_masked_row(t, a.stats, a.outputs);
    const storage *old_row = a.logits_old.template row<storage>(t), *new_row = a.logits_new.template row<storage>(t);
    Side before, after;
    Sums total;
    for (int64_t at = 0; at < a.num_columns; at += kChunk) {
      const int n = a.num_columns - at < kChunk ? int(a.num_columns - at) : kChunk;
      float max_old, max_new;
      Sums s = total;
      sweep<W, false>(old_row + at, new_row + at, n, before.shift(), after.shift(), a.inv_temperature, s, max_old,
                      max_new);
      const bool old_rises = max_old > before.max, new_rises = max_new > after.max;
      if (!old_rises && !new_rises) {
        total = s;
        continue;
      }
      if (!old_rises) max_old = before.max;
      if (!new_rises) max_new = after.max;
      rescale(total, before.max, max_old, after.max, max_new, a.inv_temperature);
      before.max = max_old, after.max = max_new;
      float ignore_old, ignore_new;
      sweep<W, true>(old_row + at, new_row + at, n, before.shift(), after.shift(), a.inv_temperature, total, ignore_old,
                     ignore_new);
      if (old_rises) total.sum_exp_m1_old -= 1;
      if (new_rises) total.sum_exp_m1_new -= 1;
    }
    if (before.max == INFINITY) total.sum_exp_m1_old = NAN;
    if (after.max == INFINITY) total.sum_exp_m1_new = NAN;
    const double poison = 0 * (total.sum_exp_m1_old + total.sum_exp_m1_new);
    const CovarianceStats out{before.max, float(total.sum_exp_m1_old), float(total.sum_xexp_old),
                              after.max,  float(total.sum_exp_m1_new), float(total.sum_xexp_new),
                              float(total.sum_d + poison), float(total.sum_xd + poison)};
    a.nan->note(store_covariance_row(out, t, a.inv_temperature, a.stats, a.outputs));
  }
};

}  // namespace

Error covariance_stats(const Logits& logits_old, const Logits& logits_new, const uint8_t* row_mask,
                       const RowSpec& spec, float* stats, const CovarianceOutputs& outputs, float*, Device threads) {
  NanFlag nan;
  with_dtype(logits_new.dtype, [&](auto d) {
    for_rows<CovarianceStatsOp<decltype(d)>>({logits_old, logits_new, row_mask, spec.columns(logits_new.width),
                                              spec.inv_temperature, stats, outputs, &nan},
                                             logits_new, threads);
  });
  return nan.error();
}

}  // namespace entcov::cpu
