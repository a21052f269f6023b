// logits_grad of ../kernels.h, which has the formula: one pass, one exponential per logit, 2^t with t = y log2(e).
//
// Memory. Reads sizeof(T) bytes per logit and about 44 bytes per row, writes sizeof(T) bytes per logit. The logits of
// rows whose incoming gradients are 0 are not read.
//
// Parallelisation. A team (launch.h) computes a segment; teams do not communicate.
//
// Numerics. x - max is computed before the scaling, so an offset of 1e4 loses no digits. t is limited to >= -127, where
// 2^t is 0, so a logit of -inf gets 0 and not NaN. The target's column is computed separately: 1 - p is -expm1(log p),
// which keeps its digits as p -> 1.
//
// A target's logit that differs from the one in the statistics shows that the logits were written after the forward
// pass. The gradient of the target's column is then NaN. In place this is not checked, since logits_grad_ has no
// forward pass.
#include "device/columns.cuh"

namespace entcov::cuda {
namespace {

struct LogitsGradArgs {
  Logits logits;
  const int64_t* target;  // [T]
  RowSpec spec;
  const float* stats;  // [T, fields]
  int fields;
  RowGrads grads;
  const float* clamp;  // [T, 4] or null
  void* grad;          // [T, width], rows grad_row_stride apart
  int64_t grad_row_stride;
  Cut cut;
};

template <bool kClamped>
struct Coefficients {
  float max, scale, a, b;                 // a and b: of 2^t and t 2^t
  float threshold, tie_weight, a_k, b_k;  // a_k and b_k: the same for kept tokens

  __device__ __forceinline__ float weight(float x) const {
    return x > threshold ? 1.0f : x == threshold ? tie_weight : 0.0f;
  }

  __device__ __forceinline__ float2 columns(float2 x) const {
    const float2 t = at_least(mul2(add2(x, both(-max)), both(scale)), kExp2Floor);
    float2 factor = fma2(t, both(b), both(a));
    if (kClamped) factor = fma2({weight(x.x), weight(x.y)}, fma2(t, both(b_k), both(a_k)), factor);
    return mul2(exp2_fast(t), factor);
  }
};

template <class T, bool kClamped, bool kAlike, int kTeamWarps>
__global__ void __launch_bounds__(kThreads, kBlocks<kTeamWarps>) logits_grad_kernel(const LogitsGradArgs a) {
  constexpr int kSize = kTeamWarps * kWarp;
  const int64_t num_columns = a.spec.columns(a.logits.width);
  const Unit at = this_unit<kTeamWarps>(a.cut, num_columns, a.logits.width);
  const int64_t t = at.row;
  if (t >= a.logits.T) return;
  const int rank = static_cast<int>(threadIdx.x) % kSize;
  T* grad = static_cast<T*>(a.grad) + t * a.grad_row_stride + at.begin;

  const float g_lp = a.grads.logprob ? a.grads.logprob[t] : 0.0f;
  const float g_h = a.grads.entropy ? a.grads.entropy[t] : 0.0f;
  const float g_k = kClamped ? a.grads.clamped_entropy[t] : 0.0f;
  const int64_t target = a.target[t];
  if (target == a.spec.ignore_index || (g_lp == 0.0f && g_h == 0.0f && g_k == 0.0f)) {
    Columns<T>(grad, at.live + at.padding).fill(0.0f, rank, kSize);
    return;
  }

  const float* s = a.stats + t * a.fields;
  const float inv_t = a.spec.inv_temperature, max = s[0], sum_exp_m1 = s[1], sum_xexp = s[2];
  const float mean_y = sum_xexp / (1.0f + sum_exp_m1), per_p = inv_t / (1.0f + sum_exp_m1);
  Coefficients<kClamped> c;
  c.max = max, c.scale = inv_t * kLog2E;
  c.a = (g_h * mean_y - g_lp) * per_p, c.b = -g_h * per_p * kLn2;
  float clamp_scale = 0.0f, clamp_offset = 0.0f;
  if (kClamped) {
    const float* k = a.clamp + t * 4;
    c.threshold = k[0], c.tie_weight = k[1];
    clamp_scale = -g_k * inv_t * expf(-k[2]), clamp_offset = k[3] - k[2];
    c.a_k = clamp_scale * clamp_offset, c.b_k = clamp_scale * kLn2;
  }

  const Columns<T> columns(grad, at.live);
  if (at.padding > 0) Columns<T>(grad + at.live, at.padding).fill(0.0f, rank, kSize);
  float check = c.a + c.b + max;
  if (kClamped) check += c.a_k + c.b_k;
  if (check != check) {
    columns.fill(NAN, rank, kSize);
    return;
  }

  const T* x = a.logits.row<T>(t) + at.begin;
  const int64_t local = a.spec.column_of(target) - at.begin;
  const bool mine = local >= 0 && local < at.live && columns.owner(static_cast<int>(local), kSize) == rank;
  float at_target = 0.0f;
  if (mine) {  // before this thread overwrites the logit in place
    const float xt = Element<T>::widen(x[local]);
    const float y = (xt - max) * inv_t, log_p = y - log1pf(sum_exp_m1), p = expf(log_p);
    at_target = -g_lp * expm1f(log_p) * inv_t;
    if (p > 0.0f) {
      at_target -= g_h * p * (y - mean_y) * inv_t;
      if (kClamped) at_target += c.weight(xt) * clamp_scale * expf(y) * (y + clamp_offset);
    }
    if (xt != s[3] && a.grad != a.logits.data) at_target = NAN;
  }

  const Reader<T, kAlike, Use::kOnce> reader(x + columns.head, at.live - columns.head, at.begin + columns.head,
                                             num_columns - at.begin - at.live);
  columns.template write<kTeamWarps>(
      rank, [&](int i) { return kAlike ? reader.whole(i) : reader.any(i); },
      [&](const uint4& u) {
        float2 v[kVector<T> / 2];
        unpack<T>(u, v);
#pragma unroll
        for (int k = 0; k < kVector<T> / 2; k++) v[k] = c.columns(v[k]);
        return pack<T>(v);
      },
      [&](int j) { return c.columns(both(Element<T>::widen(x[j]))).x; });
  if (mine) grad[local] = Element<T>::narrow(at_target);
}

}  // namespace

Error logits_grad(const Logits& logits, const int64_t* target, const RowSpec& spec, const float* stats, int fields,
                  const RowGrads& grads, const float* clamp, void* grad, int64_t grad_row_stride, Device stream) {
  if (logits.width == 0) return nullptr;
  const Cut c = cut(logits.width);
  const LogitsGradArgs args{logits, target, spec, stats, fields, grads, clamp, grad, grad_row_stride, c};
  const auto kernel = [](auto t, auto clamped, auto alike, auto one_warp) {
    return logits_grad_kernel<decltype(t), clamped, alike, one_warp ? 1 : kWarps>;
  };
  return launch_for("logits_grad", kernel, logits.dtype, c.blocks(logits.T), stream, args,
                    grads.clamped_entropy != nullptr, aligned_alike(logits, grad, grad_row_stride), c.one_warp);
}

}  // namespace entcov::cuda
