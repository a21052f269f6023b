// [R, T, fields] shard statistics -> [T, fields]: merge() over R in its fixed order, so every rank that holds the same
// shards gets the same bits.
#include "../row_stats.h"

#include "dispatch.h"

namespace entcov::cpu {
namespace {

RowStats read(const float* p, int fields) {
  RowStats s;
  s.max = p[0], s.rest = p[1], s.sum_xexp = p[2], s.target = p[3];
  if (fields == kRowStatsMomentsFields) s.rest2 = p[4], s.sum_xexp2 = p[5], s.sum_x2exp = p[6];
  return s;
}

void write(float* p, int fields, const RowStats& s) {
  p[0] = s.max, p[1] = s.rest, p[2] = s.sum_xexp, p[3] = s.target;
  if (fields == kRowStatsMomentsFields) p[4] = s.rest2, p[5] = s.sum_xexp2, p[6] = s.sum_x2exp;
}

}  // namespace

int64_t merge_row_stats(const float* shards, int64_t shard_stride, int64_t R, int64_t T, int fields,
                        const int64_t* target, int64_t ignore_index, float inv_temperature, float* out, int threads) {
  threads = usable_threads(threads);
  int64_t first_empty = T;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(min : first_empty) \
    if (threads > 1 && R * T > 4096)
  for (int64_t t = 0; t < T; t++) {
    RowStats s;
    if (target[t] == ignore_index) {
      s.max = s.target = 0.0f;
    } else {
      for (int64_t r = 0; r < R; r++)
        s = merge(s, read(shards + r * shard_stride + t * fields, fields), inv_temperature);
      if (s.max == -INFINITY && s.rest == 0.0f && t < first_empty) first_empty = t;
    }
    write(out + t * fields, fields, s);
  }
  return first_empty < T ? first_empty : -1;
}

}  // namespace entcov::cpu
