// Every kernel launcher, declared once for CPU and CUDA. bindings.cpp is compiled for each of the two and exposes the
// launchers to Python. The callers in entcov/ops check shapes and dtypes before a launch, and values after it.
//
// Arguments. Logits are a strided view: element (t, j) lies at data + t * row_stride + j, in elements; row_stride and
// alignment are arbitrary. Column j is token vocab_start + j. Columns past vocab_size are padding and are never read.
// All other tensors are contiguous fp32 or integers. A pointer may be null only where a comment says so.
// T = 0 and width = 0 are valid.
//
// Reproducibility. The result of a row depends on that row and its number of columns alone: not on T, the other rows,
// the number of threads, strides, alignment or the size of the GPU. The last bits may differ between instruction sets
// and between CPU and CUDA.
//
// -inf and NaN. A logit of -inf has probability 0 and never makes a NaN. The outputs and the gradient of a row are NaN
// if the row holds a NaN or a +inf, if its target is neither ignore_index nor a token, or if the row is whole (not a
// shard) and has no finite logit. Other rows are not affected.
//
// CPU: `Device` is the number of threads (at most one per processor is used); one thread computes a whole row.
// CUDA: `Device` is the stream; pointers belong to the current device. A launcher enqueues its kernels and returns. It
// neither allocates nor synchronises, so it can be captured in a CUDA graph.
#pragma once

#include <cstdint>

#include "clamp.h"
#include "logit_covariance.h"
#include "row_stats.h"
#include "signature.h"
#include "token_select.h"

#ifdef ENTCOV_CUDA
#include <cuda_runtime_api.h>
#define ENTCOV_CORE entcov::cuda
namespace entcov::cuda {
using Device = cudaStream_t;
}
#else
#define ENTCOV_CORE entcov::cpu
namespace entcov::cpu {
using Device = int;  // number of threads
}
#endif

namespace entcov {

enum DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

struct Logits {
  DType dtype;
  const void* data;
  int64_t row_stride, T, width;

  ENTCOV_HD int64_t element_bytes() const { return dtype == kFloat32 ? 4 : 2; }
  template <class Element>
  ENTCOV_HD const Element* row(int64_t t) const {
    return static_cast<const Element*>(data) + t * row_stride;
  }
};

// d loss / d output for each output, [T]. Null means 0.
struct RowGrads {
  const float *logprob, *entropy, *clamped_entropy;
};
struct CovarianceGrads {
  const float *covariance, *entropy_change, *kl;
};

// Null: success. kRowIsNaN: success, but a row that is not ignored is NaN; only CPU launchers report it, and Python
// then looks for the reason. Anything else: the message of a failure, valid until the next launch on this thread.
using Error = const char*;
inline constexpr char kRowIsNaN[] = "a row is NaN";

}  // namespace entcov

