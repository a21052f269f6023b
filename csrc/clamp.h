// The clamped entropy: the entropy of the softmax over the K largest logits of a row. Exact for any data and sharding.
//
//   threshold   the K-th largest logit. Of the `equal` logits that equal it, need = K - (number of logits above it) are
//               kept. Each of them has weight w = need / equal, so the result depends neither on the order of ties nor
//               on the sharding. Logits above the threshold have w = 1, those below it 0
//   L_K         log1p(sum_exp_m1), sum_exp_m1 = sum' w e^y over the kept logits, y = (x - max) / temperature
//   H_K         L_K - (sum w y e^y) / (1 + sum_exp_m1)                                     docs/math.md (10) to (12)
//
// Algorithm: a bracket from a sample, one pass over the row with exact counts, and a selection inside the bracket.
//
//   sample   one 32-byte sector in 20. Its order statistics give a bracket (a range of values) that probably contains
//            the threshold
//   pass     RowStats of all logits; the number of logits above the bracket and the same sums over them; and the logits
//            inside the bracket, about 4 % of a row
//   select   the counts show whether the bracket contains the threshold. If so, the threshold is selected among the
//            logits inside. If not, they show on which side it lies, and the pass is repeated with a bracket there
//
// So a bad bracket costs time but never accuracy. A whole row is computed by one thread or block (clamped_stats), with
// brackets from sample_ranks() and row_brackets(). A row that is split over ranks takes rounds
// (entcov/stats/sharded_clamp.py) of four ops, two of which read logits:
//
//   clamp_sketch    logits -> kSketch quantiles of a sample of this shard                                (all-gathered)
//   clamp_bracket   sketches of all shards -> the first bracket: initial_bracket()
//   clamp_partial   logits -> RowStats, sums above the bracket, and its contents: counts or a list       (all-gathered)
//   clamp_refine    partials of all shards -> the clamp, or the bracket of the next round: refine()
//
// A partial contains either the logits inside the bracket (kListed, at most 160) or their counts in 160 cells, which
// are subranges of the bracket. Counts determine the result if the threshold's cell and every nonempty cell above it
// can contain only one value. Unused low mantissa bits tell which values can occur: 16 bits are unused for bf16, even
// after an upcast to fp32. If a cell can contain several values (fp32 with all mantissa bits in use, a bracket around
// zero, or a bracket that missed), the threshold's cell is the next bracket. Every round divides the range of keys by
// 160, so the search ends for any data. All ranks take the same decisions, because those depend only on integers and on
// gathered data, in a fixed order.
//
// Numerics. Sums are those of row_stats.h: relative to the maximum, with one occurrence of it left out. Counts are sent
// as fp32, which is exact up to 2^24 columns in a shard. Values are compared by keys: unsigned integers in the order of
// the floats, with -0 equal to +0. -inf has a key; a NaN is in no bracket and makes the sums of its row NaN.
//
// Host and device share this file. Functions with a Team are called by all of its threads: a warp, or a single thread.
// A Team has kSize threads; `lane` is the index of this one. sum(v), max(v), all(v): over the team, known to every
// thread. before(v): the sum of v over lower lanes. first(v): a lane whose v is true, an arbitrary lane if there is
// none. of(v, lane): the v of that lane.
#pragma once

#include <cstring>

#include "signature.h"

#ifdef __CUDACC__
#define ENTCOV_TEAM __device__ __forceinline__  // warp teams exist on the device only
#define ENTCOV_UNROLL _Pragma("unroll")
#else
#define ENTCOV_TEAM inline
#define ENTCOV_UNROLL
#endif

