// Before and after the all-gather of a sharded call: message() assembles what a rank sends, and merge_row_stats() and
// merge_covariance_stats() merge the gathered messages of all ranks into statistics and outputs of whole rows.
//
// Memory. A merge reads 4 fields bytes per row and rank (fields: 4, 7 or 8), and writes as much plus the outputs per
// row.
// Parallelisation: rows are distributed over threads.
//
// Numerics. Messages are merged in the order of the ranks, so every rank computes the same bits.
#include "dispatch.h"

namespace entcov::cpu {
namespace {

bool all_agree(const Messages& messages, int64_t vocab_size) {
  for (int64_t r = 0; r < messages.R; r++)
    if (!agrees(messages, r, vocab_size)) return false;
  return true;
}

// Calls row(t) for every row; over several threads if there is enough work.
template <class F>
void for_merged_rows(const Messages& messages, int threads, F row) {
  threads = usable_threads(threads);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1 && messages.R * messages.T > 4096)
  for (int64_t t = 0; t < messages.T; t++) row(t);
}

}  // namespace

int64_t hash_parts(int64_t) { return 1; }

Error message(const float* payload, int64_t count, const int64_t* values, int64_t num_values, int64_t call,
              int64_t start, int64_t columns, float* message, uint64_t*, Device) {
  uint64_t hash = 0;
  for (int64_t i = 0; i < num_values; i++) hash += hash_of(i, values[i]);
  const Signature signature = sign(hash, call, start, columns);
  std::copy(payload, payload + count, message);
  memcpy(message + count, &signature, sizeof signature);
  return nullptr;
}

Error merge_row_stats(const Messages& messages, const int64_t* target, const RowSpec& spec, int fields, float* stats,
                      const RowOutputs& outputs, Device threads) {
  const bool agree = all_agree(messages, spec.vocab_size);
  NanFlag nan;
  for_merged_rows(messages, threads, [&](int64_t t) {
    if (target[t] == spec.ignore_index) return store_ignored_row(t, fields, stats, outputs);
    RowStats s;
    for (int64_t r = 0; r < messages.R; r++)
      s = merge(s, load_stats(messages.row(r, t), fields), spec.inv_temperature);
    if (!agree) s.sum_exp_m1 = NAN;
    nan.note(store_row(s, t, fields, spec.inv_temperature, stats, outputs));
  });
  return nan.error();
}

Error merge_covariance_stats(const Messages& messages, const uint8_t* row_mask, const RowSpec& spec, float* stats,
                             const CovarianceOutputs& outputs, Device threads) {
  const bool agree = all_agree(messages, spec.vocab_size);
  NanFlag nan;
  for_merged_rows(messages, threads, [&](int64_t t) {
    if (row_mask && !row_mask[t]) return store_masked_row(t, stats, outputs);
    CovarianceStats s;
    for (int64_t r = 0; r < messages.R; r++)
      s = merge(s, load_covariance_stats(messages.row(r, t)), spec.inv_temperature);
    if (!agree) s.sum_exp_m1_old = s.sum_exp_m1_new = s.sum_d = s.sum_xd = NAN;
    nan.note(store_covariance_row(s, t, spec.inv_temperature, stats, outputs));
  });
  return nan.error();
}

}  // namespace entcov::cpu
