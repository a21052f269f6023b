// launch.h: the message of a failed launch; and segments() of kernels.h.
#include "launch.h"

#include <cstdio>

namespace entcov::cuda {

Error describe_failure(cudaError_t error, const char* kernel, int64_t blocks) {
  static thread_local char message[256];
  snprintf(message, sizeof message, "entcov: %s: the launch of %lld blocks of %d threads failed: %s (%s)", kernel,
           static_cast<long long>(blocks), kThreads, cudaGetErrorString(error), cudaGetErrorName(error));
  cudaGetLastError();
  return message;
}

int64_t segments(int64_t columns) { return cut(columns).segments; }

}  // namespace entcov::cuda
