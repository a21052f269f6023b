// The clamped entropy: that of the softmax over the K largest logits of a row, exact for any data and any sharding.
//
//   threshold   the K-th largest logit. need = K - (logits above it) of the `equal` logits that equal it are kept: each
//               has the weight need / equal, so no order of ties and no sharding shows in a result
//   log_sum     L_K = log1p(sum_exp_m1),  sum_exp_m1 = sum' w e^y  over the kept logits, y = (x - max) / temperature
//   entropy     H_K = L_K - (sum w y e^y) / (1 + sum_exp_m1)                                    docs/math.md (10) to (12)
//
// A sampled bracket, one pass over the row with exact counts, and a selection among what lies in the bracket:
//
//   sample           one 32-byte sector in 20: its order statistics guess a bracket of values that holds the threshold
//   pass             the RowStats of all logits, the same sums over those above the bracket and their number, and what
//                    lies in the bracket: about 4 % of a row
//   select           the counts tell whether the bracket holds the threshold. If it does, the threshold is found among
//                    what lies in it; if not, they tell on which side it is, and the pass is repeated there
//
// So a bad guess costs time and no digit. A row whose columns are all here is done by one thread or block
// (clamped_stats): sample_ranks() and row_brackets() make its brackets. One that is split over ranks takes rounds
// (entcov/stats/sharded_clamp.py), in four ops of which two read logits:
//
//   clamp_sketch   logits -> kSketch quantiles of a sample of this shard                                  (travels)
//   clamp_guess    sketches of all shards -> the first bracket: initial_bracket()
//   clamp_partial  logits -> RowStats, sums above the bracket, and what lies in it: counts or a list      (travels)
//   clamp_refine   partials of all shards -> the clamp, or the bracket of one more round: refine()
//
// A partial tells either the logits in the bracket (kListed, 160 at most) or how many fall into each of 160 ranges of it,
// its cells. Counts are enough for the result where every cell above the threshold, and its own, can hold one value only.
// Which values can be there follows from the bits that no logit in the bracket uses: 16 of them in bf16, also where it was
// made fp32. If that does not do (fp32 with all its bits; a bracket over zero; a sample that misled), the threshold's cell
// becomes the next bracket: each time the range of keys is 160 times smaller, so it ends for any data. Ranks have to come
// to the same decisions: those are made of integers and of what was gathered, in a fixed order.
//
// Numerics. Sums are those of row_stats.h: relative to the maximum, one occurrence of it left out. Counts travel as fp32,
// exact up to 2^24 columns a shard. Values are compared by keys: unsigned integers in the order of the floats, -0 equal
// to +0. -inf has a key, a NaN is in no bracket and makes the sums of its row NaN.
//
// Host and device share this file. Functions of a Team are run by all its threads together: a warp, or a single thread.
//   Team: kSize threads, of which this is `lane`; sum(v), max(v) for all of them; before(v): the sum over lower lanes;
//   all(v); first(v): a lane whose v is true, or any lane; of(v, lane): that lane's v
#pragma once

#include <cstring>

#include "signature.h"

#ifdef __CUDACC__
#define ENTCOV_TEAM __device__ __forceinline__  // a warp has no twin on the host of a CUDA source
#define ENTCOV_UNROLL _Pragma("unroll")
#else
#define ENTCOV_TEAM inline
#define ENTCOV_UNROLL
#endif

