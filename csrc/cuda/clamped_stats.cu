// logits of whole rows -> RowStats and the clamp of every row (../clamp.h). The clamp is (threshold as a raw logit,
// weight of the logits equal to it, L_K, H_K), docs/math.md (10) and (11); logits_grad takes it.
//
// In about one row of a thousand the bracket misses the threshold: then a second pass, with the sample's next range on
// the side where the threshold lies. The threshold is selected among the listed logits by 11, 11 and 10 bits of their
// keys, and the sums over those above it are added to the sums above the bracket.
//
// If a list overflows (there are thousands of equal logits, and others, in the bracket), or after a second miss, the
// row is counted: 8,192 counters over a range of keys, then over the range of one counter, at most three times, until
// that range is one value or fits a list; then a last pass. In the worst case a row is read six times, for any data.
//
// Memory. Reads sizeof(T) bytes per logit, and 5 % more for the sample; writes 44 bytes per row (stats, clamp, three
// outputs). One exponential per logit, and one more per listed logit above the threshold.
//
// Parallelisation. One block computes a row from its sample to its result. So intermediate data stays in shared memory,
// rows do not wait for each other, and whether a row is read again is decided on the device.
//
// Numerics. Sums as in row_stats.cu. Every sum of floats has a fixed order, so the bits do not depend on the schedule.
#include "device/bracket_pass.cuh"

namespace entcov::cuda {
namespace {

constexpr int kRangeCounters = 8192;
static_assert(kRangeCounters * sizeof(uint32_t) <= kListBytes, "");

struct ClampedStatsArgs {
  Logits logits;
  const int64_t* target;  // [T]
  RowSpec spec;
  int64_t kept;
  float* stats;  // [T, 4]
  RowOutputs outputs;
  float *clamp, *clamped_entropy;  // [T, 4], [T]
};

struct Shared {
  union {
    uint4 list[kListBytes / sizeof(uint4)];
    SampleArea sample;
    uint32_t count[kRangeCounters];
  };
  SelectionShared selection;
  PassShared pass;
  Team<kWarps, 2>::Shared sums;

