// The clamped entropy of rows that are split over ranks. What a rank computes between two all-gathers:
//
//   clamp_sketch   logits -> kSketch quantiles of a sample of this shard                                  (travels)
//   clamp_guess    sketches of all shards -> a bracket of keys that ought to hold the threshold
//   clamp_part     logits -> RowStats, sums above the bracket, and what lies in it: counts or a list      (travels)
//   clamp_narrow   parts of all shards -> the clamp, or the bracket for one more clamp_part
//
// A bracket is (lo, hi, mode): keys, both inclusive, the same on every rank. Its mode says what a part tells of the logits
// in it: how many fall into each of kCells equal ranges of keys, or which they are. The counts of a part are exact
// whatever the bracket, so clamp_narrow knows whether it holds the threshold. Counts are enough for the result where
// every cell above the threshold, and its own, can hold one value only. Which values can be there follows from the bits
// that no logit in the bracket uses: 16 of them in bf16, also where it was made fp32. If that does not do (fp32 with all
// its bits; a bracket over zero; a sample that misled), the threshold's cell becomes the next bracket: each time the
// range of keys is 160 times smaller, and 160 logits or less are listed, so it ends for any data. Rows that are done
// are not read again, and their parts are zeros.
//
// Memory of clamp_part: sizeof(T) bytes a logit in, 684 bytes a row out; clamp_sketch reads one sector in 20. The other
// two are a warp a row. Ranks have to come to the same decisions: those are made of integers and of what was gathered,
// in a fixed order.
#include "../row_stats.h"
#include "clamp.cuh"

