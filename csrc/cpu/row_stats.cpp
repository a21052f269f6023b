// logits -> RowStats of every row (row_stats.h), one read of memory and one exponential a logit.
//
// A row is walked in chunks. The running maximum settles within the first few of them, so a chunk is summed in one
// sweep against the maximum known so far, and its own maximum is found on the way. Only where that turns out larger is
// the chunk summed again (its data is in L1), against its own maximum and leaving out one occurrence of it; the sums
// before are rescaled. About log(chunks) chunks of a row in random order need that.
//
// Sums of many equal terms round the same way every time, so fp32 additions are kept few: 16 in a lane, then the block
// is added to the lanes of the chunk, and the chunk to a double. The error does not grow with the vocabulary.
#include "dispatch.h"

namespace entcov::cpu {
namespace {

constexpr int kChunk = 2048;
constexpr int kLaneAdditions = 16;

struct Sums {
  double rest = 0, sum_xexp = 0, rest2 = 0, sum_xexp2 = 0, sum_x2exp = 0;
};

template <class D, bool kMoments>
struct RowStatsOp {
  struct Args {
    const typename D::storage* logits;
    int64_t row_stride, num_columns;
    const int64_t* target;
    RowSpec spec;
    float* stats;
    RowOutputs outputs;
    NanFlag* nan;
  };

  template <int W>
  struct Lanes {
    f32<W> e{}, xe{}, e2{}, xe2{}, x2e{};

    // kLeaveMaxOut: lanes that hold the maximum itself are counted instead of added.
    template <bool kLeaveMaxOut>
    ENTCOV_INLINE void add(f32<W> x, float shift, float inv_temperature, i32<W>& at_max) {
      f32<W> y = (x - shift) * inv_temperature;
      f32<W> w = exp_nonpositive<W>(y);
      if constexpr (kLeaveMaxOut) {
        const i32<W> is_max = x == splat<W>(shift);
        at_max -= is_max;
        w = is_max ? f32<W>{} : w;
      }
      e += w, xe += y * w;
      if constexpr (kMoments) {  // y * w is not shared, so xe has the same bits with and without moments
        const f32<W> w2 = w * w;
        e2 += w2, xe2 += y * w2, x2e += (y * y) * w;
      }
    }

    ENTCOV_INLINE void add(const Lanes& b) {
      e += b.e, xe += b.xe;
      if constexpr (kMoments) e2 += b.e2, xe2 += b.xe2, x2e += b.x2e;
    }

    ENTCOV_INLINE void add_to(Sums& s) const {
      s.rest += reduce_add<W>(e), s.sum_xexp += reduce_add<W>(xe);
      if constexpr (kMoments)
        s.rest2 += reduce_add<W>(e2), s.sum_xexp2 += reduce_add<W>(xe2), s.sum_x2exp += reduce_add<W>(x2e);
    }
  };

  // Adds n elements to the sums and returns their maximum. A NaN does not count for the maximum; it is in the sums.
  template <int W, bool kLeaveMaxOut>
  static ENTCOV_INLINE float sweep(const typename D::storage* x, int n, float shift, float inv_temperature, Sums& s,
                                   double& at_max) {
    Lanes<W> lanes;
    f32<W> max_a = splat<W>(-INFINITY), max_b = max_a;
    i32<W> count{};
    for (int block = 0; block < n; block += kLaneAdditions * 2 * W) {
      const int end = n - block < kLaneAdditions * 2 * W ? n : block + kLaneAdditions * 2 * W;
      Lanes<W> a, b;
      for (int j = block; j < end; j += 2 * W) {
        f32<W> u, v;
        load<D, W>(x + j, n - j, u, v);
        if constexpr (!kLeaveMaxOut) max_a = larger<W>(u, max_a), max_b = larger<W>(v, max_b);
        a.template add<kLeaveMaxOut>(u, shift, inv_temperature, count);
        b.template add<kLeaveMaxOut>(v, shift, inv_temperature, count);
      }
      a.add(b);
      lanes.add(a);
    }
    lanes.add_to(s);
    if constexpr (kLeaveMaxOut)
      for (int k = 0; k < W; k++) at_max += count[k];
    return reduce_max<W>(larger<W>(max_a, max_b));
  }

