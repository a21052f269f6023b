// The clamped entropy on the CPU: what ../clamp.h leaves to a device. A row is one thread's work.
//
// Memory of clamped_stats: one read of the row (a sample of 1 in 20 sectors first; one or two reads more if that misled, one
// row in a thousand) and, of what lies in the bracket, 4 bytes a logit written and read. Once more 32 bytes a row out.
// clamp_part: the same one read, and 680 bytes a row out; clamp_sketch: the sample, and 256 bytes a row. The other two read
// what has been gathered. Scratch a thread: 176 KiB of counters, and 4 bytes a column for the list, of which only as much is
// touched as logits lie in the bracket.
//
// Listing is a second look at each chunk of the pass (row_pass.h) while it is in L1: with AVX-512 a compressed store a
// vector, elsewhere a store and an addition a logit, without a branch. A list has room for the whole row, so it never
// overflows, and a bracket of all keys always ends the search.
#include "../clamp.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <memory>
#include <vector>

#include "row_pass.h"

namespace entcov::cpu {
namespace {

constexpr int kCounters = 2048;
constexpr int kHalfKeys = 1 << 16;  // upper halves of keys

int thread_index() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}

struct Scratch {
  uint16_t upper[kSampleLimit];         // a sample: upper halves of keys
  uint16_t sampled[kHalfKeys] = {};     // how often each is in it; all 0 between rows
  uint32_t count[kCounters];
  std::unique_ptr<float[]> list;

  explicit Scratch(int64_t columns) : list(new float[columns + 2 * 16]) {}  // whole vectors are written
};

// Here and not in the threads, where running out of memory is fatal.
std::vector<std::unique_ptr<Scratch>> scratch_for(int threads, int64_t T, int64_t columns) {
  std::vector<std::unique_ptr<Scratch>> all;
  for (int i = 0; i == 0 || (i < usable_threads(threads) && i < T); i++)
    all.push_back(std::make_unique<Scratch>(columns));
  return all;
}

template <class D>
constexpr int kSpareBits = 0;
template <>
constexpr int kSpareBits<BFloat16> = 16;
template <>
constexpr int kSpareBits<Float16> = 13;

// ---- the sample -----------------------------------------------------------------------------------------------------

// Into s.upper; returns how many.
template <class D>
ENTCOV_INLINE int take_sample(const typename D::storage* x, int columns, Scratch& s) {
  int size = 0;
  const auto take = [&](const typename D::storage* from, int n) __attribute__((always_inline)) {
    for (int j = 0; j < n; j += 4) {
      const f32<4> v = n - j < 4 ? widen_tail<D, 4>(from + j, n - j) : D::template widen<4>(from + j);
      for (int k = 0; k < 4; k++) s.upper[size + j + k] = static_cast<uint16_t>(order_key(v[k]) >> 16);
    }
    size += n;
  };
  if (columns <= kUnsampledColumns) {
    take(x, columns);
    return size;
  }
  constexpr int kSector = kSectorBytes / static_cast<int>(sizeof(typename D::storage));
  const SamplePlan plan = plan_sample(columns, kSector);
  for (int i = 0; i < plan.taken; i++) take(x + static_cast<int64_t>(i * plan.every + plan.first) * kSector, kSector);
  return size;
}

// The rank(n)-th largest of the sample, n < size, ascending and in 1..m: their upper halves.
template <class Rank>
void select_from_sample(Scratch& s, int m, int size, Rank rank, uint16_t* upper) {
  constexpr int kBlock = 256;
  for (int i = 0; i < m; i++) s.sampled[s.upper[i]]++;
  int end = kHalfKeys, n = 0, above = 0;  // `above` of the sample lie from key `end` on
  while (n < size) {
    int in_block = 0;
    for (int i = 1; i <= kBlock; i++) in_block += s.sampled[end - i];
    if (above + in_block < rank(n)) {
      above += in_block, end -= kBlock;
      continue;
    }
    for (int key = end - 1, larger = above; n < size && key >= end - kBlock; key--)
      for (larger += s.sampled[key]; n < size && rank(n) <= larger;) upper[n++] = static_cast<uint16_t>(key);
    above += in_block, end -= kBlock;
  }
  for (int i = 0; i < m; i++) s.sampled[s.upper[i]] = 0;
}

// ---- the list -------------------------------------------------------------------------------------------------------

#if defined(__x86_64__)
template <class D>
__attribute__((target(ENTCOV_AVX512))) int64_t list_vectors_avx512(const typename D::storage* x, int n, float lo,
                                                                   float hi, float* out) {
  int64_t listed = 0;
  for (int j = 0; j + 16 <= n; j += 16) {
    const __m512 v = (__m512)D::template widen<16>(x + j);
    const __mmask16 from = _mm512_cmp_ps_mask(v, _mm512_set1_ps(lo), _CMP_GE_OQ);
    const __mmask16 inside = _mm512_mask_cmp_ps_mask(from, v, _mm512_set1_ps(hi), _CMP_LE_OQ);
    _mm512_storeu_ps(out + listed, _mm512_maskz_compress_ps(inside, v));
    listed += __builtin_popcount(inside);
  }
  return listed;
}
#endif

// Writes the elements of x [n] in [lo, hi] to out, in their order, and up to 15 more; returns how many they are.
template <class D, int W>
ENTCOV_INLINE int64_t list_inside(const typename D::storage* x, int n, float lo, float hi, float* out) {
  int64_t listed = 0;
  int j = 0;
#if defined(__x86_64__)
  if constexpr (W == 16) listed = list_vectors_avx512<D>(x, n, lo, hi, out), j = n - n % W;
#endif
  for (; j < n; j += W) {
    const int real = n - j < W ? n - j : W;
    const f32<W> v = real < W ? widen_tail<D, W>(x + j, real) : D::template widen<W>(x + j);
    float values[W];
    memcpy(values, &v, sizeof v);
    for (int k = 0; k < real; k++) {
      out[listed] = values[k];
      listed += (values[k] >= lo) & (values[k] <= hi);
    }
  }
  return listed;
}

// One pass over a row with a bracket.
template <class D, int W>
struct BracketPass : RowPass<D, W, false, true> {
  float* list;
  int64_t listed = 0;

