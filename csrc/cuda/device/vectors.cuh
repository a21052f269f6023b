// 16-byte vectors of logits: reading at any alignment, unpacking and packing; and fp32 arithmetic that uses specific
// instructions (ex2.approx, max.NaN, packed pairs).
//
// A row may start at any address its dtype allows. Vectors are counted from the start of the row, aligned or not, so
// element j is always added at the same position of the same sum. An unaligned vector is extracted from the two aligned
// 16-byte words it overlaps: two 16-byte loads and four funnel shifts instead of 8 narrow loads. The second word is the
// next lane's first, so it comes from the L1 cache. Words that extend past the ends of the row are never read; the
// vectors there are read element by element.
//
// Inline PTX and intrinsics have a portable alternative beside them, which runs in the tests on a CPU.
#pragma once

#include <cstring>

#include "../launch.h"

namespace entcov::cuda {

constexpr float kLog2E = 1.44269504088896341f;
constexpr float kLn2 = 0.693147180559945309f;
constexpr float kExp2Floor = -127.0f;  // exp2_fast(t) is 0 for t <= kExp2Floor, since denormals are flushed

template <class To, class From>
__device__ __forceinline__ To bits(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "");
  To to;
  memcpy(static_cast<void*>(&to), &from, sizeof to);
  return to;
}

// 2^t for t <= 0 by one MUFU instruction. Relative error 2^-22; results below 2^-126 are 0.
__device__ __forceinline__ float exp2_fast(float t) {
#ifdef __CUDA_ARCH__
  float e;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(t));
  return e;
#else
  if (!(t <= 0.0f)) return exp2f(t);  // NaN
  return t < -126.0f ? 0.0f : bits<float>((bits<uint32_t>(exp2f(t)) + 2) & ~3u);  // rounded to the 22 bits of EX2
#endif
}

// The larger of the two, NaN if t is NaN (fmaxf would return floor).
__device__ __forceinline__ float at_least(float t, float floor) {
#ifdef __CUDA_ARCH__
  float r;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(t), "f"(floor));
  return r;
#else
  return t < floor ? floor : t;
#endif
}

// Two fp32 at once. From sm_100 on each is one instruction; there the kernels are bound by issue slots. Rounding is
// that of two single operations.
__device__ __forceinline__ float2 both(float x) { return {x, x}; }
__device__ __forceinline__ float2 fma2(float2 a, float2 b, float2 c) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
  return __ffma2_rn(a, b, c);
#else
  return {fmaf(a.x, b.x, c.x), fmaf(a.y, b.y, c.y)};
#endif
}
__device__ __forceinline__ float2 mul2(float2 a, float2 b) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
  return __fmul2_rn(a, b);
#else
  return {a.x * b.x, a.y * b.y};
#endif
}
__device__ __forceinline__ float2 add2(float2 a, float2 b) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
  return __fadd2_rn(a, b);
#else
  return {a.x + b.x, a.y + b.y};
#endif
}
__device__ __forceinline__ float2 sub2(float2 a, float2 b) { return fma2(b, both(-1.0f), a); }
__device__ __forceinline__ float2 at_least(float2 t, float floor) {
  return {at_least(t.x, floor), at_least(t.y, floor)};
}
__device__ __forceinline__ float2 exp2_fast(float2 t) { return {exp2_fast(t.x), exp2_fast(t.y)}; }

// ---- elements -------------------------------------------------------------------------------------------------------

// A 32-bit word holds two 16-bit elements or one 32-bit element. unpack and pack convert a word from and to fp32;
// larger takes the elementwise maximum of two words and ignores NaN; widen and narrow convert one element.
template <class T>
struct Element;

template <class E>
__device__ __forceinline__ uint32_t larger_one_by_one(uint32_t a, uint32_t b) {
  float x[2], y[2];
  E::unpack(a, x), E::unpack(b, y);
  x[0] = fmaxf(x[0], y[0]), x[1] = fmaxf(x[1], y[1]);
  return E::pack(x);
}

template <>
struct Element<float> {
  static constexpr int kPerWord = 1;
  static constexpr uint32_t kMinusInfinity = 0xff800000u;
  static __device__ __forceinline__ void unpack(uint32_t w, float* x) { x[0] = bits<float>(w); }
  static __device__ __forceinline__ uint32_t pack(const float* x) { return bits<uint32_t>(x[0]); }
  static __device__ __forceinline__ uint32_t larger(uint32_t a, uint32_t b) {
    return bits<uint32_t>(fmaxf(bits<float>(a), bits<float>(b)));
  }
  static __device__ __forceinline__ float widen(float x) { return x; }
  static __device__ __forceinline__ float narrow(float x) { return x; }
};