namespace entcov {

// ---- keys -----------------------------------------------------------------------------------------------------------

constexpr uint32_t kLowestKey = 0x007fffffu;   // of -inf
constexpr uint32_t kHighestKey = 0xff800000u;  // of +inf

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

// The lowest bits of a key that values of a type leave open are all 0 in positive values and all 1 in negative ones.
// `spare` is their number: 16 for bf16, 13 for fp16, 0 for fp32. This is the key with these upper bits.
ENTCOV_HD uint32_t whole_key(uint32_t upper, int spare) {
  const uint32_t key = upper << spare;
  return key >> 31 ? key : key | ((1u << spare) - 1u);
}

ENTCOV_HD uint32_t finite_key(uint32_t key) {
  return key < kLowestKey ? kLowestKey : key > kHighestKey ? kHighestKey : key;
}

// The smallest and the largest key of a value with these upper 16 bits, not below -inf nor above +inf.
ENTCOV_HD uint32_t first_key(uint32_t upper, int spare) { return finite_key(whole_key(upper << (16 - spare), spare)); }
ENTCOV_HD uint32_t last_key(uint32_t upper, int spare) {
  uint32_t last = (upper << (16 - spare)) | ((1u << (16 - spare)) - 1u);
  if (spare < 16 && upper == 0x7fffu) last--;  // -0 has the key of +0
  return finite_key(whole_key(last, spare));
}

// ---- the sample of a row --------------------------------------------------------------------------------------------

constexpr int kSectorBytes = 32;         // memory moves nothing smaller
constexpr int kSampleEvery = 20;         // of so many sectors, one is in the sample
constexpr int kSampleLimit = 8192;       // logits of a sample
constexpr int kUnsampledColumns = 4096;  // a row that is not longer is its own sample

// Sectors first, first + every, ... of a longer row, `taken` of them, spread over all of it: token ids are ordered by
// frequency, so the first columns are no sample.
struct SamplePlan {
  int every, first, taken;
};

ENTCOV_HD SamplePlan plan_sample(int columns, int sector) {  // sector: logits in one
  const int sectors = columns / sector, limit = kSampleLimit / sector;
  const int least = (sectors + limit - 1) / limit;
  const int every = least > kSampleEvery ? least : kSampleEvery;
  return {every, every / 2, (sectors - every / 2 + every - 1) / every};
}

// ---- rows whose columns are all here --------------------------------------------------------------------------------

struct KeyRange {
  uint32_t lo, hi;  // both inclusive
};

// A bracket for the rank `kept`, and the parts of the row above and below it that the threshold is in if it is missed.
struct RowBrackets {
  KeyRange inner, above, below;
};

// Ranks of a sample, from its largest: 3.2 deviations above and below the one that `kept` has there, the ends of the
// bracket, in places 1 and 2; three times as far in 0 and 3.
struct SampleRanks {
  float wanted[4];
  int size;  // of the sample

