// Two logit tensors -> CovarianceStats of every row (../logit_covariance.h), in one pass over both with two
// exponentials per column.
//
// Memory. Reads 2 sizeof(T) bytes per column, writes 32 bytes per row, or per segment if rows are cut. The outputs of
// whole rows are computed by a second launch (merge_covariance_segments): here they would take registers from the loop.
//
// Parallelisation. Segments, tiles and the fast and slow path are those of row_stats.cu. A group takes the slow path if
// it reaches the reference of either tensor.
//
// Numerics. The change d of a logit is summed raw, relative to the change of the references, and scaled at the end. A
// column with probability 0 in the old policy is left out of the sums of d, whatever its new logit is. If a sum of d
// overflows, because of logits near 1e38 or a logit that became -inf, the sums of d are computed again in a second pass
// with every logit in units of kChangeUnit.
#include "merge.cuh"
#include "device/sums.cuh"
#include "device/block_reduction.cuh"

namespace entcov::cuda {
namespace {

constexpr int kVectors = 2;  // vectors of each tensor that a thread loads before it uses them: one group

struct CovarianceStatsArgs {
  Logits logits_old, logits_new;
  const uint8_t* row_mask;  // [T] or null
  int64_t num_columns;      // without padding
  float scale;              // log2(e) / temperature
  float* stats;             // [segments, T, 8]
  Cut cut;
};

struct PairSums {
  static constexpr int kCount = 8;
  Sums before, after;
  float change;  // new reference - old reference, 0 for a reference of -inf; d of an element is relative to it
  float d = 0.0f, td = 0.0f;  // sum 2^t d and sum t 2^t d over all elements, with t of the old logits

  __device__ __forceinline__ void refer_to(float old_max, float new_max, float c) {
    before.refer_to(old_max, c), after.refer_to(new_max, c);
    change = (new_max == -INFINITY ? 0.0f : new_max) - (old_max == -INFINITY ? 0.0f : old_max);
  }

  __device__ __forceinline__ void move_before(float dt) {
    td = (td + dt * d) * exp2_fast(dt), d *= exp2_fast(dt);
    before.move(dt);
  }

  // Corrects the sums for the rounding of max c (sign 1), or undoes it (-1).
  __device__ __forceinline__ void correct(float c, float sign) {
    const float b = sign * before.deficit(c), a = sign * after.deficit(c);
    if (b != 0.0f) move_before(b);
    if (a != 0.0f) after.move(a);
  }

  // Rescales corrected sums to maxima that are as large or larger.
  __device__ __forceinline__ void raise(float old_max, float new_max, float c) {
    PairSums next;
    next.refer_to(old_max, new_max, c);
    const float moved = change - next.change;
    if (moved != 0.0f) {  // every d increases by it
      td += moved * before.te;
      d += moved * (before.e + before.at_max);
    }
    if (before.max < old_max) {
      before.release_max();
      const float dt = before.distance(old_max, c);
      if (dt > kExp2Floor) {
        move_before(dt);
      } else {
        d = td = 0.0f;  // not by multiplication: they may be infinite
        before.move(kExp2Floor);
      }
    }
    if (after.max < new_max) {
      after.release_max();
      const float dt = after.distance(new_max, c);
      after.move(dt > kExp2Floor ? dt : kExp2Floor);
    }
  }

  template <class T, bool kSlow>
  __device__ __forceinline__ void add(const uint4 (&u)[kVectors], const uint4 (&v)[kVectors], float c) {
    float2 sp, stp, sq, szq, spd, stpd;  // x: sums over the even columns, y: over the odd ones
#pragma unroll
    for (int g = 0; g < kVectors; g++) {
      float2 x[kVector<T> / 2], y[kVector<T> / 2];
      unpack<T>(u[g], x), unpack<T>(v[g], y);
#pragma unroll
      for (int k = 0; k < kVector<T> / 2; k++) {
        const bool first = g == 0 && k == 0;
        const float2 t = kSlow ? before.slow_t(x[k], c) : before.fast_t(x[k], c);
        const float2 z = kSlow ? after.slow_t(y[k], c) : after.fast_t(y[k], c);
        float2 p = exp2_fast(t), q = exp2_fast(z);
        float2 pd = mul2(p, add2(sub2(y[k], x[k]), both(-change)));
        pd.x = p.x == 0.0f ? 0.0f : pd.x, pd.y = p.y == 0.0f ? 0.0f : pd.y;
        if (kSlow) before.count_max(x[k], p), after.count_max(y[k], q);
        sp = first ? p : add2(sp, p), stp = first ? mul2(t, p) : fma2(t, p, stp);
        sq = first ? q : add2(sq, q), szq = first ? mul2(z, q) : fma2(z, q, szq);
        spd = first ? pd : add2(spd, pd), stpd = first ? mul2(t, pd) : fma2(t, pd, stpd);
      }
    }
    before.e += sp.x + sp.y, before.te += stp.x + stp.y, after.e += sq.x + sq.y, after.te += szq.x + szq.y;
    d += spd.x + spd.y, td += stpd.x + stpd.y;
  }

