// logits -> RowStats of every row (row_stats.h), one read of memory and one exponential a logit.
//
// A row is walked in chunks. The running maximum settles within the first few of them, so a chunk is summed in one
// sweep against the maximum known so far, and its own maximum is found on the way. Only where that turns out larger is
// the chunk summed again (its data is in L1), against its own maximum and leaving out one occurrence of it; the sums
// before are rescaled. About log(chunks) chunks of a row in random order need that.
//
// Sums of many equal terms round the same way every time, so fp32 additions are kept few: 16 in a lane, then the block
// is added to the lanes of the chunk, and the chunk to a double. The error does not grow with the vocabulary.
#include "../row_stats.h"

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
    int64_t vocab_start, ignore_index;
    float inv_temperature;
    float* stats;
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
    float* out = a.stats + t * kFields;
    if (a.target[t] == a.ignore_index) {
      memset(out, 0, kFields * sizeof(float));
      return;
    }
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
        m = sweep<W, false>(x + at, n, max, a.inv_temperature, s, at_max);
        if (!(m > max)) {
          total = s;
          continue;
        }
      }
      rescale(total, max, m, a.inv_temperature);
      max = m;
      // Nothing finite yet: any finite shift does, and every -inf still counts as 0, every NaN as NaN.
      const float shift = max == -INFINITY ? 0.0f : max;
      sweep<W, true>(x + at, n, shift, a.inv_temperature, total, at_max);
      if (max != -INFINITY) at_max -= 1;
      total.rest += at_max;
      if constexpr (kMoments) total.rest2 += at_max;
    }
    if (max == INFINITY) total.rest = total.sum_xexp = NAN;
    const int64_t local = column_of(a.target[t], a.vocab_start);
    out[0] = max;
    out[1] = float(total.rest);
    out[2] = float(total.sum_xexp);
    out[3] = local >= 0 && local < a.num_columns ? widen_one<D>(x + local) : -INFINITY;
    if constexpr (kMoments) {
      out[4] = float(total.rest2);
      out[5] = float(total.sum_xexp2);
      out[6] = float(total.sum_x2exp);
    }
  }
};

}  // namespace

int64_t first_bad_target(const int64_t* target, int64_t T, int64_t vocab_size, int64_t ignore_index) {
  for (int64_t t = 0; t < T; t++)
    if (target[t] != ignore_index && (target[t] < 0 || target[t] >= vocab_size)) return t;
  return -1;
}

void row_stats(int dtype, const void* logits, int64_t row_stride, int64_t T, int64_t num_columns,
               const int64_t* target, int64_t vocab_start, int64_t ignore_index, float inv_temperature, float* stats,
               int fields, int threads) {
  with_dtype(dtype, [&](auto d) {
    using D = decltype(d);
    auto run = [&](auto op) {
      using Op = decltype(op);
      for_rows<Op>({static_cast<const typename D::storage*>(logits), row_stride, num_columns, target, vocab_start,
                    ignore_index, inv_temperature, stats},
                   T, T * num_columns, threads);
    };
    if (fields == kRowStatsMomentsFields)
      run(RowStatsOp<D, true>{});
    else
      run(RowStatsOp<D, false>{});
  });
}

}  // namespace entcov::cpu
