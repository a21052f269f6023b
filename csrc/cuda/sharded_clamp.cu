// The clamped entropy of rows that are split over ranks: the kernels of its four steps. ../clamp.h describes the steps
// and implements the two that read no logits, clamp_bracket and clamp_refine.
//
// Memory. clamp_sketch reads one sector in 20 of a row and writes 256 bytes per row. clamp_partial reads sizeof(T)
// bytes per logit and writes 680 bytes per row, in one pass. If a list in shared memory overflows (thousands of equal
// logits in the bracket), the row is read a second time to count its cells. Finished rows are not read, and their
// partials are 0. clamp_bracket and clamp_refine read the gathered 256 or 680 bytes per row and rank.
//
// Parallelisation. One block per row in clamp_sketch and clamp_partial, one warp per row in the other two.
//
// Numerics. Sums as in row_stats.cu; atomics are on integers only.
#include "device/bracket_pass.cuh"

namespace entcov::cuda {
namespace {

// ---- clamp_sketch ---------------------------------------------------------------------------------------------------

struct SketchArgs {
  Logits logits;
  const int64_t* target;  // [T]
  RowSpec spec;
  float* sketch;  // [T, kSketch]
};

template <class T, bool kAligned>
__global__ void __launch_bounds__(kThreads, 3) clamp_sketch_kernel(const SketchArgs a) {
  __shared__ SampleArea sample;
  __shared__ SelectionShared selection;
  const int64_t t = blockIdx.x;
  const int thread = static_cast<int>(threadIdx.x), count = static_cast<int>(a.spec.columns(a.logits.width));
  float* out = a.sketch + t * kSketch;
  if (count == 0 || a.target[t] == a.spec.ignore_index) {
    if (thread < kSketch) out[thread] = count == 0 ? -INFINITY : 0.0f;
    return;
  }
  const T* row = a.logits.row<T>(t);
  const Reader<T, kAligned> reader(row, count, 0, 0);
  const int m = take_sample<T, kAligned>(reader, row, count, sample);
  select_from_sample(sample, m, kSketch, [m](int n) { return (2 * n + 1) * m / (2 * kSketch) + 1; }, selection);
  if (thread < kSketch) out[thread] = key_value(first_key(selection.upper[thread], kSpareBits<T>));
}

// ---- clamp_bracket --------------------------------------------------------------------------------------------------

// The Team of clamp.h that is a warp.
struct WarpTeam {
  static constexpr int kSize = kWarp;
  int lane;

