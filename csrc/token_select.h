// Selections of tokens over a mini-batch: the integer arithmetic that CPU and CUDA kernels share.
//
// Sums. A value x, |x| <= 2^20, is written in fixed point as coarse * 2^-10 + fine * 2^-41; both integers are added in
// int64, in any order. 2^32 - 1 tokens fit.
//
// Keys. A score (float32) becomes a 32-bit key that sorts as the numbers do. A token id becomes a 64-bit hash of (seed,
// step, id), one-to-one in the id: SplitMix64's finaliser, applied to id, then seed, then step (Steele, Lea and Flood,
// "Fast splittable pseudorandom number generators", 2014; constants: Stafford's mix13).
//
// Radix selection. The n-th largest key is found digit by digit, 16 bits a round. A round counts the digits of the keys
// that agree with all digits found so far (Histogram), the counts of all ranks are added up, and the next round, on
// every rank, picks the digit in which the n-th largest lies (advance()). Rounds 0 and 1 are the two digits of a score,
// rounds 2 to 5 the four of a hash.
//
//   draw      rounds 2 to 5 over the candidates: the n with the largest hash
//   largest   rounds 0 to 5: the largest scores, and of those equal to the smallest of them the largest hashes
//   quantile  rounds 0 and 1: one order statistic of the scores
//
// Ids. Two tokens may not have the same id. Every checked id sets a bit in a map of 2^22 bits, by addition, and the
// maps of all ranks are added up: where two ids set the same bit, the sum has fewer bits than there are ids. All ids
// are checked if they differ by at most 2^22 - 1, every stride-th one if they differ by up to stride times that.
//
// Everything but a few floating operations per call is integer arithmetic, which has the same result in every order.
// The floating ones are single IEEE operations, which no compiler may fuse where the fused result would differ.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "row_stats.h"

