// Vectors of W floats by GCC's vector extensions: W is 16 (AVX-512), 8 (AVX2) or 4 (baseline). All functions are
// always_inline, so they are compiled for the instruction set of the function they are inlined into (dispatch.h).
// bf16 and fp16 are converted by integer arithmetic, which every instruction set has.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "../kernels.h"

#define ENTCOV_INLINE inline __attribute__((always_inline))

namespace entcov::cpu {

template <int W>
struct Simd {
  typedef float f32 __attribute__((vector_size(W * 4)));
  typedef int32_t i32 __attribute__((vector_size(W * 4)));
  typedef uint32_t u32 __attribute__((vector_size(W * 4)));
  typedef uint16_t u16 __attribute__((vector_size(W * 2)));
};
template <int W>
using f32 = typename Simd<W>::f32;
template <int W>
using i32 = typename Simd<W>::i32;
template <int W>
using u32 = typename Simd<W>::u32;
template <int W>
using u16 = typename Simd<W>::u16;

template <int W>
ENTCOV_INLINE f32<W> splat(float value) {
  return f32<W>{} + value;
}

// a where a > b, else b. A NaN in b is returned, a NaN in a is ignored.
template <int W>
ENTCOV_INLINE f32<W> larger(f32<W> a, f32<W> b) {
  return a > b ? a : b;
}

template <int W>
ENTCOV_INLINE float reduce_max(f32<W> v) {
  float m = v[0];
  for (int k = 1; k < W; k++) m = v[k] > m ? v[k] : m;
  return m;
}

template <int W>
ENTCOV_INLINE double reduce_add(f32<W> v) {  // pairwise, in a fixed order
  for (int half = W / 2; half > 0; half /= 2)
    for (int k = 0; k < half; k++) v[k] += v[k + half];
  return v[0];
}

// -88. Defined in isa.cpp, because GCC 12 compiles larger() to one vmaxps with an opaque value, but to two instructions
// with a constant.
extern const float kExpCutoff;

// e^y for y <= 0. Relative error <= 1e-7 for y >= -87.3; exactly 0 for y < -87.7, exactly 1 for y = 0, NaN for NaN.
// Values of y below -88 are replaced by -88 in place, so that y e^y is 0 and not -inf * 0.
template <int W>
ENTCOV_INLINE f32<W> exp_nonpositive(f32<W>& y) {
  y = larger<W>(splat<W>(kExpCutoff), y);
  // Adding 1.5 * 2^23 rounds to an integer in the low bits; 127 more makes those bits the exponent of 2^n.
  const f32<W> shifted = y * 1.44269504f + 12583039.0f;
  const f32<W> n = shifted - 12583039.0f;
  const f32<W> scale = (f32<W>)((u32<W>)shifted << 23);  // n = -127: exponent field 0, a factor of exactly 0
  f32<W> r = y - n * 0.693359375f;                       // ln 2 in two parts; n times the first is exact
  r = r + n * 2.12194440e-4f;
  // Minimax on [-ln2/2, ln2/2] with the first two coefficients 1: 3e-9.
  f32<W> p = r * 1.3814467e-3f + 8.3687808e-3f;
  p = p * r + 4.1668394e-2f;
  p = p * r + 1.6666520e-1f;
  p = p * r + 0.49999993f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  return p * scale;
}

// Storage types. 2W elements are read as two vectors by widen(p, a, b) and written by narrow(p, a, b). Each type
// chooses which element goes to which lane; narrow() is the inverse of widen(). 16-bit types put even columns into a
// and odd ones into b, which takes a shift and a mask, while ordered lanes would take shuffles. widen(p) reads W
// elements in order.

struct Float32 {
  using storage = float;
  static constexpr float kMinusInfinity = -INFINITY;
  template <int W>
  static ENTCOV_INLINE f32<W> widen(const storage* p) {
    f32<W> v;
    memcpy(&v, p, sizeof v);
    return v;
  }
  template <int W>
  static ENTCOV_INLINE void widen(const storage* p, f32<W>& a, f32<W>& b) {
    memcpy(&a, p, sizeof a);
    memcpy(&b, p + W, sizeof b);
  }
  template <int W>
  static ENTCOV_INLINE void narrow(storage* p, f32<W> a, f32<W> b) {
    memcpy(p, &a, sizeof a);
    memcpy(p + W, &b, sizeof b);
  }
};

struct BFloat16 {
  using storage = uint16_t;
  static constexpr storage kMinusInfinity = 0xff80;
  template <int W>
  static ENTCOV_INLINE f32<W> widen(const storage* p) {
    u16<W> h;
    memcpy(&h, p, sizeof h);
    return (f32<W>)(__builtin_convertvector(h, u32<W>) << 16);
  }
  template <int W>
  static ENTCOV_INLINE void widen(const storage* p, f32<W>& a, f32<W>& b) {
    u32<W> pairs;
    memcpy(&pairs, p, sizeof pairs);
    a = (f32<W>)(pairs << 16);
    b = (f32<W>)(pairs & 0xffff0000u);
  }
  // Rounds to nearest even. A NaN whose payload is all ones would wrap around; the kernels never pass one.
  template <int W>
  static ENTCOV_INLINE u32<W> rounded(f32<W> v) {
    const u32<W> u = (u32<W>)v;
    return u + 0x7fffu + ((u >> 16) & 1u);
  }
  template <int W>
  static ENTCOV_INLINE void narrow(storage* p, f32<W> a, f32<W> b) {
    const u32<W> pairs = (rounded<W>(a) >> 16) | (rounded<W>(b) & 0xffff0000u);
    memcpy(p, &pairs, sizeof pairs);
  }
};

struct Float16 {
  using storage = uint16_t;
  static constexpr storage kMinusInfinity = 0xfc00;
  // No intermediate value is an fp32 denormal, so the result does not depend on whether the CPU flushes denormals.
  template <int W>
  static ENTCOV_INLINE f32<W> widen_half(u32<W> h) {
    const u32<W> magnitude = (h & 0x7fffu) << 13, exponent = magnitude & 0x0f800000u;
    const u32<W> normal = magnitude + (112u << 23);   // from bias 15 to bias 127
    const u32<W> special = magnitude + (224u << 23);  // inf, NaN: exponent 31 to 255
    const f32<W> tiny = (f32<W>)(magnitude + (113u << 23)) - 6.103515625e-05f;
    u32<W> r = (i32<W>)exponent == 0x0f800000 ? special : normal;
    r = (i32<W>)exponent == 0 ? (u32<W>)tiny : r;
    return (f32<W>)(r | ((h & 0x8000u) << 16));
  }
  // Rounds to nearest even, with denormals; values that are too large become inf.
  template <int W>
  static ENTCOV_INLINE u32<W> narrow_half(f32<W> v) {
    const u32<W> u = (u32<W>)v, sign = (u >> 16) & 0x8000u, magnitude = u & 0x7fffffffu;
    // Adding 0.5 aligns the last bit of a denormal result with the last bit of the sum, so the addition itself rounds.
    const u32<W> tiny = (u32<W>)((f32<W>)magnitude + 0.5f) - 0x3f000000u;
    const u32<W> normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    u32<W> r = (i32<W>)magnitude < (113 << 23) ? tiny : normal;
    r = (i32<W>)magnitude >= 0x47800000 ? (u32<W>{} + 0x7c00u) : r;
    r = (i32<W>)magnitude > 0x7f800000 ? (u32<W>{} + 0x7e00u) : r;
    return r | sign;
  }
  template <int W>
  static ENTCOV_INLINE f32<W> widen(const storage* p) {
    u16<W> h;
    memcpy(&h, p, sizeof h);
    return widen_half<W>(__builtin_convertvector(h, u32<W>));
  }
  template <int W>
  static ENTCOV_INLINE void widen(const storage* p, f32<W>& a, f32<W>& b) {
    u32<W> pairs;
    memcpy(&pairs, p, sizeof pairs);
    a = widen_half<W>(pairs & 0xffffu);
    b = widen_half<W>(pairs >> 16);
  }
  template <int W>
  static ENTCOV_INLINE void narrow(storage* p, f32<W> a, f32<W> b) {
    const u32<W> pairs = narrow_half<W>(a) | (narrow_half<W>(b) << 16);
    memcpy(p, &pairs, sizeof pairs);
  }
};

// The next 2W elements, of which `left` exist. The others are -inf, which adds 0 to every sum.
template <class D, int W>
ENTCOV_INLINE void load(const typename D::storage* p, int64_t left, f32<W>& a, f32<W>& b) {
  if (left >= 2 * W) return D::template widen<W>(p, a, b);
  typename D::storage padded[2 * W];
  for (int k = 0; k < 2 * W; k++) padded[k] = k < left ? p[k] : D::kMinusInfinity;
  D::template widen<W>(padded, a, b);
}

template <class D, int W>
ENTCOV_INLINE void store(typename D::storage* p, int64_t left, f32<W> a, f32<W> b) {
  if (left >= 2 * W) return D::template narrow<W>(p, a, b);
  typename D::storage padded[2 * W];
  D::template narrow<W>(padded, a, b);
  memcpy(p, padded, left * sizeof *p);
}

// The last n < W elements of a row in order; the other lanes are -inf.
template <class D, int W>
ENTCOV_INLINE f32<W> widen_tail(const typename D::storage* p, int n) {
  typename D::storage padded[W];
  for (int k = 0; k < W; k++) padded[k] = k < n ? p[k] : D::kMinusInfinity;
  return D::template widen<W>(padded);
}

template <class D>
ENTCOV_INLINE float widen_one(const typename D::storage* p) {
  f32<4> a, b;
  load<D, 4>(p, 1, a, b);
  return a[0];
}

template <class D>
ENTCOV_INLINE typename D::storage narrow_one(float value) {
  typename D::storage s;
  store<D, 4>(&s, 1, splat<4>(value), f32<4>{});
  return s;
}

}  // namespace entcov::cpu
