// Compiles one source for three instruction sets, and distributes rows over threads.
//
// An op is a struct with
//     template <int W> static void row(const Args&, int64_t t);     (ENTCOV_INLINE)
// for_rows<Op>() compiles row() for every instruction set and runs the best one that this CPU supports, over all
// threads.
//
// Only the row_* functions below have a target attribute. Everything else, such as inline functions of the standard
// library that the linker may share, is compiled without wide instructions and runs on every CPU.
#pragma once

#include <algorithm>
#include <atomic>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "simd.h"

namespace entcov::cpu {

enum class Isa : int { baseline, avx2, avx512 };
Isa current_isa();

#if defined(__x86_64__)
#define ENTCOV_AVX2 "avx2,fma,bmi,bmi2"
#define ENTCOV_AVX512 ENTCOV_AVX2 ",avx512f,avx512bw,avx512cd,avx512dq,avx512vl,prefer-vector-width=512"
template <class Op>
__attribute__((target(ENTCOV_AVX512))) void row_avx512(const typename Op::Args& a, int64_t t) {
  Op::template row<16>(a, t);
}
template <class Op>
__attribute__((target(ENTCOV_AVX2))) void row_avx2(const typename Op::Args& a, int64_t t) {
  Op::template row<8>(a, t);
}
#endif
template <class Op>
void row_baseline(const typename Op::Args& a, int64_t t) {
  Op::template row<4>(a, t);
}

// Whether any thread has found a row that is NaN.
struct NanFlag {
  std::atomic<bool> seen{false};
  void note(bool nan) {
    if (nan) seen.store(true, std::memory_order_relaxed);
  }
  Error error() const { return seen.load(std::memory_order_relaxed) ? kRowIsNaN : nullptr; }
};

// The number of threads to request from OpenMP: at most one per processor. OpenMP ends the process if it cannot start
// as many as requested.
inline int usable_threads(int threads) {
#ifdef _OPENMP
  return std::max(1, std::min(threads, omp_get_num_procs()));
#else
  (void)threads;
  return 1;
#endif
}

// Op::row() as compiled for the instruction set of this process.
template <class Op>
auto best_row() {
  auto row = row_baseline<Op>;
#if defined(__x86_64__)
  if (current_isa() == Isa::avx512) row = row_avx512<Op>;
  if (current_isa() == Isa::avx2) row = row_avx2<Op>;
#endif
  return row;
}

// Calls Op::row() for all rows of `logits`. With up to 16,384 logits, starting a thread costs more than it saves.
template <class Op>
void for_rows(const typename Op::Args& args, const Logits& logits, int threads) {
  const int64_t T = logits.T, work = T * logits.width;
  const auto row = best_row<Op>();
  threads = usable_threads(threads);
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1) if (threads > 1 && T > 1 && work > 16384)
  for (int64_t t = 0; t < T; t++) row(args, t);
}

// Calls Op::row(args, c) for the chunks c of T tokens: c * kTokensAChunk to (c + 1) * kTokensAChunk, the last may be
// shorter. A chunk takes about a microsecond: below 32, threads cost more than they save.
constexpr int64_t kTokensAChunk = 1024;
template <class Op>
void for_chunks(const typename Op::Args& args, int64_t T, int threads) {
  const auto row = best_row<Op>();
  const int64_t chunks = (T + kTokensAChunk - 1) / kTokensAChunk;
  threads = usable_threads(threads);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1 && chunks > 32)
  for (int64_t c = 0; c < chunks; c++) row(args, c);
}

// Calls run(D{}) with the storage type (simd.h) of `dtype`.
template <class F>
auto with_dtype(DType dtype, F run) {
  if (dtype == kBFloat16) return run(BFloat16{});
  if (dtype == kFloat16) return run(Float16{});
  return run(Float32{});
}

}  // namespace entcov::cpu
