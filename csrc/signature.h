// Signature: the 16 bytes that end the message of a rank, and how ranks see from them that they do not agree.
//
//   call      hash of what every rank must be called with: arguments (hashed in Python) and targets. 0: this rank failed
//   start     first column of the shard in the vocabulary
//   columns   how many columns it has, padding not counted
//
// A message is [T, width] fp32 and then its signature, so a word of it need not lie on an 8-byte boundary.
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

// The messages of R ranks, [T * width + 4] floats each.
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

// Hash of one value and its place. Hashes are added up modulo 2^64, so the order of the additions does not matter.
ENTCOV_HD uint64_t hash_of(int64_t place, int64_t value) {
  uint64_t x = static_cast<uint64_t>(place) * 0x9e3779b97f4a7c15u + static_cast<uint64_t>(value);
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

// `values`: the sum of the hashes of all values. Never 0, unless call is: that marks a rank that failed.
ENTCOV_HD Signature sign(uint64_t values, int64_t call, int64_t start, int64_t columns) {
  const uint64_t word = call == 0 ? 0 : hash_of(call, static_cast<int64_t>(values)) | 1;
  return {{static_cast<uint32_t>(word), static_cast<uint32_t>(word >> 32)},
          static_cast<int32_t>(start),
          static_cast<int32_t>(columns)};
}

// Whether rank r was called as rank 0 was, and its columns begin where those of the ranks before it (in the vocabulary)
// end. If that holds for all ranks, the shards cover [0, vocab_size) once.
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
