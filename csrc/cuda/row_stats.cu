// logits -> RowStats of every row (../row_stats.h), in one pass with one exponential per logit.
//
// Memory. Reads sizeof(T) bytes per logit and 8 bytes (the target) per row. Writes 16 bytes per row (28 with moments),
// and 8 bytes of outputs (20 with moments) if the rows are whole. A row that is cut into segments writes 16 or 28 bytes
// per segment to the workspace, which merge_segments() reads.
//
// Parallelisation. A team (a warp or a block of 256 threads, launch.h) computes a segment in tiles. In a tile every
// thread loads kVectors 16-byte vectors before it uses the first; in the last tile, groups of vectors behind the end of
// the segment are left out. With 4 blocks per multiprocessor, half of its maximum number of threads, 64 KB are in flight;
// 3 TB/s need about 16 KB. The first tile waits for the target, since the logits of ignored rows are not read.
//
// Numerics. Sums are relative to a reference (device/sums.cuh), which starts as the largest element of the team's first
// tile. Nearly every group of vectors is below the reference and costs one FFMA, one EX2, one FADD and one FFMA per
// element. A group that reaches or exceeds the reference takes the slow path; on random rows that is about one group of
// one thread per tile. Since many equal terms round in the same direction, chains of fp32 additions are short: 4 or 8
// in a group of two vectors, at most 80 groups in a thread, then pairwise sums.
#include "merge.cuh"
#include "device/sums.cuh"
#include "device/block_reduction.cuh"

namespace entcov::cuda {
namespace {

constexpr int kVectors = 4;  // vectors that a thread loads before it uses them
constexpr int kGroup = 2;    // vectors per comparison with the reference

struct RowStatsArgs {
  Logits logits;
  const int64_t* target;  // [T]
  RowSpec spec;
  float scale;         // log2(e) / temperature
  float* stats;        // [segments, T, fields]
  RowOutputs outputs;  // null if the row is a shard or is cut into segments
  Cut cut;
};

template <bool kMoments>
struct RowSums : Sums {
  static constexpr int kCount = kMoments ? 6 : 3;
  float e2 = 0.0f, te2 = 0.0f, t2e = 0.0f;  // sums of 2^{2t}, t 2^{2t}, t^2 2^t; unused without moments

  __device__ __forceinline__ void move(float d) {
    if (kMoments) {
      const float k = exp2_fast(d), k2 = k * k;
      t2e = (t2e + 2.0f * d * te + d * d * e) * k;
      te2 = (te2 + d * e2) * k2;
      e2 *= k2;
    }
    Sums::move(d);
  }

  __device__ __forceinline__ void release_max() {
    if (kMoments) e2 += at_max;
    Sums::release_max();
  }

