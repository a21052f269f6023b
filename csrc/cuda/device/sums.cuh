// Sums: a thread's running sums over its elements of one row of logits, relative to a reference.
//
// Numerics. The reference `max` is a raw logit. With c = log2(e) / temperature and t = (x - max) c, the sums are over
// the elements below max: e = sum 2^t, te = sum t 2^t. Elements equal to max are counted in at_max. The kernel leaves
// one of them out at the end, which gives the sums of row_stats.h and keeps the digits of a peaked row.
//
// t is computed by one FFMA, x c - mc, where mc is max c rounded. The rounding error of mc shifts every t by the same
// amount, which is known exactly (by another FFMA) and corrected when the sums are used. So an offset of 1e4 loses no
// digits. If max c is so large that its rounding error could exceed a few powers of 2, or if it overflows, `limit` is
// -inf and every element takes the slow path, which subtracts before it multiplies.
//
// A kernel adds a group of elements on the fast path if all are below `limit`. Only a group that reaches or exceeds the
// reference takes the slow path, which rescales the sums to the new maximum and compares every element with it.
#pragma once

#include "vectors.cuh"

namespace entcov::cuda {

constexpr float kLargestProduct = 67108864.0f;  // 2^26: below it, the rounding error of max c is at most 2

struct Sums {
  float max;            // the reference, a raw logit; -inf: no finite element so far
  float limit;          // elements below it take the fast path; max, or -inf if max c is too large
  float mc;             // max c rounded; 0 if it is too large
  float at_max = 0.0f;  // number of elements equal to max
  float e = 0.0f, te = 0.0f;

  __device__ __forceinline__ void refer_to(float new_max, float c) {
    const float product = new_max * c;
    const bool fits = fabsf(product) < kLargestProduct;  // false for an infinite max too
    max = new_max;
    limit = fits ? new_max : -INFINITY;
    mc = fits ? product : 0.0f;
  }

  // The amount by which every t is too small: mc - max c.
  __device__ __forceinline__ float deficit(float c) const { return mc == 0.0f ? 0.0f : fmaf(-max, c, mc); }

  // (max - new_max) c <= 0 for a larger new_max. At or below kExp2Floor, the sums rescale to 0.
  __device__ __forceinline__ float distance(float new_max, float c) const {
    return max == -INFINITY ? -INFINITY : (max - new_max) * c;
  }

  // t of two elements below max. For -inf it is kExp2Floor, where 2^t = 0. A NaN stays a NaN.
  __device__ __forceinline__ float2 fast_t(float2 x, float c) const {
    return at_least(fma2(x, both(c), both(-mc)), kExp2Floor);
  }

  // t of any two elements, for any finite max.
  __device__ __forceinline__ float2 slow_t(float2 x, float c) const {
    return fast_t(sub2(x, both(limit == max ? 0.0f : max)), c);
  }

  // Counts the elements equal to max, and sets their w to 0.
  __device__ __forceinline__ void count_max(float2 x, float2& w) {
    const bool first = x.x == max, second = x.y == max;
    at_max += (first ? 1.0f : 0.0f) + (second ? 1.0f : 0.0f);
    w.x = first ? 0.0f : w.x, w.y = second ? 0.0f : w.y;
  }

  // Rescales the sums: every t increases by d.
  __device__ __forceinline__ void move(float d) {
    const float k = exp2_fast(d);
    te = (te + d * e) * k;
    e *= k;
  }

  // Moves the elements equal to max from the count into the sums, before max is replaced.
  __device__ __forceinline__ void release_max() {
    e += at_max;  // their t is 0
    at_max = 0.0f;
  }
};

// The following are for Sums and structs that derive from it, with their own move() and release_max().

// Corrects the sums for the rounding of max c (sign 1), or undoes it (-1).
template <class S>
__device__ __forceinline__ void correct(S& s, float c, float sign = 1.0f) {
  const float d = sign * s.deficit(c);
  if (d != 0.0f) s.move(d);
}

// Rescales corrected sums to a larger max.
template <class S>
__device__ __forceinline__ void raise(S& s, float new_max, float c) {
  s.release_max();
  const float d = s.distance(new_max, c);
  s.move(d > kExp2Floor ? d : kExp2Floor);  // 2^floor = 0; a NaN in the sums stays
}

// Calls add() for a group with an element at or above the reference, or before the thread has seen a finite element.
template <class S, class Add>
__device__ __forceinline__ void add_slowly(S& s, float largest, float c, Add add) {
  if (largest > s.max) {
    correct(s, c);
    raise(s, largest, c);
    s.refer_to(largest, c);
    correct(s, c, -1.0f);
  }
  const bool nothing = s.max == -INFINITY;  // only -inf and NaN so far: any finite reference gives the right sums
  if (nothing) s.limit = s.max = 0.0f;
  add();
  if (nothing) s.limit = s.max = -INFINITY;
}

}  // namespace entcov::cuda
