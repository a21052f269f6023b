// Clamped entropy: from sketches to a bracket, from a bracket to sums over what is kept (clamp.h says how the steps fit
// together).
//
// clamp_collect is one read of the row and one exponential a logit, like row_stats, but with the maximum known: nothing
// is ever rescaled. It adds only logits above the bracket, so logits near the threshold enter once, in clamp_finish,
// with the weight the global counts give them.
#include "../clamp.h"

#include <algorithm>
#include <vector>

#include "../row_stats.h"
#include "dispatch.h"

namespace entcov::cpu {
namespace {

struct Row {
  const float* stats;
  bool ignored, nan;
  bool dead() const { return ignored || nan; }
};

Row row_at(int64_t t, const float* stats, int fields, const int64_t* target, int64_t ignore_index) {
  const float* s = stats + t * fields;
  return {s, target[t] == ignore_index, std::isnan(s[1])};
}

struct Bracket {
  float lo, hi, bound;
};

// One shard's sketch: m values in descending order, and which order statistic each one is.
struct Sketch {
  const float* value;
  const int64_t* rank;
  int64_t m;

  int64_t columns() const { return rank[m - 1]; }
  // At least so many of the shard's values are >= v.
  int64_t surely_from(float v) const {
    const int64_t i = std::partition_point(value, value + m, [v](float s) { return s >= v; }) - value;
    return i == 0 ? 0 : rank[i - 1];
  }
  // At most so many of them are > v.
  int64_t maybe_above(float v) const {
    const int64_t i = std::partition_point(value, value + m, [v](float s) { return s > v; }) - value;
    return i == m ? columns() : rank[i] - 1;
  }
};

Bracket bracket_row(const std::vector<Sketch>& shards, int64_t kept, std::vector<float>& values) {
  const Bracket unknown{NAN, NAN, 0};
  values.clear();
  for (const Sketch& s : shards) values.insert(values.end(), s.value, s.value + s.m);
  for (float v : values)
    if (std::isnan(v)) return unknown;
  std::sort(values.begin(), values.end(), std::greater<float>());
  const auto surely_from = [&](float v) {
    int64_t n = 0;
    for (const Sketch& s : shards) n += s.surely_from(v);
    return n;
  };
  const auto maybe_above = [&](float v) {
    int64_t n = 0;
    for (const Sketch& s : shards) n += s.maybe_above(v);
    return n;
  };
  // Both counts grow as v falls. Every shard's largest and smallest value is in its sketch, so both ends exist: no
  // value is above the largest, and all are from the smallest on. Sketches that do not descend need not have them.
  const auto lo_at =
      std::partition_point(values.begin(), values.end(), [&](float v) { return surely_from(v) < kept; });
  const auto hi_end =
      std::partition_point(values.begin(), values.end(), [&](float v) { return maybe_above(v) < kept; });
  if (lo_at == values.end() || hi_end == values.begin()) return unknown;
  const float lo = *lo_at, hi = *(hi_end - 1);
  int64_t bound = 0;
  if (lo < hi)
    for (const Sketch& s : shards) bound = std::max(bound, s.maybe_above(lo) - s.surely_from(hi));
  return {lo, hi, static_cast<float>(bound)};
}

template <class D>
struct CollectOp {
  struct Args {
    const typename D::storage* logits;
    int64_t row_stride, num_columns;
    const int64_t* target;
    int64_t ignore_index;
    const float* stats;
    int fields;
    const float* bracket;
    int bracket_fields;
    int64_t capacity;
    float inv_temperature;
    float* part;
  };

  static constexpr int kChunk = 1024;  // lanes add in fp32 within a chunk, in double from chunk to chunk
  static constexpr int kGroup = 64;    // so many logits are looked at together for values between lo and hi

  // Comparisons become floats 0 and 1, each by one selection, and are combined by arithmetic: that GCC takes to mask
  // registers, while a comparison used as an integer, or nested selections, fall apart into scalars. The counts are
  // exact, a chunk being short; the weights are finite, rows with a NaN being skipped.
  template <int W>
  struct Lanes {
    f32<W> e{}, xe{}, at_max{}, above_hi{}, equal_hi{}, above_lo{}, equal_lo{};

    ENTCOV_INLINE void add(f32<W> v, float max, float lo, float hi, float inv_temperature) {
      f32<W> y = (v - max) * inv_temperature;
      f32<W> w = exp_nonpositive<W>(y);
      const f32<W> one = splat<W>(1), zero{};
      const f32<W> is_max = v == splat<W>(max) ? one : zero, is_above = v > splat<W>(hi) ? one : zero;
      w *= is_above * (one - is_max);
      e += w, xe += y * w;
      at_max += is_max, above_hi += is_above;
      equal_hi += v == splat<W>(hi) ? one : zero;
      above_lo += v > splat<W>(lo) ? one : zero;
      equal_lo += v == splat<W>(lo) ? one : zero;
    }
  };

