// Exact order statistics of every row: selection by value, by counting.
//
// The row's values are counted by the upper 16 bits of an order-preserving key: all of a bf16 or fp16, so that one read
// and one scan of 65,536 counters answer any number of ranks. fp32 reads the row a second time and sorts out the lower
// 16 bits of the few counters that hold a wanted rank. Cost does not depend on the data, nor on the ranks.
#include <algorithm>
#include <memory>
#include <vector>

#include "../clamp.h"
#include "dispatch.h"

namespace entcov::cpu {
namespace {

constexpr int kBins = 1 << 16;

int thread_index() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}

// Keys whose unsigned order is the order of the floats; NaNs land beyond the infinities. No branches: signs are noise.
// Of fp32, -0 and +0 have one key; of 16-bit types the two zeros are neighbouring keys, joined after counting.
inline uint32_t order_key(uint32_t bits) {
  bits &= -static_cast<uint32_t>(bits != 0x80000000u);
  return bits ^ (static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31) | 0x80000000u);
}
inline uint32_t order_key(uint16_t bits) {
  return (bits ^ (static_cast<uint32_t>(static_cast<int16_t>(bits) >> 15) | 0x8000u)) & 0xffffu;
}
constexpr int kMinusZero16 = 0x7fff, kPlusZero16 = 0x8000;

inline uint32_t key_bits(uint32_t key) { return key >> 31 ? key & 0x7fffffffu : ~key; }
inline uint16_t key_bits(uint16_t key) { return static_cast<uint16_t>(key >> 15 ? key & 0x7fffu : ~key); }

struct SelectScratch {
  std::unique_ptr<int32_t[]> count{new int32_t[kBins]};
  std::unique_ptr<int32_t[]> cursor{new int32_t[kBins]};  // fp32: where the bin's next lower half goes; -1: not wanted
  std::vector<uint16_t> low;                              // fp32: lower halves of the wanted bins, bin by bin
};

struct Wanted {
  int32_t bin;
  int32_t rank;  // 1-based and descending within the bin
};

// `bin_of(j)`: the bin of element j.
template <class F>
void count_bins(F bin_of, int64_t n, int32_t* count) {
  std::fill(count, count + kBins, 0);
  for (int64_t j = 0; j < n; j++) count[bin_of(j)]++;
}

// Where each of the ascending ranks lies, from the counts.
void locate(const int32_t* count, const int64_t* ranks, int64_t num_ranks, Wanted* wanted) {
  int32_t bin = kBins - 1;
  int64_t above = 0;
  for (int64_t i = 0; i < num_ranks; i++) {
    while (above + count[bin] < ranks[i]) above += count[bin--];
    wanted[i] = {bin, static_cast<int32_t>(ranks[i] - above)};
  }
}

// 16-bit types: the bin is the value.
template <class D>
void select_row(D, const uint16_t* x, int64_t n, const int64_t* ranks, int64_t num_ranks, SelectScratch& scratch,
                Wanted* wanted, float* out) {
  int32_t* count = scratch.count.get();
  count_bins([&](int64_t j) { return order_key(x[j]); }, n, count);
  count[kPlusZero16] += count[kMinusZero16];
  count[kMinusZero16] = 0;
  locate(count, ranks, num_ranks, wanted);
  for (int64_t i = 0; i < num_ranks; i++) {
    const uint16_t bits = key_bits(static_cast<uint16_t>(wanted[i].bin));
    out[i] = widen_one<D>(&bits);
  }
}

void select_row(Float32, const float* x, int64_t n, const int64_t* ranks, int64_t num_ranks, SelectScratch& scratch,
                Wanted* wanted, float* out) {
  const auto key = [&](int64_t j) {
    uint32_t bits;
    memcpy(&bits, x + j, sizeof bits);
    return order_key(bits);
  };
  int32_t *count = scratch.count.get(), *cursor = scratch.cursor.get();
  count_bins([&](int64_t j) { return key(j) >> 16; }, n, count);
  locate(count, ranks, num_ranks, wanted);
  std::fill(cursor, cursor + kBins, -1);
  int32_t next = 0;
  for (int64_t i = 0; i < num_ranks; i++)
    if (cursor[wanted[i].bin] < 0) cursor[wanted[i].bin] = next, next += count[wanted[i].bin];
  uint16_t* low = scratch.low.data();
  for (int64_t j = 0; j < n; j++) {
    const uint32_t k = key(j);
    int32_t& at = cursor[k >> 16];
    if (at >= 0) low[at++] = static_cast<uint16_t>(k);
  }
  for (int64_t i = 0; i < num_ranks;) {
    const int32_t bin = wanted[i].bin;
    uint16_t *end = low + cursor[bin], *begin = end - count[bin];
    int64_t last = i;
    while (last + 1 < num_ranks && wanted[last + 1].bin == bin) last++;
    const auto descending = std::greater<uint16_t>();
    if (wanted[last].rank - wanted[i].rank > 8)  // many ranks in one bin: cheaper to sort it once
      std::sort(begin, end, descending);
    else
      for (int64_t r = i, placed = 0; r <= last; r++) {  // `placed`: so many of the bin are where they belong
        if (wanted[r].rank == placed) continue;
        std::nth_element(begin + placed, begin + wanted[r].rank - 1, end, descending);
        placed = wanted[r].rank;
      }
    for (; i <= last; i++) {
      const uint32_t bits = key_bits(static_cast<uint32_t>(bin) << 16 | begin[wanted[i].rank - 1]);
      memcpy(out + i, &bits, sizeof bits);
    }
  }
}

}  // namespace

void order_statistics(int dtype, const void* logits, int64_t row_stride, int64_t T, int64_t num_columns,
                      const int64_t* target, int64_t ignore_index, const int64_t* ranks, int64_t num_ranks, float* out,
                      int threads) {
  if (num_columns == 0) {
    std::fill(out, out + T * num_ranks, -INFINITY);
    return;
  }
  if (T * num_columns <= 16384) threads = 1;  // as in for_rows
  threads = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(usable_threads(threads), T)));
  std::vector<SelectScratch> scratch(threads);  // here and not in the threads, where running out of memory is fatal
  std::vector<Wanted> wanted(threads * num_ranks);
  if (dtype == kFloat32)
    for (SelectScratch& s : scratch) s.low.resize(num_columns);
  with_dtype(dtype, [&](auto d) {
    using D = decltype(d);
    const auto* data = static_cast<const typename D::storage*>(logits);
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1) if (threads > 1)
    for (int64_t t = 0; t < T; t++) {
      const int thread = thread_index();
      float* row = out + t * num_ranks;
      if (target[t] == ignore_index)
        std::fill(row, row + num_ranks, 0.0f);
      else
        select_row(d, data + t * row_stride, num_columns, ranks, num_ranks, scratch[thread],
                   wanted.data() + thread * num_ranks, row);
    }
  });
}

}  // namespace entcov::cpu