namespace entcov {

// ---- fixed point ----------------------------------------------------------------------------------------------------

constexpr double kCoarse = 1024.0;        // 2^10
constexpr double kFine = 2147483648.0;    // 2^31, of a remainder of at most 1/2: 2^30 a token
constexpr double kLargestValue = 1048576.0;  // 2^20

struct FixedPoint {
  int64_t coarse, fine;
};

// The integer nearest to x, ties to even; |x| < 2^63.
ENTCOV_HD int64_t nearest(double x) {
#ifdef __CUDA_ARCH__
  return __double2ll_rn(x);
#else
  return static_cast<int64_t>(nearbyint(x));
#endif
}

// The scalings are by powers of two and exact, so it does not matter whether the compiler fuses them.
ENTCOV_HD FixedPoint fixed_point(double x) {
  const double scaled = x * kCoarse;
  const int64_t coarse = nearest(scaled);
  return {coarse, nearest((scaled - static_cast<double>(coarse)) * kFine)};
}

ENTCOV_HD double from_fixed_point(int64_t coarse, int64_t fine) {
  return static_cast<double>(coarse) * (1.0 / kCoarse) + static_cast<double>(fine) * (1.0 / (kCoarse * kFine));
}

// What the sum of a value over all tokens is divided by. eps > 0 is added in float32, as verl's masked_mean adds it.
ENTCOV_HD double mean_divisor(int64_t num_tokens, double eps) {
  if (eps == 0.0) return static_cast<double>(num_tokens);
  return static_cast<double>(static_cast<float>(num_tokens) + static_cast<float>(eps));
}

// Values of T tokens by pointer, [T] float32, or float64 where bit k of is_double is set.
constexpr int kMostTokenValues = 8;
struct TokenValues {
  int count;
  uint32_t is_double;
  const void* data[kMostTokenValues];
};

// sums: [2 count + 2 ...] as token_sums of kernels.h writes them. NaN if a value is bad or the ranks do not agree.
ENTCOV_HD double mean_of(const int64_t* sums, int64_t count, int64_t k, double eps, const uint8_t* refused) {
  if (sums[2 * count + 1] > 0 || (refused && *refused)) return NAN;
  return from_fixed_point(sums[2 * k], sums[2 * k + 1]) / mean_divisor(sums[2 * count], eps);
}

// Score of a token by a value, given as double; NaN if the mean is.
ENTCOV_HD float value_score(double x, double mean) { return static_cast<float>(x) + 0.0f * static_cast<float>(mean); }

// Score of a token by two values minus their means.
ENTCOV_HD float covariance_score(double x, double y) { return static_cast<float>(x * y); }

// ---- keys -----------------------------------------------------------------------------------------------------------

ENTCOV_HD uint32_t float_key(float x) {
  x += 0.0f;  // -0 and 0 are the same
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

ENTCOV_HD float key_to_float(uint32_t key) {
  const uint32_t bits = key & 0x80000000u ? key & 0x7fffffffu : ~key;
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

ENTCOV_HD uint64_t mix(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

ENTCOV_HD uint64_t spread(int64_t x) { return (static_cast<uint64_t>(x) + 1) * 0x9e3779b97f4a7c15u; }

ENTCOV_HD uint64_t token_hash(int64_t token_id, int64_t seed, int64_t step) {
  return mix(mix(mix(spread(token_id)) + spread(seed)) + spread(step));
}

// ---- the call -------------------------------------------------------------------------------------------------------

enum SelectKind : int { kDraw = 0, kLargest = 1, kQuantile = 2 };

struct SelectSpec {
  SelectKind kind;
  bool strict;        // draw: low < score < high, not low <= score <= high
  bool round_up;      // n = int(ratio * N + 0.9999), not int(ratio * N)
  float low, high;    // draw: the interval of the candidates
  double ratio;       // n / number of tokens
  int64_t at_least;   // of n
  int64_t seed, step;  // used where SelectTokens has no pointer to them
};

struct SelectTokens {
  const float* value;         // [T], the scores
  const uint8_t* mask;        // [T]
  const int64_t* token_id;    // [T]; quantile: null
  const uint8_t* exclude;     // [T], tokens that are no candidates, or null
  const int64_t* num_tokens;  // [1], under the mask, over all ranks
  const int64_t *seed, *step;  // [1] or null
  const int64_t* own;         // [ranks, 2], SelectWorkspace::own of all ranks; not read before the second stage
  const uint8_t* refused;     // [1], whether the ranks do not agree, or null
};

struct SelectOutputs {
  uint8_t* chosen;   // [T]
  int64_t* result;   // [3]: chosen over all ranks (-1: invalid), tokens due, ids that repeat at least
  float* threshold;  // [1]; largest: the smallest chosen score, inf if none is chosen, NaN if the selection is invalid
};

ENTCOV_HD bool is_candidate(const SelectSpec& spec, float value) {
  return spec.strict ? value > spec.low && value < spec.high : value >= spec.low && value <= spec.high;
}

// The product of two doubles, rounded: not fused with an addition.
ENTCOV_HD double rounded_product(double a, double b) {
#ifdef __CUDA_ARCH__
  return __dmul_rn(a, b);
#else
  volatile double product = a * b;
  return product;
#endif
}

// How many tokens to choose. quantile: the rank, from above, of the smallest score with 99.9 percent of all at or
// below.
ENTCOV_HD int64_t number_due(const SelectSpec& spec, int64_t num_tokens) {
  if (spec.kind == kQuantile) return num_tokens - (999 * num_tokens + 999) / 1000 + 1;
  double share = rounded_product(static_cast<double>(num_tokens), spec.ratio);
  if (spec.round_up) share += 0.9999;
  int64_t n = static_cast<int64_t>(share);
  if (n < spec.at_least) n = spec.at_least;
  return spec.kind == kLargest && n > num_tokens ? num_tokens : n;
}

// ---- radix selection ------------------------------------------------------------------------------------------------

constexpr int kDigitBits = 16;
constexpr int kBins = 1 << kDigitBits;
constexpr int kBinsAGroup = 256;
constexpr int kGroups = kBins / kBinsAGroup;
constexpr int kScoreRounds = 2, kRounds = 6;
constexpr int kMarkStage = kRounds, kCheckStage = kRounds + 1;

// Two counters share an int64 when ranks add theirs up. No sum reaches 2^32, so none runs over into its neighbour.
struct Histogram {
  uint32_t bins[kBins];
  uint32_t groups[kGroups];  // sums of kBinsAGroup bins each
};

// What is known after some rounds.
struct SelectState {
  int64_t n;            // tokens to choose
  int64_t rank;         // of the key that is looked for, from above, among those that agree with `prefix`
  uint64_t prefix;      // its digits that are found
  uint64_t score;       // largest: the key of the smallest chosen score, after round 1
  int64_t candidates;   // of the draw over all ranks, after round 2
};

struct Digit {
  uint32_t bin;
  int64_t above, total;  // keys in higher bins, and in all
};

ENTCOV_HD SelectState first_state(const SelectSpec& spec, int64_t num_tokens) {
  const int64_t n = number_due(spec, num_tokens);
  return {n, n, 0, 0, 0};
}

// The rank that pick looks for among `total` keys. 0: there is none, and the highest bin is taken.
ENTCOV_HD int64_t rank_within(const SelectState& state, int64_t total) {
  return state.rank < total ? state.rank : total;
}

// The state after `round`, whose histogram has this digit.
ENTCOV_HD SelectState advance(SelectState state, int round, const Digit& digit) {
  state.rank = rank_within(state, digit.total) - digit.above;
  state.prefix = state.prefix << kDigitBits | digit.bin;
  if (round == kScoreRounds - 1) state.score = state.prefix, state.prefix = 0;
  if (round == kScoreRounds) state.candidates = digit.total;
  return state;
}

ENTCOV_HD int64_t number_expected(const SelectSpec& spec, const SelectState& state) {
  return spec.kind == kLargest || state.n < state.candidates ? state.n : state.candidates;
}

// Digit of a hash in round 2, 3, 4 or 5; and the digits before it.
ENTCOV_HD uint32_t hash_digit(uint64_t hash, int round) {
  return static_cast<uint32_t>(hash >> kDigitBits * (kRounds - 1 - round)) & (kBins - 1);
}
ENTCOV_HD uint64_t hash_prefix(uint64_t hash, int round) {
  return round == kScoreRounds ? 0 : hash >> kDigitBits * (kRounds - round);
}

// ---- repeated ids ---------------------------------------------------------------------------------------------------

constexpr int kMapWords = 1 << 16;

// The smallest and the largest id in a form whose unsigned maximum is taken, and which starts at 0: no id.
ENTCOV_HD uint64_t low_end(int64_t id) { return ~(static_cast<uint64_t>(id) ^ (uint64_t{1} << 63)); }
ENTCOV_HD uint64_t high_end(int64_t id) { return static_cast<uint64_t>(id) ^ (uint64_t{1} << 63); }

// Every stride-th id is checked. ends: maxima of low_end() and high_end() over all ranks.
ENTCOV_HD int64_t id_stride(uint64_t low, uint64_t high) {
  const int64_t first = static_cast<int64_t>(~low ^ (uint64_t{1} << 63));
  const int64_t last = static_cast<int64_t>(high ^ (uint64_t{1} << 63));
  const double span = static_cast<double>(last) - static_cast<double>(first);
  return (span > 0.0 ? static_cast<int64_t>(span / (64.0 * kMapWords - 2.0)) : 0) + 1;
}

struct MapBit {
  uint32_t word;
  uint64_t bit;  // 0: this id is not checked
};

ENTCOV_HD MapBit map_bit(int64_t id, int64_t stride) {
  int64_t place = id;
  if (stride != 1) {
    place = id / stride;
    if (place * stride != id) return {0, 0};
  }
  return {static_cast<uint32_t>(place >> 6) & (kMapWords - 1), uint64_t{1} << (place & 63)};
}

ENTCOV_HD int num_bits(uint64_t x) {
#ifdef __CUDA_ARCH__
  return __popcll(x);
#else
  x = x - ((x >> 1) & 0x5555555555555555u);
  x = (x & 0x3333333333333333u) + ((x >> 2) & 0x3333333333333333u);
  x = (x + (x >> 4)) & 0x0f0f0f0f0f0f0f0fu;
  x += x >> 8, x += x >> 16, x += x >> 32;
  return static_cast<int>(x & 0x7f);
#endif
}

// ---- memory between the stages --------------------------------------------------------------------------------------

// Ranks gather `own` with their first sum, and add up histograms[round] after the stage of that round (quantile: and
// `sums` with the first), and `marks` after kMarkStage.
struct SelectWorkspace {
  uint64_t own[2];                 // ends of the ids of this rank; quantile: key of the largest score, and 0
  SelectState states[kRounds + 1];  // before each round, and after the last
  uint64_t set_bits;               // in the map of all ranks
  int64_t members;                 // CPU: length of the list of tokens that agree with the digits found so far
  int64_t sums[2];                 // quantile: of all scores, in fixed point; added up with the first histogram
  Histogram histograms[kRounds];
  int64_t marks[2 + kMapWords];  // tokens chosen, ids checked, the map
};

ENTCOV_HD int first_stage(SelectKind kind) { return kind == kDraw ? kScoreRounds : 0; }

// At least so many tokens have the id of another one.
ENTCOV_HD int64_t num_repeated(const SelectWorkspace& w) { return w.marks[1] - static_cast<int64_t>(w.set_bits); }

// Whether the selection is invalid: then all tokens under the mask are chosen.
ENTCOV_HD bool is_invalid(const SelectWorkspace& w, const uint8_t* refused) {
  return num_repeated(w) > 0 || (refused && *refused);
}

// Writes the result and the threshold.
ENTCOV_HD void finish(const SelectSpec& spec, const SelectWorkspace& w, const uint8_t* refused,
                      const SelectOutputs& out) {
  const SelectState& state = w.states[kRounds];
  const bool invalid = is_invalid(w, refused);
  out.result[0] = invalid ? -1 : w.marks[0];
  out.result[1] = number_expected(spec, state);
  out.result[2] = num_repeated(w);
  *out.threshold = invalid ? NAN : state.n > 0 ? key_to_float(static_cast<uint32_t>(state.score)) : INFINITY;
}

// mean [1], extremes [2]: the mean score, the largest one and the quantile. `digit`: of round 1.
ENTCOV_HD void summarise(const SelectWorkspace& w, const Digit& digit, uint64_t largest, int64_t num_tokens,
                         double mean_logprob, const uint8_t* refused, double* mean, float* extremes) {
  const SelectState last = advance(w.states[kScoreRounds - 1], kScoreRounds - 1, digit);
  const bool invalid = refused && *refused;
  // NaN if the inputs of the scores were bad.
  const double sum = from_fixed_point(w.sums[0], w.sums[1]);
  *mean = invalid ? static_cast<double>(NAN) : sum / static_cast<double>(num_tokens) + 0.0 * mean_logprob;
  extremes[0] = invalid ? NAN : key_to_float(static_cast<uint32_t>(largest));
  extremes[1] = invalid ? NAN : key_to_float(static_cast<uint32_t>(last.score));
}

}  // namespace entcov
