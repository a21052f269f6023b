// Every launcher of the CPU core, and the contract they share. bindings.cpp hands them to Python as they are;
// entcov/ops.py checks the arguments before they get here, so nothing is checked twice.
//
// Logits are a [T, num_columns] view: element (t, j) lies at data + t * row_stride + j, counted in elements; any
// row_stride and any alignment. Column j is token vocab_start + j; columns of the padding are not counted in
// num_columns and are never read. `dtype` is a DType. Everything else is contiguous fp32 or int64.
//
// Rows are shared out over `threads` OpenMP threads (at most as many as there are processors), a whole row to one thread and in a fixed order of columns, so a
// row's result depends on that row alone: not on T, on the other rows, on the threads, on strides or on alignment.
// It may differ in the last bits between instruction sets. Memory: a constant number of bytes a thread.
//
// -inf logits have probability 0 and never make a NaN. A NaN or a +inf makes its own row NaN and no other.
// T = 0 and num_columns = 0 are fine.
#pragma once

#include <cstdint>

namespace entcov::cpu {

enum DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// Instruction sets, chosen once for the process: "avx512", "avx2" or "baseline".
const char* isa();
bool set_isa(const char* name);  // false: unknown, or this CPU has not got it

// Asks the system for huge pages under a large, fresh buffer; writing a gradient of 150 MB would otherwise spend two
// thirds of its time in 38,000 page faults. Only a hint: nothing happens to the contents, nor on other systems.
void advise_huge_pages(void* memory, int64_t bytes);

// The first row whose target is neither ignore_index nor in [0, vocab_size); -1: none.
int64_t first_bad_target(const int64_t* target, int64_t T, int64_t vocab_size, int64_t ignore_index);

// logits -> stats [T, fields], the members of RowStats in their order (row_stats.h); fields is 4, or 7 with moments.
// Rows with target == ignore_index are not read and get zeros.
void row_stats(int dtype, const void* logits, int64_t row_stride, int64_t T, int64_t num_columns,
               const int64_t* target, int64_t vocab_start, int64_t ignore_index, float inv_temperature,
               float* stats, int fields, int threads);

// shards [R, T, fields], R apart by shard_stride elements -> out [T, fields], merged in the order of R.
// Returns the first row that has no finite logit in any shard and is not ignored; -1: none.
int64_t merge_row_stats(const float* shards, int64_t shard_stride, int64_t R, int64_t T, int fields,
                        const int64_t* target, int64_t ignore_index, float inv_temperature, float* out, int threads);

// The gradient of  sum_t grad_logprob logprob + grad_entropy H + grad_clamped H_clamped  with respect to the logits,
// in the logits' dtype, rounded to nearest even. Any of the three gradients [T] may be null. clamp [T, 4] is
// (threshold as a raw logit, weight of its ties, L_k, H_k); null without grad_clamped. grad may be logits itself.
// Columns from num_columns up to total_columns, ignored rows, and rows whose gradients are all 0 get zeros; the logits
// of such rows are not read.
// Returns the first row whose target's logit is not that in stats, so that the logits were written since; -1: none, or
// grad is logits, where it is not looked for.
int64_t logits_grad(int dtype, const void* logits, int64_t row_stride, int64_t T, int64_t num_columns,
                    int64_t total_columns, const int64_t* target, int64_t vocab_start, int64_t ignore_index,
                    const float* stats, int fields, const float* grad_logprob, const float* grad_entropy,
                    const float* grad_clamped, const float* clamp, float inv_temperature, void* grad,
                    int64_t grad_row_stride, int threads);

// The clamped entropy (clamp.h). Rows that are whole: RowStats [T, 4] and clamp [T, 4], threshold (raw), weight of the logits
// that equal it, L_k, H_k, of the `kept` largest of their num_columns logits. Rows without a finite logit, or with a NaN or a
// +inf: clamp is NaN.
void clamped_stats(int dtype, const void* logits, int64_t row_stride, int64_t T, int64_t num_columns,
                   const int64_t* target, int64_t kept, int64_t ignore_index, float inv_temperature, float* stats,
                   float* clamp, int threads);

// The same for rows that are split over ranks, in four steps. bracket is [T, 4], the members of Bracket; sketches are
// [R, T, 64], parts [R, T, 166], R apart by shard_stride and rows by row_stride elements.
void clamp_sketch(int dtype, const void* logits, int64_t row_stride, int64_t T, int64_t num_columns,
                  const int64_t* target, int64_t ignore_index, float* sketch, int threads);

// columns [R]: how many each shard has. margin: ranks that the bracket reaches beyond `kept` on either side.
void clamp_guess(const float* sketches, int64_t shard_stride, int64_t row_stride, int64_t R, int64_t T,
                 const int64_t* columns, const int64_t* target, int64_t ignore_index, int64_t vocab_size, int64_t kept,
                 int64_t margin, uint32_t* bracket, int threads);

// part is [T, 4 + 166]: RowStats of the shard, then its partial.
void clamp_part(int dtype, const void* logits, int64_t row_stride, int64_t T, int64_t num_columns,
                const int64_t* target, int64_t vocab_start, int64_t vocab_size, int64_t ignore_index,
                const uint32_t* bracket, float inv_temperature, float* part, int threads);

// stats: merged. Writes clamp [T, 4] of the rows that get done, and the brackets of all rows; adds the number of those
// that are not done to unfinished [1].
void clamp_narrow(const float* parts, int64_t shard_stride, int64_t row_stride, int64_t R, int64_t T,
                  const int64_t* target, const float* stats, int fields, int64_t ignore_index, int64_t kept,
                  float inv_temperature, uint32_t* bracket, float* clamp, uint32_t* unfinished, int threads);

// Two logit tensors of the same shape and dtype -> stats [T, 8], the members of CovarianceStats (covariance_stats.h).
// row_mask [T] (bytes, 0: the row is not read and gets zeros) may be null.
void covariance_stats(int dtype, const void* logits_old, int64_t old_row_stride, const void* logits_new,
                      int64_t new_row_stride, int64_t T, int64_t num_columns, const uint8_t* row_mask,
                      float inv_temperature, float* stats, int threads);

// shards [R, T, 8] -> out [T, 8], merged in the order of R. Returns the first row that has no finite logit on one of
// the two sides and is not masked; -1: none.
int64_t merge_covariance_stats(const float* shards, int64_t shard_stride, int64_t R, int64_t T,
                               const uint8_t* row_mask, float inv_temperature, float* out, int threads);

// The gradient of  sum_t grad_covariance Cov + grad_entropy_change (H_new - H_old) + grad_kl KL(old || new)  with
// respect to logits_new, in its dtype. Any of the three gradients [T] may be null.
void logit_covariance_grad(int dtype, const void* logits_old, int64_t old_row_stride, const void* logits_new,
                           int64_t new_row_stride, int64_t T, int64_t num_columns, int64_t total_columns,
                           const uint8_t* row_mask, const float* stats, const float* grad_covariance,
                           const float* grad_entropy_change, const float* grad_kl, float inv_temperature, void* grad,
                           int64_t grad_row_stride, int threads);

}  // namespace entcov::cpu