  ENTCOV_HD bool exists(int n) const { return wanted[n] >= 1.0f && wanted[n] <= static_cast<float>(size); }
  ENTCOV_HD int rank(int n) const {
    const float w = n == 0 ? wanted[0] : n == 1 ? wanted[1] : n == 2 ? wanted[2] : wanted[3];
    return w < 1.0f ? 1 : w > static_cast<float>(size) ? size : static_cast<int>(w);
  }
};

// most: logits that the bracket may have, by estimate.
ENTCOV_HD SampleRanks sample_ranks(int64_t kept, int columns, int size, float most) {
  const float share = static_cast<float>(size) / static_cast<float>(columns), rank = static_cast<float>(kept) * share;
  const float variance = rank * fmaxf(0.0f, 1.0f - rank / static_cast<float>(size));
  const float d = fminf(3.2f * sqrtf(variance) + 2.0f, 0.5f * most * share);
  return {{floorf(rank - 3.0f * d), floorf(rank - d), ceilf(rank + d), ceilf(rank + 3.0f * d)}, size};
}

// upper: the upper halves of the keys of these ranks.
template <class Upper>
ENTCOV_HD RowBrackets row_brackets(const SampleRanks& ranks, const Upper* upper, int spare) {
  RowBrackets b;
  b.inner = {ranks.exists(2) ? first_key(upper[2], spare) : kLowestKey,
             ranks.exists(1) ? last_key(upper[1], spare) : kHighestKey};
  b.above = {b.inner.hi, ranks.exists(0) ? last_key(upper[0], spare) : kHighestKey};
  b.below = {ranks.exists(3) ? first_key(upper[3], spare) : kLowestKey, b.inner.lo};
  return b;
}

// clamp: threshold, weight of the logits that equal it, L_K, H_K. sum_exp_m1 and sum_xexp are over the logits above the
// threshold, one occurrence of max left out; they do not count where the threshold is max.
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
constexpr int kPartial = kPartialFields + kCells;  // floats a row, behind the shard's RowStats
enum PartialField : int {
  kPartialMax,     // largest logit of the shard; -inf: none is finite
  kPartialSumExpM1,    // sum' e^y over x > hi, y = (x - max) / temperature, of the shard's own max; 0 if that is in no sum
  kPartialXExp,    // sum y e^y over the same
  kPartialAbove,   // logits above hi
  kPartialInside,  // logits in the bracket
  kPartialUnused,  // how many of the lowest bits are 0 in all of them
};

enum Mode : uint32_t {
  kCount = 0,   // in cells of equally many keys
  kListed = 1,  // all of them, as they are
  kDone = 2,
  kSpread = 3,  // in cells of equal differences: nearly half of all keys lie between -1 and 1
};

struct Bracket {
  uint32_t lo, hi, mode, reserved;  // keys, both inclusive; the same on every rank
};

// Cells of kCount are equally wide; this is how wide.
ENTCOV_HD uint32_t cell_width(const Bracket& b) { return (b.hi - b.lo) / kCells + 1; }

// The cell of a key of the bracket; it never falls where the key rises.
ENTCOV_HD uint32_t cell_of(const Bracket& b, uint32_t key) {
  uint32_t cell;
  if (b.mode == kSpread) {
    const float lo = key_value(b.lo), per_cell = (key_value(b.hi) - lo) / kCells;
    cell = static_cast<uint32_t>(fminf(fmaxf((key_value(key) - lo) / per_cell, 0.0f), kCells));
  } else {
    cell = (key - b.lo) / cell_width(b);
  }
  return cell < kCells ? cell : kCells - 1;  // of any bracket at all, an index of a counter
}

// The first key of a cell, or of one behind the last.
ENTCOV_HD uint32_t first_of_cell(const Bracket& b, uint32_t cell) {
  if (b.mode != kSpread) {
    const uint32_t width = cell_width(b);
    return b.lo + (cell > (b.hi - b.lo) / width ? b.hi - b.lo + 1u : cell * width);
  }
  uint32_t low = b.lo, high = b.hi + 1u;
  while (low < high) {
    const uint32_t middle = low + (high - low) / 2;
    if (cell_of(b, middle) >= cell)
      high = middle;
    else
      low = middle + 1u;
  }
  return low;
}

// The fields of a partial but its cells. used: all bits, of x + 0, that logits in the bracket use.
ENTCOV_HD void write_partial(float* partial, float max, float sum_exp_m1, float sum_xexp, uint32_t above, uint32_t inside,
                             uint32_t used) {
  int unused = 0;
  while (unused < 32 && !(used >> unused & 1u)) unused++;
  partial[kPartialMax] = max, partial[kPartialSumExpM1] = sum_exp_m1, partial[kPartialXExp] = sum_xexp;
  partial[kPartialAbove] = static_cast<float>(above), partial[kPartialInside] = static_cast<float>(inside);
  partial[kPartialUnused] = static_cast<float>(unused);
}

// The Team of a CPU.
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

// What has come from all shards about row t: the last floats of that row of every message.
struct Gathered {
  const Messages& messages;
  int64_t t;
  int floats;
  int64_t R = messages.R;
  ENTCOV_HD const float* of(int64_t r) const { return messages.row(r, t) + messages.width - floats; }
  ENTCOV_HD uint32_t columns(int64_t r) const { return static_cast<uint32_t>(messages.signature(r).columns); }
};

// kSketch times the estimated number of logits that are > v (or >= v).
template <class Team>
ENTCOV_TEAM uint32_t estimated_above(const Team& team, const Gathered& sketches, float v, bool or_equal) {
  uint32_t sum = 0;
  for (int64_t r = team.lane; r < sketches.R; r += Team::kSize) {
    const float* s = sketches.of(r);
    int low = 0, high = kSketch;  // s descends
    while (low < high) {
      const int middle = (low + high) / 2;
      if (or_equal ? s[middle] >= v : s[middle] > v)
        low = middle + 1;
      else
        high = middle;
    }
    sum += static_cast<uint32_t>(low) * sketches.columns(r);
  }
  return team.sum(sum);
}

// How far a bracket reaches beyond the sample's end, of what it has of the sample.
ENTCOV_HD float reach(int64_t margin, int64_t rank) {
  return fminf(8.0f, fmaxf(1.0f, static_cast<float>(margin) / static_cast<float>(rank)));
}

// A bracket that reaches `margin` ranks beyond the kept-th logit on either side, by estimate.
template <class Team>
ENTCOV_TEAM Bracket initial_bracket(const Team& team, const Gathered& sketches, int64_t vocab_size, int64_t kept,
                                    int64_t margin) {
  Bracket b{kLowestKey, kHighestKey, vocab_size <= kCells ? kListed : kCount, 0};
  if (b.mode == kListed) return b;
  const int64_t least = (kept + margin) * kSketch, most = (kept - 1 - margin) * kSketch;
  uint32_t low = kLowestKey >> 16, high = kHighestKey >> 16;  // the largest with `least` logits from it on
  while (low < high) {
    const uint32_t middle = (low + high + 1) / 2;
    if (estimated_above(team, sketches, key_value(first_key(middle, 0)), true) >= least)
      low = middle;
    else
      high = middle - 1;
  }
  b.lo = first_key(low, 0);
  low = kLowestKey >> 16, high = kHighestKey >> 16;  // the smallest with no more than `most` above it
  while (low < high) {
    const uint32_t middle = (low + high) / 2;
    if (most >= 0 && estimated_above(team, sketches, key_value(last_key(middle, 0)), false) <= most)
      high = middle;
    else
      low = middle + 1;
  }
  b.hi = last_key(low, 0);
  // An end that the sample cannot tell lies behind the sample's own, by once to eight times what the bracket has of the
  // sample, the more the nearer the rank is to the row's: cells of reasonable size are worth the chance of a miss.
  float largest = -INFINITY, below_zero = -INFINITY;  // of the sketches; the second: the largest negated
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
  if (b.lo > b.hi) b.lo = kLowestKey, b.hi = kHighestKey;  // sketches with a NaN
  const float lo = key_value(b.lo), hi = key_value(b.hi);
  if (lo < 0.0f && hi > 0.0f && (hi - lo) / kCells > 1e-30f && hi - lo < INFINITY) b.mode = kSpread;
  return b;
}

// ---- from partials to the clamp, or to the next bracket -------------------------------------------------------------

// The smallest and the largest key in [a, b] of a float whose `unused` lowest bits are 0. -0 has the key of +0.
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

// A count as it travels, as fp32. What no shard can have counted becomes 0 or the most that it can: a cast of that would be
// undefined, and an index made of it anywhere.
ENTCOV_HD uint32_t counted(float value, uint32_t most = 1u << 24) {
  return static_cast<uint32_t>(fminf(fmaxf(value, 0.0f), static_cast<float>(most)));  // a NaN: 0
}

// Sums over kept logits in the bracket, of a lane. Those that equal max are counted.
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
  uint32_t need = 0, equal = 0;  // logits that equal the threshold: how many are kept, how many there are; 0: not found
  Bracket next{0, 0, kCount, 0};
};

