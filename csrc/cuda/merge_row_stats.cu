// [R, T, fields] statistics of shards, or of segments of a row, -> [T, fields]: merge() over R in its fixed order, so
// every rank that holds the same shards gets the same bits. One thread a row; one exponential a shard.
//
// A row without a finite logit is an error of the caller's that a kernel cannot raise: its `rest` becomes NaN, and with
// it everything computed from the row. Segments are not whole rows; theirs stay as they are.
#include "../covariance_stats.h"
#include "../row_stats.h"
#include "launch.h"

namespace entcov::cuda {
namespace {

struct MergeRowStatsArgs {
  const float* shards;  // [R, T, fields], R apart by shard_stride
  int64_t shard_stride, R, T;
  int fields;
  const int64_t* target;  // [T]
  int64_t ignore_index;
  float inv_temperature;
  bool whole_rows;
  float* out;  // [T, fields]
};

__global__ void __launch_bounds__(kThreads) merge_row_stats_kernel(const MergeRowStatsArgs a) {
  const int64_t t = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (t >= a.T) return;
  const bool moments = a.fields == kRowStatsMomentsFields;
  RowStats s;
  if (a.target[t] == a.ignore_index) {
    s.max = s.target = 0.0f;
  } else {
    for (int64_t r = 0; r < a.R; r++) {
      const float* p = a.shards + r * a.shard_stride + t * a.fields;
      RowStats part;
      part.max = p[0], part.rest = p[1], part.sum_xexp = p[2], part.target = p[3];
      if (moments) part.rest2 = p[4], part.sum_xexp2 = p[5], part.sum_x2exp = p[6];
      s = merge(s, part, a.inv_temperature);
    }
    if (a.whole_rows && s.max == -INFINITY) s.rest = NAN;
  }
  float* p = a.out + t * a.fields;
  p[0] = s.max, p[1] = s.rest, p[2] = s.sum_xexp, p[3] = s.target;
  if (moments) p[4] = s.rest2, p[5] = s.sum_xexp2, p[6] = s.sum_x2exp;
}

struct MergeCovarianceArgs {
  const float* shards;  // [R, T, 8]
  int64_t shard_stride, R, T;
  const uint8_t* row_mask;  // [T] or null
  float inv_temperature;
  bool whole_rows;
  float* out;  // [T, 8]
};

__global__ void __launch_bounds__(kThreads) merge_covariance_stats_kernel(const MergeCovarianceArgs a) {
  const int64_t t = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (t >= a.T) return;
  CovarianceStats s;
  if (a.row_mask && !a.row_mask[t]) {
    s.max_old = s.max_new = 0.0f;
  } else {
    for (int64_t r = 0; r < a.R; r++) {
      const float* p = a.shards + r * a.shard_stride + t * kCovarianceFields;
      s = merge(s, CovarianceStats{p[0], p[1], p[2], p[3], p[4], p[5], p[6], p[7]}, a.inv_temperature);
    }
    if (a.whole_rows && s.max_old == -INFINITY) s.rest_old = s.sum_d = s.sum_xd = NAN;
    if (a.whole_rows && s.max_new == -INFINITY) s.rest_new = s.sum_d = s.sum_xd = NAN;
  }
  float* p = a.out + t * kCovarianceFields;
  p[0] = s.max_old, p[1] = s.rest_old, p[2] = s.sum_xexp_old, p[3] = s.max_new;
  p[4] = s.rest_new, p[5] = s.sum_xexp_new, p[6] = s.sum_d, p[7] = s.sum_xd;
}

int64_t blocks(int64_t rows) { return (rows + kThreads - 1) / kThreads; }

}  // namespace

cudaError_t merge_row_stats(const float* shards, int64_t shard_stride, int64_t R, int64_t T, int fields,
                            const int64_t* target, int64_t ignore_index, float inv_temperature, float* out,
                            cudaStream_t stream) {
  return launch("merge_row_stats", merge_row_stats_kernel, blocks(T), stream,
                MergeRowStatsArgs{shards, shard_stride, R, T, fields, target, ignore_index, inv_temperature, true, out});
}

cudaError_t merge_segments(const float* parts, int64_t segments, int64_t T, int fields, const int64_t* target,
                           int64_t ignore_index, float inv_temperature, float* out, cudaStream_t stream) {
  return launch(
      "merge of segments", merge_row_stats_kernel, blocks(T), stream,
      MergeRowStatsArgs{parts, T * fields, segments, T, fields, target, ignore_index, inv_temperature, false, out});
}

cudaError_t merge_covariance_stats(const float* shards, int64_t shard_stride, int64_t R, int64_t T,
                                   const uint8_t* row_mask, float inv_temperature, float* out, cudaStream_t stream) {
  return launch("merge_covariance_stats", merge_covariance_stats_kernel, blocks(T), stream,
                MergeCovarianceArgs{shards, shard_stride, R, T, row_mask, inv_temperature, true, out});
}

cudaError_t merge_covariance_segments(const float* parts, int64_t segments, int64_t T, const uint8_t* row_mask,
                                      float inv_temperature, float* out, cudaStream_t stream) {
  return launch("merge of covariance segments", merge_covariance_stats_kernel, blocks(T), stream,
                MergeCovarianceArgs{parts, T * kCovarianceFields, segments, T, row_mask, inv_temperature, false, out});
}

}  // namespace entcov::cuda