namespace entcov {

// ---- keys -----------------------------------------------------------------------------------------------------------

constexpr uint32_t kLowestKey = 0x007fffffu;   // key of -inf
constexpr uint32_t kHighestKey = 0xff800000u;  // key of +inf

ENTCOV_HD uint32_t float_bits(float x) {
  uint32_t b;
  memcpy(&b, &x, sizeof b);
  return b;
}

ENTCOV_HD float bits_float(uint32_t b) {
  float x;
  memcpy(&x, &b, sizeof x);
  return x;
}

ENTCOV_HD uint32_t order_key(float x) {
  const uint32_t b = float_bits(x + 0.0f);  // -0 becomes +0
  return b ^ (static_cast<uint32_t>(static_cast<int32_t>(b) >> 31) | 0x80000000u);
}

ENTCOV_HD float key_value(uint32_t key) { return bits_float(key >> 31 ? key ^ 0x80000000u : ~key); }

// fp32 values that come from a narrower type use only the upper bits of their key. The lower `spare` bits (16 for bf16,
// 13 for fp16, 0 for fp32) are all 0 for positive and all 1 for negative values. This is the key with these upper bits.
ENTCOV_HD uint32_t whole_key(uint32_t upper, int spare) {
  const uint32_t key = upper << spare;
  return key >> 31 ? key : key | ((1u << spare) - 1u);
}

// The first n in [low, high) for which holds(n), or high; holds is false up to some n and true from there on.
template <class Holds>
ENTCOV_TEAM uint32_t first_where(uint32_t low, uint32_t high, Holds holds) {
  while (low < high) {
    const uint32_t middle = low + (high - low) / 2;
    if (holds(middle))
      high = middle;
    else
      low = middle + 1u;
  }
  return low;
}

ENTCOV_HD uint32_t finite_key(uint32_t key) {
  return key < kLowestKey ? kLowestKey : key > kHighestKey ? kHighestKey : key;
}

// The smallest and the largest key of a value whose key has these upper 16 bits, limited to [key of -inf, key of +inf].
ENTCOV_HD uint32_t first_key(uint32_t upper, int spare) { return finite_key(whole_key(upper << (16 - spare), spare)); }
ENTCOV_HD uint32_t last_key(uint32_t upper, int spare) {
  uint32_t last = (upper << (16 - spare)) | ((1u << (16 - spare)) - 1u);
  if (spare < 16 && upper == 0x7fffu) last--;  // -0 has the key of +0
  return finite_key(whole_key(last, spare));
}

// ---- the sample of a row --------------------------------------------------------------------------------------------

constexpr int kSectorBytes = 32;         // the smallest unit of a memory transfer
constexpr int kSampleEvery = 20;         // one sector in 20 is sampled
constexpr int kSampleLimit = 8192;       // the most logits in a sample
constexpr int kUnsampledColumns = 4096;  // the sample of a row with at most this many columns is the whole row

// The sampled sectors of a longer row: first, first + every, ..., `taken` of them. They are spread over the whole row,
// because token ids are often ordered by frequency and the first columns are not representative.
struct SamplePlan {
  int every, first, taken;
};

ENTCOV_HD SamplePlan plan_sample(int columns, int sector) {  // sector: number of logits in a sector
  const int sectors = columns / sector, limit = kSampleLimit / sector;
  const int least = (sectors + limit - 1) / limit;
  const int every = least > kSampleEvery ? least : kSampleEvery;
  return {every, every / 2, (sectors - every / 2 + every - 1) / every};
}

// ---- whole rows -----------------------------------------------------------------------------------------------------

struct KeyRange {
  uint32_t lo, hi;  // both inclusive
};

// The bracket for the threshold (inner), and the ones to search next if the threshold lies above or below it.
struct RowBrackets {
  KeyRange inner, above, below;
};

// Ranks in the sample (1 is the largest element) that become the ends of brackets. With r the expected rank of the
// threshold in the sample and d = 3.2 standard deviations of it: r - 3d, r - d, r + d, r + 3d.
struct SampleRanks {
  float wanted[4];
  int size;  // of the sample

