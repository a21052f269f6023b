// The common part of the clamped-entropy kernels: sampling a row, the pass over it with a bracket, and exact selection
// in shared memory. A block computes a row, or a shard of one, of any length. The algorithm is in csrc/clamp.h.
//
// The pass gets a bracket lo <= hi that probably contains the threshold. It loads every logit once and adds it to
//   - the sums of RowStats over all logits,
//   - if it is above hi: the same sums over the kept logits, and their number,
//   - if it lies in [lo, hi]: a list in shared memory, a few percent of the row, one list per warp in a fixed order.
//
// Numerics. Selection compares keys (clamp.h). Atomics are used on integers only, where the order does not matter; all
// sums of floats have a fixed order.
#pragma once

#include "../../clamp.h"
#include "sums.cuh"
#include "block_reduction.cuh"

namespace entcov::cuda {

constexpr int kListBytes = 36 << 10;
template <class T>
constexpr int kListOfWarp = kListBytes / kWarps / static_cast<int>(sizeof(T));  // capacity of a warp's list
constexpr int kCounters = 2048;   // one per value of an 11-bit digit of a key
constexpr int kClampVectors = 4;  // vectors that a thread loads before it uses them
constexpr int kClampGroup = 2;    // vectors per comparison with the reference

// Lower bits of a key that type T does not use (clamp.h).
template <class T>
constexpr int kSpareBits = 0;
template <>
constexpr int kSpareBits<__nv_bfloat16> = 16;
template <>
constexpr int kSpareBits<__half> = 13;

// ---- selection in shared memory -------------------------------------------------------------------------------------

constexpr int kMostRanks = 64;

// The position of an element among counters.
struct Place {
  uint32_t counter;
  uint32_t rank;   // within the counter; 1 is the largest
  uint32_t count;  // elements in the counter
};

struct SelectionShared {
  uint32_t count[kCounters];
  uint32_t warp_total[kWarps];
  uint32_t digit[kMostRanks], rank[kMostRanks], upper[kMostRanks];
  Place place;
};

// The sum of v over the threads before this one. Called by all threads of the block.
__device__ __forceinline__ uint32_t sum_before(uint32_t v, uint32_t (&warp_total)[kWarps]) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const uint32_t sum = warp_prefix_sum(v);
  if (lane == kWarp - 1) warp_total[warp] = sum;
  __syncthreads();
  uint32_t before = sum - v;
  for (int w = 0; w < warp; w++) before += warp_total[w];
  __syncthreads();  // the next call overwrites warp_total
  return before;
}

// The place of the rank-th largest element (1 is the largest), by counters in ascending order. `size` is a multiple of
// kThreads. Called by all threads of the block.
__device__ __forceinline__ Place find_bin(const uint32_t* count, int size, uint32_t rank, SelectionShared& s) {
  const int mine = size / kThreads, top = size - 1 - static_cast<int>(threadIdx.x) * mine;
  uint32_t sum = 0;
  for (int i = 0; i < mine; i++) sum += count[top - i];
  uint32_t before = sum_before(sum, s.warp_total);
  if (before < rank && rank - before <= sum) {
    int at = top;
    while (rank - before > count[at]) before += count[at--];
    s.place = {static_cast<uint32_t>(at), rank - before, count[at]};
  }
  __syncthreads();
  return s.place;
}

__device__ __forceinline__ void clear(uint32_t* words, int size) {
  for (int i = static_cast<int>(threadIdx.x); i < size; i += kThreads) words[i] = 0;
}

// ---- the sample -----------------------------------------------------------------------------------------------------

// The sample, and memory for the selection from it. The list of the pass may reuse this shared memory.
struct SampleArea {
  uint16_t upper[kSampleLimit];  // upper 16 bits of the keys
  uint32_t above[kCounters];     // number of sampled elements with a larger digit
  uint32_t slot[kCounters];      // the rank that is searched in this digit; kNoSlot: none
};
static_assert(sizeof(SampleArea) <= kListBytes, "");
constexpr uint32_t kNoSlot = 0xffffffffu;

