// Merges of the segments that long rows are cut into (launch.h); implemented in merge.cu. Segments carry no signatures.
#pragma once

#include "launch.h"

namespace entcov::cuda {

// segments_stats [segments, T, fields] -> stats [T, fields] and, unless outputs.logprob is null, the outputs [T].
// Segments are merged in their order. stats may be segments_stats if segments is 1.
Error merge_segments(const float* segments_stats, int64_t segments, int64_t T, const int64_t* target,
                     const RowSpec& spec, int fields, float* stats, const RowOutputs& outputs, Device stream);

// The same for CovarianceStats: [segments, T, 8] -> [T, 8].
Error merge_covariance_segments(const float* segments_stats, int64_t segments, int64_t T, const uint8_t* row_mask,
                                const RowSpec& spec, float* stats, const CovarianceOutputs& outputs, Device stream);

}  // namespace entcov::cuda