  ENTCOV_HD bool exists(int n) const { return wanted[n] >= 1.0f && wanted[n] <= static_cast<float>(size); }
  ENTCOV_HD int rank(int n) const {
    const float w = n == 0 ? wanted[0] : n == 1 ? wanted[1] : n == 2 ? wanted[2] : wanted[3];
    return w < 1.0f ? 1 : w > static_cast<float>(size) ? size : static_cast<int>(w);
  }
};

// most: upper limit for the estimated number of logits in the bracket.
ENTCOV_HD SampleRanks sample_ranks(int64_t kept, int columns, int size, float most) {
  const float share = static_cast<float>(size) / static_cast<float>(columns), rank = static_cast<float>(kept) * share;
  const float variance = rank * fmaxf(0.0f, 1.0f - rank / static_cast<float>(size));
  const float d = fminf(3.2f * sqrtf(variance) + 2.0f, 0.5f * most * share);
  return {{floorf(rank - 3.0f * d), floorf(rank - d), ceilf(rank + d), ceilf(rank + 3.0f * d)}, size};
}

// upper [4]: the upper 16 bits of the keys of the sampled elements with these ranks.
template <class Upper>
ENTCOV_HD RowBrackets row_brackets(const SampleRanks& ranks, const Upper* upper, int spare) {
  RowBrackets b;
  b.inner = {ranks.exists(2) ? first_key(upper[2], spare) : kLowestKey,
             ranks.exists(1) ? last_key(upper[1], spare) : kHighestKey};
  b.above = {b.inner.hi, ranks.exists(0) ? last_key(upper[0], spare) : kHighestKey};
  b.below = {ranks.exists(3) ? first_key(upper[3], spare) : kLowestKey, b.inner.lo};
  return b;
}

// Writes clamp [4]: threshold, weight of the logits that equal it, L_K, H_K. sum_exp_m1 and sum_xexp: over the logits
// above the threshold, without one occurrence of max; they are ignored if the threshold equals max.
ENTCOV_HD void finish_clamp(float threshold, uint32_t need, uint32_t equal, float max, float sum_exp_m1, float sum_xexp,
                            float inv_temperature, float* clamp) {
  const float copies = static_cast<float>(need);
  if (threshold < max) {
    const float y = (threshold - max) * inv_temperature, e = expf(y);
    sum_exp_m1 += copies * e;
    if (e > 0.0f) sum_xexp += copies * y * e;
  } else {
    sum_exp_m1 = copies - 1.0f, sum_xexp = 0.0f;
  }
  const float log_sum = log1pf(sum_exp_m1);
  clamp[0] = threshold;
  clamp[1] = copies / static_cast<float>(equal);
  clamp[2] = log_sum;
  clamp[3] = log_sum - sum_xexp / (1.0f + sum_exp_m1);
}

// ---- rows that are split over ranks: brackets and partials ----------------------------------------------------------

constexpr int kSketch = 64;
constexpr int kCells = 160;
constexpr int kPartialFields = 6;
constexpr int kPartial = kPartialFields + kCells;  // floats per row, after the shard's RowStats
enum PartialField : int {
  kPartialMax,       // largest logit of the shard; -inf: none is finite
  kPartialSumExpM1,  // sum' e^y over the logits above hi, y = (x - max) / temperature with the shard's own max
  kPartialXExp,      // sum y e^y over the same logits
  kPartialAbove,     // number of logits above hi
  kPartialInside,    // number of logits in the bracket
  kPartialUnused,    // number of lowest bits that are 0 in all logits in the bracket
};

enum Mode : uint32_t {
  kCount = 0,   // counts in cells with equally many keys
  kListed = 1,  // a list of the logits
  kDone = 2,    // the row is finished
  kSpread = 3,  // counts in cells of equal width in value: for brackets around 0, since half of all keys are in (-1, 1)
};

struct Bracket {
  uint32_t lo, hi, mode, reserved;  // keys, both inclusive; the same on every rank
};

// The number of keys in a cell of kCount.
ENTCOV_HD uint32_t cell_width(const Bracket& b) { return (b.hi - b.lo) / kCells + 1; }

// The cell of a key in the bracket; monotonic in the key.
ENTCOV_HD uint32_t cell_of(const Bracket& b, uint32_t key) {
  uint32_t cell;
  if (b.mode == kSpread) {
    const float lo = key_value(b.lo), per_cell = (key_value(b.hi) - lo) / kCells;
    cell = static_cast<uint32_t>(fminf(fmaxf((key_value(key) - lo) / per_cell, 0.0f), kCells));
  } else {
    cell = (key - b.lo) / cell_width(b);
  }
  return cell < kCells ? cell : kCells - 1;  // a valid index even for an inconsistent bracket
}

// The first key of a cell; for cell = kCells, the key after the bracket's last.
ENTCOV_TEAM uint32_t first_of_cell(const Bracket& b, uint32_t cell) {
  if (b.mode != kSpread) {
    const uint32_t width = cell_width(b);
    return b.lo + (cell > (b.hi - b.lo) / width ? b.hi - b.lo + 1u : cell * width);
  }
  return first_where(b.lo, b.hi + 1u, [&](uint32_t key) { return cell_of(b, key) >= cell; });
}

// Writes the fields of a partial, without its cells. used: bitwise or of x + 0 over the logits x in the bracket.
ENTCOV_HD void write_partial(float* partial, float max, float sum_exp_m1, float sum_xexp, uint32_t above,
                             uint32_t inside, uint32_t used) {
  int unused = 0;
  while (unused < 32 && !(used >> unused & 1u)) unused++;
  partial[kPartialMax] = max, partial[kPartialSumExpM1] = sum_exp_m1, partial[kPartialXExp] = sum_xexp;
  partial[kPartialAbove] = static_cast<float>(above), partial[kPartialInside] = static_cast<float>(inside);
  partial[kPartialUnused] = static_cast<float>(unused);
}

// The Team of a CPU thread.
struct SingleThread {
  static constexpr int kSize = 1, lane = 0;
  ENTCOV_HD uint32_t sum(uint32_t v) const { return v; }
  ENTCOV_HD float sum(float v) const { return v; }
  ENTCOV_HD float max(float v) const { return v; }
  ENTCOV_HD uint32_t before(uint32_t) const { return 0; }
  ENTCOV_HD bool all(bool v) const { return v; }
  ENTCOV_HD int first(bool) const { return 0; }
  template <class T>
  ENTCOV_HD T of(T v, int) const {
    return v;
  }
};

// ---- the first bracket ----------------------------------------------------------------------------------------------

// The gathered data of all shards for row t: the last `floats` floats of that row in every message.
struct Gathered {
  const Messages& messages;
  int64_t t;
  int floats;
  int64_t R = messages.R;
  ENTCOV_HD const float* of(int64_t r) const { return messages.row(r, t) + messages.width - floats; }
  ENTCOV_HD uint32_t columns(int64_t r) const { return static_cast<uint32_t>(messages.signature(r).columns); }
};

// kSketch times the estimated number of logits > v (or >= v) in the whole row.
template <class Team>
ENTCOV_TEAM uint32_t estimated_above(const Team& team, const Gathered& sketches, float v, bool or_equal) {
  uint32_t sum = 0;
  for (int64_t r = team.lane; r < sketches.R; r += Team::kSize) {
    const float* s = sketches.of(r);  // descends
    const uint32_t larger = first_where(0, kSketch, [&](uint32_t n) { return !(or_equal ? s[n] >= v : s[n] > v); });
    sum += larger * sketches.columns(r);
  }
  return team.sum(sum);
}

// How far a bracket extends beyond the largest (smallest) sampled value, as a multiple of its width inside the sample.
ENTCOV_HD float reach(int64_t margin, int64_t rank) {
  return fminf(8.0f, fmaxf(1.0f, static_cast<float>(margin) / static_cast<float>(rank)));
}

// A bracket that extends, by estimate, `margin` ranks beyond the kept-th largest logit on either side.
template <class Team>
ENTCOV_TEAM Bracket initial_bracket(const Team& team, const Gathered& sketches, int64_t vocab_size, int64_t kept,
                                    int64_t margin) {
  Bracket b{kLowestKey, kHighestKey, vocab_size <= kCells ? kListed : kCount, 0};
  if (b.mode == kListed) return b;
  const int64_t least = (kept + margin) * kSketch, most = (kept - 1 - margin) * kSketch;
  constexpr uint32_t kLowest = kLowestKey >> 16, kHighest = kHighestKey >> 16;
  const uint32_t too_high = first_where(kLowest + 1, kHighest + 1, [&](uint32_t upper) {
    return estimated_above(team, sketches, key_value(first_key(upper, 0)), true) < least;
  });
  b.lo = first_key(too_high - 1, 0);  // the largest upper half of a key with at least `least` logits from it on
  const uint32_t high = first_where(kLowest, kHighest, [&](uint32_t upper) {
    return most >= 0 && estimated_above(team, sketches, key_value(last_key(upper, 0)), false) <= most;
  });
  b.hi = last_key(high, 0);  // the smallest with at most `most` logits above it
  // If the bracket extends beyond the sample, that end is extrapolated by 1 to 8 times the bracket's width inside the
  // sample (reach()). An end at infinity would never miss, but its cells would be too wide to be useful.
  float largest = -INFINITY, below_zero = -INFINITY;  // the largest value of the sketches, and of their negatives
  for (int64_t r = team.lane; r < sketches.R; r += Team::kSize) {
    if (sketches.columns(r) == 0) continue;
    largest = fmaxf(largest, sketches.of(r)[0]), below_zero = fmaxf(below_zero, -sketches.of(r)[kSketch - 1]);
  }
  largest = team.max(largest);
  const float smallest = -team.max(below_zero), from = key_value(b.lo), to = key_value(b.hi);
  if (b.hi == kHighestKey && b.lo > kLowestKey && largest > from)
    b.hi = order_key(largest + reach(margin, kept) * (largest - from));
  else if (b.lo == kLowestKey && b.hi < kHighestKey && smallest < to && smallest > -INFINITY)
    b.lo = order_key(smallest - reach(margin, vocab_size - kept + 1) * (to - smallest));
  if (b.lo > b.hi) b.lo = kLowestKey, b.hi = kHighestKey;  // the sketches hold a NaN
  const float lo = key_value(b.lo), hi = key_value(b.hi);
  if (lo < 0.0f && hi > 0.0f && (hi - lo) / kCells > 1e-30f && hi - lo < INFINITY) b.mode = kSpread;
  return b;
}

// ---- from partials to the clamp, or to the next bracket -------------------------------------------------------------

// The smallest key >= a, and the largest key <= b, of a float whose `unused` lowest bits are 0. -0 has the key of +0.
ENTCOV_HD uint32_t first_possible(uint32_t a, int unused) {
  const uint32_t low = (1u << unused) - 1u;
  const uint32_t key = a >> 31 ? (a + low) & ~low : a | low;
  return key == 0x7fffffffu ? 0x80000000u : key;
}
ENTCOV_HD uint32_t last_possible(uint32_t b, int unused) {
  const uint32_t low = (1u << unused) - 1u;
  if (b >> 31) return b & ~low;
  const uint32_t key = (b & low) == low ? b : (b & ~low) - 1u;
  return key == 0x7fffffffu ? key - low - 1u : key;
}

// A count that was sent as fp32, limited to [0, most]: corrupt data must not lead to an undefined cast or an index out
// of range.
ENTCOV_HD uint32_t counted(float value, uint32_t most = 1u << 24) {
  return static_cast<uint32_t>(fminf(fmaxf(value, 0.0f), static_cast<float>(most)));  // a NaN: 0
}

// A lane's sums over the kept logits in the bracket. Logits that equal max are counted in at_max instead.
struct KeptSums {
  float sum_exp_m1 = 0.0f, sum_xexp = 0.0f, at_max = 0.0f;

