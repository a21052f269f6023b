// The frame of the gradient kernels: every column of a segment is computed by itself and written once.
//
// The 16-byte vectors are those of the output, which begins with up to 7 single columns where it is not aligned, and ends
// with some. How a column is computed does not depend on where it falls, so neither do its bits. A column is read by the
// thread that writes it, and before, so the output may be the input.
#pragma once

#include "block_reduction.cuh"
#include "vectors.cuh"

namespace entcov::cuda {

// Vectors of each input in flight a thread. A short row has no more than 8 for it.
template <int kTeamWarps>
constexpr int kColumnVectors = kTeamWarps == 1 ? 2 : 4;

// The columns [0, count) of a segment of the output, and which of them are whole vectors.
template <class T>
struct Columns {
  T* out;
  int count, head, vectors;

  __device__ __forceinline__ Columns(T* out, int count) : out(out), count(count) {
    const int to_boundary = static_cast<int>((16 - (reinterpret_cast<uintptr_t>(out) & 15)) & 15) / static_cast<int>(sizeof(T));
    head = to_boundary < count ? to_boundary : count;
    vectors = (count - head) / kVector<T>;
  }
  __device__ __forceinline__ int tail() const { return head + vectors * kVector<T>; }  // first column after the vectors
  __device__ __forceinline__ uint4* words() const { return reinterpret_cast<uint4*>(out + head); }

  // The thread of a team of `size` that writes column j.
  __device__ __forceinline__ int owner(int j, int size) const {
    if (j < head) return j;
    return j < tail() ? (j - head) / kVector<T> % size : j - tail();
  }

  __device__ __forceinline__ void fill(float value, int rank, int size) const {
    float x[kVector<T>];
#pragma unroll
    for (int k = 0; k < kVector<T>; k++) x[k] = value;
    const uint4 v = pack<T>(x);
    if (rank < head) out[rank] = Element<T>::narrow(value);
#pragma unroll 1
    for (int i = rank; i < vectors; i += size) words()[i] = v;
    if (rank < count - tail()) out[tail() + rank] = Element<T>::narrow(value);
  }

  // load(i): what vector i is computed from; vector(that): the vector; column(j): column j, for the single ones.
  template <int kTeamWarps, class Load, class Vector, class Column>
  __device__ __forceinline__ void write(int rank, Load load, Vector vector, Column column) const {
    constexpr int kSize = kTeamWarps * kWarp, kBatch = kColumnVectors<kTeamWarps>;
    if (rank < head) out[rank] = Element<T>::narrow(column(rank));
    int i = rank;
#pragma unroll 1
    for (; i + (kBatch - 1) * kSize < vectors; i += kBatch * kSize) {
      decltype(load(0)) in[kBatch];
#pragma unroll
      for (int k = 0; k < kBatch; k++) in[k] = load(i + k * kSize);
#pragma unroll
      for (int k = 0; k < kBatch; k++) words()[i + k * kSize] = vector(in[k]);
    }
#pragma unroll 1  // more would cost the registers that the loop above needs
    for (; i < vectors; i += kSize) words()[i] = vector(load(i));
    if (rank < count - tail()) out[tail() + rank] = Element<T>::narrow(column(tail() + rank));
  }
};

// Where a segment lies: `live` columns that exist, then `padding` ones that get zeros.
struct Stretch {
  int64_t begin;
  int live, padding;
};

__device__ __forceinline__ Stretch stretch(int segment, int length, int64_t num_columns, int64_t width) {
  const int64_t begin = static_cast<int64_t>(segment) * length;
  const int64_t end = begin + length < width ? begin + length : width;
  const int64_t live_end = num_columns < begin ? begin : num_columns < end ? num_columns : end;
  return {begin, static_cast<int>(live_end - begin), static_cast<int>(end - live_end)};
}

// Whether the rows of the logits and of their gradient lie alike relative to 16-byte boundaries.
template <class T>
inline bool aligned_alike(const Logits& logits, const void* grad, int64_t grad_row_stride) {
  return (reinterpret_cast<uintptr_t>(logits.data) - reinterpret_cast<uintptr_t>(grad)) % 16 == 0 &&
         (logits.T <= 1 || (logits.row_stride - grad_row_stride) * static_cast<int64_t>(sizeof(T)) % 16 == 0);
}

}  // namespace entcov::cuda