  template <class T, bool kSlow>
  __device__ __forceinline__ void add(const uint4 (&u)[kGroup], float c) {
    float2 se, ste, se2, ste2, st2e;  // x: sums over the even elements, y: over the odd ones
#pragma unroll
    for (int g = 0; g < kGroup; g++) {
      float2 x[kVector<T> / 2];
      unpack<T>(u[g], x);
#pragma unroll
      for (int k = 0; k < kVector<T> / 2; k++) {
        const bool first = g == 0 && k == 0;
        const float2 t = kSlow ? slow_t(x[k], c) : fast_t(x[k], c);
        float2 w = exp2_fast(t);
        if (kSlow) count_max(x[k], w);
        se = first ? w : add2(se, w), ste = first ? mul2(t, w) : fma2(t, w, ste);
        if (kMoments) {  // computed apart from te, so that te has the same bits as without moments
          const float2 tw = mul2(t, w);
          se2 = first ? mul2(w, w) : fma2(w, w, se2);
          ste2 = first ? mul2(tw, w) : fma2(tw, w, ste2);
          st2e = first ? mul2(t, tw) : fma2(t, tw, st2e);
        }
      }
    }
    e += se.x + se.y, te += ste.x + ste.y;
    if (kMoments) e2 += se2.x + se2.y, te2 += ste2.x + ste2.y, t2e += st2e.x + st2e.y;
  }
};

template <class T, bool kMoments, bool kAligned, int kTeamWarps>
__global__ void __launch_bounds__(kThreads, kBlocks<kTeamWarps>) row_stats_kernel(const RowStatsArgs a) {
  using Sum = RowSums<kMoments>;
  using TheTeam = Team<kTeamWarps, Sum::kCount>;
  constexpr int kFields = kMoments ? kRowStatsMomentsFields : kRowStatsFields;
  constexpr int kTile = kVectors * TheTeam::kSize;
  __shared__ typename TheTeam::Shared shared;

  const int64_t columns = a.spec.columns(a.logits.width);
  const Unit unit = this_unit<kTeamWarps>(a.cut, columns, columns);
  if (unit.row >= a.logits.T) return;
  const TheTeam team{static_cast<int>(threadIdx.x) % TheTeam::kSize};
  const int64_t place = unit.segment * a.logits.T + unit.row;  // of the result; equal to the row if there are outputs
  const int64_t target = a.target[unit.row];
  if (target == a.spec.ignore_index) {
    if (team.rank == 0) store_ignored_row(place, kFields, a.stats, a.outputs);
    return;
  }

  const T* segment = a.logits.row<T>(unit.row) + unit.begin;
  const Reader<T, kAligned> reader(segment, unit.live, unit.begin, columns - unit.begin - unit.live);

  // Load the target's logit early.
  float target_logit = -INFINITY;
  if (team.rank == 0) {
    const int64_t local = a.spec.column_of(target) - unit.begin;
    if (local >= 0 && local < unit.live) target_logit = Element<T>::widen(segment[local]);
    if (!a.spec.is_token(target)) target_logit = NAN;  // makes the whole row NaN
  }

  Sum s;
  s.refer_to(-INFINITY, a.scale);
  const int vectors = reader.vectors();
  for (int tile = 0; tile < vectors; tile += kTile) {
    uint4 u[kVectors];
    reader.load(tile, team.rank, TheTeam::kSize, u);
    if (tile == 0) s.refer_to(team.max(largest<T>(u), shared, 0), a.scale);
#pragma unroll
    for (int k = 0; k < kVectors; k += kGroup) {
      if (k > 0 && tile + k * TheTeam::kSize >= vectors) break;  // no thread has columns in this group
      const uint4(&group)[kGroup] = *reinterpret_cast<const uint4(*)[kGroup]>(&u[k]);
      const float top = largest<T>(group);
      if (top < s.limit)
        s.template add<T, false>(group, a.scale);
      else
        add_slowly(s, top, a.scale, [&] { s.template add<T, true>(group, a.scale); });
    }
  }

  // Rescale all threads' sums to the team's max, then add them.
  const float max = team.max(s.max, shared, 1);
  correct(s, a.scale);
  if (s.max < max) raise(s, max, a.scale);
  float v[Sum::kCount] = {s.at_max, s.e, s.te};
  if constexpr (kMoments) v[3] = s.e2, v[4] = s.te2, v[5] = s.t2e;
  team.sum(v, shared);
  if (team.rank != 0) return;
  const float others = max == -INFINITY ? 0.0f : v[0] - 1.0f;  // elements equal to max, without the one left out
  const bool poisoned = max == INFINITY || target_logit != target_logit;
  RowStats out;
  out.max = max;
  out.sum_exp_m1 = poisoned ? NAN : v[1] + others;
  out.sum_xexp = poisoned ? NAN : v[2] * kLn2;
  out.target = target_logit;
  if constexpr (kMoments) {
    out.sum_exp2_m1 = v[3] + others;
    out.sum_xexp2 = v[4] * kLn2;
    out.sum_x2exp = v[5] * (kLn2 * kLn2);
  }
  store_row(out, place, kFields, a.spec.inv_temperature, a.stats, a.outputs);
}

}  // namespace

Error row_stats(const Logits& logits, const int64_t* target, const RowSpec& spec, int fields, float* stats,
                const RowOutputs& outputs, float* workspace, Device stream) {
  const Cut c = cut(spec.columns(logits.width));
  const bool whole = c.segments == 1;
  const RowStatsArgs args{logits, target, spec, spec.inv_temperature * kLog2E, whole ? stats : workspace,
                          whole ? outputs : RowOutputs{}, c};
  const auto kernel = [](auto t, auto moments, auto aligned, auto one_warp) {
    return row_stats_kernel<decltype(t), moments, aligned, one_warp ? 1 : kWarps>;
  };
  const Error error = launch_for("row_stats", kernel, logits.dtype, c.blocks(logits.T), stream, args,
                                 fields == kRowStatsMomentsFields, aligned_rows(logits), c.one_warp);
  if (error || whole) return error;
  return merge_segments(workspace, c.segments, logits.T, target, spec, fields, stats, outputs, stream);
}

}  // namespace entcov::cuda