  template <int W>
  static ENTCOV_INLINE float chunk_max(const typename D::storage* x, int n) {
    f32<W> m = splat<W>(-INFINITY), u, v;
    for (int j = 0; j < n; j += 2 * W) {
      load<D, W>(x + j, n - j, u, v);
      m = larger<W>(u, m), m = larger<W>(v, m);
    }
    return reduce_max<W>(m);
  }

  // The sums move from the shift `from` to the larger one `to`; what was the maximum is then a term like any other.
  static ENTCOV_INLINE void rescale(Sums& s, float from, float to, float inv_temperature) {
    if (from == -INFINITY) return;
    const double d = (double(from) - double(to)) * inv_temperature, k = std::exp(d);
    if (k == 0) {  // out of sight; keeps a NaN
      const double nan_or_zero = s.rest * 0;
      s = Sums{};
      s.rest = nan_or_zero;
      return;
    }
    const double total = 1 + s.rest, total2 = 1 + s.rest2;
    s.sum_x2exp = (s.sum_x2exp + 2 * d * s.sum_xexp + d * d * total) * k;
    s.sum_xexp = (s.sum_xexp + d * total) * k;
    s.rest = total * k;
    s.sum_xexp2 = (s.sum_xexp2 + d * total2) * k * k;
    s.rest2 = total2 * k * k;
  }

  template <int W>
  static ENTCOV_INLINE void row(const Args& a, int64_t t) {
    constexpr int kFields = kMoments ? kRowStatsMomentsFields : kRowStatsFields;
    const int64_t target = a.target[t];
    if (target == a.spec.ignore_index) return store_ignored_row(t, kFields, a.stats, a.outputs);
    const float inv_temperature = a.spec.inv_temperature;
    const typename D::storage* x = a.logits + t * a.row_stride;
    float max = -INFINITY;
    Sums total;
    for (int64_t at = 0; at < a.num_columns; at += kChunk) {
      const int n = a.num_columns - at < kChunk ? int(a.num_columns - at) : kChunk;
      float m;
      double at_max = 0;
      if (max == -INFINITY) {
        m = chunk_max<W>(x + at, n);
      } else {
        Sums s = total;
        m = sweep<W, false>(x + at, n, max, inv_temperature, s, at_max);
        if (!(m > max)) {
          total = s;
          continue;
        }
      }
      rescale(total, max, m, inv_temperature);
      max = m;
      // Nothing finite yet: any finite shift does, and every -inf still counts as 0, every NaN as NaN.
      const float shift = max == -INFINITY ? 0.0f : max;
      sweep<W, true>(x + at, n, shift, inv_temperature, total, at_max);
      if (max != -INFINITY) at_max -= 1;
      total.rest += at_max;
      if constexpr (kMoments) total.rest2 += at_max;
    }
    if (max == INFINITY) total.rest = total.sum_xexp = NAN;
    const int64_t column = a.spec.column_of(target);
    RowStats out;
    out.max = max;
    out.rest = a.spec.is_token(target) ? float(total.rest) : NAN;
    out.sum_xexp = float(total.sum_xexp);
    if (column >= 0 && column < a.num_columns) out.target = widen_one<D>(x + column);
    if constexpr (kMoments) {
      out.rest2 = float(total.rest2);
      out.sum_xexp2 = float(total.sum_xexp2);
      out.sum_x2exp = float(total.sum_x2exp);
    }
    a.nan->note(store_row(out, t, kFields, inv_temperature, a.stats, a.outputs));
  }
};

}  // namespace

int64_t segments(int64_t) { return 1; }

Error row_stats(const Logits& logits, const int64_t* target, const RowSpec& spec, int fields, float* stats,
                const RowOutputs& outputs, float*, Device threads) {
  NanFlag nan;
  with_dtype(logits.dtype, [&](auto d) {
    using D = decltype(d);
    auto run = [&](auto op) {
      using Op = decltype(op);
      for_rows<Op>({static_cast<const typename D::storage*>(logits.data), logits.row_stride, spec.columns(logits.width),
                    target, spec, stats, outputs, &nan},
                   logits.T, logits.T * logits.width, threads);
    };
    if (fields == kRowStatsMomentsFields)
      run(RowStatsOp<D, true>{});
    else
      run(RowStatsOp<D, false>{});
  });
  return nan.error();
}

}  // namespace entcov::cpu
