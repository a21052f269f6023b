// logits -> RowStats of every row (../row_stats.h), in one pass with one exponential per logit (row_pass.h, which also
// describes the numerics).
//
// Memory. Reads sizeof(storage) bytes per logit, writes 16 bytes per row (28 with moments), and 8 bytes of outputs (20
// with moments) if the rows are whole. Parallelisation: one thread per row.
#include "row_pass.h"

namespace entcov::cpu {
namespace {

template <class D, bool kMoments>
struct RowStatsOp {
  struct Args {
    const typename D::storage* logits;
    int64_t row_stride, num_columns;
    const int64_t* target;
    RowSpec spec;
    float* stats;
    RowOutputs outputs;
    NanFlag* nan;
  };

  template <int W>
  static ENTCOV_INLINE void row(const Args& a, int64_t t) {
    constexpr int kFields = kMoments ? kRowStatsMomentsFields : kRowStatsFields;
    if (a.target[t] == a.spec.ignore_index) return store_ignored_row(t, kFields, a.stats, a.outputs);
    const typename D::storage* x = a.logits + t * a.row_stride;
    RowPass<D, W, kMoments, false> pass(a.spec.inv_temperature);
    pass.add_row(x, a.num_columns, [](int64_t, int) {});
    const RowStats stats = pass.stats(x, a.num_columns, a.target[t], a.spec);
    a.nan->note(store_row(stats, t, kFields, a.spec.inv_temperature, a.stats, a.outputs));
  }
};

}  // namespace

int64_t segments(int64_t) { return 1; }

Error row_stats(const Logits& logits, const int64_t* target, const RowSpec& spec, int fields, float* stats,
                const RowOutputs& outputs, float*, Device threads) {
  NanFlag nan;
  with_dtype(logits.dtype, [&](auto d) {
    using D = decltype(d);
    auto run = [&](auto op) {
      using Op = decltype(op);
      for_rows<Op>({static_cast<const typename D::storage*>(logits.data), logits.row_stride, spec.columns(logits.width),
                    target, spec, stats, outputs, &nan},
                   logits.T, logits.T * logits.width, threads);
    };
    if (fields == kRowStatsMomentsFields)
      run(RowStatsOp<D, true>{});
    else
      run(RowStatsOp<D, false>{});
  });
  return nan.error();
}

}  // namespace entcov::cpu
