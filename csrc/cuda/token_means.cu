// Sums of values over the tokens of a mini-batch in fixed point (../token_select.h), the means that follow, and the
// scores: a value itself, or the covariance (x - mean x) (y - mean y) of two.
//
// Memory. token_sums reads the values and a byte of the mask per token, token_scores reads them again and writes 4
// bytes: 22 bytes a token for the covariance of two float32.
//
// Parallelisation. One launch each; a block takes 2,048 tokens (device/tokens.cuh). Every thread of token_scores
// computes the means for itself, a division each, so that no launch of their own is needed.
//
// Numerics. float64, single IEEE operations that the compiler cannot fuse with another result; the sums are integers.
#include "device/tokens.cuh"

namespace entcov::cuda {
namespace {

// The mask of this thread's tokens.
__device__ __forceinline__ void load_mask(const uint8_t* mask, int64_t T, bool (&out)[kTokensAThread]) {
#pragma unroll
  for (int i = 0; i < kTokensAThread; i++) out[i] = token_of(i) < T && __ldg(mask + token_of(i));
}

// A value of this thread's tokens, 0 outside the mask, where it is not read.
__device__ __forceinline__ void load_values(const TokenValues& values, int which, const bool (&mask)[kTokensAThread],
                                            double (&out)[kTokensAThread]) {
  const bool is_double = values.is_double >> which & 1;
#pragma unroll
  for (int i = 0; i < kTokensAThread; i++) {
    const int64_t t = token_of(i);
    out[i] = !mask[i]     ? 0.0
             : is_double ? __ldg(static_cast<const double*>(values.data[which]) + t)
                         : static_cast<double>(__ldg(static_cast<const float*>(values.data[which]) + t));
  }
}

struct SumsArgs {
  TokenValues values;
  const uint8_t* mask;  // [T]
  int64_t T;
  int64_t* sums;  // [3 count + 2]
};

__global__ void __launch_bounds__(kThreads) token_sums_kernel(const SumsArgs a) {
  const int count = a.values.count;
  int64_t tokens = 0, all_bad = 0;
  bool mask[kTokensAThread];
  load_mask(a.mask, a.T, mask);
#pragma unroll
  for (int i = 0; i < kTokensAThread; i++) tokens += mask[i];
#pragma unroll
  for (int k = 0; k < kMostTokenValues; k++) {  // an index known to the compiler keeps the pointers out of local memory
    if (k >= count) break;
    double x[kTokensAThread];
    load_values(a.values, k, mask, x);
    int64_t coarse = 0, fine = 0, bad = 0;
#pragma unroll
    for (int i = 0; i < kTokensAThread; i++) {
      const bool good = fabs(x[i]) <= kLargestValue;  // false for NaN
      const FixedPoint f = fixed_point(good ? x[i] : 0.0);
      coarse += f.coarse, fine += f.fine, bad += !good;
    }
    add_of_warp(a.sums + 2 * k, coarse);
    add_of_warp(a.sums + 2 * k + 1, fine);
    add_of_warp(a.sums + 2 * count + 2 + k, bad);
    all_bad += bad;
  }
  add_of_warp(a.sums + 2 * count, tokens);
  add_of_warp(a.sums + 2 * count + 1, all_bad);
}

struct MeansArgs {
  const int64_t* sums;  // [2 count + 2]
  int64_t count;
  double eps;
  const uint8_t* refused;  // [1] or null
  double* mean;            // [count]
};

__global__ void __launch_bounds__(kThreads) token_means_kernel(const MeansArgs a) {
  const int k = static_cast<int>(threadIdx.x);
  if (k < a.count) a.mean[k] = mean_of(a.sums, a.count, k, a.eps, a.refused);
}

struct ScoresArgs {
  TokenValues values;
  const uint8_t* mask;  // [T]
  int64_t T;
  MeansArgs means;
  float* scores;  // [T]
};

__global__ void __launch_bounds__(kThreads) token_scores_kernel(const ScoresArgs a) {
  const MeansArgs& m = a.means;
  const bool two = a.values.count == 2;
  const double mean_x = mean_of(m.sums, m.count, 0, m.eps, m.refused);
  const double mean_y = two ? mean_of(m.sums, m.count, 1, m.eps, m.refused) : 0.0;
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    m.mean[0] = mean_x;
    if (two) m.mean[1] = mean_y;
  }
  bool mask[kTokensAThread];
  double x[kTokensAThread], y[kTokensAThread];
  load_mask(a.mask, a.T, mask);
  load_values(a.values, 0, mask, x);
  if (two) load_values(a.values, 1, mask, y);
#pragma unroll
  for (int i = 0; i < kTokensAThread; i++) {
    const float score = two ? covariance_score(x[i] - mean_x, y[i] - mean_y) : value_score(x[i], mean_x);
    if (token_of(i) < a.T) a.scores[token_of(i)] = mask[i] ? score : 0.0f;
  }
}

}  // namespace

Error token_sums(const TokenValues& values, const uint8_t* mask, int64_t T, int64_t* sums, Device stream) {
  return launch("token_sums", token_sums_kernel, token_blocks(T), stream, SumsArgs{values, mask, T, sums});
}

Error token_means(const int64_t* sums, int64_t count, double eps, const uint8_t* refused, double* mean, Device stream) {
  return launch("token_means", token_means_kernel, 1, stream, MeansArgs{sums, count, eps, refused, mean});
}

Error token_scores(const TokenValues& values, const uint8_t* mask, int64_t T, const int64_t* sums, double eps,
                   const uint8_t* refused, float* scores, double* mean, Device stream) {
  return launch("token_scores", token_scores_kernel, token_blocks(T), stream,
                ScoresArgs{values, mask, T, {sums, values.count, eps, refused, mean}, scores});
}

}  // namespace entcov::cuda
