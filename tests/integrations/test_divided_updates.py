"""The plug-ins for slime and Megatron-LM over micro-batches, data, tensor and context parallel ranks; NeMo-RL's logits.

Two updates of one rollout each, on real process groups (gloo) and stand-ins for the frameworks, equal those of one
process that has the whole mini-batch: tests/support/slime_cases.py, tests/support/megatron_rl_cases.py.
"""

import pytest

from tests.support import megatron_processes

CLIP_COV = {"clip_cov": {"clip_cov_ratio": 0.2, "clip_cov_lb": 0.05}}
KL_COV = {"kl_cov": {"kl_cov_ratio": 0.2}, "entropy_bonus": {"entropy_coef": 0.03}}
HIGH = {"high_entropy_tokens": {}}
SHAPED = {"perplexity_shaping": {}}
COEF, TOKEN_MEAN = {"after_step": ["entcov/entropy_coef"]}, {"calculate_per_token_loss": True}
SLIME = {
    1: [
        {"micro_batch": 4, "controls": CLIP_COV},
        {"micro_batch": 1, "controls": KL_COV, "args": {"rollout_temperature": 0.8}, **COEF},
        {"micro_batch": 2, "controls": CLIP_COV, "args": TOKEN_MEAN},
        {"micro_batch": 1, "controls": CLIP_COV, "args": {"advantage_estimator": "gspo"}},
        {"micro_batch": 1, "controls": SHAPED},
    ],
    2: [
        {"micro_batch": 2, "controls": CLIP_COV},
        {"micro_batch": 1, "controls": KL_COV, "args": TOKEN_MEAN, **COEF},
        {"micro_batch": 1, "controls": SHAPED},
        {"micro_batch": 2, "controls": KL_COV, "tp": 2, **COEF},
        {"micro_batch": 2, "controls": CLIP_COV, "cp": 2},
        {"micro_batch": 1, "controls": HIGH, "cp": 2, "args": TOKEN_MEAN},
        {"micro_batch": 1, "controls": HIGH, "cp": 2},
    ],
}
MEGATRON = {
    1: [
        {"micro_batch": 1, "controls": CLIP_COV, "per_token": True},
        {"micro_batch": 1, "controls": CLIP_COV, "packed": True},  # draws by the number of the token
        {"micro_batch": 2, "controls": SHAPED},
    ],
    2: [
        {"micro_batch": 2, "controls": CLIP_COV},
        {"micro_batch": 1, "controls": KL_COV, "per_token": True, **COEF},
        {"micro_batch": 2, "controls": CLIP_COV, "tp": 2},
        {"micro_batch": 2, "controls": HIGH | {"entropy_bonus": {"entropy_coef": 0.01}}, "tp": 2, **COEF},
    ],
}


@pytest.mark.parametrize("world", [1, 2])
def test_updates_equal_those_of_one_process(world, tmp_path):
    cases = [{"task": "slime"} | case for case in SLIME[world]]
    cases += [{"task": "megatron_rl"} | case for case in MEGATRON[world]]
    if world == 2:
        cases.append({"task": "nemo_rl"})
    assert not megatron_processes.run_cases(world, tmp_path, cases)
