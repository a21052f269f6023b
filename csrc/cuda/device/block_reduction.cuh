// Team: the threads that compute one segment of a row (a warp or a whole block), and its reductions.
//
// Sums are pairwise over the lanes of a warp, then sequential over the warps, always in this order.
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

// Resident blocks per multiprocessor, for __launch_bounds__. With 4, a thread may use 64 registers. If every warp has
// its own row, row addresses and limits differ within a block and take registers too; with 3, a thread may use 80.
template <int kTeamWarps>
constexpr int kBlocks = kTeamWarps == 1 ? 3 : 4;

// kTeamWarps: 1, or all warps of the block. N: how many sums sum() computes at once.
template <int kTeamWarps, int N>
struct Team {
  static_assert(kTeamWarps == 1 || kTeamWarps == kWarps, "");
  static constexpr int kSize = kTeamWarps * kWarp;  // threads

  // Every call has its own memory, so that a fast warp cannot overwrite what a slow warp still reads.
  struct Shared {
    float max[2][kTeamWarps];
    float sum[N][kTeamWarps];
  };

  int rank;  // of this thread in its team

  // The maximum of v over the team, in every thread; NaN is ignored. `use` is 0 in the first call and 1 in the second.
  __device__ __forceinline__ float max(float v, Shared& shared, int use) const {
    v = warp_max(v);
    if (kTeamWarps == 1) return v;
    if (rank % kWarp == 0) shared.max[use][rank / kWarp] = v;
    __syncthreads();
    return warp_max(shared.max[use][rank % kTeamWarps]);
  }

  // Replaces v by its sums over the team. Only the thread of rank 0 gets the result.
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

// The segment and row that a team computes.
struct Unit {
  int64_t row;
  int segment;
};

template <int kTeamWarps>
__device__ __forceinline__ Unit this_unit(int segments) {
  if (kTeamWarps == 1)  // such a row is one segment
    return {static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp, 0};
  const unsigned parts = static_cast<unsigned>(segments);
  return {static_cast<int64_t>(blockIdx.x / parts), static_cast<int>(blockIdx.x % parts)};
}

}  // namespace entcov::cuda