namespace ENTCOV_CORE {

// The number of segments that a row with this many columns is cut into. Different blocks compute different segments.
// On the CPU it is 1.
int64_t segments(int64_t columns);

// logits -> stats [T, fields], the members of RowStats in their order; fields is 4, or 7 with moments. If
// outputs.logprob is not null, the rows are whole and the outputs are written too. workspace: segments * T * fields
// floats if segments > 1, else null.
Error row_stats(const Logits& logits, const int64_t* target, const RowSpec& spec, int fields, float* stats,
                const RowOutputs& outputs, float* workspace, Device device);

// The number of parts in which message() hashes this many values: at most 256, each by one block. On the CPU it is 1.
int64_t hash_parts(int64_t num_values);

// payload [count] -> message [count + 4]: the payload followed by its signature (signature.h). values [num_values] must
// be equal on all ranks. call = 0 marks a rank that failed. workspace: hash_parts(num_values) integers if that is more
// than 1, else null.
Error message(const float* payload, int64_t count, const int64_t* values, int64_t num_values, int64_t call,
              int64_t start, int64_t columns, float* message, uint64_t* workspace, Device device);

// The first `fields` floats of every message row are the RowStats of a shard. They are merged in the order of the
// ranks, so every rank computes the same bits. If the ranks do not agree (signature.h), every row that is not ignored
// is NaN.
Error merge_row_stats(const Messages& messages, const int64_t* target, const RowSpec& spec, int fields, float* stats,
                      const RowOutputs& outputs, Device device);

// The gradient of  sum_t g_lp logprob + g_H H + g_K H_K  with respect to the logits, in their dtype, rounded to nearest
// even; g: the members of grads. With temperature T, y = (x - max) / T, S = 1 + sum_exp_m1 and Ey = sum_xexp / S:
//
//   dx = 1/T { g_lp (1[target] - p) - g_H p (y - Ey) - g_K w p_k (y - L_K + H_K) },   p = e^y / S,  p_k = e^{y - L_K}
//      = e^y { (a + b y) + w (a_k + b_k y) }  + 1/T g_lp in the target's column
//
// with four coefficients per row. w is 1 above the clamp's threshold, the weight of the ties at it, and 0 below it.
// y - Ey is log p + H, and does not cancel in a peaked row, where both are small differences of L.
//
// stats [T, fields]: of whole rows. clamp [T, 4]: (threshold as a raw logit,
// weight of its ties, L_K, H_K); may be null if grads.clamped_entropy is. grad [T, width] may be logits itself. Padding
// columns, ignored rows and rows whose incoming gradients are all 0 get zeros; the logits of such rows are not read. A
// target's logit that differs from the one in stats shows that the logits were written after the forward pass. That is
// an error on the CPU, and a NaN in the target's column on CUDA. It is not checked if grad is logits.
Error logits_grad(const Logits& logits, const int64_t* target, const RowSpec& spec, const float* stats, int fields,
                  const RowGrads& grads, const float* clamp, void* grad, int64_t grad_row_stride, Device device);

// Whole rows: row_stats with 4 fields and outputs, and the clamped entropy over the `kept` largest logits:
// clamp [T, 4] as for logits_grad, clamped_entropy [T]. The algorithm is in clamp.h.
Error clamped_stats(const Logits& logits, const int64_t* target, const RowSpec& spec, int64_t kept, float* stats,
                    const RowOutputs& outputs, float* clamp, float* clamped_entropy, Device device);

// The next four are clamped_stats for rows that are split over ranks; clamp.h describes the steps.

// logits of a shard -> sketch [T, kSketch].
Error clamp_sketch(const Logits& logits, const int64_t* target, const RowSpec& spec, float* sketch, Device device);

// sketches of all ranks -> bracket [T, 4]: lowest key, highest key, mode, reserved. The bracket is chosen to extend
// `margin` ranks beyond the kept-th largest logit on either side, by the sketches' estimate.
Error clamp_bracket(const Messages& sketches, const int64_t* target, const RowSpec& spec, int64_t kept, int64_t margin,
                    uint32_t* bracket, Device device);

// logits of a shard and a bracket -> partial [T, 4 + kPartial]: RowStats of the shard, then its partial for the clamp.
Error clamp_partial(const Logits& logits, const int64_t* target, const RowSpec& spec, const uint32_t* bracket,
                    float* partial, Device device);

// partials of all ranks (the last kPartial floats of every message row), merged stats [T, fields], and the brackets
// [T, 4] and clamps [T, 4] of the round before -> next_bracket [T, 4], next_clamp [T, 4], clamped_entropy [T]. Finished
// rows keep their clamp. The number of rows that are not finished is added to unfinished [1].
Error clamp_refine(const Messages& partials, const int64_t* target, const RowSpec& spec, const float* stats, int fields,
                   int64_t kept, const uint32_t* bracket, const float* clamp, uint32_t* next_bracket, float* next_clamp,
                   float* clamped_entropy, uint32_t* unfinished, Device device);

// Two logit tensors of one shape and dtype -> stats [T, 8], the members of CovarianceStats. row_mask [T] may be null;
// rows with mask 0 are not read and get zeros. outputs and workspace (with 8 fields): as for row_stats.
Error covariance_stats(const Logits& logits_old, const Logits& logits_new, const uint8_t* row_mask,
                       const RowSpec& spec, float* stats, const CovarianceOutputs& outputs, float* workspace,
                       Device device);

// As merge_row_stats, for CovarianceStats.
Error merge_covariance_stats(const Messages& messages, const uint8_t* row_mask, const RowSpec& spec, float* stats,
                             const CovarianceOutputs& outputs, Device device);

// The gradient of  sum_t g_cov Cov + g_H (H_new - H_old) + g_KL KL(old || new)  with respect to logits_new, in its
// dtype. With temperature T, p and q the old and new policy, Ex = E_p[x] and Ez = E_q[z] (logit_covariance.h):
//
//   dlogit_new = 1/T { g_cov p (x - Ex) - g_H q (z - Ez) + g_KL (q - p) } = e^x (a + b x) + e^z (a' + b' z)
//
// with four coefficients per row. stats [T, 8]: of whole rows.
Error logit_covariance_grad(const Logits& logits_old, const Logits& logits_new, const uint8_t* row_mask,
                            const RowSpec& spec, const float* stats, const CovarianceGrads& grads, void* grad,
                            int64_t grad_row_stride, Device device);

// Adds up values over the tokens under mask [T], in fixed point (token_select.h). sums [3 count + 2], zeros before:
// coarse and fine of each value; the number of tokens; how many values are bad, that is not finite or larger than 2^20,
// which add 0; and that number for each value.
Error token_sums(const TokenValues& values, const uint8_t* mask, int64_t T, int64_t* sums, Device device);

// sums [2 count + 2], of all ranks -> mean [count] float64. eps is added to the number of tokens. NaN if a value is bad
// or *refused; refused [1] may be null.
Error token_means(const int64_t* sums, int64_t count, double eps, const uint8_t* refused, double* mean, Device device);

// One value and its sums, of all ranks -> the value as float32; two values and their sums -> the product of value minus
// mean, rounded to float32. scores [T] are 0 outside the mask, and NaN under it where token_means gives NaN. mean
// [count]: as token_means writes it.
Error token_scores(const TokenValues& values, const uint8_t* mask, int64_t T, const int64_t* sums, double eps,
                   const uint8_t* refused, float* scores, double* mean, Device device);

// The number of int64 in the workspace of token_select: a SelectWorkspace, and on the CPU a list of tokens behind it.
int64_t select_workspace(int64_t T);

// Stages `first` to `last` of a selection (token_select.h). All stages, from first_stage(spec.kind) to kCheckStage
// (quantile: to stage 1), run once and in order. Where there are other ranks, a call runs one stage, and after it the
// caller adds up over the ranks what SelectWorkspace says. The selection is invalid if ids repeat or *refused: then the
// count is -1, the threshold NaN, and all tokens under the mask are chosen.
Error token_select(const SelectTokens& tokens, int64_t T, const SelectSpec& spec, int64_t ranks, int first, int last,
                   int64_t* workspace, const SelectOutputs& outputs, Device device);

// After the stages of a quantile: mean [1] float64, extremes [2]: the largest score, and the 99.9 percent quantile. own
// [ranks, 2]: SelectWorkspace::own of all ranks. NaN if *refused, the mean also if *mean_logprob is.
Error token_summary(const int64_t* workspace, const int64_t* num_tokens, const int64_t* own, int64_t ranks,
                    const double* mean_logprob, const uint8_t* refused, double* mean, float* extremes, Device device);

}  // namespace ENTCOV_CORE

#ifndef ENTCOV_CUDA
namespace entcov::cpu {

// The instruction set of the CPU kernels, chosen once for the process: "avx512", "avx2" or "baseline".
const char* isa();
bool set_isa(const char* name);  // returns false if the name is unknown or this CPU does not support it

// Advises the kernel to back a large, fresh buffer with huge pages: without them, writing a gradient of 150 MB spends
// two thirds of its time in 38,000 page faults. The contents do not change.
void advise_huge_pages(void* memory, int64_t bytes);

}  // namespace entcov::cpu
#endif