  ENTCOV_INLINE BracketPass(const typename D::storage* x, int64_t columns, float inv_temperature, float lo, float hi,
                            float* room)
      : RowPass<D, W, false, true>(inv_temperature, hi), list(room) {
    this->add_row(x, columns, [&](int64_t at, int n) __attribute__((always_inline)) {
      listed += list_inside<D, W>(x + at, n, lo, hi, list + listed);
    });
  }
};

// ---- clamped_stats --------------------------------------------------------------------------------------------------

struct Place {
  uint32_t key, rank, equal;  // of an element: its rank among those that equal it, and their number
};

// Of the rank-th largest element of a list whose keys lie in `range`: 11 bits of what is left of the range at a time.
template <int kSpare>
Place radix_select(const float* list, int64_t listed, KeyRange range, uint32_t rank, uint32_t* count) {
  uint32_t lo = range.lo >> kSpare, hi = range.hi >> kSpare, equal = static_cast<uint32_t>(listed);
  while (lo < hi) {
    int shift = 0;
    while ((hi - lo) >> shift >= kCounters) shift++;
    std::fill(count, count + kCounters, 0);
    for (int64_t i = 0; i < listed; i++) {
      const uint32_t key = order_key(list[i]) >> kSpare;
      if (key >= lo && key <= hi) count[(key - lo) >> shift]++;
    }
    uint32_t bin = (hi - lo) >> shift;
    while (bin > 0 && rank > count[bin]) rank -= count[bin--];
    equal = count[bin];
    lo += bin << shift;
    if ((hi - lo) >> shift > 0) hi = lo + (1u << shift) - 1u;
  }
  return {whole_key(lo, kSpare), rank, equal};
}

template <class D>
struct ClampedStatsOp {
  struct Args {
    const typename D::storage* logits;
    int64_t row_stride, num_columns;
    const int64_t* target;
    RowSpec spec;
    int64_t kept;
    float* stats;
    RowOutputs outputs;
    float *clamp, *clamped_entropy;
    NanFlag* nan;
    const std::unique_ptr<Scratch>* scratch;
  };
  static constexpr int kSpare = kSpareBits<D>;

  static ENTCOV_INLINE RowBrackets guess(const Args& a, const typename D::storage* x, Scratch& s) {
    const KeyRange all{kLowestKey, kHighestKey};
    const int columns = static_cast<int>(a.num_columns);
    if (columns <= kUnsampledColumns) return {all, all, all};
    const int m = take_sample<D>(x, columns, s);
    const SampleRanks ranks = sample_ranks(a.kept, columns, m, INFINITY);
    uint16_t upper[4];
    select_from_sample(s, m, 4, [&](int n) { return ranks.rank(n); }, upper);
    return row_brackets(ranks, upper, kSpare);
  }

