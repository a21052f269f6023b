// The stages of a selection of tokens (../token_select.h), a launch each, and one before to clear the workspace.
//
//   count    6 (largest), 4 (draw), 2 (quantile): picks the digit that the stage before has counted, counts the next
//   mark     picks the last digit, marks the chosen tokens, enters the ids in the map
//   check    2: counts the bits of the map; writes the results, and overrules the marks where they are invalid
//
// Launches: 10 for largest, 8 for a draw; 4 for a summary. With the 3 of the covariance (one of them clears 8 numbers)
// KL-Cov's selection takes 13, Clip-Cov's 11.
//
// Memory. largest: 52 bytes a token: score and mask in every stage but check (7 x 5), ids in the first and in mark (2 x
// 8), a mark (1); and an id for every tied token in stages 2 to 5. draw: 42, and with an `exclude` 5 more; and an id
// for every candidate in stages 3 to 5: 71 bytes at most. With the covariance (token_means.cu, 22) 74, and 93 at most.
// Besides, 2 MiB of counters are cleared, and stay in the L2 cache.
//
// Parallelisation. A block takes 2,048 tokens (device/tokens.cuh). Its threads count by atomics on global memory, in
// 65,536 bins; a warp whose tokens all have the same digit, as tied scores do, adds once. The sums of 256 bins each are
// counted in shared memory first. They let every block of the next stage pick the digit for itself, from 256 sums
// and then 256 bins, so that picking needs no launch. Nothing of size T is done in one block.
//
// Determinism. Counts are integers, which add up to the same in every order; a token's mark depends on it and on them.
#include "device/tokens.cuh"