// Reads the sample of plan_sample() into area.upper and returns its size.
template <class T, bool kAligned>
__device__ __forceinline__ int take_sample(const Reader<T, kAligned>& reader, const T* row, int count,
                                           SampleArea& area) {
  const int thread = static_cast<int>(threadIdx.x);
  if (count <= kUnsampledColumns) {
    for (int j = thread; j < count; j += kThreads)
      area.upper[j] = static_cast<uint16_t>(order_key(Element<T>::widen(row[j])) >> 16);
    __syncthreads();
    return count;
  }
  constexpr int kSector = 2 * kVector<T>;
  static_assert(kSector * sizeof(T) == kSectorBytes, "");
  const SamplePlan plan = plan_sample(count, kSector);
#pragma unroll 1
  for (int i = thread; i < 2 * plan.taken; i += kThreads) {
    float x[kVector<T>];
    unpack<T>(reader.any(2 * (i / 2 * plan.every + plan.first) + i % 2), x);
#pragma unroll
    for (int k = 0; k < kVector<T>; k++)
      area.upper[i * kVector<T> + k] = static_cast<uint16_t>(order_key(x[k]) >> 16);
  }
  __syncthreads();
  return plan.taken * kSector;
}

// For n < size <= kMostRanks, writes the upper half of the rank(n)-th largest key of the sample [m] to s.upper[n].
// rank(n) is in [1, m] and ascends with n. Two radix steps: 11 bits, then the other 5 bits of the digits that hold a
// rank.
template <class Rank>
__device__ __forceinline__ void select_from_sample(SampleArea& area, int m, int size, Rank rank, SelectionShared& s) {
  const int thread = static_cast<int>(threadIdx.x);
  clear(s.count, kCounters);
  for (int i = thread; i < kCounters; i += kThreads) area.slot[i] = kNoSlot;
  __syncthreads();
  for (int i = thread; i < m; i += kThreads) atomicAdd(&s.count[area.upper[i] >> 5], 1u);
  __syncthreads();
  constexpr int kMine = kCounters / kThreads;
  const int top = kCounters - 1 - thread * kMine;
  uint32_t sum = 0;
  for (int i = 0; i < kMine; i++) sum += s.count[top - i];
  uint32_t before = sum_before(sum, s.warp_total);
  for (int i = 0; i < kMine; i++) area.above[top - i] = before, before += s.count[top - i];
  __syncthreads();
  if (thread < size) {  // the smallest digit with fewer than `wanted` elements above it
    const uint32_t wanted = static_cast<uint32_t>(rank(thread));
    const uint32_t digit = first_where(0, kCounters - 1, [&](uint32_t n) { return area.above[n] < wanted; });
    s.digit[thread] = digit, s.rank[thread] = wanted - area.above[digit];
  }
  __syncthreads();
  if (thread < size && (thread == 0 || s.digit[thread - 1] != s.digit[thread]))
    area.slot[s.digit[thread]] = static_cast<uint32_t>(thread);
  clear(s.count, 32 * size);
  __syncthreads();
  for (int i = thread; i < m; i += kThreads) {
    const uint32_t key = area.upper[i], slot = area.slot[key >> 5];
    if (slot != kNoSlot) atomicAdd(&s.count[32 * slot + (key & 31u)], 1u);
  }
  __syncthreads();
  if (thread < size) {
    const uint32_t digit = s.digit[thread];
    const uint32_t* count = s.count + 32 * area.slot[digit];
    uint32_t low = 31, left = s.rank[thread];
    while (low > 0 && left > count[low]) left -= count[low--];
    s.upper[thread] = digit << 5 | low;
  }
  __syncthreads();
}

// ---- the pass -------------------------------------------------------------------------------------------------------