namespace entcov::cuda {
namespace {

constexpr int kSketch = 64;
constexpr int kCells = 160;
constexpr int kPartFields = 7;
enum PartField : int {
  kPartMax,     // largest logit of the shard; -inf: none is finite
  kPartE,       // sum e^y over hi < x < max, y = (x - max) / temperature, of the shard's own max
  kPartYE,      // sum y e^y over the same
  kPartAtMax,   // logits that equal max
  kPartAbove,   // logits above hi
  kPartInside,  // logits in the bracket
  kPartUnused,  // how many of the lowest bits are 0 in all of them
};
enum Mode : uint32_t {
  kCount = 0,   // in cells of equally many keys
  kListed = 1,  // all of them, as they are
  kDone = 2,
  kSpread = 3,  // in cells of equal differences: nearly half of all keys lie between -1 and 1
};

struct Bracket {
  uint32_t lo, hi, mode, reserved;
};

// ---- clamp_sketch ---------------------------------------------------------------------------------------------------

// Cells of kCount are equally wide; this is how wide.
__device__ __forceinline__ uint32_t cell_width(const Bracket& b) { return (b.hi - b.lo) / kCells + 1; }

// The cell of a key of the bracket; it never falls where the key rises.
__device__ __forceinline__ uint32_t cell_of(const Bracket& b, uint32_t key) {
  uint32_t cell;
  if (b.mode == kSpread) {
    const float lo = key_value(b.lo), per_cell = (key_value(b.hi) - lo) / kCells;
    cell = static_cast<uint32_t>((key_value(key) - lo) / per_cell);
  } else {
    cell = (key - b.lo) / cell_width(b);
  }
  return cell < kCells ? cell : kCells - 1;  // of any bracket at all, an index of a counter
}

// The first key of a cell, or of one behind the last.
__device__ __forceinline__ uint32_t first_of_cell(const Bracket& b, uint32_t cell) {
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

struct SketchArgs {
  const void* logits;  // [T, num_columns], rows row_stride apart
  int64_t row_stride, T, num_columns;
  const int64_t* target;  // [T]
  int64_t ignore_index;
  float* sketch;  // [T, kSketch]
};

template <class T, bool kAligned>
__global__ void __launch_bounds__(kThreads, 3) clamp_sketch_kernel(const SketchArgs a) {
  __shared__ SampleArea sample;
  __shared__ SelectionShared selection;
  const int64_t t = blockIdx.x;
  const int thread = static_cast<int>(threadIdx.x), count = static_cast<int>(a.num_columns);
  float* out = a.sketch + t * kSketch;
  if (count == 0 || a.target[t] == a.ignore_index) {
    if (thread < kSketch) out[thread] = count == 0 ? -INFINITY : 0.0f;
    return;
  }
  const T* row = static_cast<const T*>(a.logits) + t * a.row_stride;
  const Reader<T, kAligned> reader(row, count, 0, 0);
  const int m = take_sample<T, kAligned>(reader, row, count, sample);
  select_from_sample(sample, m, kSketch, [m](int n) { return (2 * n + 1) * m / (2 * kSketch) + 1; }, selection);
  if (thread < kSketch) out[thread] = key_value(first_key<T>(selection.upper[thread]));
}

// ---- clamp_guess ----------------------------------------------------------------------------------------------------

struct GuessArgs {
  const float* sketches;  // [R, T, kSketch], R apart by shard_stride and rows by row_stride elements
  int64_t shard_stride, row_stride, R, T;
  const int64_t* columns;  // [R]
  const int64_t* target;   // [T]
  int64_t ignore_index, vocab_size, kept, margin;
  Bracket* bracket;  // [T]
};

__device__ __forceinline__ uint32_t sum_of_warp(uint32_t v) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) v += __shfl_xor_sync(0xffffffffu, v, offset);
  return v;
}

// kSketch times the estimated number of logits that are > v (or >= v).
__device__ __forceinline__ uint32_t estimate(const GuessArgs& a, int64_t t, float v, bool or_equal) {
  uint32_t sum = 0;
  for (int64_t r = static_cast<int64_t>(threadIdx.x) % kWarp; r < a.R; r += kWarp) {
    const float* s = a.sketches + r * a.shard_stride + t * a.row_stride;
    int low = 0, high = kSketch;  // s descends
    while (low < high) {
      const int middle = (low + high) / 2;
      if (or_equal ? s[middle] >= v : s[middle] > v)
        low = middle + 1;
      else
        high = middle;
    }
    sum += static_cast<uint32_t>(low) * static_cast<uint32_t>(a.columns[r]);
  }
  return sum_of_warp(sum);
}

__device__ __forceinline__ float reach(int64_t margin, int64_t rank) {
  return fminf(8.0f, fmaxf(1.0f, static_cast<float>(margin) / static_cast<float>(rank)));
}

struct Ends {
  float smallest, largest;  // of the sketches of shards that have columns
};
__device__ __forceinline__ Ends ends(const GuessArgs& a, int64_t t) {
  float largest = -INFINITY, below_zero = -INFINITY;  // the second: the largest negated
  for (int64_t r = static_cast<int64_t>(threadIdx.x) % kWarp; r < a.R; r += kWarp) {
    if (a.columns[r] == 0) continue;
    const float* s = a.sketches + r * a.shard_stride + t * a.row_stride;
    largest = fmaxf(largest, s[0]), below_zero = fmaxf(below_zero, -s[kSketch - 1]);
  }
  return {-warp_max(below_zero), warp_max(largest)};
}

// The largest or the smallest upper half of a key that a bracket may begin or end with, by bisection.
__global__ void __launch_bounds__(kThreads) clamp_guess_kernel(const GuessArgs a) {
  const int64_t t = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (t >= a.T) return;
  Bracket b{kLowestKey, kHighestKey, a.vocab_size <= kCells ? kListed : kCount, 0};
  if (a.target[t] == a.ignore_index) {
    b = {0, 0, kDone, 0};
  } else if (b.mode == kCount) {
    const int64_t least = (a.kept + a.margin) * kSketch, most = (a.kept - 1 - a.margin) * kSketch;
    uint32_t low = kLowestKey >> 16, high = kHighestKey >> 16;  // the largest with `least` logits from it on
    while (low < high) {
      const uint32_t middle = (low + high + 1) / 2;
      if (estimate(a, t, key_value(first_key<float>(middle)), true) >= least)
        low = middle;
      else
        high = middle - 1;
    }
    b.lo = first_key<float>(low);
    low = kLowestKey >> 16, high = kHighestKey >> 16;  // the smallest with no more than `most` above it
    while (low < high) {
      const uint32_t middle = (low + high) / 2;
      if (most >= 0 && estimate(a, t, key_value(last_key<float>(middle)), false) <= most)
        high = middle;
      else
        low = middle + 1;
    }
    b.hi = last_key<float>(low);
    // An end that the sample cannot tell lies behind the sample's own, by once to eight times what the bracket has of the
    // sample, the more the nearer the rank is to the row's: cells of reasonable size are worth the chance of a miss.
    const Ends sampled = ends(a, t);
    const float from = key_value(b.lo), to = key_value(b.hi);
    if (b.hi == kHighestKey && b.lo > kLowestKey && sampled.largest > from)
      b.hi = order_key(sampled.largest + reach(a.margin, a.kept) * (sampled.largest - from));
    else if (b.lo == kLowestKey && b.hi < kHighestKey && sampled.smallest < to && sampled.smallest > -INFINITY)
      b.lo = order_key(sampled.smallest - reach(a.margin, a.vocab_size - a.kept + 1) * (to - sampled.smallest));
    if (b.lo > b.hi) b.lo = kLowestKey, b.hi = kHighestKey;  // sketches with a NaN
    const float lo = key_value(b.lo), hi = key_value(b.hi);
    if (lo < 0.0f && hi > 0.0f && (hi - lo) / kCells > 1e-30f && hi - lo < INFINITY) b.mode = kSpread;
  }
  if (threadIdx.x % kWarp == 0) a.bracket[t] = b;
}

// ---- clamp_part -----------------------------------------------------------------------------------------------------

struct PartArgs {
  const void* logits;  // [T, num_columns], rows row_stride apart
  int64_t row_stride, T, num_columns;
  const int64_t* target;  // [T]
  int64_t vocab_start, vocab_size, ignore_index;
  const Bracket* bracket;  // [T]
  float inv_temperature;
  float* part;  // [T, kRowStatsFields + kPartFields + kCells]
};

struct PartShared {
  uint4 list[kListBytes / sizeof(uint4)];
  PassShared pass;
  uint32_t cells[kCells];
  uint32_t used_bits;
};

template <class T, bool kAligned, int kTeamWarps>
__global__ void __launch_bounds__(kThreads, 3) clamp_part_kernel(const PartArgs a) {
  static_assert(kTeamWarps == kWarps, "");
  __shared__ PartShared shared;
  constexpr int kFields = kRowStatsFields + kPartFields;
  const int64_t t = blockIdx.x;
  const int thread = static_cast<int>(threadIdx.x), count = static_cast<int>(a.num_columns);
  float* out = a.part + t * (kFields + kCells);
  const Bracket b = a.bracket[t];
  const int64_t target = a.target[t];
  if (b.mode == kDone || target == a.ignore_index) {
    if (thread < kFields + kCells) out[thread] = 0.0f;
    return;
  }
  const T* row = static_cast<const T*>(a.logits) + t * a.row_stride;
  const Reader<T, kAligned> reader(row, count, 0, 0);
  const float lo = key_value(b.lo), hi = key_value(b.hi);
  if (thread < kCells) shared.cells[thread] = 0;
  if (thread == 0) shared.used_bits = 0;
  T* list = reinterpret_cast<T*>(shared.list);
  const RowPass p = pass_over<T, kAligned>(reader, count, lo, hi, a.inv_temperature * kLog2E, list, shared.pass);

  // What lies in the bracket. A list that has overflowed has holes: then the row is read once more, and only counted.
  uint32_t used = 0;
  const auto count_in = [&](float x, int) {
    if (x >= lo && x <= hi) {
      used |= bits<uint32_t>(x + 0.0f);
      atomicAdd(&shared.cells[cell_of(b, order_key(x))], 1u);
    }
  };
  if (b.mode == kListed)  // so few that a list never overflows, in a bracket that clamp_guess or clamp_narrow made
    for_listed(list, shared.pass, [&](float x, int place) {
      used |= bits<uint32_t>(x + 0.0f);
      if (place < kCells) shared.cells[place] = bits<uint32_t>(x + 0.0f);
    });
  else if (p.all_listed)
    for_listed(list, shared.pass, count_in);
  else
    for_elements<T, kAligned>(reader, count, [&](float x) { count_in(x, 0); });
  atomicOr(&shared.used_bits, used);
  __syncthreads();
  if (thread < kCells) {
    const uint32_t cell = shared.cells[thread];
    out[kFields + thread] = b.mode == kListed ? bits<float>(cell) : static_cast<float>(cell);
  }
  if (thread != 0) return;

  const int64_t local = column_of(target, a.vocab_start);
  const bool mine = local >= 0 && local < a.num_columns;
  const bool poisoned = p.max == INFINITY || target < 0 || target >= a.vocab_size;
  const float others = p.max == -INFINITY ? 0.0f : p.at_max - 1.0f;
  out[0] = p.max, out[1] = poisoned ? NAN : p.e + others, out[2] = poisoned ? NAN : p.te * kLn2;
  out[3] = poisoned ? NAN : mine ? Element<T>::widen(row[local]) : -INFINITY;
  float* o = out + kRowStatsFields;
  o[kPartMax] = p.max, o[kPartE] = p.kept_e, o[kPartYE] = p.kept_te * kLn2, o[kPartAtMax] = p.at_max;
  o[kPartAbove] = static_cast<float>(p.above), o[kPartInside] = static_cast<float>(p.inside);
  const uint32_t lowest = shared.used_bits & (0u - shared.used_bits);  // the lowest bit that is used
  o[kPartUnused] = static_cast<float>(__popc(lowest - 1u));
}

// ---- clamp_narrow ---------------------------------------------------------------------------------------------------

struct NarrowArgs {
  const float* parts;  // [R, T, kPartFields + kCells], R apart by shard_stride and rows by row_stride elements
  int64_t shard_stride, row_stride, R, T;
  const int64_t* target;  // [T]
  const float* stats;     // [T, fields], merged
  int fields;
  int64_t ignore_index, kept;
  float inv_temperature;
  Bracket* bracket;  // [T], read and written
  float* clamp;      // [T, 4], written where a row gets done
  uint32_t* unfinished;  // [1], counts rows that are not done
};

constexpr int kMine = kCells / kWarp;  // cells of a lane
static_assert(kMine * kWarp == kCells, "");

// The smallest and the largest key in [a, b] of a float whose `unused` lowest bits are 0. -0 has the key of +0.
__device__ __forceinline__ uint32_t first_possible(uint32_t a, int unused) {
  const uint32_t low = (1u << unused) - 1u;
  const uint32_t key = a >> 31 ? (a + low) & ~low : a | low;
  return key == 0x7fffffffu ? 0x80000000u : key;
}
__device__ __forceinline__ uint32_t last_possible(uint32_t b, int unused) {
  const uint32_t low = (1u << unused) - 1u;
  if (b >> 31) return b & ~low;
  const uint32_t key = (b & low) == low ? b : (b & ~low) - 1u;
  return key == 0x7fffffffu ? key - low - 1u : key;
}

// A count as it travels, as fp32. What no shard can have counted becomes 0 or the most that it can: a cast of that would be
// undefined, and an index made of it anywhere.
__device__ __forceinline__ uint32_t counted(float value, uint32_t most = 1u << 24) {
  return static_cast<uint32_t>(fminf(fmaxf(value, 0.0f), static_cast<float>(most)));  // a NaN: 0
}

// Sums over kept logits in the bracket and below the row's maximum, of a lane.
struct KeptSums {
  float e = 0.0f, ye = 0.0f;