namespace entcov::cuda {
namespace {

static_assert(kGroups == kThreads && kBinsAGroup == kThreads, "a thread has one sum, and one bin");

struct StageArgs {
  SelectTokens tokens;
  int64_t T;
  SelectSpec spec;
  int64_t ranks;
  int stage;
  bool begin;  // whether this is the first stage
  SelectWorkspace* workspace;
  SelectOutputs out;
};

// ---- picking a digit ------------------------------------------------------------------------------------------------

// What find() needs, of its own for each call.
struct Found {
  uint32_t of_warp[kWarps];
  uint32_t place;
  int64_t above;
};

// The place of the count in which the rank-th thing lies, where thread i has the i-th count from above. `above`: in
// higher counts. Every thread gets both, and the total. Needs 1 <= rank; it is lowered to the total; total 0: place 0.
__device__ __forceinline__ uint32_t find(uint32_t count, int64_t rank, Found& shared, int64_t& above, int64_t& total) {
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  uint32_t up_to = warp_prefix_sum(count);
  if (threadIdx.x % kWarp == kWarp - 1) shared.of_warp[warp] = up_to;
  if (threadIdx.x == 0) shared.place = 0, shared.above = 0;
  __syncthreads();
  uint32_t all = 0;
#pragma unroll
  for (int w = 0; w < kWarps; w++) {
    if (w < warp) up_to += shared.of_warp[w];
    all += shared.of_warp[w];
  }
  rank = rank < all ? rank : all;
  if (count > 0 && up_to - count < rank && rank <= up_to) shared.place = threadIdx.x, shared.above = up_to - count;
  __syncthreads();
  above = shared.above, total = all;
  return shared.place;
}

struct StageShared {
  Found group, bin;
  uint32_t groups[kGroups];  // this block's counts of the next digit
};

// The digit in which the key of the state's rank lies, for every thread of the block.
__device__ __forceinline__ Digit pick(const Histogram& h, const SelectState& state, StageShared& shared) {
  Digit digit;
  const uint32_t of_group = h.groups[kGroups - 1 - threadIdx.x];
  const uint32_t below_top = find(of_group, state.rank, shared.group, digit.above, digit.total);
  const uint32_t top = (kGroups - below_top) * kBinsAGroup - 1;  // the highest bin of the group
  const int64_t rank = rank_within(state, digit.total);
  int64_t in_group, all;
  digit.bin = top - find(h.bins[top - threadIdx.x], rank - digit.above, shared.bin, in_group, all);
  digit.above += in_group;
  if (rank == 0) digit.bin = kBins - 1, digit.above = 0;
  return digit;
}

// The state that this stage starts from. Block 0 keeps it for the next one.
__device__ __forceinline__ SelectState enter(const StageArgs& a, StageShared& shared) {
  SelectWorkspace& w = *a.workspace;
  SelectState state;
  if (a.begin) {
    state = first_state(a.spec, *a.tokens.num_tokens);
  } else {
    const SelectState before = w.states[a.stage - 1];
    state = advance(before, a.stage - 1, pick(w.histograms[a.stage - 1], before, shared));
  }
  if (blockIdx.x == 0 && threadIdx.x == 0) w.states[a.stage] = state;
  return state;
}

// ---- counting -------------------------------------------------------------------------------------------------------

// Counts `bin` where `member`. Called by all lanes of a warp together.
__device__ __forceinline__ void count(Histogram& h, StageShared& shared, bool member, uint32_t bin) {
  const unsigned members = __ballot_sync(0xffffffffu, member);
  if (members == 0) return;
  const int leader = __popc((members & (~members + 1)) - 1);
  const uint32_t bin_of_leader = __shfl_sync(0xffffffffu, bin, leader);
  const unsigned equal = __ballot_sync(0xffffffffu, member && bin == bin_of_leader);
  const bool same = equal == members;
  if (same ? static_cast<int>(threadIdx.x) % kWarp != leader : !member) return;
  const uint32_t number = same ? static_cast<uint32_t>(__popc(members)) : 1u;
  atomicAdd(&h.bins[bin], number);
  atomicAdd(&shared.groups[bin / kBinsAGroup], number);
}

__device__ __forceinline__ int64_t seed_of(const StageArgs& a) { return a.tokens.seed ? *a.tokens.seed : a.spec.seed; }
__device__ __forceinline__ int64_t step_of(const StageArgs& a) { return a.tokens.step ? *a.tokens.step : a.spec.step; }

// Whether a token under the mask takes part in the draw.
__device__ __forceinline__ bool drawn_from(const StageArgs& a, const SelectState& state, float value, int64_t t) {
  if (a.spec.kind == kLargest) return float_key(value) == state.score;
  return is_candidate(a.spec, value) && !(a.tokens.exclude && __ldg(a.tokens.exclude + t));
}

__global__ void __launch_bounds__(kThreads) count_kernel(const StageArgs a) {
  __shared__ StageShared shared;
  shared.groups[threadIdx.x] = 0;
  const SelectState state = enter(a, shared);
  __syncthreads();
  const int64_t seed = seed_of(a), step = step_of(a);
  SelectWorkspace& w = *a.workspace;
  Histogram& h = w.histograms[a.stage];
  const bool notes_ends = a.begin && a.spec.kind != kQuantile;  // of the ids
  float value[kTokensAThread];
  bool mask[kTokensAThread];
#pragma unroll
  for (int i = 0; i < kTokensAThread; i++) {
    const int64_t t = token_of(i);
    mask[i] = t < a.T && __ldg(a.tokens.mask + t);
    value[i] = t < a.T ? __ldg(a.tokens.value + t) : 0.0f;
  }
  uint64_t low = 0, high = 0;
#pragma unroll
  for (int i = 0; i < kTokensAThread; i++) {
    const int64_t t = token_of(i);
    const uint32_t key = float_key(value[i]);
    const bool in_draw = a.stage >= kScoreRounds;
    bool member = mask[i] && (!in_draw || drawn_from(a, state, value[i], t));
    int64_t id = 0;
    if (notes_ends ? mask[i] : in_draw && member) id = __ldg(a.tokens.token_id + t);
    if (notes_ends && mask[i]) {
      low = low_end(id) > low ? low_end(id) : low;
      high = high_end(id) > high ? high_end(id) : high;
    }
    uint32_t bin = key >> kDigitBits;
    if (a.stage == 1) {
      member = member && bin == state.prefix;
      bin = key & (kBins - 1);
    } else if (in_draw) {
      const uint64_t hash = token_hash(id, seed, step);
      member = member && hash_prefix(hash, a.stage) == state.prefix;
      bin = hash_digit(hash, a.stage);
    }
    count(h, shared, member, bin);
  }
  if (notes_ends) {
    max_of_warp(&w.own[0], low);
    max_of_warp(&w.own[1], high);
  }
  if (a.begin && !notes_ends) {
    uint64_t largest = 0;
    int64_t coarse = 0, fine = 0;
#pragma unroll
    for (int i = 0; i < kTokensAThread; i++) {
      const uint64_t key = mask[i] ? float_key(value[i]) : 0;
      const FixedPoint x = fixed_point(mask[i] ? static_cast<double>(value[i]) : 0.0);
      largest = key > largest ? key : largest;
      coarse += x.coarse, fine += x.fine;
    }
    max_of_warp(&w.own[0], largest);
    add_of_warp(&w.sums[0], coarse);
    add_of_warp(&w.sums[1], fine);
  }
  __syncthreads();
  const uint32_t mine = shared.groups[threadIdx.x];
  if (mine != 0) atomicAdd(&h.groups[threadIdx.x], mine);
}

// ---- marks and checks -----------------------------------------------------------------------------------------------

__global__ void __launch_bounds__(kThreads) mark_kernel(const StageArgs a) {
  __shared__ StageShared shared;
  const SelectState state = enter(a, shared);
  const int64_t seed = seed_of(a), step = step_of(a);
  SelectWorkspace& w = *a.workspace;
  uint64_t low = 0, high = 0;
  for (int64_t r = 0; r < a.ranks; r++) {
    const uint64_t l = static_cast<uint64_t>(a.tokens.own[2 * r]), h = static_cast<uint64_t>(a.tokens.own[2 * r + 1]);
    low = l > low ? l : low, high = h > high ? h : high;
  }
  const int64_t stride = id_stride(low, high);
  int64_t chosen = 0, checked = 0;
#pragma unroll 4
  for (int i = 0; i < kTokensAThread; i++) {
    const int64_t t = token_of(i);
    if (t >= a.T) continue;
    bool taken = false;
    if (__ldg(a.tokens.mask + t)) {
      const float value = __ldg(a.tokens.value + t);
      const int64_t id = __ldg(a.tokens.token_id + t);
      taken = state.n > 0 && ((a.spec.kind == kLargest && float_key(value) > state.score) ||
                              (drawn_from(a, state, value, t) && token_hash(id, seed, step) >= state.prefix));
      const MapBit at = map_bit(id, stride);
      if (at.bit != 0) {
        auto* word = reinterpret_cast<unsigned long long*>(&w.marks[2 + at.word]);
        atomicAdd(word, static_cast<unsigned long long>(at.bit));
        checked++;
      }
    }
    a.out.chosen[t] = taken;
    chosen += taken;
  }
  add_of_warp(&w.marks[0], chosen);
  add_of_warp(&w.marks[1], checked);
}

constexpr int kWordsABlock = 8 * kThreads;
static_assert(kMapWords % kWordsABlock == 0, "");

__global__ void __launch_bounds__(kThreads) count_bits_kernel(SelectWorkspace* const w) {
  const int64_t* map = w->marks + 2 + static_cast<int64_t>(blockIdx.x) * kWordsABlock;
  int64_t bits = 0;
#pragma unroll
  for (int i = 0; i < kWordsABlock; i += kThreads) bits += num_bits(static_cast<uint64_t>(map[i + threadIdx.x]));
  add_of_warp(reinterpret_cast<int64_t*>(&w->set_bits), bits);
}

// The tokens are read and written only if the selection is invalid.
__global__ void __launch_bounds__(kThreads) finish_kernel(const StageArgs a) {
  if (blockIdx.x == 0 && threadIdx.x == 0) finish(a.spec, *a.workspace, a.tokens.refused, a.out);
  if (!is_invalid(*a.workspace, a.tokens.refused)) return;
  for (int i = 0; i < kTokensAThread; i++)
    if (token_of(i) < a.T) a.out.chosen[token_of(i)] = __ldg(a.tokens.mask + token_of(i));
}

constexpr int64_t kClearedABlock = 16 * kThreads;  // int64
constexpr int64_t kWords = sizeof(SelectWorkspace) / sizeof(int64_t);

__global__ void __launch_bounds__(kThreads) clear_kernel(int64_t* const words) {
  const int64_t begin = blockIdx.x * kClearedABlock;
  for (int64_t i = begin + threadIdx.x; i < begin + kClearedABlock && i < kWords; i += kThreads) words[i] = 0;
}

struct SummaryArgs {
  const SelectWorkspace* workspace;
  const int64_t* num_tokens;    // [1]
  const int64_t* own;           // [ranks, 2]
  int64_t ranks;
  const double* mean_logprob;  // [1]
  const uint8_t* refused;      // [1] or null
  double* mean;                // [1]
  float* extremes;             // [2]
};

__global__ void __launch_bounds__(kThreads) summary_kernel(const SummaryArgs a) {
  __shared__ StageShared shared;
  const SelectWorkspace& w = *a.workspace;
  const Digit digit = pick(w.histograms[kScoreRounds - 1], w.states[kScoreRounds - 1], shared);
  if (threadIdx.x != 0) return;
  uint64_t largest = 0;
  for (int64_t r = 0; r < a.ranks; r++) {
    const uint64_t key = static_cast<uint64_t>(a.own[2 * r]);
    largest = key > largest ? key : largest;
  }
  summarise(w, digit, largest, *a.num_tokens, *a.mean_logprob, a.refused, a.mean, a.extremes);
}

Error run_stage(const StageArgs& a, Device stream) {
  const int64_t blocks = token_blocks(a.T);
  if (a.stage < kMarkStage) return launch("token_select: count", count_kernel, blocks, stream, a);
  if (a.stage == kMarkStage) return launch("token_select: mark", mark_kernel, blocks, stream, a);
  if (Error error = launch("token_select: bits", count_bits_kernel, kMapWords / kWordsABlock, stream, a.workspace))
    return error;
  return launch("token_select: finish", finish_kernel, blocks, stream, a);
}

}  // namespace

int64_t select_workspace(int64_t) { return kWords; }

Error token_select(const SelectTokens& tokens, int64_t T, const SelectSpec& spec, int64_t ranks, int first, int last,
                   int64_t* workspace, const SelectOutputs& outputs, Device stream) {
  const int begin = first_stage(spec.kind);
  if (first == begin) {
    const int64_t blocks = (kWords + kClearedABlock - 1) / kClearedABlock;
    if (Error error = launch("token_select: clear", clear_kernel, blocks, stream, workspace)) return error;
  }
  StageArgs args{tokens, T, spec, ranks, 0, false, reinterpret_cast<SelectWorkspace*>(workspace), outputs};
  for (int stage = first; stage <= last; stage++) {
    args.stage = stage, args.begin = stage == begin;
    if (Error error = run_stage(args, stream)) return error;
  }
  return nullptr;
}

Error token_summary(const int64_t* workspace, const int64_t* num_tokens, const int64_t* own, int64_t ranks,
                    const double* mean_logprob, const uint8_t* refused, double* mean, float* extremes, Device stream) {
  return launch("token_summary", summary_kernel, 1, stream,
                SummaryArgs{reinterpret_cast<const SelectWorkspace*>(workspace), num_tokens, own, ranks, mean_logprob,
                            refused, mean, extremes});
}

}  // namespace entcov::cuda
