// Runs unmodified CUDA kernels on the CPU, for tests: the device's vocabulary for a host compiler.
//
//   g++ -x c++ -std=c++17 -fno-strict-aliasing -I<this folder> -isystem <CUDA headers> -c kernel.cu
//
// This folder's cuda_runtime.h stands before CUDA's, so a kernel needs no #ifdef. CUDA's own headers give the types
// (dim3, uint4, __nv_bfloat16, cudaLaunchConfig_t ...); they come with a toolkit or from PyPI (nvidia-cuda-runtime,
// nvidia-cuda-crt, nvidia-cuda-cccl).
//
// Every CUDA thread is a fibre with its own stack, the fibres of a block share one OS thread, blocks are spread over OS
// threads. A fibre runs until it meets a barrier or a warp collective; then the scheduler picks another, in an order that
// a seed decides. So a missing barrier shows as a wrong result under some seed, and under -fsanitize=thread as a data
// race under every seed. Shared memory is filled with NaN before each block. Reported with kernel line and thread:
// barriers and collectives that diverge, deadlocks, misaligned vector accesses. Bytes asked for by __ldg and __ldcs, which
// is how kernels read logits, are counted.
//
// Not seen: overruns of a __shared__ array through a pointer it decayed to, races between blocks other than TSan's, inline
// PTX (its portable twin runs), clusters, and anything about speed.
#pragma once

#include <cuda_runtime_api.h>
#include <vector_functions.h>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#undef __shared__
#define __shared__ thread_local  // one a block, since a block's fibres share an OS thread; static at block scope
#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __forceinline__
#define __forceinline__ inline __attribute__((always_inline))

#include <cmath>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <utility>

namespace emu {

struct Site {  // where in the kernel
  const char* file;
  int line;
};
#define EMU_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

extern thread_local int lane;
[[noreturn]] void fail(const char* format, ...);
void block_barrier(Site site);
// Gathers one value from every lane of `mask`; returns when all have come. values[i] is meant where mask has bit i.
enum class Collective { shuffle, ballot, syncwarp };
void warp_gather(Collective what, unsigned mask, uint64_t value, uint64_t (&values)[32], Site site);
cudaError_t launch(const cudaLaunchConfig_t& config, void (*body)(void*), void* arg);

template <class T>
uint64_t pack(T value) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>, "");
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof value);
  return bits;
}

template <class T>
T unpack(uint64_t bits) {
  T value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

template <class T>
T shuffle(unsigned mask, T value, int source, Site site) {
  uint64_t values[32];
  warp_gather(Collective::shuffle, mask, pack(value), values, site);
  // From a lane outside the mask it is undefined: all ones here, which is NaN or -1.
  return unpack<T>(mask >> source & 1 ? values[source] : ~uint64_t{0});
}

void count_load(size_t bytes);

// Like the hardware, no vector access off its alignment.
template <class T>
T load(const T* p) {
  count_load(sizeof(T));
  if (reinterpret_cast<uintptr_t>(p) % alignof(T)) fail("misaligned %zu-byte load at %p", sizeof(T), (const void*)p);
  return *p;
}

}  // namespace emu

extern thread_local uint3 threadIdx, blockIdx;  // set whenever a fibre goes on
extern thread_local dim3 blockDim, gridDim;

inline void __syncthreads(EMU_SITE) { emu::block_barrier({file, line}); }
inline void __syncwarp(unsigned mask = ~0u, EMU_SITE) {
  uint64_t values[32];
  emu::warp_gather(emu::Collective::syncwarp, mask, 0, values, {file, line});
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32, EMU_SITE) {
  const int source = emu::lane ^ lane_mask;
  return emu::shuffle(mask, value, source <= (emu::lane | (width - 1)) ? source : emu::lane, {file, line});
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, EMU_SITE) {
  const int source = emu::lane - static_cast<int>(delta);
  return emu::shuffle(mask, value, source >= (emu::lane & ~(width - 1)) ? source : emu::lane, {file, line});
}
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, EMU_SITE) {
  return emu::shuffle(mask, value, (emu::lane & ~(width - 1)) | (source & (width - 1)), {file, line});
}
inline unsigned __ballot_sync(unsigned mask, int predicate, EMU_SITE) {
  uint64_t values[32];
  emu::warp_gather(emu::Collective::ballot, mask, predicate != 0, values, {file, line});
  unsigned result = 0;
  for (int i = 0; i < 32; i++) result |= (mask >> i & 1) && values[i] ? 1u << i : 0;
  return result;
}

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline unsigned atomicAdd(unsigned* address, unsigned value) {
  return __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
}
inline unsigned long long atomicAdd(unsigned long long* address, unsigned long long value) {
  return __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
}
inline unsigned long long atomicMax(unsigned long long* address, unsigned long long value) {
  unsigned long long before = __atomic_load_n(address, __ATOMIC_RELAXED);
  constexpr int kOrder = __ATOMIC_RELAXED;
  while (before < value && !__atomic_compare_exchange_n(address, &before, value, true, kOrder, kOrder)) {
  }
  return before;
}
inline unsigned atomicOr(unsigned* address, unsigned value) {
  return __atomic_fetch_or(address, value, __ATOMIC_RELAXED);
}
inline int min(int a, int b) { return a < b ? a : b; }

template <class T>
T __ldg(const T* p) {
  return emu::load(p);
}
template <class T>
T __ldcs(const T* p) {
  return emu::load(p);
}

// The real signature. The kernel's arguments are copied at the launch, as the device does.
template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments&&... arguments) {
  auto body = [kernel, copies = std::tuple<Parameters...>(std::forward<Arguments>(arguments)...)] {
    std::apply(kernel, copies);
  };
  return emu::launch(*config, [](void* p) { (*static_cast<decltype(body)*>(p))(); }, &body);
}
