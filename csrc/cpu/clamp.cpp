// The clamped entropy on the CPU: clamped_stats, and the four steps for rows that are split over ranks. The algorithm
// and everything shared with CUDA are in ../clamp.h.
//
// Memory. clamped_stats reads a sample of 1 in 20 sectors, then the row in one pass; about one row in a thousand, whose
// bracket missed, is read one or two more times. The logits in the bracket are written to a list and read back. It
// writes 44 bytes per row. clamp_sketch reads the sample and writes 256 bytes per row. clamp_partial reads the row once
// and writes 680 bytes per row. clamp_bracket and clamp_refine read the gathered messages. Scratch per thread: 152 KiB
// of counters and sample, and two lists of 4 bytes per column, of which only the part that is filled is touched.
//
// Parallelisation. One thread per row. Listing reads every chunk of the pass (row_pass.h) a second time, from L1: with
// AVX-512 it masks 64 logits at a time, of which about two are in the bracket; otherwise one store and one addition per
// logit, without a branch. A list has room for the whole row and never overflows, so a pass with all keys as the
// bracket always ends the search.
//
// Numerics. As in row_pass.h; all counts are integers.
#include "../clamp.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <memory>
#include <vector>

#include "row_pass.h"

namespace entcov::cpu {
namespace {

constexpr int kBins = 512;
constexpr int kWays = 4;            // counters per bin, used in turn: a counter that was just written is slow to read
constexpr int kHalfKeys = 1 << 16;  // number of upper halves of keys

constexpr int kListSlack = 64;  // elements past the end of a list that may be overwritten

struct Scratch {
  uint16_t upper[kSampleLimit];      // the sample: upper halves of keys
  uint16_t sampled[kHalfKeys] = {};  // how often each upper half is in the sample; all 0 between rows
  uint32_t count[kBins][kWays];
  std::unique_ptr<float[]> room;

  explicit Scratch(int64_t columns) : room(new float[2 * (columns + kListSlack)]) {}

  // Room for two lists, each with as many logits as the row has columns.
  template <class D>
  typename D::storage* list() {
    return reinterpret_cast<typename D::storage*>(room.get());
  }
};

// The arguments of the ops that read logits. No op uses all of them.
struct RowArgs {
  Logits logits;
  const int64_t* target;  // [T]
  RowSpec spec;
  float* out;  // [T, ...]
  int64_t kept = 0;
  const Bracket* bracket = nullptr;  // [T]
  RowOutputs outputs{};
  float *clamp = nullptr, *clamped_entropy = nullptr;  // [T, 4], [T]
  int64_t num_columns = 0;                             // without padding
  NanFlag* nan = nullptr;
  const std::unique_ptr<Scratch>* scratch = nullptr;  // one per thread

