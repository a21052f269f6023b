// The stages of a selection of tokens (../token_select.h). A stage picks the digit that the round before has counted,
// and counts the next one; the last two mark the chosen tokens and check their ids.
//
// Memory. The first stage reads the scores, the mask and the ids. It, or in `largest` the second one, lists the tokens
// that can still be the n-th (16 bytes each), and later stages read the list alone: what has a higher digit than the
// one picked is chosen, what has a lower one is not, and the rest stays in the list. Marking reads mask and ids once
// more, and a map of 512 KiB is written. A histogram of 257 KiB is cleared for every stage; where one call runs several
// stages and few tokens are listed, only the counters that they have used.
//
// Parallelisation: none. A stage takes nanoseconds a token, and a mini-batch has one or two selections.
#include <algorithm>

#include "dispatch.h"

namespace entcov::cpu {
namespace {

constexpr int64_t kFew = 4096;  // counters that are faster cleared one by one than with all others

struct Member {
  uint64_t key;  // of the score until stage 2, then the hash
  int64_t token;
};

// The digit of a key that a stage counts.
ENTCOV_INLINE uint32_t digit_at(uint64_t key, int stage) {
  return stage < kScoreRounds ? key >> kDigitBits * (kScoreRounds - 1 - stage) & (kBins - 1) : hash_digit(key, stage);
}

struct StageArgs {
  SelectTokens tokens;
  int64_t T;
  SelectSpec spec;
  int64_t seed, step;
  SelectWorkspace* workspace;
  Member* members;    // [T]
  Histogram* counts;  // of this stage
  uint32_t digit;     // just picked
  bool some;          // whether any token is to be chosen
  int64_t stride;     // of the ids that are checked
  uint8_t* chosen;
};

// The smallest and largest id of a chunk, into workspace->own.
ENTCOV_INLINE void note_ends(const StageArgs& a, int64_t begin, int64_t n) {
  int64_t low = INT64_MAX, high = INT64_MIN;
  for (int64_t i = begin; i < begin + n; i++) {
    const int64_t id = a.tokens.token_id[i];
    low = std::min(low, a.tokens.mask[i] ? id : INT64_MAX);
    high = std::max(high, a.tokens.mask[i] ? id : INT64_MIN);
  }
  uint64_t* own = a.workspace->own;
  own[0] = std::max(own[0], low_end(low)), own[1] = std::max(own[1], high_end(high));
}

ENTCOV_INLINE void count(Histogram& h, uint32_t bin) { h.bins[bin]++, h.groups[bin / kBinsAGroup]++; }

ENTCOV_INLINE void add_member(const StageArgs& a, uint64_t key, int64_t token) {
  a.members[a.workspace->members++] = {key, token};
}

// Counts the highest digit of all scores.
template <SelectKind kKind>
struct CountScoresOp {
  using Args = StageArgs;

  template <int W>
  static ENTCOV_INLINE void row(const Args& a, int64_t chunk) {
    const int64_t begin = chunk * kTokensAChunk, n = std::min(kTokensAChunk, a.T - begin);
    const float* value = a.tokens.value + begin;
    const uint8_t* mask = a.tokens.mask + begin;
    uint32_t key[kTokensAChunk];
    for (int64_t i = 0; i < n; i++) key[i] = float_key(value[i]);
    for (int64_t i = 0; i < n; i++) a.counts->bins[key[i] >> kDigitBits] += mask[i];
    if (kKind == kLargest) return note_ends(a, begin, n);
    uint32_t largest = 0;
    for (int64_t i = 0; i < n; i++) largest = std::max(largest, mask[i] ? key[i] : 0u);
    SelectWorkspace& w = *a.workspace;
    w.own[0] = std::max<uint64_t>(w.own[0], largest);
    for (int64_t i = 0; i < n; i++) {
      const FixedPoint x = fixed_point(mask[i] ? static_cast<double>(value[i]) : 0.0);
      w.sums[0] += x.coarse, w.sums[1] += x.fine;
    }
  }
};

// Counts the second digit of the scores whose first one has been picked, and lists them; those above are chosen.
template <SelectKind kKind>
struct CountLowerOp {
  using Args = StageArgs;

  template <int W>
  static ENTCOV_INLINE void row(const Args& a, int64_t chunk) {
    const int64_t begin = chunk * kTokensAChunk, n = std::min(kTokensAChunk, a.T - begin);
    const float* value = a.tokens.value + begin;
    const uint8_t* mask = a.tokens.mask + begin;
    uint32_t key[kTokensAChunk];
    uint8_t equal[kTokensAChunk];
    for (int64_t i = 0; i < n; i++) key[i] = float_key(value[i]);
    for (int64_t i = 0; i < n; i++) equal[i] = mask[i] & ((key[i] >> kDigitBits) == a.digit);
    if (kKind == kLargest)
      for (int64_t i = 0; i < n; i++) a.chosen[begin + i] = mask[i] & a.some & ((key[i] >> kDigitBits) > a.digit);
    for (int64_t i = 0; i < n; i++)
      if (equal[i]) {
        count(*a.counts, digit_at(key[i], 1));
        if (kKind == kLargest) add_member(a, key[i], begin + i);
      }
  }
};

// Lists the candidates of a draw and counts the first digit of their hashes.
struct CountCandidatesOp {
  using Args = StageArgs;