  ENTCOV_HD void add(float copies, float x, float max, float inv_temperature) {
    const float y = (x - max) * inv_temperature;
    if (x >= max) at_max += copies;
    if (x >= max || !(y > kExpFloor)) return;
    const float w = copies * expf(y);
    sum_exp_m1 += w, sum_xexp += y * w;
  }
};

struct Found {
  float threshold = 0.0f;
  uint32_t need = 0, equal = 0;  // how many logits that equal the threshold are kept, and exist; equal = 0: not found
  Bracket next{0, 0, kCount, 0};
};

// The work of refine() on one row that is neither ignored nor finished.
template <class Team>
struct Refine {
  const Team& team;
  const Gathered& partials;
  float max, inv_temperature;

  ENTCOV_TEAM uint32_t total(PartialField field) const {
    uint32_t sum = 0;
    for (int64_t r = team.lane; r < partials.R; r += Team::kSize) sum += counted(partials.of(r)[field]);
    return team.sum(sum);
  }

  // Broadcasts what one lane has found. No lane has found anything only if the partials are inconsistent.
  ENTCOV_TEAM void share(Found& found) const {
    const int source = team.first(found.equal != 0);
    found.threshold = team.of(found.threshold, source);
    found.need = team.of(found.need, source), found.equal = team.of(found.equal, source);
    found.next.lo = team.of(found.next.lo, source), found.next.hi = team.of(found.next.hi, source);
    found.next.mode = team.of(found.next.mode, source);
  }