  template <class Number>
  __device__ __forceinline__ Number sum(Number v) const {
    return warp_sum(v);
  }
  __device__ __forceinline__ float max(float v) const { return warp_max(v); }
  __device__ __forceinline__ uint32_t before(uint32_t v) const { return warp_prefix_sum(v) - v; }
  __device__ __forceinline__ bool all(bool v) const { return __ballot_sync(0xffffffffu, !v) == 0; }
  __device__ __forceinline__ int first(bool v) const {
    const unsigned who = __ballot_sync(0xffffffffu, v);
    return __popc((who & (0u - who)) - 1u) % kWarp;
  }
  template <class T>
  __device__ __forceinline__ T of(T v, int source) const {
    return __shfl_sync(0xffffffffu, v, source);
  }
};

struct BracketArgs {
  Messages sketches;      // rows of kSketch floats
  const int64_t* target;  // [T]
  RowSpec spec;
  int64_t kept, margin;
  Bracket* bracket;  // [T]
};

__global__ void __launch_bounds__(kThreads) clamp_bracket_kernel(const BracketArgs a) {
  const int64_t t = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (t >= a.sketches.T) return;
  const WarpTeam team{static_cast<int>(threadIdx.x) % kWarp};
  Bracket b{0, 0, kDone, 0};
  if (a.target[t] != a.spec.ignore_index)
    b = initial_bracket(team, Gathered{a.sketches, t, kSketch}, a.spec.vocab_size, a.kept, a.margin);
  if (team.lane == 0) a.bracket[t] = b;
}

// ---- clamp_partial --------------------------------------------------------------------------------------------------

struct PartialArgs {
  Logits logits;
  const int64_t* target;  // [T]
  RowSpec spec;
  const Bracket* bracket;  // [T]
  float* partial;          // [T, kRowStatsFields + kPartial]
};

struct PartialShared {
  uint4 list[kListBytes / sizeof(uint4)];
  PassShared pass;
  uint32_t cells[kCells];
  uint32_t used_bits;
};

template <class T, bool kAligned>
__global__ void __launch_bounds__(kThreads, 3) clamp_partial_kernel(const PartialArgs a) {
  __shared__ PartialShared shared;
  constexpr int kFields = kRowStatsFields + kPartialFields;
  const int64_t t = blockIdx.x;
  const int thread = static_cast<int>(threadIdx.x), count = static_cast<int>(a.spec.columns(a.logits.width));
  float* out = a.partial + t * (kFields + kCells);
  const Bracket b = a.bracket[t];
  const int64_t target = a.target[t];
  if (b.mode == kDone || target == a.spec.ignore_index) {
    if (thread < kFields + kCells) out[thread] = 0.0f;
    return;
  }
  const T* row = a.logits.row<T>(t);
  const Reader<T, kAligned> reader(row, count, 0, 0);
  const float lo = key_value(b.lo), hi = key_value(b.hi);
  if (thread < kCells) shared.cells[thread] = 0;
  if (thread == 0) shared.used_bits = 0;
  T* list = reinterpret_cast<T*>(shared.list);
  const RowPass p = pass_over<T, kAligned>(reader, count, lo, hi, a.spec.inv_temperature * kLog2E, list, shared.pass);

  // List or count the logits in the bracket. If a list has overflowed, the row is read a second time.
  uint32_t used = 0;
  const auto count_in = [&](float x, int) {
    if (x >= lo && x <= hi) {
      used |= bits<uint32_t>(x + 0.0f);
      atomicAdd(&shared.cells[cell_of(b, order_key(x))], 1u);
    }
  };
  if (b.mode == kListed)  // at most kCells logits, so no list overflows
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

  const int64_t local = a.spec.column_of(target);
  const bool mine = local >= 0 && local < count;
  const bool poisoned = p.max == INFINITY || !a.spec.is_token(target);
  const float others = p.max == -INFINITY ? 0.0f : p.at_max - 1.0f;
  out[0] = p.max, out[1] = poisoned ? NAN : p.e + others, out[2] = poisoned ? NAN : p.te * kLn2;
  out[3] = poisoned ? NAN : mine ? Element<T>::widen(row[local]) : -INFINITY;
  write_partial(out + kRowStatsFields, p.max, p.kept_e + (p.max > hi ? others : 0.0f), p.kept_te * kLn2, p.above,
                p.inside, shared.used_bits);
}

// ---- clamp_refine ---------------------------------------------------------------------------------------------------

struct RefineArgs {
  Messages partials;      // the last kPartial floats of every row are a partial
  const int64_t* target;  // [T]
  RowSpec spec;
  const float* stats;  // [T, fields], merged
  int fields;
  int64_t kept;
  const Bracket* bracket;  // [T]
  const float* clamp;      // [T, 4]
  Bracket* next_bracket;   // [T]
  float *next_clamp, *clamped_entropy;  // [T, 4], [T]
  uint32_t* unfinished;    // [1], the number of unfinished rows is added to it
};

__global__ void __launch_bounds__(kThreads) clamp_refine_kernel(const RefineArgs a) {
  const int64_t t = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (t >= a.partials.T) return;
  const WarpTeam team{static_cast<int>(threadIdx.x) % kWarp};
  float clamp[4];
  for (int i = 0; i < 4; i++) clamp[i] = a.clamp[4 * t + i];
  const Bracket next = refine(team, Gathered{a.partials, t, kPartial}, a.bracket[t], a.stats + t * a.fields,
                              a.target[t] == a.spec.ignore_index, static_cast<uint32_t>(a.kept), a.spec,
                              clamp);
  if (team.lane != 0) return;
  a.next_bracket[t] = next;
  for (int i = 0; i < 4; i++) a.next_clamp[4 * t + i] = clamp[i];
  a.clamped_entropy[t] = clamp[3];
  if (next.mode != kDone) atomicAdd(a.unfinished, 1u);
}

int64_t warp_blocks(int64_t rows) { return (rows + kWarps - 1) / kWarps; }

}  // namespace

Error clamp_sketch(const Logits& logits, const int64_t* target, const RowSpec& spec, float* sketch, Device stream) {
  const auto kernel = [](auto t, auto aligned) { return clamp_sketch_kernel<decltype(t), aligned>; };
  return launch_for("clamp_sketch", kernel, logits.dtype, logits.T, stream, SketchArgs{logits, target, spec, sketch},
                    aligned_rows(logits));
}

Error clamp_bracket(const Messages& sketches, const int64_t* target, const RowSpec& spec, int64_t kept, int64_t margin,
                    uint32_t* bracket, Device stream) {
  return launch("clamp_bracket", clamp_bracket_kernel, warp_blocks(sketches.T), stream,
                BracketArgs{sketches, target, spec, kept, margin, reinterpret_cast<Bracket*>(bracket)});
}

Error clamp_partial(const Logits& logits, const int64_t* target, const RowSpec& spec, const uint32_t* bracket,
                    float* partial, Device stream) {
  const auto kernel = [](auto t, auto aligned) { return clamp_partial_kernel<decltype(t), aligned>; };
  return launch_for("clamp_partial", kernel, logits.dtype, logits.T, stream,
                    PartialArgs{logits, target, spec, reinterpret_cast<const Bracket*>(bracket), partial},
                    aligned_rows(logits));
}

Error clamp_refine(const Messages& partials, const int64_t* target, const RowSpec& spec, const float* stats, int fields,
                   int64_t kept, const uint32_t* bracket, const float* clamp, uint32_t* next_bracket, float* next_clamp,
                   float* clamped_entropy, uint32_t* unfinished, Device stream) {
  return launch("clamp_refine", clamp_refine_kernel, warp_blocks(partials.T), stream,
                RefineArgs{partials, target, spec, stats, fields, kept, reinterpret_cast<const Bracket*>(bracket),
                           clamp, reinterpret_cast<Bracket*>(next_bracket), next_clamp, clamped_entropy, unfinished});
}

}  // namespace entcov::cuda
