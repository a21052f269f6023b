// What the launchers of the CPU do with headers of csrc that may have a fault (test_header_faults.py). Structs come as
// their members.
#include "clamp.h"
#include "logit_covariance.h"
#include "signature.h"

using namespace entcov;

extern "C" void clamp_bracket(const float* data, int64_t R, int64_t T, int64_t width, const int64_t* target, int64_t,
                              int64_t vocab_size, double, int64_t ignore_index, int64_t kept, int64_t margin,
                              Bracket* bracket) {
  const Messages sketches{data, R, T, width};
  for (int64_t t = 0; t < T; t++)
    bracket[t] = target[t] == ignore_index
                     ? Bracket{0, 0, kDone, 0}
                     : initial_bracket(SingleThread(), Gathered{sketches, t, kSketch}, vocab_size, kept, margin);
}

extern "C" void clamp_refine(const float* data, int64_t R, int64_t T, int64_t width, const int64_t* target,
                             int64_t vocab_start, int64_t vocab_size, double temperature, int64_t ignore_index,
                             const float* stats, int64_t fields, int64_t kept, const Bracket* bracket, const float* clamp, Bracket* next_bracket,
                             float* next_clamp, float* clamped_entropy, uint32_t* unfinished) {
  const Messages partials{data, R, T, width};
  const RowSpec spec{vocab_start, vocab_size, static_cast<float>(1.0 / temperature), ignore_index};
  for (int64_t t = 0; t < T; t++) {
    memcpy(next_clamp + t * 4, clamp + t * 4, 4 * sizeof *clamp);
    next_bracket[t] = refine(SingleThread(), Gathered{partials, t, kPartial}, bracket[t], stats + t * fields,
                             target[t] == ignore_index, static_cast<uint32_t>(kept), spec,
                             next_clamp + t * 4);
    clamped_entropy[t] = next_clamp[t * 4 + 3];
    *unfinished += next_bracket[t].mode != kDone;
  }
}

extern "C" void row_outputs(float* stats, int64_t T, int64_t fields, double temperature, float* logprob, float* entropy,
                            float* collision, float* varentropy, float* entropy_drift, const int64_t* target,
                            int64_t ignore_index) {
  const RowOutputs outputs{logprob, entropy, collision, varentropy, entropy_drift};
  for (int64_t t = 0; t < T; t++)
    if (target[t] == ignore_index)
      store_ignored_row(t, static_cast<int>(fields), stats, outputs);
    else
      store_row(load_stats(stats + t * fields, static_cast<int>(fields)), t, static_cast<int>(fields),
                static_cast<float>(1.0 / temperature), stats, outputs);
}

extern "C" void merge_row_stats(const float* data, int64_t R, int64_t T, int64_t width, const int64_t* target, int64_t,
                                int64_t vocab_size, double temperature, int64_t ignore_index, int64_t fields,
                                float* stats, float* logprob, float* entropy, float* collision, float* varentropy,
                                float* entropy_drift) {
  const Messages messages{data, R, T, width};
  const float inv_temperature = static_cast<float>(1.0 / temperature);
  bool agree = true;
  for (int64_t r = 0; r < R; r++) agree = agree && agrees(messages, r, vocab_size);
  for (int64_t t = 0; t < T; t++) {
    RowStats s;
    for (int64_t r = 0; r < R; r++)
      s = merge(s, load_stats(messages.row(r, t), static_cast<int>(fields)), inv_temperature);
    if (!agree) s.sum_exp_m1 = NAN;
    const RowOutputs outputs{logprob, entropy, collision, varentropy, entropy_drift};
    if (target[t] == ignore_index)
      store_ignored_row(t, static_cast<int>(fields), stats, outputs);
    else
      store_row(s, t, static_cast<int>(fields), inv_temperature, stats, outputs);
  }
}

extern "C" void covariance_outputs(float* stats, int64_t T, double temperature, float* covariance, float* predicted,
                                   float* entropy_change, float* kl) {
  for (int64_t t = 0; t < T; t++)
    store_covariance_row(load_covariance_stats(stats + t * kCovarianceFields), t,
                         static_cast<float>(1.0 / temperature), stats, {covariance, predicted, entropy_change, kl});
}

extern "C" void merge_covariance_stats(const float* data, int64_t R, int64_t T, int64_t width, const uint8_t* row_mask,
                                       int64_t, int64_t vocab_size, double temperature, int64_t, float* stats,
                                       float* covariance, float* predicted, float* entropy_change, float* kl) {
  const Messages messages{data, R, T, width};
  const float inv_temperature = static_cast<float>(1.0 / temperature);
  bool agree = true;
  for (int64_t r = 0; r < R; r++) agree = agree && agrees(messages, r, vocab_size);
  for (int64_t t = 0; t < T; t++) {
    CovarianceStats s;
    for (int64_t r = 0; r < R; r++) s = merge(s, load_covariance_stats(messages.row(r, t)), inv_temperature);
    if (!agree) s.sum_exp_m1_old = NAN;
    const CovarianceOutputs outputs{covariance, predicted, entropy_change, kl};
    if (row_mask && !row_mask[t])
      store_masked_row(t, stats, outputs);
    else
      store_covariance_row(s, t, inv_temperature, stats, outputs);
  }
}
