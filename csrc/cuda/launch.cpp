#include "launch.h"

#include <cstdio>

namespace entcov::cuda {
namespace {
thread_local char message[256] = "";
}

const char* launch_error() { return message; }

cudaError_t note_failure(cudaError_t error, const char* kernel, int64_t blocks, int threads) {
  snprintf(message, sizeof message, "%s: the launch of %lld blocks of %d threads failed: %s (%s)", kernel,
           static_cast<long long>(blocks), threads, cudaGetErrorString(error), cudaGetErrorName(error));
  cudaGetLastError();
  return error;
}

int64_t segments(int64_t num_columns) { return cut(num_columns).segments; }

}  // namespace entcov::cuda
