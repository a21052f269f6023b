// How a row is divided among threads, and how a kernel is launched.
//
// A row is cut into segments. A unit is one segment of one row; it is computed by a team, which is one warp or one
// block of 256 threads. The number of segments and the size of the team depend on the number of columns alone. So the
// order of additions within a row, and every bit of its result, is independent of the number of rows.
//
//   columns                team          segments per row    units per block
//   <= 2,048               a warp        1                   8
//   <= 40,960              a block       1                   1
//   more                   a block       ceil(columns / 40,960), of nearly equal length
//
// 40,960 logits keep a block busy for tens of microseconds, so its start and end overlap with the other blocks on the
// multiprocessor; a vocabulary of 152,064 still gives 4 units per row. Segments of a row are merged by a second, small
// launch (merge.cuh).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "../kernels.h"

namespace entcov::cuda {

constexpr int kWarp = 32;
constexpr int kThreads = 256;  // of a block
constexpr int kWarps = kThreads / kWarp;
constexpr int64_t kOneWarpColumns = 2048;  // the longest row that one warp computes
constexpr int64_t kSegmentColumns = 40960;
constexpr int64_t kSegmentMultiple = 128;  // every segment is aligned to 16 bytes if its row is

struct Cut {
  int segments;   // per row
  int length;     // columns of a segment; the last one may be shorter
  bool one_warp;  // whether the team is a warp
  int64_t blocks(int64_t rows) const {
    const int64_t units = rows * segments;
    return one_warp ? (units + kWarps - 1) / kWarps : units;
  }
};

inline Cut cut(int64_t columns) {
  Cut c;
  c.segments = static_cast<int>(columns <= kSegmentColumns ? 1 : (columns + kSegmentColumns - 1) / kSegmentColumns);
  const int64_t even = (columns + c.segments - 1) / c.segments;
  c.length = static_cast<int>((even + kSegmentMultiple - 1) / kSegmentMultiple * kSegmentMultiple);
  c.one_warp = columns <= kOneWarpColumns;
  return c;
}

// The message of a failed launch. Clears the runtime's last error, so that a later, unrelated check does not report it.
Error describe_failure(cudaError_t error, const char* kernel, int64_t blocks);

// While an object of this class exists, this thread may load a kernel although a stream is being captured into a CUDA
// graph. The first launch of a kernel in a process loads it, and drivers before 12.3 do not permit that in other modes.
class MayLoad {
 public:
  MayLoad() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  ~MayLoad() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  MayLoad(const MayLoad&) = delete;
  MayLoad& operator=(const MayLoad&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;  // then the mode before
};

// Enqueues kernel(args) with `blocks` blocks of kThreads threads on the stream. Returns null, or the message of the
// failure, which names the kernel `name`. With blocks = 0 it does nothing.
template <class Args>
Error launch(const char* name, void (*kernel)(Args), int64_t blocks, cudaStream_t stream, const Args& args) {
  if (blocks == 0) return nullptr;
  if (blocks > INT32_MAX) return describe_failure(cudaErrorInvalidConfiguration, name, blocks);
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(kThreads);
  config.stream = stream;
  cudaError_t error;
  {
    const MayLoad may_load;
    error = cudaLaunchKernelEx(&config, kernel, args);
  }
  return error == cudaSuccess ? nullptr : describe_failure(error, name, blocks);
}

// Calls run(flag...) with every flag as a std::bool_constant, which may be a template argument.
template <class Run>
Error with_flags(Run run) {
  return run();
}
template <class Run, class... Flags>
Error with_flags(Run run, bool flag, Flags... others) {
  const auto known = [&](auto value) {
    return with_flags([&](auto... values) { return run(value, values...); }, others...);
  };
  return flag ? known(std::true_type{}) : known(std::false_type{});
}

// launch() of the kernel that choose(T{}, flag...) returns, with the element type T of `dtype`.
template <class Choose, class Args, class... Flags>
Error launch_for(const char* name, Choose choose, DType dtype, int64_t blocks, cudaStream_t stream, const Args& args,
                 Flags... flags) {
  const auto with_type = [&](auto t) {
    return with_flags([&](auto... known) { return launch(name, choose(t, known...), blocks, stream, args); }, flags...);
  };
  if (dtype == kBFloat16) return with_type(__nv_bfloat16{});
  if (dtype == kFloat16) return with_type(__half{});
  return with_type(float{});
}

// Whether every row starts at a 16-byte boundary.
inline bool aligned_rows(const Logits& logits) {
  return reinterpret_cast<uintptr_t>(logits.data) % 16 == 0 &&
         (logits.T <= 1 || logits.row_stride * logits.element_bytes() % 16 == 0);
}

}  // namespace entcov::cuda