struct ClampSums : Sums {
  float kept_e = 0.0f, kept_te = 0.0f;  // e and te over the elements above hi and below max
  uint32_t above = 0;                   // number of elements above hi
  float hi;

  __device__ __forceinline__ void move(float d) {
    const float k = exp2_fast(d);
    kept_te = (kept_te + d * kept_e) * k;
    kept_e *= k;
    Sums::move(d);
  }

  __device__ __forceinline__ void release_max() {
    if (max > hi) kept_e += at_max;
    Sums::release_max();
  }

  // Returns a mask of the elements in [lo, hi].
  template <class T, bool kSlow>
  __device__ __forceinline__ uint32_t add(const uint4 (&u)[kClampGroup], float c, float lo) {
    float2 se, ste;  // x: sums over the even elements, y: over the odd ones
    float sk = 0.0f, stk = 0.0f;
    uint32_t inside = 0;
    const auto sort_in = [&](float x, float t, float w, int bit) {
      if (x > hi)
        sk += w, stk = fmaf(t, w, stk), above++;
      else if (x >= lo)
        inside |= 1u << bit;
    };
#pragma unroll
    for (int g = 0; g < kClampGroup; g++) {
      float2 x[kVector<T> / 2];
      unpack<T>(u[g], x);
#pragma unroll
      for (int k = 0; k < kVector<T> / 2; k++) {
        const bool first = g == 0 && k == 0;
        const float2 t = kSlow ? slow_t(x[k], c) : fast_t(x[k], c);
        float2 w = exp2_fast(t);
        if (kSlow) count_max(x[k], w);
        se = first ? w : add2(se, w), ste = first ? mul2(t, w) : fma2(t, w, ste);
        sort_in(x[k].x, t.x, w.x, g * kVector<T> + 2 * k);
        sort_in(x[k].y, t.y, w.y, g * kVector<T> + 2 * k + 1);
      }
    }
    e += se.x + se.y, te += ste.x + ste.y;
    kept_e += sk, kept_te += stk;
    return inside;
  }
};

struct PassShared {
  Team<kWarps, 5>::Shared team;
  uint32_t listed[kWarps];  // elements in the bracket per warp; if more than kListOfWarp, the warp's list is incomplete
  uint32_t above;
};

// The result of a pass. The sums are valid in thread 0 only, the other members in all threads.
struct RowPass {
  float max;
  float at_max, e, te, kept_e, kept_te;  // as in Sums and ClampSums, relative to max
  uint32_t above, inside;                // number of elements above hi, and in [lo, hi]
  bool all_listed;                       // no list has overflowed
};

// Element j of a vector, not converted.
template <class T>
__device__ __forceinline__ T element(const uint4& u, int j) {
  constexpr int n = Element<T>::kPerWord;
  const uint32_t word = j / n == 0 ? u.x : j / n == 1 ? u.y : j / n == 2 ? u.z : u.w;
  if constexpr (n == 1)
    return bits<T>(word);
  else
    return bits<T>(static_cast<uint16_t>(word >> 16 * (j % n)));
}

