// Kernels with known properties, for the tests of `python -m benchmarks static`. Never launched.
#include <cuda_bf16.h>

#include <cstdint>

namespace scratch {

__device__ __forceinline__ float ex2(float t) {
  float e;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(t));
  return e;
}

// 16 bytes a load, two in flight, one exponential a logit. 4 * 256 bytes of shared memory.
template <class T>
__global__ void __launch_bounds__(256) wide(const uint4* x, float* out, int n) {
  __shared__ float s[256];
  float sum = 0.0f;
#pragma unroll 1
  for (int i = threadIdx.x; i < n; i += 512) {
    const uint4 u[2] = {x[i], x[i + 256]};
#pragma unroll
    for (int k = 0; k < 2; k++) {
      const uint32_t w[4] = {u[k].x, u[k].y, u[k].z, u[k].w};
#pragma unroll
      for (int j = 0; j < 4; j++) sum += ex2(__uint_as_float(w[j] << 16)) + ex2(__uint_as_float(w[j] & 0xffff0000u));
    }
  }
  s[threadIdx.x] = sum;
  __syncthreads();
  out[threadIdx.x] = s[255 - threadIdx.x];
}
template __global__ void wide<__nv_bfloat16>(const uint4*, float*, int);

// One 32-bit load of an fp32 logit.
template <class T>
__global__ void __launch_bounds__(128) narrow(const T* x, float* out, int n) {
  float sum = 0.0f;
#pragma unroll 1
  for (int i = threadIdx.x; i < n; i += 128) sum += ex2(x[i]);
  out[threadIdx.x] = sum;
}
template __global__ void narrow<float>(const float*, float*, int);

// Two exponentials an fp32 logit, and a 16-byte store for every 16-byte load.
template <class T>
__global__ void __launch_bounds__(256) twice(const float4* x, float4* out, int n) {
#pragma unroll 1
  for (int i = threadIdx.x; i < n; i += 256) {
    const float4 v = x[i];
    out[i] = {ex2(v.x) + ex2(-v.x), ex2(v.y) + ex2(-v.y), ex2(v.z) + ex2(-v.z), ex2(v.w) + ex2(-v.w)};
  }
}
template __global__ void twice<float>(const float4*, float4*, int);

// A vector that reaches a limit takes a way with three exponentials more, a negative one a way with none.
template <class T>
__global__ void __launch_bounds__(256) branching(const float4* x, float* out, int n) {
  float limit = out[0], sum = 0.0f;
#pragma unroll 1
  for (int i = threadIdx.x; i < n; i += 256) {
    const float4 v = x[i];
    if (v.x < 0.0f) {
      sum = v.y;
    } else {
      if (v.x >= limit) {
        sum *= ex2(limit) + ex2(v.y * limit) + ex2(v.z * limit);
        asm volatile("bar.warp.sync 0xffffffff;");  // keeps this a branch
        limit = v.x;
      }
      sum += ex2(v.x - limit) + ex2(v.y - limit) + ex2(v.z - limit) + ex2(v.w - limit);
    }
  }
  out[threadIdx.x] = sum;
}
template __global__ void branching<float>(const float4*, float*, int);

// 64 numbers a thread that all stay alive, where 2,048 threads a multiprocessor leave it 32 registers.
template <class T>
__global__ void __launch_bounds__(1024, 2) spilling(const T* x, T* out, int n) {
  T v[64];
#pragma unroll
  for (int k = 0; k < 64; k++) v[k] = x[k * 1024 + threadIdx.x];
#pragma unroll 1
  for (int i = 0; i < n; i++) {
#pragma unroll
    for (int k = 0; k < 64; k++) v[k] = v[k] * v[(k * 7 + 3) % 64] + x[i];
  }
#pragma unroll
  for (int k = 0; k < 64; k++) out[k * 1024 + threadIdx.x] = v[k];
}
template __global__ void spilling<float>(const float*, float*, int);

// A loop over rows around a loop over their vectors, and a narrow one over what is left.
template <class T>
__global__ void __launch_bounds__(256) nested(const float* x, float* out, int rows, int n) {
#pragma unroll 1
  for (int row = blockIdx.x; row < rows; row += gridDim.x) {
    const float target = x[row];
    float sum = 0.0f;
    const float4* vectors = reinterpret_cast<const float4*>(x + static_cast<int64_t>(row) * n);
#pragma unroll 1
    for (int i = threadIdx.x; i < n / 4; i += 256) {
      const float4 v = vectors[i];
      sum += ex2(v.x) + ex2(v.y) + ex2(v.z) + ex2(v.w);
    }
#pragma unroll 1
    for (int i = n / 4 * 4; i < n; i++) sum += ex2(x[i]);
    out[row * 256 + threadIdx.x] = sum - target;
  }
}
template __global__ void nested<float>(const float*, float*, int, int);

}  // namespace scratch
