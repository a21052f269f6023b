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

template <class Number>
__device__ __forceinline__ Number warp_sum(Number v) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) v += __shfl_xor_sync(0xffffffffu, v, offset);
  return v;
}

// The sum of v over the lanes up to this one.
__device__ __forceinline__ uint32_t warp_prefix_sum(uint32_t v) {
#pragma unroll
  for (int offset = 1; offset < kWarp; offset *= 2) {
    const uint32_t other = __shfl_up_sync(0xffffffffu, v, offset);
    v += static_cast<int>(threadIdx.x) % kWarp >= offset ? other : 0u;
  }
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

// The segment of a row that a team computes: `live` columns from `begin` on, then `padding` columns.
struct Unit {
  int64_t row;
  int segment;
  int64_t begin;
  int live, padding;
};

// num_columns: of the row, without padding; width: with it.
template <int kTeamWarps>
__device__ __forceinline__ Unit this_unit(const Cut& cut, int64_t num_columns, int64_t width) {
  Unit u{static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp, 0, 0, 0, 0};  // one warp: one segment
  if (kTeamWarps != 1) {
    const unsigned parts = static_cast<unsigned>(cut.segments);
    u.row = blockIdx.x / parts, u.segment = static_cast<int>(blockIdx.x % parts);
  }
  u.begin = static_cast<int64_t>(u.segment) * cut.length;
  const int64_t end = u.begin + cut.length < width ? u.begin + cut.length : width;
  const int64_t live_end = num_columns < u.begin ? u.begin : num_columns < end ? num_columns : end;
  u.live = static_cast<int>(live_end - u.begin), u.padding = static_cast<int>(end - live_end);
  return u;
}

}  // namespace entcov::cuda