// One row.
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

  // What one lane has found, for all lanes. Nobody: partials that contradict themselves.
  ENTCOV_TEAM void share(Found& found) const {
    const int source = team.first(found.equal != 0);
    found.threshold = team.of(found.threshold, source);
    found.need = team.of(found.need, source), found.equal = team.of(found.equal, source);
    found.next.lo = team.of(found.next.lo, source), found.next.hi = team.of(found.next.hi, source);
    found.next.mode = team.of(found.next.mode, source);
  }

  // The rank-th largest of the listed logits, by comparing all with all: no more than kCells are listed.
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

  // The same from counts, if cells that matter can hold one value only; otherwise the next bracket is the threshold's
  // cell.
  ENTCOV_TEAM Found select_counted(const Bracket& b, uint32_t rank, KeptSums& sums) const {
    constexpr int kMine = kCells / Team::kSize;  // cells of a lane, descending
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
      if (count[i] > 0 && before < rank) {  // the threshold's cell, or above it
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

  // The bracket that follows b: done, with the clamp of the row in clamp [4]; or the one for the next round.
  ENTCOV_TEAM Bracket run(const Bracket& b, uint32_t kept, float* clamp) const {
    const float hi = key_value(b.hi);
    const uint32_t above = total(kPartialAbove), inside = total(kPartialInside);
    const uint32_t rank = kept - above;  // of the threshold in the bracket, from its largest
    if (kept <= above) return {b.hi + 1u, order_key(max), kCount, 0};
    if (rank > inside) return {kLowestKey, last_possible(b.lo - 1u, 0), kCount, 0};
    KeptSums sums;
    const Found found = b.mode == kListed ? select_listed(rank, sums) : select_counted(b, rank, sums);
    if (found.equal == 0) return found.next;
    // What the shards have above the bracket, where each has left one occurrence of its own maximum out.
    for (int64_t r = team.lane; r < partials.R; r += Team::kSize) {
      const float* p = partials.of(r);
      const Shift s = shift_between(p[kPartialMax], max, inv_temperature);
      const float left_out = p[kPartialMax] > hi ? 1.0f : 0.0f;
      if (p[kPartialMax] == max) sums.at_max += left_out;
      const float sum_exp_m1 = p[kPartialSumExpM1] + (p[kPartialMax] == max ? 0.0f : left_out);
      sums.sum_exp_m1 += sum_exp_m1 * s.factor, sums.sum_xexp += (p[kPartialXExp] + s.distance * sum_exp_m1) * s.factor;
    }
    const float sum_exp_m1 = (team.sum(sums.at_max) - 1.0f) + team.sum(sums.sum_exp_m1);
    finish_clamp(found.threshold, found.need, found.equal, max, sum_exp_m1, team.sum(sums.sum_xexp), inv_temperature, clamp);
    return {b.lo, b.hi, kDone, 0};
  }
};

// One round of one row. stats: merged. Returns the next bracket, and writes clamp [4] where that is done.
template <class Team>
ENTCOV_TEAM Bracket refine(const Team& team, const Gathered& partials, const Bracket& b, const float* stats,
                           bool ignored, uint32_t kept, float inv_temperature, float* clamp) {
  if (ignored || stats[1] != stats[1]) {
    for (int i = 0; i < 4; i++) clamp[i] = ignored ? 0.0f : NAN;
    return {b.lo, b.hi, kDone, 0};
  }
  if (b.mode == kDone) return b;
  return Refine<Team>{team, partials, stats[0], inv_temperature}.run(b, kept, clamp);
}

}  // namespace entcov
