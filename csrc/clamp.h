// Clamped entropy of the CPU core: the entropy of the softmax over the `kept` largest logits of a row, exact for any
// sharding of the vocabulary. Same conventions as entcov.h. The four steps, and what travels between shards:
//
//   order_statistics   logits -> a sketch: chosen order statistics of this shard         (travels with RowStats)
//   clamp_bracket      sketches of all shards -> lo <= threshold <= hi, the same on every rank
//   clamp_collect      logits -> sums above hi, counts, and the raw values between lo and hi     (travels)
//   clamp_finish       parts of all shards -> the threshold, its ties' weight, L_k, H_k
//
// On an unsharded row the sketch asks for rank `kept` alone, so lo = hi = threshold and nothing lies between.
// Formulas: docs/math.md (10) to (12).
//
// "Dead" rows are those to ignore (target == ignore_index; every output 0) and those that hold a NaN or a +inf
// (stats say rest = NaN; every output NaN). Their sketches and parts mean nothing and are not looked at.
#pragma once

#include <cstdint>

namespace entcov::cpu {

// A part is [kPartFields + capacity] floats a row: the members below, then the raw values between lo and hi.
enum PartField : int {
  kPartRest = 0,      // sum e^y over hi < x < max, y = (x - max) / temperature with the row's max over all shards
  kPartXExp = 1,      // sum y e^y over the same
  kPartAtMax = 2,     // how many equal max. Counts are exact: a shard has less than 2^24 columns
  kPartAboveHi = 3,   // how many x > hi
  kPartEqualHi = 4,   // how many x == hi
  kPartEqualLo = 5,   // how many x == lo
  kPartBetween = 6,   // how many lo < x < hi
  kPartFields = 7,
};

// out [T, num_ranks]: the ranks[i]-th largest logit of every row, as raw fp32. ranks: ascending, in 1..num_columns,
// repeats allowed. -0 counts as +0, and comes out as +0. num_columns = 0 gives -inf. Ignored rows are not read.
// Scratch: 0.5 MiB a thread, and 2 bytes a column for fp32.
void order_statistics(int dtype, const void* logits, int64_t row_stride, int64_t T, int64_t num_columns,
                      const int64_t* target, int64_t ignore_index, const int64_t* ranks, int64_t num_ranks, float* out,
                      int threads);

// sketches [R, T, m], R apart by shard_stride and rows by row_stride elements; ranks [R, m] is what each shard's m order
// statistics are, ascending from 1 to 2^24, or all 0 for a shard without columns. out [T, 3]: lo, hi, and a bound on how
// many values lie strictly between them on any one shard; NaN, NaN, 0 for sketches that hold a NaN or no bracket.
void clamp_bracket(const float* sketches, int64_t shard_stride, int64_t row_stride, int64_t R, int64_t T, int64_t m,
                   const int64_t* ranks, const float* stats, int fields, const int64_t* target, int64_t ignore_index,
                   int64_t kept, float* out, int threads);

// bracket [T, bracket_fields]: lo, hi first. part [T, kPartFields + capacity]; unused places of it are 0.
void clamp_collect(int dtype, const void* logits, int64_t row_stride, int64_t T, int64_t num_columns,
                   const int64_t* target, int64_t ignore_index, const float* stats, int fields, const float* bracket,
                   int bracket_fields, int64_t capacity, float inv_temperature, float* part, int threads);

// parts [R, T, kPartFields + capacity] -> clamp [T, 4]: threshold (raw), weight of the logits that equal it,
// L_k = log sum_kept w e^y, H_k. Four NaN for parts that contradict themselves: counts that are none, values that are NaN,
// or a kept-th logit that is nowhere.
void clamp_finish(const float* parts, int64_t R, int64_t T, int64_t capacity, const float* bracket, int bracket_fields,
                  const float* stats, int fields, const int64_t* target, int64_t ignore_index, int64_t kept,
                  float inv_temperature, float* clamp, int threads);

}  // namespace entcov::cpu