  template <int W>
  static ENTCOV_INLINE void row(const Args& a, int64_t t) {
    float* clamp = a.clamp + t * 4;
    if (a.target[t] == a.spec.ignore_index) {
      store_ignored_row(t, kRowStatsFields, a.stats, a.outputs);
      std::fill(clamp, clamp + 4, a.clamped_entropy[t] = 0.0f);
      return;
    }
    const float inv_temperature = a.spec.inv_temperature;
    Scratch& s = *a.scratch[thread_index()];
    const typename D::storage* x = a.logits + t * a.row_stride;
    const RowBrackets brackets = guess(a, x, s);
    const int64_t kept = a.kept;
    KeyRange b = brackets.inner;
    for (int passes = 1;; passes++) {
      const BracketPass<D, W> p(x, a.num_columns, inv_temperature, key_value(b.lo), key_value(b.hi), s.list.get());
      const RowStats stats = p.stats(x, a.num_columns, a.target[t], a.spec);
      const bool dead = std::isnan(stats.rest) || stats.max == -INFINITY;
      const bool missed = kept <= p.total.above || kept - p.total.above > p.listed;
      if (missed && !dead) {
        if (passes == 1)
          b = kept <= p.total.above ? brackets.above : brackets.below;
        else
          b = {kLowestKey, kHighestKey};
        continue;
      }
      a.nan->note(store_row(stats, t, kRowStatsFields, inv_temperature, a.stats, a.outputs));
      if (dead) {
        std::fill(clamp, clamp + 4, a.clamped_entropy[t] = NAN);
        return;
      }
      // [above hi][listed, descending]: the threshold is the kept-th.
      const Place at = radix_select<kSpare>(s.list.get(), p.listed, b, static_cast<uint32_t>(kept - p.total.above), s.count);
      const float threshold = key_value(at.key);
      for (int64_t i = 0; i < p.listed; i++)
        if (!(s.list[i] > threshold)) s.list[i] = -INFINITY;
      const RowPass<Float32, W, false, false> of_list(inv_temperature);
      Sums sums;
      double at_max = p.max > key_value(b.hi) ? 0 : -1;  // above the bracket one is left out already
      for (int64_t i = 0; i < p.listed; i += kChunk) {
        const int n = p.listed - i < kChunk ? static_cast<int>(p.listed - i) : kChunk;
        of_list.template sweep<true>(s.list.get() + i, n, p.max, sums, at_max);
      }
      finish_clamp(threshold, at.rank, at.equal, p.max, float(p.total.rest_above + sums.rest + at_max),
                   float(p.total.sum_xexp_above + sums.sum_xexp), inv_temperature, clamp);
      a.clamped_entropy[t] = clamp[3];
      return;
    }
  }
};

// ---- rows that are split over ranks ---------------------------------------------------------------------------------

template <class D>
struct SketchOp {
  struct Args {
    const typename D::storage* logits;
    int64_t row_stride, num_columns;
    const int64_t* target;
    RowSpec spec;
    float* sketch;
    NanFlag* nan;
    const std::unique_ptr<Scratch>* scratch;
  };

  template <int W>
  static ENTCOV_INLINE void row(const Args& a, int64_t t) {
    float* out = a.sketch + t * kSketch;
    const bool ignored = a.target[t] == a.spec.ignore_index;
    a.nan->note(!ignored && !a.spec.is_token(a.target[t]));  // the row will be, and a rank says so before it sends
    if (a.num_columns == 0 || ignored) {
      std::fill(out, out + kSketch, a.num_columns == 0 ? -INFINITY : 0.0f);
      return;
    }
    Scratch& s = *a.scratch[thread_index()];
    const int m = take_sample<D>(a.logits + t * a.row_stride, static_cast<int>(a.num_columns), s);
    uint16_t upper[kSketch];
    select_from_sample(s, m, kSketch, [m](int n) { return (2 * n + 1) * m / (2 * kSketch) + 1; }, upper);
    for (int n = 0; n < kSketch; n++) out[n] = key_value(first_key(upper[n], kSpareBits<D>));
  }
};

template <class D>
struct PartialOp {
  struct Args {
    const typename D::storage* logits;
    int64_t row_stride, num_columns;
    const int64_t* target;
    RowSpec spec;
    const Bracket* bracket;
    float* partial;
    const std::unique_ptr<Scratch>* scratch;
  };

  template <int W>
  static ENTCOV_INLINE void row(const Args& a, int64_t t) {
    constexpr int kWidth = kRowStatsFields + kPartial;
    float *out = a.partial + t * kWidth, *partial = out + kRowStatsFields, *cells = partial + kPartialFields;
    const Bracket b = a.bracket[t];
    std::fill(out, out + kWidth, 0.0f);
    if (b.mode == kDone || a.target[t] == a.spec.ignore_index) return;
    Scratch& s = *a.scratch[thread_index()];
    const typename D::storage* x = a.logits + t * a.row_stride;
    const float* list = s.list.get();
    const BracketPass<D, W> p(x, a.num_columns, a.spec.inv_temperature, key_value(b.lo), key_value(b.hi), s.list.get());
    uint32_t used = 0;
    for (int64_t i = 0; i < p.listed; i++) {
      const float v = list[i] + 0.0f;
      used |= float_bits(v);
      if (b.mode != kListed)
        cells[cell_of(b, order_key(v))] += 1.0f;
      else if (i < kCells)
        cells[i] = v;
    }
    store_row(p.stats(x, a.num_columns, a.target[t], a.spec), 0, kRowStatsFields, a.spec.inv_temperature, out, {});
    write_partial(partial, p.max, float(p.total.rest_above), float(p.total.sum_xexp_above),
                  static_cast<uint32_t>(p.total.above), static_cast<uint32_t>(p.listed), used);
  }
};

struct SingleThread {
  static constexpr int kSize = 1;
  static constexpr int lane = 0;
  uint32_t sum(uint32_t v) const { return v; }
  float sum(float v) const { return v; }
  float max(float v) const { return v; }
  uint32_t before(uint32_t) const { return 0; }
  bool all(bool v) const { return v; }
  int first(bool) const { return 0; }
  template <class T>
  T of(T v, int) const {
    return v;
  }
};

}  // namespace

