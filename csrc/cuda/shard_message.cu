// What stands around the all-gather of a sharded call (entcov/stats/shards.py): the header in front of a rank's statistics, and
// the comparison of all headers behind it. One launch each instead of two dozen small ones, on data that is small too: by
// launches such a call would cost half as much again as the statistics of 8,192 rows of 19,008 columns.
//
// checksum: a hash of each value with its place, added up modulo 2^64; the order of the additions does not matter to it.
// The values that the hash is of are one a token, so one block is enough.
#include "team.cuh"

namespace entcov::cuda {
namespace {

constexpr int kFloatsABlock = 8 * kThreads;

__device__ __forceinline__ uint64_t mixed(int64_t place, int64_t value) {
  const auto turn = [](uint64_t x, int by) { return x ^ static_cast<uint64_t>(static_cast<int64_t>(x) >> by); };
  uint64_t x = static_cast<uint64_t>(place) * 0x9e3779b97f4a7c15u + static_cast<uint64_t>(value);
  x = turn(x, 31) * 0xbf58476d1ce4e5b9u;
  return turn(x, 29) * 0x94d049bb133111ebu;
}

struct ChecksumArgs {
  const int64_t* values;  // [count]
  int64_t count;
  int64_t* sum;  // []
};

__global__ void __launch_bounds__(kThreads) checksum_kernel(const ChecksumArgs a) {
  __shared__ uint64_t of_warp[kWarps];
  uint64_t sum = 0;
#pragma unroll 4
  for (int64_t i = threadIdx.x; i < a.count; i += kThreads) sum += mixed(i, a.values[i]);
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
  if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int w = 1; w < kWarps; w++) sum += of_warp[w];
  *a.sum = static_cast<int64_t>(sum);
}

struct MessageArgs {
  HeaderWords header;
  const int64_t* hash;   // [] or null: the header's last word
  const float* payload;  // [count]
  int64_t count, header_floats;
  float* message;  // [header_floats + count]; the header's words take two floats each
};

// Block 0 writes the header, the others copy.
__global__ void __launch_bounds__(kThreads) shard_message_kernel(const MessageArgs a) {
  if (blockIdx.x > 0) {
    const int64_t begin = (blockIdx.x - int64_t{1}) * kFloatsABlock;
    const int64_t end = begin + kFloatsABlock < a.count ? begin + kFloatsABlock : a.count;
    for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) a.message[a.header_floats + i] = a.payload[i];
    return;
  }
  int64_t* words = reinterpret_cast<int64_t*>(a.message);
  if (threadIdx.x == 0) {
    for (int i = 0; i < a.header.count; i++) words[i] = a.header.words[i];
    if (a.hash) words[a.header.count] = *a.hash;
  }
  const int64_t used = 2 * (a.header.count + (a.hash ? 1 : 0));
  for (int64_t i = used + threadIdx.x; i < a.header_floats; i += kThreads) a.message[i] = 0.0f;
}

struct AcceptArgs {
  const uint32_t* shards;  // [R, rank_floats]: header_floats of header, then `count` floats; 4-byte aligned
  int64_t R, rank_floats, header_floats, count;
  int words, alike_from;  // words in a header; from which on they must be those of rank 0
  int64_t pieces;         // what word 1 must add up to over the ranks
  uint32_t* parts;        // [R, count]
};

// Every block compares the headers for itself.
__global__ void __launch_bounds__(kThreads) accept_shards_kernel(const AcceptArgs a) {
  using Block = Team<kWarps, 1>;
  __shared__ typename Block::Shared shared;
  const Block team{static_cast<int>(threadIdx.x)};
  bool differ = false;
  const int64_t halves = 2 * a.words;
  for (int64_t i = threadIdx.x; i < a.R * halves; i += kThreads) {
    const int64_t rank = i / halves, half = i % halves;
    differ |= half >= 2 * a.alike_from && a.shards[rank * a.rank_floats + half] != a.shards[half];
  }
  if (threadIdx.x == 0) {
    uint64_t sum = 0;
    for (int64_t rank = 0; rank < a.R; rank++) {
      const uint32_t* piece = a.shards + rank * a.rank_floats + 2;
      sum += uint64_t{piece[1]} << 32 | piece[0];
    }
    differ |= sum != static_cast<uint64_t>(a.pieces);
  }
  const bool refused = team.max(differ ? 1.0f : 0.0f, shared, 0) > 0.0f;

  const int64_t begin = static_cast<int64_t>(blockIdx.x) * kFloatsABlock, all = a.R * a.count;
  const int64_t end = begin + kFloatsABlock < all ? begin + kFloatsABlock : all;
  int64_t i = begin + threadIdx.x, rank = i / a.count, at = i % a.count;
  for (; i < end; i += kThreads, at += kThreads) {
    for (; at >= a.count; at -= a.count) rank++;
    a.parts[i] = refused ? 0x7fc00000u : a.shards[rank * a.rank_floats + a.header_floats + at];
  }
}

int64_t blocks(int64_t floats) { return (floats + kFloatsABlock - 1) / kFloatsABlock; }

}  // namespace

cudaError_t checksum(const int64_t* values, int64_t count, int64_t* sum, cudaStream_t stream) {
  return launch("checksum", checksum_kernel, 1, stream, ChecksumArgs{values, count, sum});
}

cudaError_t shard_message(HeaderWords header, const int64_t* hash, const float* payload, int64_t count,
                          int64_t header_floats, float* message, cudaStream_t stream) {
  return launch("shard_message", shard_message_kernel, 1 + blocks(count), stream,
                MessageArgs{header, hash, payload, count, header_floats, message});
}

cudaError_t accept_shards(const float* shards, int64_t R, int64_t rank_floats, int64_t header_floats, int words,
                          int alike_from, int64_t pieces, float* parts, cudaStream_t stream) {
  const int64_t count = rank_floats - header_floats;
  return launch("accept_shards", accept_shards_kernel, blocks(R * count), stream,
                AcceptArgs{reinterpret_cast<const uint32_t*>(shards), R, rank_floats, header_floats, count, words,
                           alike_from, pieces, reinterpret_cast<uint32_t*>(parts)});
}

}  // namespace entcov::cuda
