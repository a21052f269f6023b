// How the kernels over packed tokens (token_means.cu, token_select.cu) share tokens out, and how they add integers up.
//
// A block takes 2,048 tokens, its threads every 256th of them, so that a warp loads neighbours. Sums and maxima are
// those of integers: blocks may add to them in any order, by atomics on global memory, and the result has the same
// bits.
#pragma once

#include "block_reduction.cuh"

namespace entcov::cuda {

constexpr int kTokensAThread = 8;
constexpr int kTokensABlock = kThreads * kTokensAThread;

// At least one, since one block also does what is to be done once.
inline int64_t token_blocks(int64_t T) { return T <= kTokensABlock ? 1 : (T + kTokensABlock - 1) / kTokensABlock; }

// The k-th token of this thread; it may lie behind the last one.
__device__ __forceinline__ int64_t token_of(int k) {
  return static_cast<int64_t>(blockIdx.x) * kTokensABlock + k * kThreads + threadIdx.x;
}

// sum += x, over all lanes of the warp.
__device__ __forceinline__ void add_of_warp(int64_t* sum, int64_t x) {
  x = warp_sum(x);
  if (threadIdx.x % kWarp == 0 && x != 0)
    atomicAdd(reinterpret_cast<unsigned long long*>(sum), static_cast<unsigned long long>(x));
}

// most = max(most, x), over all lanes of the warp.
__device__ __forceinline__ void max_of_warp(uint64_t* most, uint64_t x) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    const uint64_t other = __shfl_xor_sync(0xffffffffu, x, offset);
    x = other > x ? other : x;
  }
  if (threadIdx.x % kWarp == 0 && x != 0)
    atomicMax(reinterpret_cast<unsigned long long*>(most), static_cast<unsigned long long>(x));
}

}  // namespace entcov::cuda