  template <class T>
  __device__ __forceinline__ T* listed() {
    return reinterpret_cast<T*>(list);
  }
};

template <class T, bool kAligned>
__device__ __forceinline__ RowBrackets initial_brackets(const Reader<T, kAligned>& reader, const T* row, int count,
                                                        int64_t kept, Shared& shared) {
  const KeyRange all{kLowestKey, kHighestKey};
  if (count <= kUnsampledColumns) return {all, all, all};  // fits the list
  const int m = take_sample<T, kAligned>(reader, row, count, shared.sample);
  // An expected 70 % of the lists' capacity, so that no warp's list overflows.
  const SampleRanks ranks = sample_ranks(kept, count, m, 0.7f * (kWarps * kListOfWarp<T>));
  select_from_sample(shared.sample, m, 4, [&](int n) { return ranks.rank(n); }, shared.selection);
  const RowBrackets brackets = row_brackets(ranks, shared.selection.upper, kSpareBits<T>);
  __syncthreads();  // the list overwrites the sample
  return brackets;
}

// By counting: a subrange of `within` that contains its rank-th largest element, and either is a single key or contains
// at most as many elements as one warp can list.
template <class T, bool kAligned>
__device__ __forceinline__ KeyRange find_threshold_range(const Reader<T, kAligned>& reader, int count, KeyRange within,
                                                         uint32_t rank, Shared& shared) {
  uint32_t lo = within.lo >> kSpareBits<T>, hi = within.hi >> kSpareBits<T>;
#pragma unroll 1
  while (true) {
    int shift = 0;
    while ((hi - lo) >> shift >= kRangeCounters) shift++;
    clear(shared.count, kRangeCounters);
    __syncthreads();
    for_elements<T, kAligned>(reader, count, [&](float x) {
      const uint32_t key = order_key(x) >> kSpareBits<T>;
      if (key >= lo && key <= hi) atomicAdd(&shared.count[(key - lo) >> shift], 1u);
    });
    __syncthreads();
    const Place place = find_bin(shared.count, kRangeCounters, rank, shared.selection);
    lo += place.counter << shift, rank = place.rank;
    if ((hi - lo) >> shift > 0) hi = lo + (1u << shift) - 1u;
    if (hi == 0x7fffffffu >> kSpareBits<T> && lo < hi) hi--;  // -0 has the key of +0
    __syncthreads();
    if (lo == hi || place.count <= kListOfWarp<T>) return {whole_key(lo, kSpareBits<T>), whole_key(hi, kSpareBits<T>)};
  }
}

// The rank-th largest of the listed elements: its key (as counter), its rank among equal elements, and their number.
template <class T>
__device__ __forceinline__ Place radix_select(Shared& shared, uint32_t rank) {
  uint32_t prefix = 0, mask = 0;
  Place place{};
#pragma unroll 1
  for (int shift = 21; shift >= 0; shift = shift == 21 ? 10 : shift - 10) {
    clear(shared.selection.count, kCounters);
    __syncthreads();
    const uint32_t digits = shift == 0 ? 0x3ffu : 0x7ffu;
    for_listed(shared.listed<T>(), shared.pass, [&](float x, int) {
      const uint32_t key = order_key(x);
      if ((key & mask) == prefix) atomicAdd(&shared.selection.count[key >> shift & digits], 1u);
    });
    __syncthreads();
    place = find_bin(shared.selection.count, kCounters, rank, shared.selection);
    prefix |= place.counter << shift, mask |= digits << shift, rank = place.rank;
    __syncthreads();
  }
  place.counter = prefix;
  return place;
}

template <class T, bool kAligned>
__global__ void __launch_bounds__(kThreads, 3) clamped_stats_kernel(const ClampedStatsArgs a) {
  __shared__ Shared shared;
  const int64_t t = blockIdx.x;
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t target = a.target[t];
  float* clamp = a.clamp + t * 4;
  if (target == a.spec.ignore_index) {
    if (thread < 4) clamp[thread] = 0.0f;
    if (thread == 0) store_ignored_row(t, kRowStatsFields, a.stats, a.outputs), a.clamped_entropy[t] = 0.0f;
    return;
  }
  const int count = static_cast<int>(a.spec.columns(a.logits.width));
  const T* row = a.logits.row<T>(t);
  const Reader<T, kAligned> reader(row, count, 0, 0);
  const float c = a.spec.inv_temperature * kLog2E;
  const uint32_t kept = static_cast<uint32_t>(a.kept);

  const RowBrackets brackets = initial_brackets<T, kAligned>(reader, row, count, a.kept, shared);
  KeyRange b = brackets.inner;
  RowPass p;
  bool dead;
#pragma unroll 1
  for (int passes = 1;; passes++) {
    p = pass_over<T, kAligned>(reader, count, key_value(b.lo), key_value(b.hi), c, shared.listed<T>(), shared.pass);
    // A row with a NaN or without a finite logit has no threshold. Only thread 0 has the sums, so it broadcasts.
    if (thread == 0) {
      const bool off = p.max == -INFINITY || p.max == INFINITY || p.e != p.e || !a.spec.is_token(target);
      shared.selection.place = {off ? 1u : 0u, 0u, 0u};
    }
    __syncthreads();
    dead = shared.selection.place.counter != 0;
    __syncthreads();
    const bool hit = p.above < kept && kept - p.above <= p.inside;
    if (dead || (hit && (p.all_listed || b.lo == b.hi))) break;
    if (!hit && passes == 1)
      b = p.above >= kept ? brackets.above : brackets.below;
    else if (hit)
      b = find_threshold_range<T, kAligned>(reader, count, b, kept - p.above, shared);
    else
      b = find_threshold_range<T, kAligned>(reader, count, {kLowestKey, order_key(p.max)}, kept, shared);
  }
  if (dead) {
    if (thread < 4) clamp[thread] = NAN;
    if (thread == 0) {
      store_row({p.max, NAN, NAN, NAN}, t, kRowStatsFields, a.spec.inv_temperature, a.stats, a.outputs);
      a.clamped_entropy[t] = NAN;
    }
    return;
  }

  // The threshold's key. If the bracket is a single key, all elements inside are equal.
  Place at{b.lo, kept - p.above, p.inside};
  if (b.lo != b.hi) at = radix_select<T>(shared, kept - p.above);
  const float threshold = key_value(at.counter);
  float sums[2] = {0.0f, 0.0f};
  if (b.lo != b.hi)
    for_listed(shared.listed<T>(), shared.pass, [&](float x, int) {
      if (x > threshold && x < p.max) {
        const float y = at_least((x - p.max) * c, kExp2Floor), e = exp2_fast(y);
        sums[0] += e, sums[1] = fmaf(y, e, sums[1]);
      }
    });
  Team<kWarps, 2>{thread}.sum(sums, shared.sums);
  if (thread != 0) return;

  const float others = p.at_max - 1.0f;  // elements equal to max, without the one left out
  store_row({p.max, p.e + others, p.te * kLn2, Element<T>::widen(row[target])}, t, kRowStatsFields,
            a.spec.inv_temperature, a.stats, a.outputs);
  finish_clamp(threshold, at.rank, at.count, p.max, others + (p.kept_e + sums[0]), (p.kept_te + sums[1]) * kLn2,
               a.spec.inv_temperature, clamp);
  a.clamped_entropy[t] = clamp[3];
}

}  // namespace

Error clamped_stats(const Logits& logits, const int64_t* target, const RowSpec& spec, int64_t kept, float* stats,
                    const RowOutputs& outputs, float* clamp, float* clamped_entropy, Device stream) {
  const auto kernel = [](auto t, auto aligned) { return clamped_stats_kernel<decltype(t), aligned>; };
  return launch_for("clamped_stats", kernel, logits.dtype, logits.T, stream,
                    ClampedStatsArgs{logits, target, spec, kept, stats, outputs, clamp, clamped_entropy},
                    aligned_rows(logits));
}

}  // namespace entcov::cuda
