// Kernels with one fault each, and their correct twins: what the emulator and the sanitizers must tell apart. They are
// built from the pieces of the real kernels where those have such pieces.
#include "device/block_reduction.cuh"
#include "device/vectors.cuh"

namespace {

using namespace entcov::cuda;

struct FaultArgs {
  const uint16_t* in;
  float* out;
  int count;
  bool faulty;
};

// Sums one row of bf16; faulty: takes the row for 8 elements longer than it is.
__global__ void out_of_bounds(FaultArgs a) {
  const Reader<__nv_bfloat16, true> reader(reinterpret_cast<const __nv_bfloat16*>(a.in), a.faulty ? a.count + 8 : a.count,
                                           0, 0);
  float sum = 0.0f;
  for (int i = threadIdx.x; i < reader.vectors(); i += kThreads) {
    const uint4 u[1] = {reader.any(i)};
    sum += largest<__nv_bfloat16>(u);
  }
  a.out[threadIdx.x] = sum;
}

// faulty: 16-byte loads of a row that starts 2 bytes past a boundary.
__global__ void misaligned_load(FaultArgs a) {
  const uint4 u[1] = {__ldg(reinterpret_cast<const uint4*>(a.in + (a.faulty ? 1 : 0)) + threadIdx.x)};
  a.out[threadIdx.x] = largest<__nv_bfloat16>(u);
}

// The last step of every block reduction; faulty: without the barrier between the warps' writes and their reader.
__global__ void missing_barrier(FaultArgs a) {
  __shared__ float warp_sums[kWarps];
  const float sum = warp_sum(1.0f);
  if (threadIdx.x % kWarp == 0) warp_sums[threadIdx.x / kWarp] = sum;
  if (!a.faulty) __syncthreads();
  if (threadIdx.x != 0) return;
  float total = 0.0f;
  for (int w = 0; w < kWarps; w++) total += warp_sums[w];
  *a.out = total;
}

// Lanes of one warp hand each other a number; faulty: a shuffle in place of __syncwarp, and shuffles order no memory.
__global__ void missing_warp_sync(FaultArgs a) {
  __shared__ float slot[kThreads];
  slot[threadIdx.x] = static_cast<float>(threadIdx.x);
  if (a.faulty)
    __shfl_xor_sync(0xffffffffu, 0, 1);
  else
    __syncwarp();
  a.out[threadIdx.x] = slot[threadIdx.x ^ 1];
}

// faulty: one element past a shared array.
__global__ void shared_overrun(FaultArgs a) {
  __shared__ float slot[kThreads];
  slot[threadIdx.x + (a.faulty ? 1 : 0)] = 1.0f;
  __syncthreads();
  a.out[threadIdx.x] = slot[threadIdx.x];
}

// faulty: half of the threads wait at another barrier.
__global__ void divergent_barrier(FaultArgs a) {
  if (a.faulty && threadIdx.x < 128)
    __syncthreads();
  else
    __syncthreads();
  a.out[threadIdx.x] = 1.0f;
}

// faulty: a shuffle that half of the lanes it names never reach.
__global__ void missing_lanes(FaultArgs a) {
  float v = 1.0f;
  if (!a.faulty || threadIdx.x % 2) v = __shfl_xor_sync(0xffffffffu, v, 2);
  a.out[threadIdx.x] = v;
}

// faulty: reads shared memory that nobody wrote.
__global__ void uninitialised_shared(FaultArgs a) {
  __shared__ float slot[kThreads];
  if (!a.faulty) slot[threadIdx.x] = 1.0f;
  a.out[threadIdx.x] = slot[threadIdx.x];
}

}  // namespace

// in: `count` bf16, a multiple of 2,048; out: 256 floats.
#define FAULT(name)                                                                                            \
  extern "C" __attribute__((visibility("default"))) int name##_fault(const uint16_t* in, float* out, int count, \
                                                                     int faulty) {                             \
    return launch(#name, name, 1, nullptr, FaultArgs{in, out, count, faulty != 0}) ? cudaErrorLaunchFailure : 0; \
  }
FAULT(out_of_bounds)
FAULT(misaligned_load)
FAULT(missing_barrier)
FAULT(missing_warp_sync)
FAULT(shared_overrun)
FAULT(divergent_barrier)
FAULT(missing_lanes)
FAULT(uninitialised_shared)
