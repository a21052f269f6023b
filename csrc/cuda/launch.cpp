// launch.h: the message of a failed launch; and segments() of kernels.h.
#include "launch.h"

#include <cstdio>

namespace entcov::cuda {

namespace {

// Where the binary does not fit the machine, which shows at the first launch: in which way, and what to do about it.
void reason(cudaError_t error, char* text, size_t size) {
  constexpr int kMajor = CUDART_VERSION / 1000, kMinor = CUDART_VERSION % 1000 / 10;
  int driver = 0, device = 0, major = 0, minor = 0;
  if (error == cudaErrorInsufficientDriver || error == cudaErrorUnsupportedPtxVersion) {
    if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0) {
      snprintf(text, size, ". No NVIDIA driver was found on this machine");
      return;
    }
    snprintf(text, size,
             ". entcov was built with CUDA %d.%d, and the driver supports CUDA up to %d.%d: update the driver, or build "
             "entcov again with CUDA %d (CUDA_HOME names the toolkit)",
             kMajor, kMinor, driver / 1000, driver % 1000 / 10, driver / 1000);
  } else if (error == cudaErrorNoKernelImageForDevice) {
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    snprintf(text, size,
             ". entcov was built without machine code for this GPU, of compute capability %d.%d: build it again with "
             "ENTCOV_CUDA_ARCHS=%d%d",
             major, minor, major, minor);
  }
}

}  // namespace

Error describe_failure(cudaError_t error, const char* kernel, int64_t blocks) {
  static thread_local char message[512];
  char fitting[256] = "";
  reason(error, fitting, sizeof fitting);
  snprintf(message, sizeof message, "entcov: %s: the launch of %lld blocks of %d threads failed: %s (%s)%s", kernel,
           static_cast<long long>(blocks), kThreads, cudaGetErrorString(error), cudaGetErrorName(error), fitting);
  cudaGetLastError();
  return message;
}

int64_t segments(int64_t columns) { return cut(columns).segments; }

}  // namespace entcov::cuda