template <>
struct Element<__nv_bfloat16> {
  static constexpr int kPerWord = 2;
  static constexpr uint32_t kMinusInfinity = 0xff80ff80u;
  static __device__ __forceinline__ void unpack(uint32_t w, float* x) {
    x[0] = bits<float>(w << 16), x[1] = bits<float>(w & 0xffff0000u);
  }
  static __device__ __forceinline__ uint32_t pack(const float* x) {
    return bits<uint32_t>(__floats2bfloat162_rn(x[0], x[1]));
  }
  static __device__ __forceinline__ uint32_t larger(uint32_t a, uint32_t b) {
#ifdef __CUDA_ARCH__
    return bits<uint32_t>(__hmax2(bits<__nv_bfloat162>(a), bits<__nv_bfloat162>(b)));
#else
    return larger_one_by_one<Element>(a, b);
#endif
  }
  static __device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
  static __device__ __forceinline__ __nv_bfloat16 narrow(float x) { return __float2bfloat16_rn(x); }
};

template <>
struct Element<__half> {
  static constexpr int kPerWord = 2;
  static constexpr uint32_t kMinusInfinity = 0xfc00fc00u;
  static __device__ __forceinline__ void unpack(uint32_t w, float* x) {
    const float2 f = __half22float2(bits<__half2>(w));
    x[0] = f.x, x[1] = f.y;
  }
  static __device__ __forceinline__ uint32_t pack(const float* x) {
    return bits<uint32_t>(__floats2half2_rn(x[0], x[1]));
  }
  static __device__ __forceinline__ uint32_t larger(uint32_t a, uint32_t b) {
#ifdef __CUDA_ARCH__
    return bits<uint32_t>(__hmax2(bits<__half2>(a), bits<__half2>(b)));
#else
    return larger_one_by_one<Element>(a, b);
#endif
  }
  static __device__ __forceinline__ float widen(__half x) { return __half2float(x); }
  static __device__ __forceinline__ __half narrow(float x) { return __float2half_rn(x); }
};

// ---- vectors --------------------------------------------------------------------------------------------------------

template <class T>
constexpr int kVector = 16 / static_cast<int>(sizeof(T));  // elements of a 16-byte vector

template <class T>
__device__ __forceinline__ void unpack(const uint4& u, float (&x)[kVector<T>]) {
  constexpr int n = Element<T>::kPerWord;
  Element<T>::unpack(u.x, x), Element<T>::unpack(u.y, x + n);
  Element<T>::unpack(u.z, x + 2 * n), Element<T>::unpack(u.w, x + 3 * n);
}

// The same, in pairs of adjacent elements.
template <class T>
__device__ __forceinline__ void unpack(const uint4& u, float2 (&x)[kVector<T> / 2]) {
  float flat[kVector<T>];
  unpack<T>(u, flat);
#pragma unroll
  for (int k = 0; k < kVector<T> / 2; k++) x[k] = {flat[2 * k], flat[2 * k + 1]};
}

template <class T>
__device__ __forceinline__ uint4 pack(const float (&x)[kVector<T>]) {
  constexpr int n = Element<T>::kPerWord;
  return {Element<T>::pack(x), Element<T>::pack(x + n), Element<T>::pack(x + 2 * n), Element<T>::pack(x + 3 * n)};
}

template <class T>
__device__ __forceinline__ uint4 pack(const float2 (&x)[kVector<T> / 2]) {
  float flat[kVector<T>];
#pragma unroll
  for (int k = 0; k < kVector<T> / 2; k++) flat[2 * k] = x[k].x, flat[2 * k + 1] = x[k].y;
  return pack<T>(flat);
}

// The largest element of N vectors; NaN is ignored.
template <class T, int N>
__device__ __forceinline__ float largest(const uint4 (&u)[N]) {
  uint32_t m = Element<T>::kMinusInfinity;
#pragma unroll
  for (int i = 0; i < N; i++) {
    const uint32_t lo = Element<T>::larger(u[i].x, u[i].y), hi = Element<T>::larger(u[i].z, u[i].w);
    m = i == 0 ? Element<T>::larger(lo, hi) : Element<T>::larger(m, Element<T>::larger(lo, hi));
  }
  float x[Element<T>::kPerWord];
  Element<T>::unpack(m, x);
  return fmaxf(x[0], x[Element<T>::kPerWord - 1]);
}

// The low 32 bits of (high, low) >> bits, for bits < 32.
__device__ __forceinline__ uint32_t funnel(uint32_t low, uint32_t high, int bits) {
#ifdef __CUDA_ARCH__
  return __funnelshift_r(low, high, bits);
#else
  return static_cast<uint32_t>((uint64_t{high} << 32 | low) >> bits);
#endif
}

