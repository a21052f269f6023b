// How a kernel is launched, how its failure is told, and how rows are shared out over blocks.
//
// Work comes in units: one segment of one row, done by a team of warps. The number of segments and the size of the team
// follow from the number of columns alone, so the order of additions in a row, and with it every bit of its result, does
// not depend on how many rows there are. A short row is one warp's work and eight of them share a block; a longer one is
// a block's. A row of up to kSegmentColumns is one segment: 40,960 logits keep a block busy for tens of microseconds,
// which hides its start and its end behind the other blocks of the multiprocessor, and a vocabulary of 152,064 still
// gives 4 units a row.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../kernels.h"

namespace entcov::cuda {

constexpr int kWarp = 32;
constexpr int kThreads = 256;  // of a block
constexpr int kWarps = kThreads / kWarp;
constexpr int64_t kOneWarpColumns = 2048;    // rows up to here are one warp's
constexpr int64_t kSegmentColumns = 40960;
constexpr int64_t kSegmentMultiple = 128;    // a segment starts as well aligned as its row does

// How the columns of a row are cut.
struct Cut {
  int segments;    // of a row
  int64_t length;  // columns of a segment; the last one may have fewer
  bool one_warp;   // a warp does a segment, not a block
  int64_t blocks(int64_t rows) const {
    const int64_t units = rows * segments;
    return one_warp ? (units + kWarps - 1) / kWarps : units;
  }
};

inline Cut cut(int64_t columns) {
  Cut c;
  c.segments = static_cast<int>(columns <= kSegmentColumns ? 1 : (columns + kSegmentColumns - 1) / kSegmentColumns);
  const int64_t even = (columns + c.segments - 1) / c.segments;
  c.length = (even + kSegmentMultiple - 1) / kSegmentMultiple * kSegmentMultiple;
  c.one_warp = columns <= kOneWarpColumns;
  return c;
}

// What a failed launch was, for Python. Clears the error from the runtime, so that nobody else reports it as theirs.
Error describe_failure(cudaError_t error, const char* kernel, int64_t blocks, int threads);

// A compile-time choice handed to a generic lambda.
template <bool kValue>
struct Bool {
  static constexpr bool value = kValue;
};

template <class Args>
Error launch(const char* name, void (*kernel)(Args), int64_t blocks, cudaStream_t stream, const Args& args) {
  if (blocks == 0) return nullptr;
  if (blocks > INT32_MAX) return describe_failure(cudaErrorInvalidConfiguration, name, blocks, kThreads);
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(kThreads);
  config.stream = stream;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, args);
  return error == cudaSuccess ? nullptr : describe_failure(error, name, blocks, kThreads);
}

}  // namespace entcov::cuda