  __device__ __forceinline__ void add(float copies, float x, float max, float inv_temperature) {
    const float y = (x - max) * inv_temperature;
    if (x >= max || !(y > kExpFloor)) return;
    const float w = copies * expf(y);
    e += w, ye += y * w;
  }
};

struct Found {
  float threshold = 0.0f;
  uint32_t need = 0, equal = 0;  // logits that equal the threshold: how many are kept, how many there are; 0: not found
  Bracket next{0, 0, kCount, 0};
};

// One row, by one warp.
struct Narrow {
  const NarrowArgs& a;
  int64_t t;
  int lane;

  __device__ __forceinline__ const float* part(int64_t r) const {
    return a.parts + r * a.shard_stride + t * a.row_stride;
  }

  __device__ __forceinline__ uint32_t total(PartField field) const {
    uint32_t sum = 0;
    for (int64_t r = lane; r < a.R; r += kWarp) sum += counted(part(r)[field]);
    return sum_of_warp(sum);
  }

  // The rank-th largest of the listed logits, by comparing all with all: no more than kCells are listed.
  __device__ __forceinline__ Found select_listed(uint32_t rank, float max, KeptSums& sums) const {
    Found found;
    const auto for_mine = [&](auto use) {
      for (int64_t r = 0; r < a.R; r++) {
        const float* p = part(r);
        const int size = static_cast<int>(counted(p[kPartInside], kCells));
        for (int i = lane; i < size; i += kWarp) use(p[kPartFields + i]);
      }
    };
    for_mine([&](float x) {
      uint32_t larger = 0, same = 0;
      for (int64_t r = 0; r < a.R; r++) {
        const float* p = part(r);
        const int size = static_cast<int>(counted(p[kPartInside], kCells));
        for (int i = 0; i < size; i++) larger += p[kPartFields + i] > x, same += p[kPartFields + i] == x;
      }
      if (larger < rank && rank - larger <= same) found.threshold = x, found.need = rank - larger, found.equal = same;
    });
    const unsigned who = __ballot_sync(0xffffffffu, found.equal != 0);  // they all say the same
    const int source = __popc((who & (0u - who)) - 1u) % kWarp;  // nobody: parts that contradict themselves
    found.threshold = __shfl_sync(0xffffffffu, found.threshold, source);
    found.need = __shfl_sync(0xffffffffu, found.need, source), found.equal = __shfl_sync(0xffffffffu, found.equal, source);
    for_mine([&](float x) {
      if (x > found.threshold) sums.add(1.0f, x, max, a.inv_temperature);
    });
    return found;
  }