  // Selects the rank-th largest of the listed logits by comparing all pairs; at most kCells logits are listed.
  ENTCOV_TEAM Found select_listed(uint32_t rank, KeptSums& sums) const {
    Found found;
    const auto listed = [&](int64_t r) { return static_cast<int>(counted(partials.of(r)[kPartialInside], kCells)); };
    for (int64_t r = 0; r < partials.R; r++)
      for (int i = team.lane, size = listed(r); i < size; i += Team::kSize) {
        const float x = partials.of(r)[kPartialFields + i];
        uint32_t larger = 0, same = 0;
        for (int64_t q = 0; q < partials.R; q++) {
          const float* other = partials.of(q) + kPartialFields;
          for (int k = 0, n = listed(q); k < n; k++) larger += other[k] > x, same += other[k] == x;
        }
        if (larger < rank && rank - larger <= same) found.threshold = x, found.need = rank - larger, found.equal = same;
      }
    share(found);
    for (int64_t r = 0; r < partials.R; r++)
      for (int i = team.lane, size = listed(r); i < size; i += Team::kSize) {
        const float x = partials.of(r)[kPartialFields + i];
        if (x > found.threshold) sums.add(1.0f, x, max, inv_temperature);
      }
    return found;
  }

  // Selects by counts. found.equal is 0 if the threshold's cell or a nonempty cell above it can contain several values;
  // found.next is then the threshold's cell.
  ENTCOV_TEAM Found select_counted(const Bracket& b, uint32_t rank, KeptSums& sums) const {
    constexpr int kMine = kCells / Team::kSize;  // cells per lane, in descending order
    static_assert(kMine * Team::kSize == kCells, "");
    int unused = 31;
    for (int64_t r = 0; r < partials.R; r++) {
      const int here = static_cast<int>(counted(partials.of(r)[kPartialUnused], 31));
      if (partials.of(r)[kPartialInside] > 0.0f && here < unused) unused = here;
    }
    uint32_t count[kMine], sum = 0;
ENTCOV_UNROLL
    for (int i = 0; i < kMine; i++) {
      count[i] = 0;
      for (int64_t r = 0; r < partials.R; r++)
        count[i] += counted(partials.of(r)[kPartialFields + kCells - 1 - (team.lane * kMine + i)]);
      sum += count[i];
    }
    uint32_t before = team.before(sum);
    Found found;
    bool single = true;
ENTCOV_UNROLL
    for (int i = 0; i < kMine; i++) {
      if (count[i] > 0 && before < rank) {  // the threshold's cell, or one above it
        const uint32_t cell = static_cast<uint32_t>(kCells - 1 - (team.lane * kMine + i));
        const uint32_t first = first_possible(first_of_cell(b, cell), unused);
        const uint32_t last = last_possible(first_of_cell(b, cell + 1u) - 1u, unused);
        single = single && first == last;
        if (rank - before <= count[i]) {
          found.need = rank - before, found.equal = count[i], found.threshold = key_value(first);
          found.next = {first, last, count[i] <= kCells ? kListed : kCount, 0};
        } else {
          sums.add(static_cast<float>(count[i]), key_value(first), max, inv_temperature);
        }
      }
      before += count[i];
    }
    const bool all_single = team.all(single);
    share(found);
    if (!all_single) found.equal = 0;
    return found;
  }

