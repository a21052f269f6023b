"""The launch scripts of megatron_integration: their methods as published, and the command that a dry run prints."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import transformers

from entcov.plan.model_shapes import PUBLISHED

ROOT, PYTHON = Path(__file__).resolve().parents[2], Path(sys.executable).parent
FOLDER = ROOT / "megatron_integration" / "launch"

GRPO = {"clip_low": 0.2, "clip_high": 0.2, "dual_clip": None}
DUAL_CLIP = GRPO | {"dual_clip": 3.0}
CLIP_COV = {"clip_cov_ratio": 2e-4, "clip_cov_lb": 1.0, "clip_cov_ub": 5.0}
AENT = {
    "aent_math": {
        "entropy_coef": 2e-3, "clamp_p": 0.33, "entropy_low": 0.15, "entropy_high": 0.24, "coef_lr": 2e-3,
        "coef_min": 6e-4, "coef_max": 9e-3, "warmup": 30, "adaptive": True,
    },
    "aent_openr1": {
        "entropy_coef": 3e-4, "clamp_p": 0.25, "entropy_low": 0.35, "entropy_high": 0.62, "coef_lr": 1e-4,
        "coef_min": 4e-5, "coef_max": 1e-3, "warmup": 156, "adaptive": True,
    },
}  # fmt: skip
METHODS = {  # -> clip, control's name, its knobs ("7b" and "32b" where they differ)
    "grpo": (GRPO, None, {}),
    "clip_higher": (GRPO | {"clip_high": 0.28}, None, {}),
    "clip_cov": ({"clip_low": 1.0, "clip_high": 1.0, "dual_clip": None}, "clip_cov", CLIP_COV),
    "kl_cov": (GRPO, "kl_cov", {"7b": {"kl_cov_ratio": 2e-3}, "32b": {"kl_cov_ratio": 2e-4}, "ppo_kl_coef": 1.0}),
    "aent_math": (DUAL_CLIP, "aent", AENT["aent_math"]),
    "aent_openr1": (DUAL_CLIP, "aent", AENT["aent_openr1"]),
}


def dry_run(script: str, *arguments: str, **environment: str) -> list[str]:
    """The command that a script would start, word by word."""
    done = subprocess.run(
        [str(FOLDER / script), *arguments],
        capture_output=True, text=True, cwd="/",
        env={"PATH": f"{PYTHON}:{os.environ['PATH']}", "ENTCOV_DRY_RUN": "1"} | environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return shlex.split(done.stdout)


def smoke_variables(folder: Path, name: str) -> dict[str, str]:
    """The variables of a smoke test of a published model, whose config.json is written to `folder`."""
    arguments = {key: value for key, value in PUBLISHED[name].items() if value is not None}
    rope = {"rope_type": "default", "rope_theta": 1000000.0}
    transformers.AutoConfig.for_model(**arguments, rope_parameters=rope).save_pretrained(folder)
    return {"SMOKE_LAYERS": "2", "MODEL_PATH": str(folder), "OMP_NUM_THREADS": "1"}