  // The same from counts, if cells that matter can hold one value only; otherwise the next bracket is the threshold's
  // cell.
  __device__ __forceinline__ Found select_counted(const Bracket& b, uint32_t rank, float max, KeptSums& sums) const {
    int unused = 31;
    for (int64_t r = 0; r < a.R; r++)
      if (part(r)[kPartInside] > 0.0f) unused = min(unused, static_cast<int>(counted(part(r)[kPartUnused], 31)));
    uint32_t count[kMine], sum = 0;  // cells in descending order, lane after lane
#pragma unroll
    for (int i = 0; i < kMine; i++) {
      count[i] = 0;
      for (int64_t r = 0; r < a.R; r++)
        count[i] += counted(part(r)[kPartFields + kCells - 1 - (lane * kMine + i)]);
      sum += count[i];
    }
    uint32_t upto = sum;
#pragma unroll
    for (int offset = 1; offset < kWarp; offset *= 2) {
      const uint32_t other = __shfl_up_sync(0xffffffffu, upto, offset);
      upto += lane >= offset ? other : 0u;
    }
    uint32_t before = upto - sum;
    Found found;
    bool single = true;
#pragma unroll
    for (int i = 0; i < kMine; i++) {
      if (count[i] > 0 && before < rank) {  // the threshold's cell, or above it
        const uint32_t cell = static_cast<uint32_t>(kCells - 1 - (lane * kMine + i));
        const uint32_t first = first_possible(first_of_cell(b, cell), unused);
        const uint32_t last = last_possible(first_of_cell(b, cell + 1u) - 1u, unused);
        single = single && first == last;
        if (rank - before <= count[i]) {
          found.need = rank - before, found.equal = count[i], found.threshold = key_value(first);
          found.next = {first, last, count[i] <= kCells ? kListed : kCount, 0};
        } else {
          sums.add(static_cast<float>(count[i]), key_value(first), max, a.inv_temperature);
        }
      }
      before += count[i];
    }
    const bool all_single = __ballot_sync(0xffffffffu, !single) == 0;
    const unsigned who = __ballot_sync(0xffffffffu, found.equal != 0);
    const int source = __popc((who & (0u - who)) - 1u) % kWarp;  // nobody: parts that contradict themselves
    found.threshold = __shfl_sync(0xffffffffu, found.threshold, source);
    found.need = __shfl_sync(0xffffffffu, found.need, source), found.equal = __shfl_sync(0xffffffffu, found.equal, source);
    found.next.lo = __shfl_sync(0xffffffffu, found.next.lo, source);
    found.next.hi = __shfl_sync(0xffffffffu, found.next.hi, source);
    found.next.mode = __shfl_sync(0xffffffffu, found.next.mode, source);
    if (!all_single) found.equal = 0;
    return found;
  }
};

__global__ void __launch_bounds__(kThreads) clamp_narrow_kernel(const NarrowArgs a) {
  const int64_t t = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (t >= a.T) return;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const Narrow n{a, t, lane};
  const float* stats = a.stats + t * a.fields;
  float* clamp = a.clamp + t * 4;
  const bool ignored = a.target[t] == a.ignore_index;
  if (ignored || stats[1] != stats[1]) {
    if (lane < 4) clamp[lane] = ignored ? 0.0f : NAN;
    __syncwarp();
    if (lane == 0) a.bracket[t].mode = kDone;
    return;
  }
  const Bracket b = a.bracket[t];
  __syncwarp();
  if (b.mode == kDone) return;
  const float max = stats[0], hi = key_value(b.hi);
  const uint32_t above = n.total(kPartAbove), inside = n.total(kPartInside);
  const uint32_t rank = static_cast<uint32_t>(a.kept) - above;  // of the threshold in the bracket, from its largest
  Found found;
  KeptSums sums;
  if (static_cast<uint32_t>(a.kept) <= above)
    found.next = {b.hi + 1u, order_key(max), kCount, 0};
  else if (rank > inside)
    found.next = {kLowestKey, last_possible(b.lo - 1u, 0), kCount, 0};
  else if (b.mode == kListed)
    found = n.select_listed(rank, max, sums);
  else
    found = n.select_counted(b, rank, max, sums);
  if (found.equal == 0) {
    if (lane == 0) a.bracket[t] = found.next, atomicAdd(a.unfinished, 1u);
    return;
  }

  // What the shards have above the bracket. One that has the row's maximum leaves it out; of another one the largest
  // logit is an ordinary logit of the row.
  float at_max = 0.0f;
  for (int64_t r = lane; r < a.R; r += kWarp) {
    const float* p = n.part(r);
    const Shift s = shift_between(p[kPartMax], max, a.inv_temperature);
    if (p[kPartMax] == max) at_max += p[kPartAtMax];
    const float e = p[kPartE] + (p[kPartMax] > hi && p[kPartMax] < max ? p[kPartAtMax] : 0.0f);
    sums.e += e * s.factor, sums.ye += (p[kPartYE] + s.distance * e) * s.factor;
  }
  at_max = warp_sum(at_max), sums.e = warp_sum(sums.e), sums.ye = warp_sum(sums.ye);
  if (lane != 0) return;
  const float need = static_cast<float>(found.need);
  float rest = need - 1.0f, sum_xexp = 0.0f;  // if nothing but the maximum is kept
  if (found.threshold < max) {
    KeptSums tied;
    tied.add(need, found.threshold, max, a.inv_temperature);
    rest = (at_max - 1.0f) + (sums.e + tied.e), sum_xexp = sums.ye + tied.ye;
  }
  const float log_sum = log1pf(rest);
  clamp[0] = found.threshold;
  clamp[1] = need / static_cast<float>(found.equal);
  clamp[2] = log_sum;
  clamp[3] = log_sum - sum_xexp / (1.0f + rest);
  a.bracket[t].mode = kDone;
}

int64_t warp_blocks(int64_t rows) { return (rows + kWarps - 1) / kWarps; }

}  // namespace