Error clamped_stats(const Logits& logits, const int64_t* target, const RowSpec& spec, int64_t kept, float* stats,
                    const RowOutputs& outputs, float* clamp, float* clamped_entropy, Device threads) {
  const int64_t columns = spec.columns(logits.width);
  const auto scratch = scratch_for(threads, logits.T, columns);
  NanFlag nan;
  with_dtype(logits.dtype, [&](auto d) {
    using D = decltype(d);
    for_rows<ClampedStatsOp<D>>(
        {static_cast<const typename D::storage*>(logits.data), logits.row_stride, columns, target, spec, kept, stats,
         outputs, clamp, clamped_entropy, &nan, scratch.data()},
        logits.T, logits.T * columns, threads);
  });
  return nan.error();
}

Error clamp_sketch(const Logits& logits, const int64_t* target, const RowSpec& spec, float* sketch, Device threads) {
  const int64_t columns = spec.columns(logits.width);
  const auto scratch = scratch_for(threads, logits.T, 0);
  NanFlag nan;
  with_dtype(logits.dtype, [&](auto d) {
    using D = decltype(d);
    for_rows<SketchOp<D>>({static_cast<const typename D::storage*>(logits.data), logits.row_stride, columns, target,
                           spec, sketch, &nan, scratch.data()},
                          logits.T, logits.T * columns, threads);
  });
  return nan.error();
}

Error clamp_bracket(const Messages& sketches, const int64_t* target, const RowSpec& spec, int64_t kept, int64_t margin,
                    uint32_t* bracket, Device threads) {
  threads = usable_threads(threads);
  Bracket* out = reinterpret_cast<Bracket*>(bracket);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1 && sketches.T > 1)
  for (int64_t t = 0; t < sketches.T; t++)
    out[t] = target[t] == spec.ignore_index
                 ? Bracket{0, 0, kDone, 0}
                 : initial_bracket(SingleThread(), Gathered{sketches, t, kSketch}, spec.vocab_size, kept, margin);
  return nullptr;
}

Error clamp_partial(const Logits& logits, const int64_t* target, const RowSpec& spec, const uint32_t* bracket,
                    float* partial, Device threads) {
  const int64_t columns = spec.columns(logits.width);
  const auto scratch = scratch_for(threads, logits.T, columns);
  with_dtype(logits.dtype, [&](auto d) {
    using D = decltype(d);
    for_rows<PartialOp<D>>({static_cast<const typename D::storage*>(logits.data), logits.row_stride, columns, target,
                            spec, reinterpret_cast<const Bracket*>(bracket), partial, scratch.data()},
                           logits.T, logits.T * columns, threads);
  });
  return nullptr;
}

Error clamp_refine(const Messages& partials, const int64_t* target, const RowSpec& spec, const float* stats, int fields,
                   int64_t kept, const uint32_t* bracket, const float* clamp, uint32_t* next_bracket, float* next_clamp,
                   float* clamped_entropy, uint32_t* unfinished, Device threads) {
  threads = usable_threads(threads);
  const Bracket* brackets = reinterpret_cast<const Bracket*>(bracket);
  Bracket* next = reinterpret_cast<Bracket*>(next_bracket);
  uint32_t open = 0;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(+ : open) if (threads > 1 && partials.T > 1)
  for (int64_t t = 0; t < partials.T; t++) {
    std::copy(clamp + t * 4, clamp + t * 4 + 4, next_clamp + t * 4);
    next[t] = refine(SingleThread(), Gathered{partials, t, kPartial}, brackets[t], stats + t * fields,
                     target[t] == spec.ignore_index, static_cast<uint32_t>(kept), spec.inv_temperature,
                     next_clamp + t * 4);
    clamped_entropy[t] = next_clamp[t * 4 + 3];
    open += next[t].mode != kDone;
  }
  *unfinished += open;
  return nullptr;
}

}  // namespace entcov::cpu
