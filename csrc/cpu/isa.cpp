// Which instruction set the CPU kernels use: the best one that this CPU supports, unless set_isa() chose another.
#include <atomic>

#include "dispatch.h"

namespace entcov::cpu {

extern const float kExpCutoff = -88.0f;

namespace {

constexpr const char* kNames[] = {"baseline", "avx2", "avx512"};

bool supported(Isa isa) {
#if defined(__x86_64__)  // the features that ENTCOV_AVX2 and ENTCOV_AVX512 (dispatch.h) enable
  if (isa == Isa::avx2)
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
           __builtin_cpu_supports("bmi2");
  if (isa == Isa::avx512)
    return supported(Isa::avx2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl");
#endif
  return isa == Isa::baseline;
}

std::atomic<Isa>& chosen() {
  static std::atomic<Isa> isa{supported(Isa::avx512) ? Isa::avx512 : supported(Isa::avx2) ? Isa::avx2 : Isa::baseline};
  return isa;
}

}  // namespace

Isa current_isa() { return chosen().load(std::memory_order_relaxed); }

const char* isa() { return kNames[static_cast<int>(current_isa())]; }

bool set_isa(const char* name) {
  for (int i = 0; i < 3; i++)
    if (!strcmp(name, kNames[i]) && supported(static_cast<Isa>(i))) {
      chosen() = static_cast<Isa>(i);
      return true;
    }
  return false;
}

}  // namespace entcov::cpu