// The 16 bytes that start 4 kWords bytes and `bits` bits into the 32 bytes (a, b).
template <int kWords>
__device__ __forceinline__ uint4 shifted(const uint4& a, const uint4& b, int bits) {
  const uint32_t w[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
  return {funnel(w[kWords], w[kWords + 1], bits), funnel(w[kWords + 1], w[kWords + 2], bits),
          funnel(w[kWords + 2], w[kWords + 3], bits), funnel(w[kWords + 3], w[kWords + 4], bits)};
}

// kOnce: the logits are read once, by loads marked evict-first. It is required where the row is also written, since the
// loads of kAgain use the read-only cache.
enum class Use { kAgain, kOnce };

// Reads the vectors of a column range of a row, `count` elements from `origin` on. `before` elements in front of it and
// `after` behind it belong to the same row and may be read too.
template <class T, bool kAligned, Use kUse = Use::kAgain>
class Reader {
 public:
  __device__ __forceinline__ Reader(const T* origin, int count, int64_t before, int64_t after)
      : origin_(origin), count_(count) {
    const auto address = reinterpret_cast<uintptr_t>(origin);
    shift_ = kAligned ? 0 : static_cast<int>(address & 15);
    words_ = reinterpret_cast<const uint4*>(address - shift_);
    const int whole = count / kVector<T>;
    if (shift_ == 0) {
      begin_ = 0, end_ = whole;
    } else {
      begin_ = before * static_cast<int64_t>(sizeof(T)) >= shift_ ? 0 : 1;
      const int64_t words = ((count + after) * static_cast<int64_t>(sizeof(T)) + shift_) / 16;  // whole ones
      end_ = static_cast<int>(words - 1 < whole ? (words > 0 ? words - 1 : 0) : whole);
    }
  }

  __device__ __forceinline__ int vectors() const { return (count_ + kVector<T> - 1) / kVector<T>; }
  // whole() may read the vectors in [begin, end).
  __device__ __forceinline__ int begin() const { return begin_; }
  __device__ __forceinline__ int end() const { return end_; }

  __device__ __forceinline__ uint4 whole(int i) const {
    uint4 u[1];
    whole(i, 0, u);
    return u[0];
  }

  // Vectors i, i + step, ...: all words are loaded before the first is used. The shift is uniform over the row, so a
  // branch is cheaper than a select.
  template <int N>
  __device__ __forceinline__ void whole(int i, int step, uint4 (&u)[N]) const {
#pragma unroll
    for (int k = 0; k < N; k++) u[k] = word(i + k * step);
    if constexpr (!kAligned) {
      if (shift_ == 0) return;
      uint4 next[N];
#pragma unroll
      for (int k = 0; k < N; k++) next[k] = word(i + k * step + 1);
      const int bits = shift_ % 4 * 8;
      switch (shift_ / 4) {
        case 0: return shift<0>(u, next, bits);
        case 1: return shift<1>(u, next, bits);
        case 2: return shift<2>(u, next, bits);
        default: return shift<3>(u, next, bits);
      }
    }
  }

  // The vectors of a thread in a tile of N size vectors: tile + rank, tile + rank + size, ... Elements past the range
  // are -inf. Returns whether whole() could read them all.
  template <int N>
  __device__ __forceinline__ bool load(int tile, int rank, int size, uint4 (&u)[N]) const {
    const bool inside = tile >= begin_ && tile + N * size <= end_;
    if (inside) {
      whole(tile + rank, size, u);
    } else {
#pragma unroll
      for (int k = 0; k < N; k++) u[k] = any(tile + rank + k * size);
    }
    return inside;
  }

  // Any vector; elements past the range are -inf.
  __device__ __forceinline__ uint4 any(int i) const {
    if (i >= begin_ && i < end_) return whole(i);
    constexpr uint32_t fill = Element<T>::kMinusInfinity;
    uint4 u = {fill, fill, fill, fill};
    if (i >= vectors()) return u;
    // At most three vectors of a row get here, so the loop saves registers rather than time.
#pragma unroll 1
    for (int word = 0; word < 4; word++) {
      float x[Element<T>::kPerWord];
#pragma unroll
      for (int k = 0; k < Element<T>::kPerWord; k++) {
        const int j = i * kVector<T> + word * Element<T>::kPerWord + k;
        x[k] = j < count_ ? Element<T>::widen(origin_[j]) : -INFINITY;
      }
      u.x = u.y, u.y = u.z, u.z = u.w, u.w = Element<T>::pack(x);
    }
    return u;
  }

 private:
  // Without alignment two lanes read each word, so it has to stay in the cache.
  __device__ __forceinline__ uint4 word(int i) const {
    return kAligned && kUse == Use::kOnce ? __ldcs(words_ + i) : __ldg(words_ + i);
  }

  template <int kWords, int N>
  __device__ __forceinline__ static void shift(uint4 (&u)[N], const uint4 (&next)[N], int bits) {
#pragma unroll
    for (int k = 0; k < N; k++) u[k] = shifted<kWords>(u[k], next[k], bits);
  }

  const T* origin_;
  const uint4* words_;
  int count_, shift_, begin_, end_;
};

}  // namespace entcov::cuda
