// What a thread knows of its elements of one row of logits: sums relative to a reference.
//
// Numerics. The reference is a raw logit `max`; e = 2^t, t = (x - max) c with c = log2(e) / temperature, is summed over
// the elements below max, and those equal to max are counted instead: one of them is left out when all is known, so the
// sums become those of row_stats.h and a peaked row keeps its digits.
//
// t is one FFMA, x c - mc, with mc = max c rounded. That is off by the rounding of mc, the same for every element, known
// exactly (another FFMA), and put right when the sums are used. So an offset of 1e4 costs no digit. Where max c is so large
// that its rounding could be worth more than a few powers of 2, or where it overflows, `limit` sends every element to the
// slow path, which then subtracts before it multiplies.
#pragma once

#include "vectors.cuh"

namespace entcov::cuda {

constexpr float kLargestProduct = 67108864.0f;  // 2^26: rounded to a multiple of 4, max c is off by 2 at most

struct Sums {
  float max;            // the reference, raw; -inf: nothing finite yet
  float limit;          // elements below it take the fast path: max, or -inf where max c is too large
  float mc;             // max c rounded; 0 where it is too large
  float at_max = 0.0f;  // how many elements equal max
  float e = 0.0f, te = 0.0f;

  __device__ __forceinline__ void refer_to(float new_max, float c) {
    const float product = new_max * c;
    const bool fits = fabsf(product) < kLargestProduct;  // false for an infinite max too
    max = new_max;
    limit = fits ? new_max : -INFINITY;
    mc = fits ? product : 0.0f;
  }

  // What t lacks: mc - max c.
  __device__ __forceinline__ float deficit(float c) const { return mc == 0.0f ? 0.0f : fmaf(-max, c, mc); }

  // The exact distance of max from a larger one, <= 0; kExp2Floor or less: out of sight.
  __device__ __forceinline__ float distance(float new_max, float c) const {
    return max == -INFINITY ? -INFINITY : (max - new_max) * c;
  }

  // t of two elements below max. -inf becomes the floor, where 2^t = 0; a NaN stays.
  __device__ __forceinline__ float2 fast_t(float2 x, float c) const {
    return at_least(fma2(x, both(c), both(-mc)), kExp2Floor);
  }

  // The same of any two elements and any finite max.
  __device__ __forceinline__ float2 slow_t(float2 x, float c) const {
    return fast_t(sub2(x, both(limit == max ? 0.0f : max)), c);
  }

  // Counts those of two elements that equal max, and takes them out of w.
  __device__ __forceinline__ void count_max(float2 x, float2& w) {
    const bool first = x.x == max, second = x.y == max;
    at_max += (first ? 1.0f : 0.0f) + (second ? 1.0f : 0.0f);
    w.x = first ? 0.0f : w.x, w.y = second ? 0.0f : w.y;
  }

  // Every t gains d.
  __device__ __forceinline__ void move(float d) {
    const float k = exp2_fast(d);
    te = (te + d * e) * k;
    e *= k;
  }

  // The elements that equalled max become ordinary ones.
  __device__ __forceinline__ void release_max() {
    e += at_max;  // their t is 0
    at_max = 0.0f;
  }
};

}  // namespace entcov::cuda
