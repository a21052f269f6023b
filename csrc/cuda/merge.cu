// The kernels before and after the all-gather of a sharded call: message() assembles what a rank sends, and
// merge_row_stats() and merge_covariance_stats() merge the gathered messages of all ranks into statistics and outputs
// of whole rows. The same two merge kernels merge the segments of long rows (merge.cuh).
//
// Memory. A merge reads 4 fields bytes per row and part (fields: 4, 7 or 8; a part is a rank or a segment), and writes
// as much plus the outputs per row. Assembling a message reads and writes the payload once, and reads 8 bytes per value
// to hash it.
//
// Parallelisation. Merge: one thread per row, one launch that also writes the outputs. Message: block 0 hashes the
// values and writes the signature, the other blocks copy 2,048 floats of the payload each. More than 4,096 values are
// hashed by a launch before it, in up to 256 blocks; block 0 then adds the hashes of the blocks. So no block does work
// that grows with the number of tokens while the others have none.
//
// Numerics. Parts are merged in order, with merge() of row_stats.h and logit_covariance.h: one exponential per part,
// four for covariances. Every rank that holds the same messages computes the same bits.
#include "merge.cuh"
#include "device/block_reduction.cuh"

namespace entcov::cuda {
namespace {

constexpr int kFloatsABlock = 8 * kThreads;   // of the payload, copied by one block
constexpr int kValuesABlock = 16 * kThreads;  // hashed by one block
constexpr int kMostParts = kThreads;          // one for each thread of the block that adds them

struct Values {
  const int64_t* values;  // [count]
  int64_t count;
  uint64_t* parts;  // [blocks of hash_values_kernel]; null: the values were not hashed before
};

struct MessageArgs {
  const float* payload;  // [count]
  int64_t count;
  Values values;
  int64_t num_parts, call, start, columns;
  float* message;  // [count + kSignatureFloats]
};

// The sum of v over the block, in thread 0.
__device__ __forceinline__ uint64_t block_sum(uint64_t v) {
  __shared__ uint64_t of_warp[kWarps];
  v = warp_sum(v);
  if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = v;
  __syncthreads();
  if (threadIdx.x == 0)
    for (int w = 1; w < kWarps; w++) v += of_warp[w];
  return v;
}

// The sum of the hashes of values block, block + blocks, ..., in units of one value a thread; in thread 0. Integers are
// added, so the order does not matter.
__device__ __forceinline__ uint64_t hash_of_block(const Values& v, int64_t block, int64_t blocks) {
  uint64_t hash = 0;
#pragma unroll 4
  for (int64_t i = block * kThreads + threadIdx.x; i < v.count; i += blocks * kThreads)
    hash += hash_of(i, v.values[i]);
  return block_sum(hash);
}

__global__ void __launch_bounds__(kThreads) hash_values_kernel(const Values v) {
  const uint64_t hash = hash_of_block(v, blockIdx.x, gridDim.x);
  if (threadIdx.x == 0) v.parts[blockIdx.x] = hash;
}

__global__ void __launch_bounds__(kThreads) message_kernel(const MessageArgs a) {
  if (blockIdx.x > 0) {
    const int64_t begin = (blockIdx.x - int64_t{1}) * kFloatsABlock;
    const int64_t end = begin + kFloatsABlock < a.count ? begin + kFloatsABlock : a.count;
    for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) a.message[i] = a.payload[i];
    return;
  }
  uint64_t hash;
  if (a.values.parts)
    hash = block_sum(threadIdx.x < a.num_parts ? a.values.parts[threadIdx.x] : 0);
  else
    hash = hash_of_block(a.values, 0, 1);
  if (threadIdx.x != 0) return;
  const Signature signature = sign(hash, a.call, a.start, a.columns);
  float words[kSignatureFloats];
  memcpy(words, &signature, sizeof words);
  for (int i = 0; i < kSignatureFloats; i++) a.message[a.count + i] = words[i];
}

// The parts to merge: messages of ranks, each with a signature, or segments [R, T, width] without signatures.
struct Partials {
  Messages messages;
  bool are_segments;