  template <int W>
  static ENTCOV_INLINE void row(const Args& a, int64_t chunk) {
    const int64_t begin = chunk * kTokensAChunk, n = std::min(kTokensAChunk, a.T - begin);
    const float* value = a.tokens.value + begin;
    const uint8_t *mask = a.tokens.mask + begin, *exclude = a.tokens.exclude ? a.tokens.exclude + begin : nullptr;
    const SelectSpec spec = a.spec;
    uint8_t candidate[kTokensAChunk + 8] = {};
    if (spec.strict)
      for (int64_t i = 0; i < n; i++) candidate[i] = mask[i] & (value[i] > spec.low) & (value[i] < spec.high);
    else
      for (int64_t i = 0; i < n; i++) candidate[i] = mask[i] & (value[i] >= spec.low) & (value[i] <= spec.high);
    if (exclude)
      for (int64_t i = 0; i < n; i++) candidate[i] &= !exclude[i];
    for (int64_t i = 0; i < n; i += 8) {
      uint64_t eight;
      memcpy(&eight, candidate + i, sizeof eight);
      if (eight == 0) continue;
      for (int64_t j = i; j < std::min(i + 8, n); j++)
        if (candidate[j]) {
          const uint64_t hash = token_hash(a.tokens.token_id[begin + j], a.seed, a.step);
          count(*a.counts, hash_digit(hash, kScoreRounds));
          add_member(a, hash, begin + j);
        }
    }
    memset(a.chosen + begin, 0, n);
    note_ends(a, begin, n);
  }
};

// Sets the bits of the checked ids.
struct MapIdsOp {
  using Args = StageArgs;

  template <int W>
  static ENTCOV_INLINE void row(const Args& a, int64_t chunk) {
    const int64_t begin = chunk * kTokensAChunk, n = std::min(kTokensAChunk, a.T - begin);
    const int64_t* id = a.tokens.token_id + begin;
    const uint8_t* mask = a.tokens.mask + begin;
    int64_t* marks = a.workspace->marks;
    int64_t checked = 0, chosen = 0, set = 0;
    for (int64_t i = 0; i < n; i++) {
      const MapBit at = map_bit(id[i], a.stride);
      const uint64_t bit = mask[i] ? at.bit : 0;
      uint64_t word;
      memcpy(&word, marks + 2 + at.word, sizeof word);
      // Adding a bit that is set already makes fewer.
      set += word & bit ? num_bits(word + bit) - num_bits(word) : bit != 0;
      word += bit;
      memcpy(marks + 2 + at.word, &word, sizeof word);
      checked += bit != 0;
    }
    for (int64_t i = 0; i < n; i++) chosen += a.chosen[begin + i];
    marks[0] += chosen, marks[1] += checked, a.workspace->set_bits += set;
  }
};

struct CountBitsOp {
  using Args = StageArgs;

