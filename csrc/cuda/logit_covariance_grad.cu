// logit_covariance_grad of ../kernels.h, which has the formula: one pass, two exponentials per column, 2^t and 2^s with
// t = x log2(e), s = z log2(e).
//
// Memory. Reads 2 sizeof(T) bytes per column, writes sizeof(T). The logits of rows that are masked, or whose incoming
// gradients are 0, are not read.
//
// Parallelisation. As in logits_grad.cu: a team per segment, no communication.
//
// Numerics. t and s are limited to >= -127, where 2^t is 0, so a logit of -inf adds 0 and not NaN.
#include "device/columns.cuh"

namespace entcov::cuda {
namespace {

struct LogitCovarianceGradArgs {
  Logits logits_old, logits_new;
  const uint8_t* row_mask;  // [T] or null
  RowSpec spec;
  const float* stats;  // [T, 8]
  CovarianceGrads grads;
  void* grad;  // [T, width], rows grad_row_stride apart
  int64_t grad_row_stride;
  Cut cut;
};

// The terms of the gradient from one of the two tensors.
struct Side {
  float max, a, b;
  __device__ __forceinline__ float2 terms(float2 x, float scale) const {
    const float2 t = at_least(mul2(add2(x, both(-max)), both(scale)), kExp2Floor);
    return mul2(exp2_fast(t), fma2(t, both(b), both(a)));
  }
};

struct Pair {
  uint4 before, after;
};

template <class T, bool kAlike, int kTeamWarps>
__global__ void __launch_bounds__(kThreads, kBlocks<kTeamWarps>)
    logit_covariance_grad_kernel(const LogitCovarianceGradArgs a) {
  constexpr int kSize = kTeamWarps * kWarp;
  const int64_t num_columns = a.spec.columns(a.logits_new.width);
  const Unit at = this_unit<kTeamWarps>(a.cut, num_columns, a.logits_new.width);
  const int64_t t = at.row;
  if (t >= a.logits_new.T) return;
  const int rank = static_cast<int>(threadIdx.x) % kSize;
  T* grad = static_cast<T*>(a.grad) + t * a.grad_row_stride + at.begin;

  const float g_cov = a.grads.covariance ? a.grads.covariance[t] : 0.0f;
  const float g_h = a.grads.entropy_change ? a.grads.entropy_change[t] : 0.0f;
  const float g_kl = a.grads.kl ? a.grads.kl[t] : 0.0f;
  if ((a.row_mask && !a.row_mask[t]) || (g_cov == 0.0f && g_h == 0.0f && g_kl == 0.0f)) {
    Columns<T>(grad, at.live + at.padding).fill(0.0f, rank, kSize);
    return;
  }

  const float* s = a.stats + t * kCovarianceFields;
  const float inv_t = a.spec.inv_temperature, scale = inv_t * kLog2E;
  const float per_p = inv_t / (1.0f + s[1]), mean_x = s[2] / (1.0f + s[1]);
  const float per_q = inv_t / (1.0f + s[4]), mean_z = s[5] / (1.0f + s[4]);
  const Side before{s[0], per_p * (-g_kl - g_cov * mean_x), per_p * g_cov * kLn2};
  const Side after{s[3], per_q * (g_kl + g_h * mean_z), -per_q * g_h * kLn2};

  const Columns<T> columns(grad, at.live);
  if (at.padding > 0) Columns<T>(grad + at.live, at.padding).fill(0.0f, rank, kSize);
  const float check = before.a + before.b + after.a + after.b;
  if (check != check) {
    columns.fill(NAN, rank, kSize);
    return;
  }

  const T *old_row = a.logits_old.row<T>(t) + at.begin, *new_row = a.logits_new.row<T>(t) + at.begin;
  const int head = columns.head, count = at.live - head;
  const int64_t in_front = at.begin + head, behind = num_columns - at.begin - at.live;
  const Reader<T, kAlike, Use::kOnce> old_reader(old_row + head, count, in_front, behind);
  const Reader<T, kAlike, Use::kOnce> new_reader(new_row + head, count, in_front, behind);
  columns.template write<kTeamWarps>(
      rank,
      [&](int i) {
        return kAlike ? Pair{old_reader.whole(i), new_reader.whole(i)} : Pair{old_reader.any(i), new_reader.any(i)};
      },
      [&](const Pair& in) {
        float2 u[kVector<T> / 2], v[kVector<T> / 2];
        unpack<T>(in.before, u), unpack<T>(in.after, v);
#pragma unroll
        for (int k = 0; k < kVector<T> / 2; k++) u[k] = add2(before.terms(u[k], scale), after.terms(v[k], scale));
        return pack<T>(u);
      },
      [&](int j) {
        return add2(before.terms(both(Element<T>::widen(old_row[j])), scale),
                    after.terms(both(Element<T>::widen(new_row[j])), scale)).x;
      });
}

}  // namespace

Error logit_covariance_grad(const Logits& logits_old, const Logits& logits_new, const uint8_t* row_mask,
                            const RowSpec& spec, const float* stats, const CovarianceGrads& grads, void* grad,
                            int64_t grad_row_stride, Device stream) {
  if (logits_new.width == 0) return nullptr;
  const Cut c = cut(logits_new.width);
  const LogitCovarianceGradArgs args{logits_old, logits_new, row_mask, spec, stats, grads, grad, grad_row_stride, c};
  const auto kernel = [](auto t, auto alike, auto one_warp) {
    return logit_covariance_grad_kernel<decltype(t), alike, one_warp ? 1 : kWarps>;
  };
  const bool alike =
      aligned_alike(logits_old, grad, grad_row_stride) && aligned_alike(logits_new, grad, grad_row_stride);
  return launch_for("logit_covariance_grad", kernel, logits_new.dtype, c.blocks(logits_new.T), stream, args, alike,
                    c.one_warp);
}

}  // namespace entcov::cuda