  // Adds a group with an element at or above a reference, or one before the thread has seen a finite element of a
  // tensor.
  template <class T>
  __device__ __forceinline__ void add_slowly(const uint4 (&u)[kVectors], const uint4 (&v)[kVectors], float old_top,
                                             float new_top, float c) {
    if (old_top > before.max || new_top > after.max) {
      const float old_max = fmaxf(old_top, before.max), new_max = fmaxf(new_top, after.max);
      correct(c, 1.0f);
      raise(old_max, new_max, c);
      refer_to(old_max, new_max, c);
      correct(c, -1.0f);
    }
    // Only -inf and NaN so far in that tensor: any finite reference gives the right sums.
    const bool no_old = before.max == -INFINITY, no_new = after.max == -INFINITY;
    if (no_old) before.limit = before.max = 0.0f;
    if (no_new) after.limit = after.max = 0.0f;
    add<T, true>(u, v, c);
    if (no_old) before.limit = before.max = -INFINITY;
    if (no_new) after.limit = after.max = -INFINITY;
  }
};

// Computes the sums of d again, relative to the final maxima and in units of kChangeUnit. The loop saves registers
// rather than time, since it rarely runs.
template <class T>
__device__ __forceinline__ void sum_in_units(const T* old_row, const T* new_row, int first, int step, int count,
                                             float old_max, float new_max, float c, float (&sums)[2]) {
  constexpr float kUnits = 1.0f / kChangeUnit;
  const float from = old_max == -INFINITY ? 0.0f : old_max, to = new_max == -INFINITY ? 0.0f : new_max;
  const float change = to * kUnits - from * kUnits;
  sums[0] = sums[1] = 0.0f;
#pragma unroll 1
  for (int j = first; j < count; j += step) {
    const float x = Element<T>::widen(old_row[j]), y = Element<T>::widen(new_row[j]);
    const float t = at_least((x - from) * c, kExp2Floor), p = exp2_fast(t);
    const float pd = p == 0.0f ? 0.0f : p * ((y * kUnits - x * kUnits) - change);
    sums[0] += pd, sums[1] = fmaf(t, pd, sums[1]);
  }
}

template <class T, bool kAligned, int kTeamWarps>
__global__ void __launch_bounds__(kThreads, kBlocks<kTeamWarps>) covariance_stats_kernel(const CovarianceStatsArgs a) {
  using TheTeam = Team<kTeamWarps, PairSums::kCount>;
  constexpr int kTile = kVectors * TheTeam::kSize;
  __shared__ typename TheTeam::Shared shared, shared_new;
  __shared__ typename Team<kTeamWarps, 2>::Shared shared_again;

  const Unit unit = this_unit<kTeamWarps>(a.cut, a.num_columns, a.num_columns);
  const int count = unit.live;
  if (unit.row >= a.logits_new.T) return;
  const TheTeam team{static_cast<int>(threadIdx.x) % TheTeam::kSize};
  float* out = a.stats + (unit.segment * a.logits_new.T + unit.row) * kCovarianceFields;
  if (a.row_mask && !a.row_mask[unit.row]) {
    if (team.rank < kCovarianceFields) out[team.rank] = 0.0f;
    return;
  }

  const int64_t behind = a.num_columns - unit.begin - count;
  const T *old_row = a.logits_old.row<T>(unit.row) + unit.begin, *new_row = a.logits_new.row<T>(unit.row) + unit.begin;
  const Reader<T, kAligned> old_reader(old_row, count, unit.begin, behind);
  const Reader<T, kAligned> new_reader(new_row, count, unit.begin, behind);
  const int from = old_reader.begin() > new_reader.begin() ? old_reader.begin() : new_reader.begin();
  const int to = old_reader.end() < new_reader.end() ? old_reader.end() : new_reader.end();

  PairSums s;
  s.refer_to(-INFINITY, -INFINITY, a.scale);
  const int vectors = old_reader.vectors();
  for (int tile = 0; tile < vectors; tile += kTile) {
    uint4 u[kVectors], v[kVectors];
    const int first = tile + team.rank;
    if (tile >= from && tile + kTile <= to) {
      old_reader.whole(first, TheTeam::kSize, u);
      new_reader.whole(first, TheTeam::kSize, v);
    } else {
#pragma unroll
      for (int k = 0; k < kVectors; k++) {
        u[k] = old_reader.any(first + k * TheTeam::kSize);
        v[k] = new_reader.any(first + k * TheTeam::kSize);
      }
    }
    if (tile == 0) {
      const float old_max = team.max(largest<T>(u), shared, 0);
      s.refer_to(old_max, team.max(largest<T>(v), shared_new, 0), a.scale);
    }
    const float old_top = largest<T>(u), new_top = largest<T>(v);
    if (old_top < s.before.limit && new_top < s.after.limit)
      s.template add<T, false>(u, v, a.scale);
    else
      s.template add_slowly<T>(u, v, old_top, new_top, a.scale);
  }

  const float old_max = team.max(s.before.max, shared, 1), new_max = team.max(s.after.max, shared_new, 1);
  s.correct(a.scale, 1.0f);
  s.raise(old_max, new_max, a.scale);
  float v[PairSums::kCount] = {s.before.at_max, s.before.e, s.before.te, s.after.at_max,
                               s.after.e,       s.after.te, s.d,         s.td};
  team.sum(v, shared);
  const bool first = team.rank == 0;
  float d = v[6] * (1.0f / kChangeUnit), td = v[7] * (kLn2 / kChangeUnit), poison = 0.0f;
  if (first) {
    const float sum_exp_m1_old = old_max == INFINITY ? NAN : v[1] + (old_max == -INFINITY ? 0.0f : v[0] - 1.0f);
    const float sum_exp_m1_new = new_max == INFINITY ? NAN : v[4] + (new_max == -INFINITY ? 0.0f : v[3] - 1.0f);
    poison = 0.0f * (sum_exp_m1_old + sum_exp_m1_new);
    out[0] = old_max, out[1] = sum_exp_m1_old, out[2] = v[2] * kLn2;
    out[3] = new_max, out[4] = sum_exp_m1_new, out[5] = v[5] * kLn2;
  }
  const bool overflow = first && !(fabsf(d) < INFINITY && fabsf(td) < INFINITY);
  const Team<kTeamWarps, 2> again{team.rank};
  if (again.max(overflow ? 1.0f : 0.0f, shared_again, 0) > 0.0f) {
    float sums[2];
    sum_in_units(old_row, new_row, team.rank, TheTeam::kSize, count, old_max, new_max, a.scale, sums);
    again.sum(sums, shared_again);
    d = sums[0], td = sums[1] * kLn2;
  }
  if (first) out[6] = d + poison, out[7] = td + poison;
}

}  // namespace

Error covariance_stats(const Logits& logits_old, const Logits& logits_new, const uint8_t* row_mask,
                       const RowSpec& spec, float* stats, const CovarianceOutputs& outputs, float* workspace,
                       Device stream) {
  const int64_t T = logits_new.T, columns = spec.columns(logits_new.width);
  const Cut c = cut(columns);
  const CovarianceStatsArgs args{logits_old, logits_new, row_mask, columns, spec.inv_temperature * kLog2E,
                                 c.segments > 1 ? workspace : stats, c};
  const auto kernel = [](auto t, auto aligned, auto one_warp) {
    return covariance_stats_kernel<decltype(t), aligned, one_warp ? 1 : kWarps>;
  };
  const Error error = launch_for("covariance_stats", kernel, logits_new.dtype, c.blocks(T), stream, args,
                                 aligned_rows(logits_old) && aligned_rows(logits_new), c.one_warp);
  if (error || (c.segments == 1 && !outputs.covariance)) return error;
  return merge_covariance_segments(args.stats, c.segments, T, row_mask, spec, stats, outputs, stream);
}

}  // namespace entcov::cuda
