"""The lists of controls that the tests of the TRL plug-in run with, at strengths that act on 60 tokens."""

from entcov.controls import make_control


def clip_cov():
    return make_control("clip_cov", clip_cov_ratio=0.1, clip_cov_lb=0.01, clip_cov_ub=50.0)


def aent():
    return make_control("aent", entropy_coef=0.05, coef_min=0.0, coef_max=1.0, coef_lr=0.05, entropy_low=9,
                        entropy_high=9, warmup=0)  # fmt: skip


LAYOUT_CONTROLS = {
    "clip_cov and aent": lambda: [clip_cov(), aent()],
    "kl_cov and position_shaping": lambda: [make_control("kl_cov", kl_cov_ratio=0.1), make_control("position_shaping")],
    "clip_cov and entropy_ratio_clip": lambda: [
        clip_cov(), make_control("entropy_ratio_clip", entropy_ratio_low=1e-3, entropy_ratio_high=1e-3),
    ],
    "high_entropy_tokens and clip_b": lambda: [
        make_control("high_entropy_tokens", top_entropy_quantile=0.5), make_control("clip_b", mu=0.5),
    ],
}  # fmt: skip
