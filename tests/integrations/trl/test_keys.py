"""Every key of GRPOConfig has its meaning or is refused by its name, before a model is loaded."""

import math

import pytest

pytest.importorskip("trl")

import trl
from trl import GRPOConfig

from entcov.controls import make_control
from entcov.integrations.trl import EntcovGRPOTrainer, keys, trainer
from entcov.integrations.trl.keys import policy_loss_config
from tests.support.trl_runs import made, settings

REFUSED = {
    "loss_type must be one of grpo, bnpo, dapo, dr_grpo, cispo, sapo, vespo with importance_sampling_level='token', "
    "got luspo": {"loss_type": "luspo"},
    "loss_type must be one of grpo, luspo with importance_sampling_level='sequence', got dapo": {
        "loss_type": "dapo", "importance_sampling_level": "sequence",
    },
    "importance_sampling_level must be token or sequence, got turn": {"importance_sampling_level": "turn"},
    "use_bias_correction_kl must be False with importance_sampling_level='sequence' and beta > 0": {
        "loss_type": "grpo", "importance_sampling_level": "sequence", "beta": 0.1,
    },
    "epsilon_high must be at least 1 for loss_type cispo": {"loss_type": "cispo"},
    "delta must be None, the loss does not read it (sapo); got 2.0": {"loss_type": "sapo", "delta": 2.0},
    "delta must be at least 1 + epsilon_high = 1.2, got 1.1": {"delta": 1.1},
    "clip_low must be": {"epsilon": 1.5},
    "top_entropy_quantile must be left at 1.0, got 0.2: TRL's threshold is that of each micro-batch": {
        "top_entropy_quantile": 0.2,
    },
    "entropy_coef must be left at 0.0, got 0.01: use controls=[make_control(\"entropy_bonus\"": {"entropy_coef": 0.01},
    "use_adaptive_entropy must be left at False, got True": {"use_adaptive_entropy": True},
    "entropy_target must be left at 0.2, got 0.5: it is target of": {"entropy_target": 0.5},
    "off_policy_mask_threshold must be in [0, inf], got -0.5": {"off_policy_mask_threshold": -0.5},
    "delta must be None, the loss does not read it (vespo); got 2.0": {"loss_type": "vespo", "delta": 2.0},
    "steps_per_generation must be a multiple of gradient_accumulation_steps, so that the tokens of an optimizer step "
    "come from one generation batch; got 2 and 4": {"rows": 4, "steps_per_generation": 2},
    "vllm_importance_sampling_mode must be one of token_truncate, token_mask, sequence_truncate, sequence_mask": {
        "use_vllm": True, "vllm_importance_sampling_mode": "x",
    },
}  # fmt: skip


@pytest.mark.parametrize("message", REFUSED)
def test_a_key_that_has_no_meaning_here_is_refused_before_a_model_is_loaded(message, tmp_path):
    args = settings(tmp_path, **REFUSED[message])
    with pytest.raises(ValueError) as error:
        EntcovGRPOTrainer("no/such/model", args=args)
    assert message in str(error.value)


def test_every_key_of_grpo_config_is_known():
    """A key of a later version is in none of the three lists: it must be looked at before it is accepted."""
    own = set(GRPOConfig.__annotations__)
    assert own <= {*keys.TRANSLATED, *keys.REFUSED, *keys.KEPT} and len(own) > 70
    lists = [set(keys.TRANSLATED), set(keys.REFUSED), set(keys.KEPT)]
    assert not lists[0] & lists[1] and not lists[0] & lists[2] and not lists[1] & lists[2]


def test_a_key_of_another_version_is_refused_where_it_is_set(tmp_path, monkeypatch):
    monkeypatch.setattr(keys, "KEPT", [name for name in keys.KEPT if name != "top_k"])
    policy_loss_config(settings(tmp_path))
    with pytest.raises(ValueError, match="top_k must be left at 0, got 5: .* this key of another version"):
        policy_loss_config(settings(tmp_path, top_k=5))


@pytest.mark.parametrize(
    "mode, low, high, expected",
    [
        ("token_truncate", None, 2.0, {"tis_cap": 2.0, "tis_floor": 0.0, "tis_level": "token", "tis_mode": "truncate"}),
        ("sequence_mask", 0.5, None,
         {"tis_cap": math.exp(20), "tis_floor": 0.5, "tis_level": "sequence", "tis_mode": "mask"}),
    ],
)  # fmt: skip
def test_the_importance_weight_of_vllm(mode, low, high, expected, tmp_path):
    changed = {"vllm_importance_sampling_clip_min": low, "vllm_importance_sampling_clip_max": high}
    config = policy_loss_config(settings(tmp_path, use_vllm=True, vllm_importance_sampling_mode=mode, **changed))
    assert {name: getattr(config, name) for name in expected} == expected
    off = policy_loss_config(settings(tmp_path, use_vllm=True, vllm_importance_sampling_correction=False))
    assert off.tis_cap is None and policy_loss_config(settings(tmp_path)).tis_cap is None


@pytest.mark.parametrize(
    "controls, error, message",
    [
        ("clip_cov", TypeError, "controls must be a list, got 'clip_cov'"),
        (["clip_cof"], ValueError, "control name must be one of"),
        (["aent", "entropy_bonus"], ValueError, "aent and entropy_bonus both set the entropy bonus"),
        ([make_control("sent", semantics="paper")], ValueError, "beta must be above 0 for control sent"),
    ],
)
def test_controls_that_cannot_be_are_refused_before_a_model_is_loaded(controls, error, message, tmp_path):
    with pytest.raises(error) as found:
        EntcovGRPOTrainer("no/such/model", args=settings(tmp_path), controls=controls)
    assert message in str(found.value)


def test_another_version_gives_one_line_and_a_missing_method_an_error(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(trl, "__version__", "1.17.0")
    made(tmp_path, [])
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("entcov")]
    assert len(lines) == 1 and lines[0].startswith("entcov: tested with trl 1.16.0, this is 1.17.0 (transformers ")
    monkeypatch.setattr(trainer, "HOOKS", (*trainer.HOOKS, "_gone"))
    with pytest.raises(RuntimeError, match="trl 1.17.0 has no GRPOTrainer._gone, which entcov's plug-in extends"):
        made(tmp_path, [])


def test_the_lists_of_keys_are_those_of_the_page():
    page = (trainer.Path(__file__).parents[3] / "docs/trl.md").read_text()
    missing = [name for name in (*keys.TRANSLATED, *keys.REFUSED) if f"`{name}`" not in page]
    assert not missing