  Scratch& of_this_thread() const {
#ifdef _OPENMP
    return *scratch[omp_get_thread_num()];
#else
    return *scratch[0];
#endif
  }
};

template <template <class> class Op>
Error run(RowArgs args, int threads) {
  args.num_columns = args.spec.columns(args.logits.width);
  std::vector<std::unique_ptr<Scratch>> scratch;  // allocated here: an exception in an OpenMP thread would be fatal
  for (int64_t i = 0; i == 0 || (i < usable_threads(threads) && i < args.logits.T); i++)
    scratch.push_back(std::make_unique<Scratch>(args.num_columns));
  NanFlag nan;
  args.scratch = scratch.data(), args.nan = &nan;
  with_dtype(args.logits.dtype, [&](auto d) { for_rows<Op<decltype(d)>>(args, args.logits, threads); });
  return nan.error();
}

template <class D>
constexpr int kSpareBits = 0;
template <>
constexpr int kSpareBits<BFloat16> = 16;
template <>
constexpr int kSpareBits<Float16> = 13;

// order_key() of every lane.
template <int W>
ENTCOV_INLINE u32<W> order_keys(f32<W> v) {
  const u32<W> b = (u32<W>)(v + 0.0f);
  return b ^ ((u32<W>)((i32<W>)b >> 31) | 0x80000000u);
}

// ---- the sample -----------------------------------------------------------------------------------------------------

// Reads the sample of plan_sample() into s.upper and returns its size.
template <class D>
ENTCOV_INLINE int take_sample(const typename D::storage* x, int columns, Scratch& s) {
  int size = 0;
  const auto take = [&](const typename D::storage* from, int n) __attribute__((always_inline)) {
    for (int j = 0; j < n; j += 8) {
      const f32<8> v = n - j < 8 ? widen_tail<D, 8>(from + j, n - j) : D::template widen<8>(from + j);
      const u16<8> upper = __builtin_convertvector(order_keys<8>(v) >> 16, u16<8>);
      memcpy(s.upper + size + j, &upper, sizeof upper);
    }
    size += n;
  };
  if (columns <= kUnsampledColumns) {
    take(x, columns);
    return size;
  }
  constexpr int kSector = kSectorBytes / static_cast<int>(sizeof(typename D::storage));
  const SamplePlan plan = plan_sample(columns, kSector);
  const auto sector = [&](int i) { return x + static_cast<int64_t>(i * plan.every + plan.first) * kSector; };
  constexpr int kAhead = 24;  // prefetch distance: the time to process 24 sectors covers the latency of memory
  for (int i = 0; i < plan.taken; i++) {
    __builtin_prefetch(sector(i + kAhead < plan.taken ? i + kAhead : i));
    take(sector(i), kSector);
  }
  return size;
}

// For n < size, writes the upper half of the rank(n)-th largest key of the sample [m] to upper[n]. rank(n) is in [1, m]
// and ascends with n.
template <class Rank>
void select_from_sample(Scratch& s, int m, int size, Rank rank, uint16_t* upper) {
  constexpr int kBlock = 256;
  for (int i = 0; i < m; i++) s.sampled[s.upper[i]]++;
  int end = kHalfKeys, n = 0, above = 0;  // above: number of sampled keys >= end
  while (n < size) {
    uint16_t in_block = 0;  // at most kSampleLimit
    for (int i = end - kBlock; i < end; i++) in_block = static_cast<uint16_t>(in_block + s.sampled[i]);
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

struct Counts {
  int64_t inside = 0, above = 0;  // number of elements inside and above a bracket
};

#if defined(__x86_64__)
template <class D>
__attribute__((target(ENTCOV_AVX512))) Counts list_by_masks(const typename D::storage* x, int n, float lo, float hi,
                                                            typename D::storage* out) {
  Counts counts;
  for (int j = 0; j < n; j += 64) {
    uint64_t from_lo = 0, over_hi = 0;
    for (int k = 0; k < 64; k += 16) {
      const __m512 v = (__m512)D::template widen<16>(x + j + k);
      from_lo |= static_cast<uint64_t>(_mm512_cmp_ps_mask(v, _mm512_set1_ps(lo), _CMP_GE_OQ)) << k;
      over_hi |= static_cast<uint64_t>(_mm512_cmp_ps_mask(v, _mm512_set1_ps(hi), _CMP_GT_OQ)) << k;
    }
    uint64_t inside = from_lo & ~over_hi;
    typename D::storage* at = out + counts.inside;
    counts.above += _mm_popcnt_u64(over_hi);
    counts.inside += _mm_popcnt_u64(inside);
    do {  // four per iteration: there are rarely more, and there is no branch on the exact number
      for (int k = 0; k < 4; k++) {
        *at++ = x[j + (_tzcnt_u64(inside) & 63)];
        inside = _blsr_u64(inside);
      }
    } while (inside);
  }
  return counts;
}
#endif

// Writes the elements of x [n] in [lo, hi] to out in order, and overwrites up to kListSlack elements past them. out may
// be x.
template <class D, int W>
ENTCOV_INLINE Counts list_inside(const typename D::storage* x, int n, float lo, float hi, typename D::storage* out) {
  Counts counts;
  int j = 0;
#if defined(__x86_64__)
  if constexpr (W == 16) counts = list_by_masks<D>(x, n / 64 * 64, lo, hi, out), j = n / 64 * 64;
#endif
  for (; j < n; j += W) {
    const int real = n - j < W ? n - j : W;
    const f32<W> v = real < W ? widen_tail<D, W>(x + j, real) : D::template widen<W>(x + j);
    float values[W];
    memcpy(values, &v, sizeof v);
    for (int k = 0; k < real; k++) {
      out[counts.inside] = x[j + k];
      counts.inside += (values[k] >= lo) & (values[k] <= hi);
      counts.above += values[k] > hi;
    }
  }
  return counts;
}

// Calls use(x) for every element of a list.
template <class D, int W, class Use>
ENTCOV_INLINE void for_listed(const typename D::storage* list, int64_t n, Use use) {
  for (int64_t i = 0; i < n; i += W) {
    const int real = n - i < W ? static_cast<int>(n - i) : W;
    const f32<W> v = real < W ? widen_tail<D, W>(list + i, real) : D::template widen<W>(list + i);
    for (int k = 0; k < real; k++) use(v[k]);
  }
}

// One pass over a row with a bracket.
template <class D, int W>
struct BracketPass : RowPass<D, W, false, true> {
  Counts counts;

  ENTCOV_INLINE BracketPass(const typename D::storage* x, int64_t columns, float inv_temperature, KeyRange bracket,
                            typename D::storage* list)
      : RowPass<D, W, false, true>(inv_temperature, key_value(bracket.hi)) {
    this->add_row(x, columns, [&](int64_t at, int n) __attribute__((always_inline)) {
      const Counts c = list_inside<D, W>(x + at, n, key_value(bracket.lo), this->threshold, list + counts.inside);
      counts.inside += c.inside, counts.above += c.above;
    });
  }
};

// ---- clamped_stats --------------------------------------------------------------------------------------------------

struct Place {
  uint32_t key, rank, equal;  // of an element: its key, its rank among equal elements, and the number of those
};

// The place of the rank-th largest element of a list whose keys lie in `range`. Every step divides the range into at
// most 512 bins and continues with the elements of one bin.
template <class D, int W>
ENTCOV_INLINE Place radix_select(typename D::storage* list, int64_t listed, KeyRange range, uint32_t rank,
                                 uint32_t (*count)[kWays]) {
  constexpr int kSpare = kSpareBits<D>;
  uint32_t lo = range.lo >> kSpare, hi = range.hi >> kSpare;
  typename D::storage *left = list, *room = list + listed + kListSlack;
  int64_t n = listed;
  while (lo < hi) {
    int shift = 0;
    while ((hi - lo) >> shift >= kBins) shift++;
    memset(count, 0, kBins * sizeof *count);
    for (int64_t i = 0; i < n; i += W) {
      const int real = n - i < W ? static_cast<int>(n - i) : W;
      const f32<W> v = real < W ? widen_tail<D, W>(left + i, real) : D::template widen<W>(left + i);
      const u32<W> bins = ((order_keys<W>(v) >> kSpare) - lo) >> shift;
      uint32_t bin[W];
      memcpy(bin, &bins, sizeof bins);
      if (real == W)
        for (int k = 0; k < W; k++) count[bin[k]][k % kWays]++;
      else
        for (int k = 0; k < real; k++) count[bin[k]][k % kWays]++;
    }
    uint32_t bin = (hi - lo) >> shift, in_bin;
    const auto total = [&](uint32_t b) { return count[b][0] + count[b][1] + count[b][2] + count[b][3]; };
    while (bin > 0 && rank > (in_bin = total(bin))) rank -= in_bin, bin--;
    lo += bin << shift;
    if ((hi - lo) >> shift > 0) hi = lo + (1u << shift) - 1u;
    if (hi == 0x7fffffffu >> kSpare && lo < hi) hi--;  // -0 has the key of +0
    n = list_inside<D, W>(left, static_cast<int>(n), key_value(whole_key(lo, kSpare)), key_value(whole_key(hi, kSpare)),
                          room).inside;
    left = room;
  }
  return {whole_key(lo, kSpare), rank, static_cast<uint32_t>(n)};
}

template <class D>
struct ClampedStatsOp {
  using Args = RowArgs;

  static ENTCOV_INLINE RowBrackets initial_brackets(const Args& a, const typename D::storage* x, Scratch& s) {
    const KeyRange all{kLowestKey, kHighestKey};
    const int columns = static_cast<int>(a.num_columns);
    if (columns <= kUnsampledColumns) return {all, all, all};
    const int m = take_sample<D>(x, columns, s);
    const SampleRanks ranks = sample_ranks(a.kept, columns, m, INFINITY);
    uint16_t upper[4];
    select_from_sample(s, m, 4, [&](int n) { return ranks.rank(n); }, upper);
    return row_brackets(ranks, upper, kSpareBits<D>);
  }

  template <int W>
  static ENTCOV_INLINE void row(const Args& a, int64_t t) {
    float* clamp = a.clamp + t * 4;
    if (a.target[t] == a.spec.ignore_index) {
      store_ignored_row(t, kRowStatsFields, a.out, a.outputs);
      std::fill(clamp, clamp + 4, a.clamped_entropy[t] = 0.0f);
      return;
    }
    const float inv_temperature = a.spec.inv_temperature;
    Scratch& s = a.of_this_thread();
    const auto* x = a.logits.row<typename D::storage>(t);
    typename D::storage* list = s.template list<D>();
    const RowBrackets brackets = initial_brackets(a, x, s);
    KeyRange b = brackets.inner;
    for (int passes = 1;; passes++) {
      const BracketPass<D, W> p(x, a.num_columns, inv_temperature, b, list);
      const RowStats stats = p.stats(x, a.num_columns, a.target[t], a.spec);
      const bool dead = std::isnan(stats.sum_exp_m1) || p.max == -INFINITY;
      const int64_t rank = a.kept - p.counts.above;  // of the threshold in the bracket, 1 is the largest
      if (!dead && (rank < 1 || rank > p.counts.inside)) {
        b = passes > 1 ? KeyRange{kLowestKey, kHighestKey} : rank < 1 ? brackets.above : brackets.below;
        continue;
      }
      a.nan->note(store_row(stats, t, kRowStatsFields, inv_temperature, a.out, a.outputs));
      if (dead) {
        std::fill(clamp, clamp + 4, a.clamped_entropy[t] = NAN);
        return;
      }
      const Place at = radix_select<D, W>(list, p.counts.inside, b, static_cast<uint32_t>(rank), s.count);
      // Add the listed logits above the threshold to the sums above the bracket. If the maximum is above the bracket,
      // one occurrence of it is left out already; else at_max leaves it out here.
      const RowPass<D, W, false, true> of_list(inv_temperature, key_value(at.key));
      Sums sums;
      double at_max = p.max > p.threshold ? 0 : -1;
      for (int64_t i = 0; i < p.counts.inside; i += kChunk) {
        const int n = p.counts.inside - i < kChunk ? static_cast<int>(p.counts.inside - i) : kChunk;
        of_list.template sweep<true>(list + i, n, p.max, sums, at_max);
      }
      finish_clamp(of_list.threshold, at.rank, at.equal, p.max,
                   float(p.total.sum_exp_m1_above + sums.sum_exp_m1_above + at_max),
                   float(p.total.sum_xexp_above + sums.sum_xexp_above), inv_temperature, clamp);
      a.clamped_entropy[t] = clamp[3];
      return;
    }
  }
};

// ---- rows that are split over ranks ---------------------------------------------------------------------------------

template <class D>
struct SketchOp {
  using Args = RowArgs;

  template <int W>
  static ENTCOV_INLINE void row(const Args& a, int64_t t) {
    float* out = a.out + t * kSketch;
    if (a.num_columns == 0 || a.target[t] == a.spec.ignore_index) {
      std::fill(out, out + kSketch, a.num_columns == 0 ? -INFINITY : 0.0f);
      return;
    }
    Scratch& s = a.of_this_thread();
    const int m = take_sample<D>(a.logits.row<typename D::storage>(t), static_cast<int>(a.num_columns), s);
    uint16_t upper[kSketch];
    select_from_sample(s, m, kSketch, [m](int n) { return (2 * n + 1) * m / (2 * kSketch) + 1; }, upper);
    for (int n = 0; n < kSketch; n++) out[n] = key_value(first_key(upper[n], kSpareBits<D>));
  }
};

template <class D>
struct PartialOp {
  using Args = RowArgs;

  template <int W>
  static ENTCOV_INLINE void row(const Args& a, int64_t t) {
    constexpr int kWidth = kRowStatsFields + kPartial;
    float *out = a.out + t * kWidth, *partial = out + kRowStatsFields, *cells = partial + kPartialFields;
    const Bracket b = a.bracket[t];
    std::fill(out, out + kWidth, 0.0f);
    if (b.mode == kDone || a.target[t] == a.spec.ignore_index) return;
    Scratch& s = a.of_this_thread();
    const auto* x = a.logits.row<typename D::storage>(t);
    typename D::storage* list = s.template list<D>();
    const BracketPass<D, W> p(x, a.num_columns, a.spec.inv_temperature, {b.lo, b.hi}, list);
    uint32_t used = 0;
    int i = 0;
    for_listed<D, W>(list, p.counts.inside, [&](float v) {
      used |= float_bits(v + 0.0f);
      if (b.mode != kListed)
        cells[cell_of(b, order_key(v))] += 1.0f;
      else if (i < kCells)
        cells[i++] = v + 0.0f;
    });
    store_row(p.stats(x, a.num_columns, a.target[t], a.spec), 0, kRowStatsFields, a.spec.inv_temperature, out, {});
    write_partial(partial, p.max, float(p.total.sum_exp_m1_above), float(p.total.sum_xexp_above),
                  static_cast<uint32_t>(p.counts.above), static_cast<uint32_t>(p.counts.inside), used);
  }
};

}  // namespace

Error clamped_stats(const Logits& logits, const int64_t* target, const RowSpec& spec, int64_t kept, float* stats,
                    const RowOutputs& outputs, float* clamp, float* clamped_entropy, Device threads) {
  return run<ClampedStatsOp>({logits, target, spec, stats, kept, nullptr, outputs, clamp, clamped_entropy}, threads);
}

Error clamp_sketch(const Logits& logits, const int64_t* target, const RowSpec& spec, float* sketch, Device threads) {
  return run<SketchOp>({logits, target, spec, sketch}, threads);
}

Error clamp_partial(const Logits& logits, const int64_t* target, const RowSpec& spec, const uint32_t* bracket,
                    float* partial, Device threads) {
  return run<PartialOp>({logits, target, spec, partial, 0, reinterpret_cast<const Bracket*>(bracket)}, threads);
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
                     target[t] == spec.ignore_index, static_cast<uint32_t>(kept), spec, next_clamp + t * 4);
    clamped_entropy[t] = next_clamp[t * 4 + 3];
    open += next[t].mode != kDone;
  }
  *unfinished += open;
  return nullptr;
}

}  // namespace entcov::cpu