  __device__ __forceinline__ const float* row(int64_t r, int64_t t) const {
    return are_segments ? messages.data + (r * messages.T + t) * messages.width : messages.row(r, t);
  }
  // Whether the ranks agree (signature.h); always true for segments. Called by all threads of the block.
  __device__ __forceinline__ bool agree(int64_t vocab_size) const {
    using Block = Team<kWarps, 1>;
    __shared__ typename Block::Shared shared;
    float differs = 0.0f;
    if (!are_segments)
      for (int64_t r = threadIdx.x; r < messages.R; r += kThreads)
        if (!agrees(messages, r, vocab_size)) differs = 1.0f;
    return Block{static_cast<int>(threadIdx.x)}.max(differs, shared, 0) == 0.0f;
  }
};

struct MergeRowStatsArgs {
  Partials partials;
  const int64_t* target;  // [T]
  RowSpec spec;
  int fields;
  float* stats;  // [T, fields]
  RowOutputs outputs;
};

__global__ void __launch_bounds__(kThreads) merge_row_stats_kernel(const MergeRowStatsArgs a) {
  const bool agree = a.partials.agree(a.spec.vocab_size);
  const int64_t t = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (t >= a.partials.messages.T) return;
  if (a.target[t] == a.spec.ignore_index) return store_ignored_row(t, a.fields, a.stats, a.outputs);
  RowStats s;
  for (int64_t r = 0; r < a.partials.messages.R; r++)
    s = merge(s, load_stats(a.partials.row(r, t), a.fields), a.spec.inv_temperature);
  if (!agree) s.sum_exp_m1 = NAN;
  store_row(s, t, a.fields, a.spec.inv_temperature, a.stats, a.outputs);
}

struct MergeCovarianceArgs {
  Partials partials;
  const uint8_t* row_mask;  // [T] or null
  RowSpec spec;
  float* stats;  // [T, 8]
  CovarianceOutputs outputs;
};

__global__ void __launch_bounds__(kThreads) merge_covariance_stats_kernel(const MergeCovarianceArgs a) {
  const bool agree = a.partials.agree(a.spec.vocab_size);
  const int64_t t = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (t >= a.partials.messages.T) return;
  if (a.row_mask && !a.row_mask[t]) return store_masked_row(t, a.stats, a.outputs);
  CovarianceStats s;
  for (int64_t r = 0; r < a.partials.messages.R; r++)
    s = merge(s, load_covariance_stats(a.partials.row(r, t)), a.spec.inv_temperature);
  if (!agree) s.sum_exp_m1_old = s.sum_exp_m1_new = s.sum_d = s.sum_xd = NAN;
  store_covariance_row(s, t, a.spec.inv_temperature, a.stats, a.outputs);
}

int64_t blocks(int64_t rows) { return (rows + kThreads - 1) / kThreads; }

}  // namespace

int64_t hash_parts(int64_t num_values) {
  const int64_t parts = (num_values + kValuesABlock - 1) / kValuesABlock;
  return parts < 1 ? 1 : parts < kMostParts ? parts : kMostParts;
}

Error message(const float* payload, int64_t count, const int64_t* values, int64_t num_values, int64_t call,
              int64_t start, int64_t columns, float* message, uint64_t* workspace, Device stream) {
  const int64_t parts = hash_parts(num_values);
  const Values v{values, num_values, parts > 1 ? workspace : nullptr};
  if (v.parts)
    if (const Error error = launch("hash of values", hash_values_kernel, parts, stream, v)) return error;
  return launch("message", message_kernel, 1 + (count + kFloatsABlock - 1) / kFloatsABlock, stream,
                MessageArgs{payload, count, v, parts, call, start, columns, message});
}

Error merge_row_stats(const Messages& messages, const int64_t* target, const RowSpec& spec, int fields, float* stats,
                      const RowOutputs& outputs, Device stream) {
  return launch("merge_row_stats", merge_row_stats_kernel, blocks(messages.T), stream,
                MergeRowStatsArgs{{messages, false}, target, spec, fields, stats, outputs});
}

Error merge_segments(const float* segments_stats, int64_t segments, int64_t T, const int64_t* target,
                     const RowSpec& spec, int fields, float* stats, const RowOutputs& outputs, Device stream) {
  return launch("merge of segments", merge_row_stats_kernel, blocks(T), stream,
                MergeRowStatsArgs{{{segments_stats, segments, T, fields}, true}, target, spec, fields, stats, outputs});
}

Error merge_covariance_stats(const Messages& messages, const uint8_t* row_mask, const RowSpec& spec, float* stats,
                             const CovarianceOutputs& outputs, Device stream) {
  return launch("merge_covariance_stats", merge_covariance_stats_kernel, blocks(messages.T), stream,
                MergeCovarianceArgs{{messages, false}, row_mask, spec, stats, outputs});
}

Error merge_covariance_segments(const float* segments_stats, int64_t segments, int64_t T, const uint8_t* row_mask,
                                const RowSpec& spec, float* stats, const CovarianceOutputs& outputs, Device stream) {
  return launch(
      "merge of covariance segments", merge_covariance_stats_kernel, blocks(T), stream,
      MergeCovarianceArgs{{{segments_stats, segments, T, kCovarianceFields}, true}, row_mask, spec, stats, outputs});
}

}  // namespace entcov::cuda
