// The launchers of csrc/cpu/token_means.cpp and token_select.cpp with C names, for test_selection_faults.py, which
// compiles them with a fault in a header or in one of the two. A struct of pointers comes as an array of addresses.
#include "cpu/isa.cpp"
#include "cpu/token_means.cpp"
#include "cpu/token_select.cpp"

using namespace entcov;

static TokenValues values_of(int64_t is_double, const void* const* data, int64_t count) {
  TokenValues values{static_cast<int>(count), static_cast<uint32_t>(is_double), {}};
  for (int64_t k = 0; k < count; k++) values.data[k] = data[k];
  return values;
}

extern "C" void token_sums(int64_t is_double, const void* const* data, int64_t count, const uint8_t* mask, int64_t T,
                           int64_t* sums) {
  cpu::token_sums(values_of(is_double, data, count), mask, T, sums, 1);
}

extern "C" void token_scores(int64_t is_double, const void* const* data, int64_t count, const uint8_t* mask, int64_t T,
                             const int64_t* sums, double eps, const uint8_t* refused, float* scores, double* mean) {
  cpu::token_scores(values_of(is_double, data, count), mask, T, sums, eps, refused, scores, mean, 1);
}

extern "C" void token_select(const SelectTokens* tokens, int64_t T, const int64_t* numbers, const double* reals,
                             int64_t ranks, int64_t first, int64_t last, int64_t* workspace,
                             const SelectOutputs* outputs) {
  const SelectSpec spec{static_cast<SelectKind>(numbers[0]), numbers[1] != 0, numbers[2] != 0,
                        static_cast<float>(reals[0]), static_cast<float>(reals[1]), reals[2],
                        numbers[3], numbers[4], numbers[5]};
  cpu::token_select(*tokens, T, spec, ranks, static_cast<int>(first), static_cast<int>(last), workspace, *outputs, 1);
}

extern "C" void token_summary(const int64_t* workspace, const int64_t* num_tokens, const int64_t* own, int64_t ranks,
                              const double* mean_logprob, const uint8_t* refused, double* mean, float* extremes) {
  cpu::token_summary(workspace, num_tokens, own, ranks, mean_logprob, refused, mean, extremes, 1);
}
