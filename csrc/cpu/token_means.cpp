// Sums of values over the tokens of a mini-batch in fixed point (../token_select.h), the means that follow, and the
// scores: a value itself, or the covariance (x - mean x) (y - mean y) of two.
//
// Memory. token_sums reads the values and a byte of the mask per token; token_scores reads them again and writes 4
// bytes. Parallelisation: chunks of 1,024 tokens are distributed over threads. The order of the sums does not matter.
//
// Numerics. float64; a score is rounded once to float32. Rounding to an integer adds and subtracts 1.5 * 2^52, which is
// exact for these sizes and which vectors can do.
#include <algorithm>

#include "dispatch.h"

namespace entcov::cpu {
namespace {

constexpr double kRounder = 6755399441055744.0;  // 1.5 * 2^52

ENTCOV_INLINE int64_t bits_of(double x) {
  int64_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

// n values of tokens from `begin` on as double, 0 outside the mask. Two loops, so that each is vectorised.
ENTCOV_INLINE void load(const TokenValues& values, int which, const uint8_t* mask, int64_t begin, int64_t n,
                        double* out) {
  if (values.is_double >> which & 1) {
    const double* x = static_cast<const double*>(values.data[which]) + begin;
    for (int64_t i = 0; i < n; i++) {
      const double value = x[i];
      out[i] = mask[begin + i] ? value : 0.0;
    }
  } else {
    const float* x = static_cast<const float*>(values.data[which]) + begin;
    for (int64_t i = 0; i < n; i++) {
      const double value = x[i];
      out[i] = mask[begin + i] ? value : 0.0;
    }
  }
}

struct SumsArgs {
  TokenValues values;
  const uint8_t* mask;
  int64_t T;
  int64_t* sums;  // [3 count + 2]
};

struct SumsOp {
  using Args = SumsArgs;

  template <int W>
  static ENTCOV_INLINE void row(const Args& a, int64_t chunk) {
    const int64_t begin = chunk * kTokensAChunk, n = std::min(kTokensAChunk, a.T - begin);
    const int count = a.values.count;
    double x[kTokensAChunk];
    int64_t tokens = 0, all_bad = 0;
    for (int64_t i = 0; i < n; i++) tokens += a.mask[begin + i];
    for (int k = 0; k < count; k++) {
      load(a.values, k, a.mask, begin, n, x);
      int64_t bad = 0, coarse = 0, fine = 0;
      for (int64_t i = 0; i < n; i++) {
        const bool good = std::fabs(x[i]) <= kLargestValue;  // false for NaN
        bad += !good;
        x[i] = good ? x[i] : 0.0;
      }
      for (int64_t i = 0; i < n; i++) {
        const double scaled = x[i] * kCoarse, shifted = scaled + kRounder;
        const double rest = (scaled - (shifted - kRounder)) * kFine + kRounder;
        coarse += bits_of(shifted) - bits_of(kRounder);
        fine += bits_of(rest) - bits_of(kRounder);
      }
      add(a.sums + 2 * k, coarse);
      add(a.sums + 2 * k + 1, fine);
      add(a.sums + 2 * count + 2 + k, bad);
      all_bad += bad;
    }
    add(a.sums + 2 * count, tokens);
    add(a.sums + 2 * count + 1, all_bad);
  }

  static void add(int64_t* sum, int64_t x) {
    if (x != 0) __atomic_fetch_add(sum, x, __ATOMIC_RELAXED);
  }
};

struct ScoresArgs {
  TokenValues values;
  const uint8_t* mask;
  int64_t T;
  double mean[2];
  float* scores;
};

struct ScoresOp {
  using Args = ScoresArgs;

  template <int W>
  static ENTCOV_INLINE void row(const Args& a, int64_t chunk) {
    const int64_t begin = chunk * kTokensAChunk, n = std::min(kTokensAChunk, a.T - begin);
    double x[kTokensAChunk], y[kTokensAChunk];
    load(a.values, 0, a.mask, begin, n, x);
    if (a.values.count == 2) load(a.values, 1, a.mask, begin, n, y);
    const double mean_x = a.mean[0], mean_y = a.mean[1];
    for (int64_t i = 0; i < n; i++) {
      const float score =
          a.values.count == 2 ? covariance_score(x[i] - mean_x, y[i] - mean_y) : value_score(x[i], mean_x);
      a.scores[begin + i] = a.mask[begin + i] ? score : 0.0f;
    }
  }
};

}  // namespace

Error token_sums(const TokenValues& values, const uint8_t* mask, int64_t T, int64_t* sums, Device threads) {
  for_chunks<SumsOp>({values, mask, T, sums}, T, threads);
  return nullptr;
}

Error token_means(const int64_t* sums, int64_t count, double eps, const uint8_t* refused, double* mean, Device) {
  for (int64_t k = 0; k < count; k++) mean[k] = mean_of(sums, count, k, eps, refused);
  return nullptr;
}

Error token_scores(const TokenValues& values, const uint8_t* mask, int64_t T, const int64_t* sums, double eps,
                   const uint8_t* refused, float* scores, double* mean, Device threads) {
  ScoresArgs args{values, mask, T, {}, scores};
  for (int k = 0; k < values.count; k++) args.mean[k] = mean[k] = mean_of(sums, values.count, k, eps, refused);
  for_chunks<ScoresOp>(args, T, threads);
  return nullptr;
}

}  // namespace entcov::cpu
