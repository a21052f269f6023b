"""The published settings of the methods, by name: the one place that holds their numbers.

`preset=NAME` on a command line, or `preset: NAME` in a recipe, applies the keys of a setting; entcov/rl/recipe.py reads
it. To add a setting, add an entry to PUBLISHED, and its line to the table in docs/methods.md: a test compares the
two.
"""

from dataclasses import dataclass
from typing import Any

from entcov import arguments as check

_CUI = "Cui et al., arXiv 2505.22617, section"
_WANG = "Wang et al., arXiv 2602.03392; Trinity-RFT"
_SHEN = "Shen, arXiv 2509.03493, copy of the scripts (recipe/aent):"


@dataclass(frozen=True)
class Setting:
    """`keys` are those of a recipe, nested as in YAML; `source` says where they are published."""

    source: str
    keys: dict[str, Any]


def _setting(
    source: str, control: str | None, clip: tuple[float, float] | None, dual_clip: float | None = None, **knobs: Any
) -> Setting:
    """One control with its knobs (None: no control), and the PPO clip (low, high) (None: not published).

    A setting with a clip says whether there is a dual clip, so that it replaces that of another setting.
    """
    keys: dict[str, Any] = {"control": [control] if control else [], "controls": {control: knobs} if control else {}}
    if clip:
        keys["loss"] = {"clip_low": clip[0], "clip_high": clip[1], "dual_clip": dual_clip}
    return Setting(source, keys)


# Cui et al.: their fork's loss has the dual clip commented out, so the scripts' 10 has no effect. Shen: verl's default.
PUBLISHED: dict[str, Setting] = {
    "grpo": _setting(f"{_CUI} 4.3, the baseline", None, (0.2, 0.2)),
    "clip_higher": _setting(f"DAPO, arXiv 2503.14476; {_CUI} 4.3", None, (0.2, 0.28)),
    # The authors' scripts set the clip to 1: the ratio may move in [0, 2], and the control limits the entropy's fall.
    "clip_cov": _setting(
        f"{_CUI} 4.3; the clip from the scripts (recipe/dapo)", "clip_cov", (1.0, 1.0),
        clip_cov_ratio=2e-4, clip_cov_lb=1.0, clip_cov_ub=5.0,
    ),
    # The control drops the clip, as the authors' code does: the clip of their scripts has no effect.
    "kl_cov": _setting(f"{_CUI} 4.3, 7B", "kl_cov", (0.2, 0.2), kl_cov_ratio=2e-3, ppo_kl_coef=1.0),
    "kl_cov_32b": _setting(f"{_CUI} 4.3, 32B", "kl_cov", (0.2, 0.2), kl_cov_ratio=2e-4, ppo_kl_coef=1.0),
    # Found for models of 1.5 billion parameters. The band may not suit another model: compare it with actor/entropy
    # before the warm-up ends.
    "aent_math": _setting(
        f"{_SHEN} MATH, Qwen2.5-Math-1.5B", "aent", (0.2, 0.2), 3.0,
        entropy_coef=2e-3, clamp_p=0.33, entropy_low=0.15, entropy_high=0.24, coef_lr=2e-3, coef_min=6e-4,
        coef_max=9e-3, warmup=30,
    ),
    "aent_openr1": _setting(
        f"{_SHEN} OpenR1, DeepSeek-R1-Distill-Qwen-1.5B", "aent", (0.2, 0.2), 3.0,
        entropy_coef=3e-4, clamp_p=0.25, entropy_low=0.35, entropy_high=0.62, coef_lr=1e-4, coef_min=4e-5,
        coef_max=1e-3, warmup=156,
    ),
    "entropy_bonus": _setting(f"{_CUI} 4.1, Qwen2.5-7B", "entropy_bonus", (0.2, 0.2), entropy_coef=5e-3),
    "skywork": _setting(
        "Skywork-OR1, arXiv 2505.22312, scripts", "adaptive_bonus", None,
        entropy_coef=0.0, target=0.2, delta=1e-4, coef_min=0.0, coef_max=5e-3,
    ),
    "trl_adaptive": _setting(
        "TRL 1.16, defaults of GRPOConfig with use_adaptive_entropy", "adaptive_bonus", None,
        rule="trl", entropy_coef=0.0, target=0.2, delta=5e-3, coef_min=0.0, coef_max=1.0,
    ),
    "clip_b": _setting(f"{_WANG}, default_args", "clip_b", None, mu=2.5),
    "clip_v": _setting(f"{_WANG}, default_args", "clip_v", None, mu=8.5, max_frac=1e-4),
    "high_entropy_tokens": _setting(
        "Wang et al., arXiv 2506.01939, with DAPO's clip", "high_entropy_tokens", (0.2, 0.28), top_entropy_quantile=0.2
    ),
    "entropy_advantage": _setting(
        "Cheng et al., arXiv 2506.14758, GRPO (from notes)", "entropy_advantage", None, alpha=0.4, kappa=2.0
    ),
    "positive_advantage_reweighting": _setting(
        "Jin et al., arXiv 2511.05993, guided by entropy (from notes)", "positive_advantage_reweighting", None,
        schedule="entropy", target=0.2, delta=0.05, weight=0.0,
    ),
    "entropic": _setting(
        "EntroPIC, arXiv 2511.15248, run_entropic.sh", "entropic", None,
        target=0.1, kp=1.0, ki=0.01, prob_threshold=0.95,
    ),
    "entropy_ratio_clip": _setting(
        "ERC, arXiv 2512.05591, scripts (recipe/dapo)", "entropy_ratio_clip", (0.2, 0.28), 10.0,
        entropy_ratio_low=0.05, entropy_ratio_high=0.05,
    ),
    "adaptive_clip": _setting(
        "Microsoft AI, MAI-Thinking-1, section 3.1.1 (from notes)", "adaptive_clip", None,
        target=0.3, epsilon=0.6, step_size=0.25, relaxation_max=2.5,
    ),
    "ce_gppo": Setting(
        "CE-GPPO, arXiv 2509.20712, script of 7B (recipe/dapo)",
        {
            "control": [],
            "controls": {},
            "loss": {
                "objective": "ce_gppo", "clip_low": 0.2, "clip_high": 0.2, "dual_clip": 10.0, "ce_gppo_beta1": 0.75,
                "ce_gppo_beta2": 1.0,
            },
        },
    ),
    "qae": Setting(
        "QAE, arXiv 2509.22611",
        {"control": [], "controls": {}, "advantage": "qae", "advantages": {"qae": {"quantile_k": 0.4}}},
    ),
    "sent": Setting(  # the KL to the reference on all tokens is the scripts' too
        "SENT, arXiv 2512.04359, scripts of stage 1 and 2",
        {
            "control": ["sent"],
            "controls": {
                "sent": {
                    "low_entropy_ratio": 0.8, "kl_cov_ratio": 2e-4, "ppo_kl_coef": 0.1, "high_cov_coef": 2.0,
                    "low_cov_coef": 0.5,
                }
            },
            "loss": {"kl_coef": 1e-3},
        },
    ),
}  # fmt: skip


def preset(name: object) -> dict[str, Any]:
    """The recipe's keys of the setting of that name; an unknown name is a ValueError that lists the known ones."""
    check.one_of("preset", name, PUBLISHED)
    return PUBLISHED[name].keys
