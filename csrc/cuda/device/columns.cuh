// The common part of the gradient kernels: every column of a segment is computed independently and written once.
//
// Columns are written as aligned 16-byte vectors of the output. Up to 7 single columns precede the first vector if the
// output is not aligned, and up to 7 follow the last. A column is computed the same way in a vector and alone, so
// its bits do not depend on the alignment. A column is read by the thread that writes it, before it writes, so the
// output may be the input.
#pragma once

#include "block_reduction.cuh"
#include "vectors.cuh"

namespace entcov::cuda {

// Vectors of each input that a thread loads before it computes. A row of one warp has at most 8 per thread in 16 bits.
template <int kTeamWarps>
constexpr int kColumnVectors = kTeamWarps == 1 ? 2 : 4;

// The columns [0, count) of a segment of the output: `head` single columns, `vectors` aligned vectors, single columns.
template <class T>
struct Columns {
  T* out;
  int count, head, vectors;

  __device__ __forceinline__ Columns(T* out, int count) : out(out), count(count) {
    const int to_boundary =
        static_cast<int>((16 - (reinterpret_cast<uintptr_t>(out) & 15)) & 15) / static_cast<int>(sizeof(T));
    head = to_boundary < count ? to_boundary : count;
    vectors = (count - head) / kVector<T>;
  }
  __device__ __forceinline__ int tail() const { return head + vectors * kVector<T>; }  // first column after the vectors
  __device__ __forceinline__ uint4* words() const { return reinterpret_cast<uint4*>(out + head); }

  // The rank of the thread that writes column j, in a team of `size` threads.
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

  // Writes all columns. load(i) loads the input of vector i, vector(input) computes the vector, and column(j) computes
  // the single column j.
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
#pragma unroll 1  // unrolling would take registers from the loop above
    for (; i < vectors; i += kSize) words()[i] = vector(load(i));
    if (rank < count - tail()) out[tail() + rank] = Element<T>::narrow(column(tail() + rank));
  }
};

// Whether every row of the gradient has the same offset from a 16-byte boundary as the row of the logits.
inline bool aligned_alike(const Logits& logits, const void* grad, int64_t grad_row_stride) {
  return (reinterpret_cast<uintptr_t>(logits.data) - reinterpret_cast<uintptr_t>(grad)) % 16 == 0 &&
         (logits.T <= 1 || (logits.row_stride - grad_row_stride) * logits.element_bytes() % 16 == 0);
}

}  // namespace entcov::cuda
