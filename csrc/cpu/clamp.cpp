// Clamped entropy: selection by value, then sums over what is kept (clamp.h says how the steps fit together).
//
// order_statistics counts the rows' values by the upper 16 bits of an order-preserving key: all of a bf16 or fp16, so
// that one read and one scan of 65,536 counters answer any number of ranks. fp32 reads the row a second time and sorts
// out the lower 16 bits of the few counters that hold a wanted rank. Cost does not depend on the data, nor on how many
// logits are kept.
//
// clamp_collect is one read of the row and one exponential a logit, like row_stats, but with the maximum known: nothing
// is ever rescaled. It adds only logits above the bracket, so logits near the threshold enter once, in clamp_finish,
// with the weight the global counts give them.
#include "../clamp.h"

#include <algorithm>
#include <memory>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "../row_stats.h"
#include "dispatch.h"

namespace entcov::cpu {
namespace {

constexpr int kBins = 1 << 16;

int thread_index() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}

// Keys whose unsigned order is the order of the floats, -0 and +0 being one. NaNs land beyond the infinities.
inline uint32_t order_key(uint32_t bits) {
  if (bits == 0x80000000u) bits = 0;
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}
inline uint32_t order_key(uint16_t bits) {
  if (bits == 0x8000u) bits = 0;
  return (bits >> 15 ? ~bits : bits | 0x8000u) & 0xffffu;
}
inline uint32_t key_bits(uint32_t key) { return key >> 31 ? key & 0x7fffffffu : ~key; }
inline uint16_t key_bits(uint16_t key) { return static_cast<uint16_t>(key >> 15 ? key & 0x7fffu : ~key); }

struct SelectScratch {
  std::unique_ptr<int32_t[]> count{new int32_t[kBins]};
  std::unique_ptr<int32_t[]> cursor{new int32_t[kBins]};  // fp32: where the bin's next lower half goes; -1: not wanted
  std::vector<uint16_t> low;                              // fp32: lower halves of the wanted bins, bin by bin
};

struct Wanted {
  int32_t bin;
  int32_t rank;  // 1-based and descending within the bin
};

// `bin_of(j)`: the bin of element j. Fills count and where each rank lies.
template <class F>
void locate(F bin_of, int64_t n, const int64_t* ranks, int64_t num_ranks, int32_t* count, Wanted* wanted) {
  std::fill(count, count + kBins, 0);
  for (int64_t j = 0; j < n; j++) count[bin_of(j)]++;
  int32_t bin = kBins - 1;
  int64_t above = 0;
  for (int64_t i = 0; i < num_ranks; i++) {
    while (above + count[bin] < ranks[i]) above += count[bin--];
    wanted[i] = {bin, static_cast<int32_t>(ranks[i] - above)};
  }
}

// 16-bit types: the bin is the value.
template <class D>
void select_row(D, const uint16_t* x, int64_t n, const int64_t* ranks, int64_t num_ranks, SelectScratch& scratch,
                Wanted* wanted, float* out) {
  locate([&](int64_t j) { return order_key(x[j]); }, n, ranks, num_ranks, scratch.count.get(), wanted);
  for (int64_t i = 0; i < num_ranks; i++) {
    const uint16_t bits = key_bits(static_cast<uint16_t>(wanted[i].bin));
    out[i] = widen_one<D>(&bits);
  }
}

void select_row(Float32, const float* x, int64_t n, const int64_t* ranks, int64_t num_ranks, SelectScratch& scratch,
                Wanted* wanted, float* out) {
  const auto key = [&](int64_t j) {
    uint32_t bits;
    memcpy(&bits, x + j, sizeof bits);
    return order_key(bits);
  };
  int32_t *count = scratch.count.get(), *cursor = scratch.cursor.get();
  locate([&](int64_t j) { return key(j) >> 16; }, n, ranks, num_ranks, count, wanted);
  std::fill(cursor, cursor + kBins, -1);
  int32_t next = 0;
  for (int64_t i = 0; i < num_ranks; i++)
    if (cursor[wanted[i].bin] < 0) cursor[wanted[i].bin] = next, next += count[wanted[i].bin];
  uint16_t* low = scratch.low.data();
  for (int64_t j = 0; j < n; j++) {
    const uint32_t k = key(j);
    int32_t& at = cursor[k >> 16];
    if (at >= 0) low[at++] = static_cast<uint16_t>(k);
  }
  for (int64_t i = 0; i < num_ranks;) {
    const int32_t bin = wanted[i].bin;
    uint16_t *end = low + cursor[bin], *begin = end - count[bin];
    int64_t last = i;
    while (last + 1 < num_ranks && wanted[last + 1].bin == bin) last++;
    const auto descending = std::greater<uint16_t>();
    if (wanted[last].rank - wanted[i].rank > 8)  // many ranks in one bin: cheaper to sort it once
      std::sort(begin, end, descending);
    else
      for (int64_t r = i; r <= last; r++)
        std::nth_element(r == i ? begin : begin + wanted[r - 1].rank - 1, begin + wanted[r].rank - 1, end, descending);
    for (; i <= last; i++) {
      const uint32_t bits = key_bits(static_cast<uint32_t>(bin) << 16 | begin[wanted[i].rank - 1]);
      memcpy(out + i, &bits, sizeof bits);
    }
  }
}

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
  values.clear();
  for (const Sketch& s : shards) values.insert(values.end(), s.value, s.value + s.m);
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
  // value is above the largest, and all are from the smallest on.
  const float lo = *std::partition_point(values.begin(), values.end(), [&](float v) { return surely_from(v) < kept; });
  const float hi =
      *(std::partition_point(values.begin(), values.end(), [&](float v) { return maybe_above(v) < kept; }) - 1);
  int64_t bound = 0;
  if (lo < hi)
    for (const Sketch& s : shards) bound = std::max(bound, s.maybe_above(lo) - s.surely_from(hi));
  return {lo, hi, static_cast<float>(bound)};
}

