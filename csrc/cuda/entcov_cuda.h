// Every launcher of the CUDA core. The contract is that of the CPU core (../entcov.h): same arguments in the same order,
// same values, same fields; here is what differs.
//
// Pointers are device pointers, of the current device. Launchers put their kernels on `stream` and return; they neither
// allocate nor synchronise, so they can be captured in a CUDA graph. They return the error of the launch, and
// launch_error() then says what was launched.
//
// Nothing can be raised from inside a kernel. A row whose target lies outside [0, vocab_size) gets rest = NaN, and so does a
// row without a finite logit in the merge: every output of such a row is NaN, and so is its gradient.
//
// A row's result depends on that row and on num_columns alone: not on T, the other rows, strides, alignment or the GPU's
// size. Long rows are cut into segments (of a length that num_columns decides) that go to different blocks and are merged
// in order; `workspace` holds their statistics: segments(num_columns) * T * fields floats, unused when segments() is 1.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace entcov::cuda {

enum DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// Parts that a row is cut into.
int64_t segments(int64_t num_columns);

// What the failed launch of this thread was: kernel, grid, block, error.
const char* launch_error();

cudaError_t row_stats(int dtype, const void* logits, int64_t row_stride, int64_t T, int64_t num_columns,
                      const int64_t* target, int64_t vocab_start, int64_t vocab_size, int64_t ignore_index,
                      float inv_temperature, float* stats, int fields, float* workspace, cudaStream_t stream);

cudaError_t merge_row_stats(const float* shards, int64_t shard_stride, int64_t R, int64_t T, int fields,
                            const int64_t* target, int64_t ignore_index, float inv_temperature, float* out,
                            cudaStream_t stream);

cudaError_t logits_grad(int dtype, const void* logits, int64_t row_stride, int64_t T, int64_t num_columns,
                        int64_t total_columns, const int64_t* target, int64_t vocab_start, int64_t ignore_index,
                        const float* stats, int fields, const float* grad_logprob, const float* grad_entropy,
                        const float* grad_clamped, const float* clamp, float inv_temperature, void* grad,
                        int64_t grad_row_stride, cudaStream_t stream);

// Rows that are whole: RowStats [T, 4] and clamp [T, 4] (csrc/clamp.h) of the `kept` largest of their num_columns logits.
// A row that holds a NaN or a +inf, has no finite logit or a bad target: all NaN.
cudaError_t clamped_stats(int dtype, const void* logits, int64_t row_stride, int64_t T, int64_t num_columns,
                          const int64_t* target, int64_t kept, int64_t ignore_index, float inv_temperature,
                          float* stats, float* clamp, cudaStream_t stream);

// The same for rows that are split over ranks, in four steps that ../clamp.h tells of. bracket is [T, 4]: two keys, a
// mode and nothing. sketches are [R, T, 64], parts [R, T, 166], R apart by shard_stride and rows by row_stride elements.
cudaError_t clamp_sketch(int dtype, const void* logits, int64_t row_stride, int64_t T, int64_t num_columns,
                         const int64_t* target, int64_t ignore_index, float* sketch, cudaStream_t stream);

// columns [R]: how many each shard has. margin: ranks that the bracket reaches beyond `kept` on either side.
cudaError_t clamp_guess(const float* sketches, int64_t shard_stride, int64_t row_stride, int64_t R, int64_t T,
                        const int64_t* columns, const int64_t* target, int64_t ignore_index, int64_t vocab_size,
                        int64_t kept, int64_t margin, uint32_t* bracket, cudaStream_t stream);

// part is [T, 4 + 166]: RowStats of the shard, then its partial.
cudaError_t clamp_part(int dtype, const void* logits, int64_t row_stride, int64_t T, int64_t num_columns,
                       const int64_t* target, int64_t vocab_start, int64_t vocab_size, int64_t ignore_index,
                       const uint32_t* bracket, float inv_temperature, float* part, cudaStream_t stream);

// stats: merged. Writes clamp [T, 4] of the rows that get done, and the brackets of all rows; adds the number of those
// that are not done to unfinished [1].
cudaError_t clamp_narrow(const float* parts, int64_t shard_stride, int64_t row_stride, int64_t R, int64_t T,
                         const int64_t* target, const float* stats, int fields, int64_t ignore_index, int64_t kept,
                         float inv_temperature, uint32_t* bracket, float* clamp, uint32_t* unfinished,
                         cudaStream_t stream);

cudaError_t covariance_stats(int dtype, const void* logits_old, int64_t old_row_stride, const void* logits_new,
                             int64_t new_row_stride, int64_t T, int64_t num_columns, const uint8_t* row_mask,
                             float inv_temperature, float* stats, float* workspace, cudaStream_t stream);

cudaError_t merge_covariance_stats(const float* shards, int64_t shard_stride, int64_t R, int64_t T,
                                   const uint8_t* row_mask, float inv_temperature, float* out, cudaStream_t stream);

cudaError_t logit_covariance_grad(int dtype, const void* logits_old, int64_t old_row_stride, const void* logits_new,
                                  int64_t new_row_stride, int64_t T, int64_t num_columns, int64_t total_columns,
                                  const uint8_t* row_mask, const float* stats, const float* grad_covariance,
                                  const float* grad_entropy_change, const float* grad_kl, float inv_temperature,
                                  void* grad, int64_t grad_row_stride, cudaStream_t stream);

// ---- around the all-gather; no twin in the CPU core: entcov/shard_ops.py says what they compute --------------------------

struct HeaderWords {
  static constexpr int kMost = 24;
  int64_t words[kMost];
  int count;
};

cudaError_t checksum(const int64_t* values, int64_t count, int64_t* sum, cudaStream_t stream);

cudaError_t shard_message(HeaderWords header, const int64_t* hash, const float* payload, int64_t count,
                          int64_t header_floats, float* message, cudaStream_t stream);

cudaError_t accept_shards(const float* shards, int64_t R, int64_t rank_floats, int64_t header_floats, int words,
                          int alike_from, int64_t pieces, float* parts, cudaStream_t stream);

}  // namespace entcov::cuda