  // Returns a bracket with mode kDone and writes clamp [4], or returns the bracket of the next round.
  ENTCOV_TEAM Bracket run(const Bracket& b, uint32_t kept, float* clamp) const {
    const float hi = key_value(b.hi);
    const uint32_t above = total(kPartialAbove), inside = total(kPartialInside);
    const uint32_t rank = kept - above;  // of the threshold among the logits in the bracket, 1 is the largest
    if (kept <= above) return {b.hi + 1u, order_key(max), kCount, 0};
    if (rank > inside) return {kLowestKey, last_possible(b.lo - 1u, 0), kCount, 0};
    KeptSums sums;
    const Found found = b.mode == kListed ? select_listed(rank, sums) : select_counted(b, rank, sums);
    if (found.equal == 0) return found.next;
    // Add the shards' sums above the bracket. Each leaves out one occurrence of its own maximum, if that lies above.
    for (int64_t r = team.lane; r < partials.R; r += Team::kSize) {
      const float* p = partials.of(r);
      const Shift s = shift_between(p[kPartialMax], max, inv_temperature);
      const float left_out = p[kPartialMax] > hi ? 1.0f : 0.0f;
      if (p[kPartialMax] == max) sums.at_max += left_out;
      const float sum_exp_m1 = p[kPartialSumExpM1] + (p[kPartialMax] == max ? 0.0f : left_out);
      sums.sum_exp_m1 += sum_exp_m1 * s.factor, sums.sum_xexp += (p[kPartialXExp] + s.distance * sum_exp_m1) * s.factor;
    }
    const float sum_exp_m1 = (team.sum(sums.at_max) - 1.0f) + team.sum(sums.sum_exp_m1);
    finish_clamp(found.threshold, found.need, found.equal, max, sum_exp_m1, team.sum(sums.sum_xexp), inv_temperature,
                 clamp);
    return {b.lo, b.hi, kDone, 0};
  }
};

// One round of one row. stats: the merged RowStats. Returns the next bracket; writes clamp [4] if its mode is kDone,
// unless the row was finished before. If the ranks do not agree, because one failed in this round, the clamp is NaN.
template <class Team>
ENTCOV_TEAM Bracket refine(const Team& team, const Gathered& partials, const Bracket& b, const float* stats,
                           bool ignored, uint32_t kept, const RowSpec& spec, float* clamp) {
  bool agree = true;
  for (int64_t r = team.lane; r < partials.R; r += Team::kSize)
    agree = agree && agrees(partials.messages, r, spec.vocab_size);
  agree = team.all(agree);
  if (ignored || !agree || stats[1] != stats[1]) {
    for (int i = 0; i < 4; i++) clamp[i] = ignored ? 0.0f : NAN;
    return {b.lo, b.hi, kDone, 0};
  }
  if (b.mode == kDone) return b;
  return Refine<Team>{team, partials, stats[0], spec.inv_temperature}.run(b, kept, clamp);
}

}  // namespace entcov
