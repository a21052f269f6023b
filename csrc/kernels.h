// Every kernel launcher, once, with one signature for CPU and CUDA. bindings.cpp is compiled for each of them and hands
// the launchers to Python as they are. entcov/ops checks shapes and dtypes before a launch and values after it.
//
// Logits are a view: element (t, j) lies at data + t * row_stride + j, counted in elements; any row_stride and any
// alignment. Column j is token vocab_start + j; columns that RowSpec says do not exist are never read. Everything else
// is contiguous fp32 or int64. Null is allowed where a comment says so. T = 0 and width = 0 are fine.
//
// A row's result depends on that row and its number of columns alone: not on T, the other rows, threads, strides,
// alignment or the GPU's size. It may differ in the last bits between instruction sets and between CPU and CUDA.
//
// -inf logits have probability 0 and never make a NaN. A row is NaN, and no other, if it holds a NaN or a +inf, if its
// target is neither ignore_index nor a token, or if it is whole and has no finite logit. So is its gradient.
//
// CPU: rows are shared out over `Device` = threads (at most one a processor), a whole row to one thread.
// CUDA: pointers are those of the current device. Launchers put their kernels on `Device` = the stream and return; they
// neither allocate nor synchronise, so they can be captured in a CUDA graph.
#pragma once

#include <cstdint>

#include "clamp.h"
#include "logit_covariance.h"
#include "row_stats.h"
#include "signature.h"

#ifdef ENTCOV_CUDA
#include <cuda_runtime_api.h>
#define ENTCOV_CORE entcov::cuda
namespace entcov::cuda {
using Device = cudaStream_t;
}
#else
#define ENTCOV_CORE entcov::cpu
namespace entcov::cpu {
using Device = int;  // threads
}
#endif

namespace entcov {

enum DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

struct Logits {
  DType dtype;
  const void* data;
  int64_t row_stride, T, width;
};

// d loss / d of each output, [T]; null: 0.
struct RowGrads {
  const float *logprob, *entropy, *clamped_entropy;
};
struct CovarianceGrads {
  const float *covariance, *entropy_change, *kl;
};

// Null: done. kRowIsNaN: done, and a row that counts is NaN; the CPU says so where Python is to look for the reason. Else
// what failed, until the next launch of this thread.
using Error = const char*;
inline constexpr char kRowIsNaN[] = "a row is NaN";

}  // namespace entcov

