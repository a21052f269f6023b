// logits -> RowStats of every row (../row_stats.h), in one pass with one exponential per logit (row_pass.h, which also
// describes the numerics).
//
// Memory. Reads sizeof(storage) bytes per logit, writes 16 bytes per row (28 with moments), and 8 bytes of outputs (20
// with moments) if the rows are whole. Parallelisation: one thread per row.
#include "row_pass.h"

namespace entcov::cpu {
namespace {

struct RowStatsArgs {
  Logits logits;
  const int64_t* target;
  RowSpec spec;
  float* stats;
  RowOutputs outputs;
  NanFlag* nan;
};

template <class D, bool kMoments>
struct RowStatsOp {
  using Args = RowStatsArgs;

  template <int W>
  static ENTCOV_INLINE void row(const Args& a, int64_t t) {
    constexpr int kFields = kMoments ? kRowStatsMomentsFields : kRowStatsFields;
    if (a.target[t] == a.spec.ignore_index) return store_ignored_row(t, kFields, a.stats, a.outputs);
    const auto* x = a.logits.row<typename D::storage>(t);
    const int64_t columns = a.spec.columns(a.logits.width);
    RowPass<D, W, kMoments, false> pass(a.spec.inv_temperature);
    pass.add_row(x, columns, [](int64_t, int) {});
    const RowStats stats = pass.stats(x, columns, a.target[t], a.spec);
    a.nan->note(store_row(stats, t, kFields, a.spec.inv_temperature, a.stats, a.outputs));
  }
};

}  // namespace

int64_t segments(int64_t) { return 1; }

Error row_stats(const Logits& logits, const int64_t* target, const RowSpec& spec, int fields, float* stats,
                const RowOutputs& outputs, float*, Device threads) {
  NanFlag nan;
  const RowStatsArgs args{logits, target, spec, stats, outputs, &nan};
  with_dtype(logits.dtype, [&](auto d) {
    using D = decltype(d);
    if (fields == kRowStatsMomentsFields)
      for_rows<RowStatsOp<D, true>>(args, logits, threads);
    else
      for_rows<RowStatsOp<D, false>>(args, logits, threads);
  });
  return nan.error();
}

}  // namespace entcov::cpu
