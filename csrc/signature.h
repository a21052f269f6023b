// Message and Signature: what one rank contributes to an all-gather, and how all ranks detect that they do not agree.
//
// A message is a payload [T, width] fp32 followed by a signature of 16 bytes:
//
//   call      64-bit hash of everything that must be equal on all ranks: arguments (hashed in Python) and targets.
//             0: this rank failed before the all-gather
//   start     first column of the shard in the vocabulary
//   columns   number of columns of the shard, without padding
//
// The payload may have an odd number of floats, so `call` is stored as two 32-bit words: 4-byte alignment is enough.
// The functions below are shared by the CPU and CUDA kernels, which check the signatures where they merge messages.
#pragma once

#include <cstdint>
#include <cstring>

#include "row_stats.h"

namespace entcov {

struct Signature {
  uint32_t call[2];
  int32_t start, columns;
};
constexpr int kSignatureFloats = 4;
static_assert(sizeof(Signature) == kSignatureFloats * sizeof(float), "");

// The gathered messages of R ranks, T * width + 4 floats each, in the order of the ranks.
struct Messages {
  const float* data;
  int64_t R, T, width;

  ENTCOV_HD int64_t floats() const { return T * width + kSignatureFloats; }
  ENTCOV_HD const float* row(int64_t r, int64_t t) const { return data + r * floats() + t * width; }
  ENTCOV_HD Signature signature(int64_t r) const {
    const float* at = data + r * floats() + T * width;
    const float words[kSignatureFloats] = {at[0], at[1], at[2], at[3]};  // memcpy from `at` would load bytes
    Signature s;
    memcpy(&s, words, sizeof s);
    return s;
  }
};

// Hash of a value and its position (the splitmix64 finalizer). Hashes are added modulo 2^64, so threads may add them in
// any order.
ENTCOV_HD uint64_t hash_of(int64_t place, int64_t value) {
  uint64_t x = static_cast<uint64_t>(place) * 0x9e3779b97f4a7c15u + static_cast<uint64_t>(value);
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

// The signature for a call whose values have the sum of hashes `values`. Its call word is 0 if and only if call is 0.
ENTCOV_HD Signature sign(uint64_t values, int64_t call, int64_t start, int64_t columns) {
  const uint64_t word = call == 0 ? 0 : hash_of(call, static_cast<int64_t>(values)) | 1;
  return {{static_cast<uint32_t>(word), static_cast<uint32_t>(word >> 32)},
          static_cast<int32_t>(start),
          static_cast<int32_t>(columns)};
}

// Whether rank r has the call word of rank 0, and its shard starts where the shards before it in the vocabulary end. If
// this holds for all ranks, the shards cover [0, vocab_size) exactly once. O(R).
ENTCOV_HD bool agrees(const Messages& m, int64_t r, int64_t vocab_size) {
  const Signature first = m.signature(0), mine = m.signature(r);
  if (mine.call[0] != first.call[0] || mine.call[1] != first.call[1] || mine.call[0] == 0) return false;
  int64_t before = 0, all = 0;
  for (int64_t q = 0; q < m.R; q++) {
    const Signature other = m.signature(q);
    const bool clash = other.start == mine.start && q != r && other.columns > 0 && mine.columns > 0;
    if (clash) return false;
    if (other.start < mine.start) before += other.columns;
    all += other.columns;
  }
  return all == vocab_size && (mine.columns == 0 || mine.start == before);
}

}  // namespace entcov