cudaError_t clamp_sketch(int dtype, const void* logits, int64_t row_stride, int64_t T, int64_t num_columns,
                         const int64_t* target, int64_t ignore_index, float* sketch, cudaStream_t stream) {
  const SketchArgs args{logits, row_stride, T, num_columns, target, ignore_index, sketch};
  return with_dtype(dtype, [&](auto t) {
    using Type = decltype(t);
    const auto kernel =
        aligned_rows<Type>(logits, row_stride, T) ? clamp_sketch_kernel<Type, true> : clamp_sketch_kernel<Type, false>;
    return launch("clamp_sketch", kernel, T, stream, args);
  });
}

cudaError_t clamp_guess(const float* sketches, int64_t shard_stride, int64_t row_stride, int64_t R, int64_t T,
                        const int64_t* columns, const int64_t* target, int64_t ignore_index, int64_t vocab_size,
                        int64_t kept, int64_t margin, uint32_t* bracket, cudaStream_t stream) {
  return launch("clamp_guess", clamp_guess_kernel, warp_blocks(T), stream,
                GuessArgs{sketches, shard_stride, row_stride, R, T, columns, target, ignore_index, vocab_size, kept, margin,
                          reinterpret_cast<Bracket*>(bracket)});
}

cudaError_t clamp_part(int dtype, const void* logits, int64_t row_stride, int64_t T, int64_t num_columns,
                       const int64_t* target, int64_t vocab_start, int64_t vocab_size, int64_t ignore_index,
                       const uint32_t* bracket, float inv_temperature, float* part, cudaStream_t stream) {
  const PartArgs args{logits,       row_stride,      T,
                      num_columns,  target,          vocab_start,
                      vocab_size,   ignore_index,    reinterpret_cast<const Bracket*>(bracket),
                      inv_temperature, part};
  return with_dtype(dtype, [&](auto t) {
    using Type = decltype(t);
    const auto kernel = aligned_rows<Type>(logits, row_stride, T) ? clamp_part_kernel<Type, true, kWarps>
                                                                  : clamp_part_kernel<Type, false, kWarps>;
    return launch("clamp_part", kernel, T, stream, args);
  });
}

cudaError_t clamp_narrow(const float* parts, int64_t shard_stride, int64_t row_stride, int64_t R, int64_t T,
                         const int64_t* target, const float* stats, int fields, int64_t ignore_index, int64_t kept,
                         float inv_temperature, uint32_t* bracket, float* clamp, uint32_t* unfinished,
                         cudaStream_t stream) {
  return launch("clamp_narrow", clamp_narrow_kernel, warp_blocks(T), stream,
                NarrowArgs{parts, shard_stride, row_stride, R, T, target, stats, fields, ignore_index, kept, inv_temperature,
                           reinterpret_cast<Bracket*>(bracket), clamp, unfinished});
}

}  // namespace entcov::cuda
