// clamp_bracket and clamp_refine made of a clamp.h that may have a fault (test_clamp_faults.py). Structs come as their
// members.
#include "clamp.h"

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

extern "C" void clamp_refine(const float* data, int64_t R, int64_t T, int64_t width, const int64_t* target, int64_t,
                             int64_t, double temperature, int64_t ignore_index, const float* stats, int64_t fields,
                             int64_t kept, const Bracket* bracket, const float* clamp, Bracket* next_bracket,
                             float* next_clamp, float* clamped_entropy, uint32_t* unfinished) {
  const Messages partials{data, R, T, width};
  for (int64_t t = 0; t < T; t++) {
    memcpy(next_clamp + t * 4, clamp + t * 4, 4 * sizeof *clamp);
    next_bracket[t] = refine(SingleThread(), Gathered{partials, t, kPartial}, bracket[t], stats + t * fields,
                             target[t] == ignore_index, static_cast<uint32_t>(kept),
                             static_cast<float>(1.0 / temperature), next_clamp + t * 4);
    clamped_entropy[t] = next_clamp[t * 4 + 3];
    *unfinished += next_bracket[t].mode != kDone;
  }
}