namespace ENTCOV_CORE {

// Segments that a row of so many columns is cut into, which different blocks do.
int64_t segments(int64_t columns);

// logits -> stats [T, fields], the members of RowStats in their order; fields is 4, or 7 with moments. With
// outputs.logprob the rows are whole, and the outputs are written. workspace: segments * T * fields floats where segments
// > 1, else null.
Error row_stats(const Logits& logits, const int64_t* target, const RowSpec& spec, int fields, float* stats,
                const RowOutputs& outputs, float* workspace, Device device);

// payload [count] -> message [count + 4]: the payload and its signature. values [num_values]: what every rank must have
// alike. call 0: this rank failed.
Error message(const float* payload, int64_t count, const int64_t* values, int64_t num_values, int64_t call,
              int64_t start, int64_t columns, float* message, Device device);

// The first `fields` of every row of the messages are RowStats of shards. They are merged in the order of the ranks, so
// every rank gets the same bits. Ranks that do not agree: every row that is not ignored is NaN.
Error merge_row_stats(const Messages& messages, const int64_t* target, const RowSpec& spec, int fields, float* stats,
                      const RowOutputs& outputs, Device device);

// The gradient of  sum_t logprob' logprob + entropy' H + clamped_entropy' H_clamped  with respect to the logits, in their
// dtype, rounded to nearest even. stats [T, fields]: of whole rows. clamp [T, 4]: (threshold as a raw logit, weight of its
// ties, L_k, H_k); null without grads.clamped_entropy. grad [T, width] may be logits itself. Columns that do not exist,
// ignored rows and rows whose gradients are all 0 get zeros; the logits of such rows are not read.
// If a target's logit is not the one in stats, the logits were written since: an error on the CPU, a NaN in the target's
// column on CUDA. That is not looked for where grad is logits.
Error logits_grad(const Logits& logits, const int64_t* target, const RowSpec& spec, const float* stats, int fields,
                  const RowGrads& grads, const float* clamp, void* grad, int64_t grad_row_stride, Device device);

// Rows that are whole: as row_stats with 4 fields and outputs, and the clamp of their `kept` largest logits: clamp [T, 4] as
// for logits_grad, and clamped_entropy [T]. The algorithm: clamp.h.
Error clamped_stats(const Logits& logits, const int64_t* target, const RowSpec& spec, int64_t kept, float* stats,
                    const RowOutputs& outputs, float* clamp, float* clamped_entropy, Device device);

// The same for rows that are split over ranks, in four steps that clamp.h tells of.
// sketch [T, kSketch].
Error clamp_sketch(const Logits& logits, const int64_t* target, const RowSpec& spec, float* sketch, Device device);

// sketches: messages. margin: ranks that the bracket reaches beyond the kept-th logit on either side, by estimate.
// bracket [T, 4]: two keys, a mode and nothing.
Error clamp_bracket(const Messages& sketches, const int64_t* target, const RowSpec& spec, int64_t kept, int64_t margin,
                    uint32_t* bracket, Device device);

// partial [T, 4 + kPartial]: RowStats of the shard, and its partial for the clamp.
Error clamp_partial(const Logits& logits, const int64_t* target, const RowSpec& spec, const uint32_t* bracket,
                    float* partial, Device device);

// partials: messages, whose rows end in a partial. stats [T, fields]: merged. Writes the next brackets and, of rows that
// are done, the clamp; those that were done before keep theirs. unfinished [1]: rows that are not done are added to it.
Error clamp_refine(const Messages& partials, const int64_t* target, const RowSpec& spec, const float* stats, int fields,
                   int64_t kept, const uint32_t* bracket, const float* clamp, uint32_t* next_bracket, float* next_clamp,
                   float* clamped_entropy, uint32_t* unfinished, Device device);

// Two logit tensors of one shape and dtype -> stats [T, 8], the members of CovarianceStats. row_mask [T] (0: the row is
// not read and gets zeros) may be null. outputs and workspace as for row_stats.
Error covariance_stats(const Logits& logits_old, const Logits& logits_new, const uint8_t* row_mask,
                       const RowSpec& spec, float* stats, const CovarianceOutputs& outputs, float* workspace,
                       Device device);

Error merge_covariance_stats(const Messages& messages, const uint8_t* row_mask, const RowSpec& spec, float* stats,
                             const CovarianceOutputs& outputs, Device device);

// The gradient of  sum_t covariance' Cov + entropy_change' (H_new - H_old) + kl' KL(old || new)  with respect to
// logits_new, in its dtype.
Error logit_covariance_grad(const Logits& logits_old, const Logits& logits_new, const uint8_t* row_mask,
                            const RowSpec& spec, const float* stats, const CovarianceGrads& grads, void* grad,
                            int64_t grad_row_stride, Device device);

}  // namespace ENTCOV_CORE

#ifndef ENTCOV_CUDA
namespace entcov::cpu {

// Instruction sets, chosen once for the process: "avx512", "avx2" or "baseline".
const char* isa();
bool set_isa(const char* name);  // false: unknown, or this CPU has not got it

// Asks the system for huge pages under a large, fresh buffer: writing a gradient of 150 MB would otherwise spend two
// thirds of its time in 38,000 page faults. A hint; the contents do not change.
void advise_huge_pages(void* memory, int64_t bytes);

}  // namespace entcov::cpu
#endif
