// logits -> RowStats of every row (row_stats.h), one read of memory and one exponential a logit: row_pass.h.
#include "row_pass.h"

namespace entcov::cpu {
namespace {

template <class D, bool kMoments>
struct RowStatsOp {
  struct Args {
    const typename D::storage* logits;
    int64_t row_stride, num_columns;
    const int64_t* target;
    int64_t vocab_start, ignore_index;
    float inv_temperature;
    float* stats;
  };

  template <int W>
  static ENTCOV_INLINE void row(const Args& a, int64_t t) {
    constexpr int kFields = kMoments ? kRowStatsMomentsFields : kRowStatsFields;
    float* out = a.stats + t * kFields;
    if (a.target[t] == a.ignore_index) {
      memset(out, 0, kFields * sizeof(float));
      return;
    }
    const typename D::storage* x = a.logits + t * a.row_stride;
    RowPass<D, W, kMoments, false> pass(a.inv_temperature);
    pass.add_row(x, a.num_columns, [](int64_t, int) {});
    pass.write_stats(x, a.num_columns, column_of(a.target[t], a.vocab_start), out);
  }
};

}  // namespace

int64_t first_bad_target(const int64_t* target, int64_t T, int64_t vocab_size, int64_t ignore_index) {
  for (int64_t t = 0; t < T; t++)
    if (target[t] != ignore_index && (target[t] < 0 || target[t] >= vocab_size)) return t;
  return -1;
}

void row_stats(int dtype, const void* logits, int64_t row_stride, int64_t T, int64_t num_columns,
               const int64_t* target, int64_t vocab_start, int64_t ignore_index, float inv_temperature, float* stats,
               int fields, int threads) {
  with_dtype(dtype, [&](auto d) {
    using D = decltype(d);
    auto run = [&](auto op) {
      using Op = decltype(op);
      for_rows<Op>({static_cast<const typename D::storage*>(logits), row_stride, num_columns, target, vocab_start,
                    ignore_index, inv_temperature, stats},
                   T, T * num_columns, threads);
    };
    if (fields == kRowStatsMomentsFields)
      run(RowStatsOp<D, true>{});
    else
      run(RowStatsOp<D, false>{});
  });
}

}  // namespace entcov::cpu
