// The threads that share a segment of a row, and how they add up: a warp, or a whole block.
//
// Sums go pairwise over the lanes of a warp and then, one warp after the other, over the warps; always in that order.
#pragma once

#include "../launch.h"

namespace entcov::cuda {

__device__ __forceinline__ float warp_max(float v) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, offset));
  return v;
}

__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) v += __shfl_xor_sync(0xffffffffu, v, offset);
  return v;
}

// Blocks that fit a multiprocessor: 64 registers a thread for a block's work. Where every warp has a row of its own, row
// addresses and limits differ within the block and take registers too, so it is 80.
template <int kTeamWarps>
constexpr int kBlocks = kTeamWarps == 1 ? 3 : 4;

// A team is kTeamWarps warps of a block: 1 or all of them. N: how many numbers are added up at the end.
template <int kTeamWarps, int N>
struct Team {
  static_assert(kTeamWarps == 1 || kTeamWarps == kWarps, "");
  static constexpr int kSize = kTeamWarps * kWarp;  // threads

  // Each use has its own place, so that a fast warp cannot overwrite what a slow one still reads.
  struct Shared {
    float max[2][kTeamWarps];
    float sum[N][kTeamWarps];
  };

  int rank;  // of this thread in its team

  // The largest of v over the team, for every thread of it; NaN does not count. use: 0, then 1.
  __device__ __forceinline__ float max(float v, Shared& shared, int use) const {
    v = warp_max(v);
    if (kTeamWarps == 1) return v;
    if (rank % kWarp == 0) shared.max[use][rank / kWarp] = v;
    __syncthreads();
    return warp_max(shared.max[use][rank % kTeamWarps]);
  }

  // The sums of v over the team; right in the thread of rank 0.
  __device__ __forceinline__ void sum(float (&v)[N], Shared& shared) const {
#pragma unroll
    for (int i = 0; i < N; i++) v[i] = warp_sum(v[i]);
    if (kTeamWarps == 1) return;
    if (rank % kWarp == 0) {
#pragma unroll
      for (int i = 0; i < N; i++) shared.sum[i][rank / kWarp] = v[i];
    }
    __syncthreads();
    if (rank != 0) return;
#pragma unroll
    for (int i = 0; i < N; i++)
      for (int w = 1; w < kTeamWarps; w++) v[i] += shared.sum[i][w];
  }
};

// Which segment of which row a team does.
struct Unit {
  int64_t row;
  int segment;
};

template <int kTeamWarps>
__device__ __forceinline__ Unit this_unit(int segments) {
  if (kTeamWarps == 1)  // a row that one warp does is one segment
    return {static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp, 0};
  const unsigned parts = static_cast<unsigned>(segments);
  return {static_cast<int64_t>(blockIdx.x / parts), static_cast<int>(blockIdx.x % parts)};
}

}  // namespace entcov::cuda
