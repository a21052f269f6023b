// Merges of the segments that long rows are cut into. Unlike shards they bring no signature.
#pragma once

#include "launch.h"

namespace entcov::cuda {

// [segments, T, fields] -> [T, fields], and the outputs where they are wanted.
Error merge_segments(const float* segments_stats, int64_t segments, int64_t T, const int64_t* target,
                     const RowSpec& spec, int fields, float* stats, const RowOutputs& outputs, Device stream);
Error merge_covariance_segments(const float* segments_stats, int64_t segments, int64_t T, const uint8_t* row_mask,
                                const RowSpec& spec, float* stats, const CovarianceOutputs& outputs, Device stream);

}  // namespace entcov::cuda