  template <int W>
  static ENTCOV_INLINE void row(const Args& a, int64_t chunk) {
    const int64_t* map = a.workspace->marks + 2 + chunk * kTokensAChunk;
    int64_t bits = 0;
    for (int64_t i = 0; i < kTokensAChunk; i++) bits += num_bits(static_cast<uint64_t>(map[i]));
    a.workspace->set_bits += bits;
  }
};
static_assert(kMapWords % kTokensAChunk == 0, "");

Digit pick(const Histogram& h, const SelectState& state) {
  int64_t total = 0;
  for (uint32_t count : h.groups) total += count;
  const int64_t rank = rank_within(state, total);
  if (rank == 0) return {kBins - 1, 0, total};
  int64_t above = 0;
  int group = kGroups - 1;
  for (; above + h.groups[group] < rank; group--) above += h.groups[group];
  int bin = (group + 1) * kBinsAGroup - 1;
  for (; above + h.bins[bin] < rank; bin--) above += h.bins[bin];
  return {static_cast<uint32_t>(bin), above, total};
}

// Keeps the members with the digit that was picked after `stage`; those with a higher one are chosen.
void narrow(const StageArgs& a, int stage) {
  int64_t kept = 0;
  for (int64_t m = 0; m < a.workspace->members; m++) {
    const Member member = a.members[m];
    const uint32_t digit = digit_at(member.key, stage);
    if (digit == a.digit)
      a.members[kept++] = member;
    else
      a.chosen[member.token] = digit > a.digit && a.some;
  }
  a.workspace->members = kept;
}

// Counts the digits of all tokens.
void count_all(const StageArgs& a, int stage) {
  const bool largest = a.spec.kind == kLargest;
  if (stage == 0) {
    largest ? for_chunks<CountScoresOp<kLargest>>(a, a.T, 1) : for_chunks<CountScoresOp<kQuantile>>(a, a.T, 1);
    for (int bin = 0; bin < kBins; bin++) a.counts->groups[bin / kBinsAGroup] += a.counts->bins[bin];
  } else if (stage == 1) {
    largest ? for_chunks<CountLowerOp<kLargest>>(a, a.T, 1) : for_chunks<CountLowerOp<kQuantile>>(a, a.T, 1);
  } else {
    for_chunks<CountCandidatesOp>(a, a.T, 1);
  }
}

// Counts the digits of the members that have the digit that was picked.
void count_members(const StageArgs& a, int stage) {
  narrow(a, stage - 1);
  for (int64_t m = 0; m < a.workspace->members; m++) {
    Member& member = a.members[m];
    if (stage == kScoreRounds) member.key = token_hash(a.tokens.token_id[member.token], a.seed, a.step);
    count(*a.counts, digit_at(member.key, stage));
  }
}

void mark_stage(StageArgs& a, int64_t ranks) {
  SelectWorkspace& w = *a.workspace;
  memset(w.marks, 0, sizeof w.marks);
  w.set_bits = 0;
  narrow(a, kRounds - 1);
  for (int64_t m = 0; m < w.members; m++) a.chosen[a.members[m].token] = a.some;
  uint64_t low = 0, high = 0;
  for (int64_t r = 0; r < ranks; r++) {
    low = std::max(low, static_cast<uint64_t>(a.tokens.own[2 * r]));
    high = std::max(high, static_cast<uint64_t>(a.tokens.own[2 * r + 1]));
  }
  a.stride = id_stride(low, high);
  for_chunks<MapIdsOp>(a, a.T, 1);
}

void check_stage(const StageArgs& a, int64_t ranks, const SelectOutputs& out) {
  SelectWorkspace& w = *a.workspace;
  if (ranks > 1) {  // the map is that of all ranks
    w.set_bits = 0;
    for_chunks<CountBitsOp>(a, kMapWords, 1);
  }
  finish(a.spec, w, a.tokens.refused, out);
  if (is_invalid(w, a.tokens.refused)) std::copy(a.tokens.mask, a.tokens.mask + a.T, a.chosen);
}

}  // namespace

int64_t select_workspace(int64_t T) {
  return (sizeof(SelectWorkspace) + T * sizeof(Member)) / sizeof(int64_t);
}

Error token_select(const SelectTokens& tokens, int64_t T, const SelectSpec& spec, int64_t ranks, int first, int last,
                   int64_t* workspace, const SelectOutputs& outputs, Device) {
  SelectWorkspace& w = *reinterpret_cast<SelectWorkspace*>(workspace);
  StageArgs a{};
  a.tokens = tokens, a.T = T, a.spec = spec, a.workspace = &w, a.chosen = outputs.chosen;
  a.members = reinterpret_cast<Member*>(workspace + sizeof(SelectWorkspace) / sizeof(int64_t));
  a.seed = tokens.seed ? *tokens.seed : spec.seed, a.step = tokens.step ? *tokens.step : spec.step;
  const int begin = first_stage(spec.kind);
  if (first == begin) {
    w.states[begin] = first_state(spec, *tokens.num_tokens);
    w.own[0] = w.own[1] = 0, w.sums[0] = w.sums[1] = w.members = 0;
  }
  a.counts = first > begin ? &w.histograms[first - 1] : nullptr;  // of the stage before
  for (int stage = first; stage <= last; stage++) {
    if (stage == kCheckStage) {
      check_stage(a, ranks, outputs);
      break;
    }
    if (stage > begin) {
      const Digit digit = pick(*a.counts, w.states[stage - 1]);
      w.states[stage] = advance(w.states[stage - 1], stage - 1, digit);
      a.digit = digit.bin;
    }
    a.some = w.states[stage].n > 0;
    if (stage == kMarkStage) {
      mark_stage(a, ranks);
      continue;
    }
    const bool listed = stage > begin && stage >= kScoreRounds;  // the stage before has counted the members alone
    if (listed && stage > first && w.members <= kFew) {
      for (int64_t m = 0; m < w.members; m++) {
        const uint32_t bin = digit_at(a.members[m].key, stage - 1);
        a.counts->bins[bin] = a.counts->groups[bin / kBinsAGroup] = 0;
      }
    } else {
      a.counts = &w.histograms[stage];
      memset(a.counts, 0, sizeof *a.counts);
    }
    listed ? count_members(a, stage) : count_all(a, stage);
  }
  return nullptr;
}

Error token_summary(const int64_t* workspace, const int64_t* num_tokens, const int64_t* own, int64_t ranks,
                    const double* mean_logprob, const uint8_t* refused, double* mean, float* extremes, Device) {
  const SelectWorkspace& w = *reinterpret_cast<const SelectWorkspace*>(workspace);
  uint64_t largest = 0;
  for (int64_t r = 0; r < ranks; r++) largest = std::max<uint64_t>(largest, own[2 * r]);
  const Digit digit = pick(w.histograms[kScoreRounds - 1], w.states[kScoreRounds - 1]);
  summarise(w, digit, largest, *num_tokens, *mean_logprob, refused, mean, extremes);
  return nullptr;
}

}  // namespace entcov::cpu
