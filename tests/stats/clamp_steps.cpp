// clamp_guess and clamp_narrow made of a clamp.h that may have a fault (test_clamp_faults.py).
#include "clamp.h"

using namespace entcov;

extern "C" void clamp_guess(const float* sketches, int64_t shard_stride, int64_t row_stride, int64_t R, int64_t T,
                            const int64_t* columns, const int64_t* target, int64_t ignore_index, int64_t vocab_size,
                            int64_t kept, int64_t margin, Bracket* bracket) {
  for (int64_t t = 0; t < T; t++)
    bracket[t] = target[t] == ignore_index
                     ? Bracket{0, 0, kDone, 0}
                     : initial_bracket(SingleThread(), Gathered{sketches + t * row_stride, shard_stride, R}, columns,
                                       vocab_size, kept, margin);
}

extern "C" void clamp_narrow(const float* parts, int64_t shard_stride, int64_t row_stride, int64_t R, int64_t T,
                             const int64_t* target, const float* stats, int64_t fields, int64_t ignore_index,
                             int64_t kept, double inv_temperature, Bracket* bracket, float* clamp, uint32_t* unfinished) {
  for (int64_t t = 0; t < T; t++) {
    bracket[t] = refine(SingleThread(), Gathered{parts + t * row_stride, shard_stride, R}, bracket[t],
                        stats + t * fields, target[t] == ignore_index, static_cast<uint32_t>(kept),
                        static_cast<float>(inv_temperature), clamp + t * 4);
    *unfinished += bracket[t].mode != kDone;
  }
}