  template <int W>
  static ENTCOV_INLINE int64_t count(f32<W> v) {
    return static_cast<int64_t>(reduce_add<W>(v));
  }

  template <int W>
  static ENTCOV_INLINE void row(const Args& a, int64_t t) {
    float* part = a.part + t * (kPartFields + a.capacity);
    memset(part, 0, (kPartFields + a.capacity) * sizeof *part);
    const float *stats = a.stats + t * a.fields, *bracket = a.bracket + t * a.bracket_fields;
    if (a.target[t] == a.ignore_index || std::isnan(stats[1])) return;
    const typename D::storage* x = a.logits + t * a.row_stride;
    const float max = stats[0], lo = bracket[0], hi = bracket[1];
    double rest = 0, sum_xexp = 0;
    int64_t at_max = 0, above_hi = 0, equal_hi = 0, equal_lo = 0, between = 0;
    const auto take = [&](f32<W> v) __attribute__((always_inline)) {
      for (int k = 0; k < W; k++)
        if (v[k] > lo && v[k] < hi) {
          if (between < a.capacity) part[kPartFields + between] = v[k];
          between++;
        }
    };
    for (int64_t at = 0; at < a.num_columns; at += kChunk) {
      const int n = a.num_columns - at < kChunk ? int(a.num_columns - at) : kChunk;
      Lanes<W> lanes;
      int j = 0;
      for (; j + kGroup <= n; j += kGroup) {
        const f32<W> before = lanes.above_lo - lanes.above_hi - lanes.equal_hi;
        for (int i = j; i < j + kGroup; i += W)
          lanes.add(D::template widen<W>(x + at + i), max, lo, hi, a.inv_temperature);
        // lo = hi makes the count negative where a logit equals both.
        const f32<W> found = lanes.above_lo - lanes.above_hi - lanes.equal_hi - before;
        if (lo < hi && count<W>(found) > 0)
          for (int i = j; i < j + kGroup; i += W) take(D::template widen<W>(x + at + i));
      }
      for (; j < n; j += W) {
        const int real = n - j < W ? n - j : W;
        const f32<W> v = real < W ? widen_tail<D, W>(x + at + j, real) : D::template widen<W>(x + at + j);
        lanes.add(v, max, lo, hi, a.inv_temperature);
        if (lo < hi) take(v);
        // The filler of a partial vector reads as -inf, which may be the threshold.
        if (lo == -INFINITY) equal_lo -= W - real;
        if (hi == -INFINITY) equal_hi -= W - real;
      }
      rest += reduce_add<W>(lanes.e), sum_xexp += reduce_add<W>(lanes.xe);
      at_max += count<W>(lanes.at_max), above_hi += count<W>(lanes.above_hi), equal_hi += count<W>(lanes.equal_hi);
      equal_lo += count<W>(lanes.equal_lo);
    }
    part[kPartRest] = static_cast<float>(rest);
    part[kPartXExp] = static_cast<float>(sum_xexp);
    part[kPartAtMax] = static_cast<float>(at_max);
    part[kPartAboveHi] = static_cast<float>(above_hi);
    part[kPartEqualHi] = static_cast<float>(equal_hi);
    part[kPartEqualLo] = static_cast<float>(equal_lo);
    part[kPartBetween] = static_cast<float>(between);
  }
};

// Sums over the kept set, relative to the row's maximum and with one occurrence of it left out, as in RowStats.
struct Kept {
  double rest = 0, sum_xexp = 0;