template <int W>
ENTCOV_INLINE bool any(i32<W> mask) {
  typedef int8_t i8 __attribute__((vector_size(W)));
  const i8 narrow = __builtin_convertvector(mask, i8);
  uint32_t words[W / 4], all = 0;
  memcpy(words, &narrow, sizeof words);
  for (int k = 0; k < W / 4; k++) all |= words[k];
  return all != 0;
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

  template <int W>
  static ENTCOV_INLINE void row(const Args& a, int64_t t) {
    float* part = a.part + t * (kPartFields + a.capacity);
    std::fill(part, part + kPartFields + a.capacity, 0.0f);
    const float *stats = a.stats + t * a.fields, *bracket = a.bracket + t * a.bracket_fields;
    if (a.target[t] == a.ignore_index || std::isnan(stats[1])) return;
    const typename D::storage* x = a.logits + t * a.row_stride;
    const float max = stats[0], lo = bracket[0], hi = bracket[1];
    double rest = 0, sum_xexp = 0;
    i32<W> at_max{}, above{}, equal_hi{}, equal_lo{};
    int64_t between = 0;
    for (int64_t at = 0; at < a.num_columns; at += kChunk) {
      const int n = a.num_columns - at < kChunk ? int(a.num_columns - at) : kChunk;
      f32<W> e{}, xe{};
      for (int j = 0; j < n; j += W) {
        const int lanes = n - j < W ? n - j : W;
        const f32<W> v = lanes < W ? widen_tail<D, W>(x + at + j, lanes) : D::template widen<W>(x + at + j);
        const i32<W> is_above = v > hi, is_max = v == max;
        f32<W> y = (v - max) * a.inv_temperature;
        f32<W> w = exp_nonpositive<W>(y);
        w = (is_above & ~is_max) ? w : f32<W>{};
        e += w, xe += y * w;
        i32<W> is_lo = v == lo, is_hi = v == hi;
        if (lanes < W)  // the tail's filler reads as -inf, which may be lo or hi
          for (int k = lanes; k < W; k++) is_lo[k] = is_hi[k] = 0;
        at_max -= is_max, above -= is_above, equal_hi -= is_hi, equal_lo -= is_lo;
        const i32<W> is_between = (v > lo) & (v < hi);
        if (any<W>(is_between))
          for (int k = 0; k < W; k++)
            if (is_between[k]) {
              if (between < a.capacity) part[kPartFields + between] = v[k];
              between++;
            }
      }
      rest += reduce_add<W>(e), sum_xexp += reduce_add<W>(xe);
    }
    int64_t counts[4] = {};
    for (int k = 0; k < W; k++)
      counts[0] += at_max[k], counts[1] += above[k], counts[2] += equal_hi[k], counts[3] += equal_lo[k];
    part[kPartRest] = static_cast<float>(rest);
    part[kPartXExp] = static_cast<float>(sum_xexp);
    part[kPartAtMax] = static_cast<float>(counts[0]);
    part[kPartAboveHi] = static_cast<float>(counts[1]);
    part[kPartEqualHi] = static_cast<float>(counts[2]);
    part[kPartEqualLo] = static_cast<float>(counts[3]);
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

void finish_row(const std::vector<const float*>& parts, int64_t capacity, const float* bracket, float max,
                int64_t kept, float inv_temperature, std::vector<float>& between, float* clamp) {
  const float lo = bracket[0], hi = bracket[1];
  Kept sums;
  double at_max = 0, above = 0, equal_hi = 0, equal_lo = 0;
  between.clear();
  for (const float* p : parts) {
    sums.rest += p[kPartRest], sums.sum_xexp += p[kPartXExp];
    at_max += p[kPartAtMax], above += p[kPartAboveHi], equal_hi += p[kPartEqualHi], equal_lo += p[kPartEqualLo];
    const int64_t n = std::min(static_cast<int64_t>(p[kPartBetween]), capacity);
    between.insert(between.end(), p + kPartFields, p + kPartFields + n);
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

void order_statistics(int dtype, const void* logits, int64_t row_stride, int64_t T, int64_t num_columns,
                      const int64_t* target, int64_t ignore_index, const int64_t* ranks, int64_t num_ranks, float* out,
                      int threads) {
  if (num_columns == 0) {
    std::fill(out, out + T * num_ranks, -INFINITY);
    return;
  }
  threads = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(threads, T)));
  std::vector<SelectScratch> scratch(threads);  // here and not in the threads, where running out of memory is fatal
  std::vector<Wanted> wanted(threads * num_ranks);
  if (dtype == kFloat32)
    for (SelectScratch& s : scratch) s.low.resize(num_columns);
  with_dtype(dtype, [&](auto d) {
    using D = decltype(d);
    const auto* data = static_cast<const typename D::storage*>(logits);
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1) if (threads > 1)
    for (int64_t t = 0; t < T; t++) {
      const int thread = thread_index();
      float* row = out + t * num_ranks;
      if (target[t] == ignore_index)
        std::fill(row, row + num_ranks, 0.0f);
      else
        select_row(d, data + t * row_stride, num_columns, ranks, num_ranks, scratch[thread],
                   wanted.data() + thread * num_ranks, row);
    }
  });
}

void clamp_bracket(const float* sketches, int64_t shard_stride, int64_t row_stride, int64_t R, int64_t T, int64_t m,
                   const int64_t* ranks, const float* stats, int fields, const int64_t* target, int64_t ignore_index,
                   int64_t kept, float* out, int threads) {
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