// One pass over the row. Writes the elements in [lo, hi] to list, those of warp w from w * kListOfWarp on.
template <class T, bool kAligned>
__device__ __forceinline__ RowPass pass_over(const Reader<T, kAligned>& reader, int count, float lo, float hi, float c,
                                             T* list, PassShared& shared) {
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp, warp = thread / kWarp;
  const Team<kWarps, 5> team{thread};
  constexpr int kTile = kClampVectors * kThreads;
  if (thread == 0) shared.above = 0;
  T* of_warp = list + warp * kListOfWarp<T>;
  uint32_t listed = 0;

  ClampSums s;
  s.hi = hi;
  s.refer_to(-INFINITY, c);
  const int vectors = reader.vectors();
#pragma unroll 1
  for (int tile = 0; tile < vectors; tile += kTile) {
    uint4 u[kClampVectors];
    const bool whole = reader.load(tile, thread, kThreads, u);
    if (tile == 0) s.refer_to(team.max(largest<T>(u), shared.team, 0), c);
    uint32_t inside = 0;  // mask of the elements in the bracket
#pragma unroll
    for (int k = 0; k < kClampVectors; k += kClampGroup) {
      const uint4(&group)[kClampGroup] = *reinterpret_cast<const uint4(*)[kClampGroup]>(&u[k]);
      const float top = largest<T>(group);
      uint32_t found;
      if (top < s.limit)
        found = s.template add<T, false>(group, c, lo);
      else
        add_slowly(s, top, c, [&] { found = s.template add<T, true>(group, c, lo); });
      inside |= found << k * kVector<T>;
    }
    if (!whole) {  // remove the -inf that pad the last vector
#pragma unroll
      for (int k = 0; k < kClampVectors; k++) {
        const int real = count - (tile + thread + k * kThreads) * kVector<T>;
        if (real < kVector<T>) inside &= ~(((1u << kVector<T>)-(1u << (real > 0 ? real : 0))) << k * kVector<T>);
      }
    }
    // Append to the warp's list in the order of lanes: all elements of a thread, or none if the list has no room for
    // them.
    const uint32_t mine = static_cast<uint32_t>(__popc(inside));
    const uint32_t upto = warp_prefix_sum(mine);
    T* at = of_warp + (listed + upto - mine);
    if (listed + upto > kListOfWarp<T>) inside = 0;
    listed += __shfl_sync(0xffffffffu, upto, kWarp - 1);
#pragma unroll
    for (int k = 0; k < kClampVectors; k++) {
#pragma unroll
      for (int j = 0; j < kVector<T>; j++)
        if (inside >> (k * kVector<T> + j) & 1u) *at++ = element<T>(u[k], j);
    }
  }

  // Rescale all threads' sums to the block's max, then add them.
  const float max = team.max(s.max, shared.team, 1);
  correct(s, c);
  if (s.max < max) raise(s, max, c);
  float v[5] = {s.at_max, s.e, s.te, s.kept_e, s.kept_te};
  team.sum(v, shared.team);
  if (lane == 0) shared.listed[warp] = listed;
  atomicAdd(&shared.above, s.above);
  __syncthreads();
  RowPass p;
  p.max = max, p.at_max = v[0], p.e = v[1], p.te = v[2], p.kept_e = v[3], p.kept_te = v[4];
  p.above = shared.above, p.inside = 0, p.all_listed = true;
#pragma unroll
  for (int w = 0; w < kWarps; w++) {
    p.inside += shared.listed[w];
    p.all_listed = p.all_listed && shared.listed[w] <= kListOfWarp<T>;
  }
  __syncthreads();  // the next pass overwrites `shared`
  return p;
}

// A pass over the row in which every thread calls use(x) for its elements.
template <class T, bool kAligned, class Use>
__device__ __forceinline__ void for_elements(const Reader<T, kAligned>& reader, int count, Use use) {
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < reader.vectors(); i += kThreads) {
    float x[kVector<T>];
    unpack<T>(reader.any(i), x);
    const int real = count - i * kVector<T>;
#pragma unroll
    for (int k = 0; k < kVector<T>; k++)
      if (k < real) use(x[k]);
  }
}

// Every thread calls use(x, place) for its share of its warp's list, in a fixed order. place counts 0, 1, ... over the
// lists of all warps. A list that has overflowed is skipped.
template <class T, class Use>
__device__ __forceinline__ void for_listed(const T* list, const PassShared& shared, Use use) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const uint32_t seen = shared.listed[warp];
  const int size = seen <= kListOfWarp<T> ? static_cast<int>(seen) : 0;
  int before = 0;
  for (int w = 0; w < warp; w++) before += static_cast<int>(shared.listed[w]);
#pragma unroll 1
  for (int i = lane; i < size; i += kWarp) use(Element<T>::widen(list[warp * kListOfWarp<T> + i]), before + i);
}

}  // namespace entcov::cuda