  void add(double copies, float x, float max, float inv_temperature) {
    const double y = (double(x) - double(max)) * inv_temperature, e = copies * std::exp(y);
    if (e == 0) return;  // y may be -inf
    rest += e, sum_xexp += y * e;
  }
};

// Whether a shard can have counted this: whole numbers up to 2^24, which fp32 holds exactly.
bool is_count(float v) { return v >= 0 && v <= (1 << 24) && v == std::floor(v); }

void finish_row(const std::vector<const float*>& parts, int64_t capacity, const float* bracket, float max,
                int64_t kept, float inv_temperature, std::vector<float>& between, float* clamp) {
  const float lo = bracket[0], hi = bracket[1];
  Kept sums;
  double at_max = 0, above = 0, equal_hi = 0, equal_lo = 0;
  between.clear();
  bool sound = true;
  for (const float* p : parts) {
    for (int i = kPartAtMax; i <= kPartBetween; i++) sound = sound && is_count(p[i]);
    sound = sound && p[kPartBetween] <= static_cast<float>(capacity);
    if (!sound) break;
    sums.rest += p[kPartRest], sums.sum_xexp += p[kPartXExp];
    at_max += p[kPartAtMax], above += p[kPartAboveHi], equal_hi += p[kPartEqualHi], equal_lo += p[kPartEqualLo];
    const float *begin = p + kPartFields, *end = begin + static_cast<int64_t>(p[kPartBetween]);
    sound = std::none_of(begin, end, [](float x) { return std::isnan(x); });
    between.insert(between.end(), begin, end);
  }
  if (!sound) {
    std::fill_n(clamp, 4, NAN);
    return;
  }
  // Where the ranks go: [above hi][== hi][between, descending][== lo]. The threshold is the kept-th.
  float threshold = hi;
  double tied = equal_hi, need = kept - above;  // need >= 1: fewer than `kept` lie above hi
  if (need > equal_hi) {
    sums.add(equal_hi, hi, max, inv_temperature);
    need -= equal_hi;
    std::sort(between.begin(), between.end(), std::greater<float>());
    if (need <= static_cast<double>(between.size())) {
      threshold = between[static_cast<size_t>(need) - 1];
      const auto ties = std::equal_range(between.begin(), between.end(), threshold, std::greater<float>());
      for (auto it = between.begin(); it != ties.first; ++it) sums.add(1, *it, max, inv_temperature);
      need -= static_cast<double>(ties.first - between.begin());
      tied = static_cast<double>(ties.second - ties.first);
    } else {
      for (float x : between) sums.add(1, x, max, inv_temperature);
      need -= static_cast<double>(between.size());
      threshold = lo, tied = equal_lo;
    }
  }
  if (!(need >= 1 && need <= tied)) {
    std::fill_n(clamp, 4, NAN);
    return;
  }
  sums.add(need, threshold, max, inv_temperature);
  // One occurrence of the maximum is left out. Above hi none was added, below it all that are kept were.
  sums.rest += max > hi ? at_max - 1 : -1;
  const double log_sum = std::log1p(sums.rest);
  clamp[0] = threshold;
  clamp[1] = static_cast<float>(need / tied);
  clamp[2] = static_cast<float>(log_sum);
  clamp[3] = static_cast<float>(log_sum - sums.sum_xexp / (1 + sums.rest));
}

}  // namespace

void clamp_bracket(const float* sketches, int64_t shard_stride, int64_t row_stride, int64_t R, int64_t T, int64_t m,
                   const int64_t* ranks, const float* stats, int fields, const int64_t* target, int64_t ignore_index,
                   int64_t kept, float* out, int threads) {
  threads = usable_threads(threads);
#pragma omp parallel num_threads(threads) if (threads > 1 && T > 1)
  {
    std::vector<Sketch> shards;
    std::vector<float> values;
#pragma omp for schedule(static)
    for (int64_t t = 0; t < T; t++) {
      const Row row = row_at(t, stats, fields, target, ignore_index);
      Bracket b{0, 0, 0};
      if (!row.dead()) {
        shards.clear();
        for (int64_t r = 0; r < R; r++)
          if (ranks[r * m + m - 1] > 0) shards.push_back({sketches + r * shard_stride + t * row_stride, ranks + r * m, m});
        b = bracket_row(shards, kept, values);
      }
      out[3 * t] = b.lo, out[3 * t + 1] = b.hi, out[3 * t + 2] = b.bound;
    }
  }
}

void clamp_collect(int dtype, const void* logits, int64_t row_stride, int64_t T, int64_t num_columns,
                   const int64_t* target, int64_t ignore_index, const float* stats, int fields, const float* bracket,
                   int bracket_fields, int64_t capacity, float inv_temperature, float* part, int threads) {
  with_dtype(dtype, [&](auto d) {
    using D = decltype(d);
    for_rows<CollectOp<D>>({static_cast<const typename D::storage*>(logits), row_stride, num_columns, target,
                            ignore_index, stats, fields, bracket, bracket_fields, capacity, inv_temperature, part},
                           T, T * num_columns, threads);
  });
}

void clamp_finish(const float* parts, int64_t R, int64_t T, int64_t capacity, const float* bracket, int bracket_fields,
                  const float* stats, int fields, const int64_t* target, int64_t ignore_index, int64_t kept,
                  float inv_temperature, float* clamp, int threads) {
  const int64_t width = kPartFields + capacity;
  threads = usable_threads(threads);
#pragma omp parallel num_threads(threads) if (threads > 1 && T > 1)
  {
    std::vector<const float*> row_parts(R);
    std::vector<float> between;
#pragma omp for schedule(static)
    for (int64_t t = 0; t < T; t++) {
      const Row row = row_at(t, stats, fields, target, ignore_index);
      float* out = clamp + 4 * t;
      if (row.dead()) {
        std::fill(out, out + 4, row.nan && !row.ignored ? NAN : 0.0f);
        continue;
      }
      for (int64_t r = 0; r < R; r++) row_parts[r] = parts + (r * T + t) * width;
      finish_row(row_parts, capacity, bracket + t * bracket_fields, row.stats[0], kept, inv_temperature, between, out);
    }
  }
}

}  // namespace entcov::cpu
