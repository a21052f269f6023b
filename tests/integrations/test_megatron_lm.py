"""The plug-in for Megatron-LM's GRPO example: what it refuses, what it finds missing, what it leaves behind.

Its updates, over micro-batches and ranks: test_divided_updates.py. Everything here is on stand-ins.
"""

import json

import pytest
import torch

from entcov.integrations import megatron_lm as plugin
from entcov.objective.tokens import PolicyLossConfig
from tests.support import megatron_rl_standin as standin

CLIP_COV = {"clip_cov": {}}
REPLACED = ("train_step", "save_checkpoint", "get_logprobs", "selective_log_softmax", "compute_logprobs_batch")


@pytest.fixture
def megatron():
    standin.arguments()
    with standin.modules():
        yield


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"perform_rl_step": False}, "perform_rl_step must be on"),
        ({"grpo_entropy_term_weight": 0.01}, "grpo_entropy_term_weight must be 0"),
        ({"context_parallel_size": 2}, "context_parallel_size must be 1"),
        ({"virtual_pipeline_model_parallel_size": 2}, "virtual_pipeline_model_parallel_size must not be given"),
        ({"cuda_graph_impl": "local"}, "cuda_graph_impl must be none"),
        ({"rl_inference_logprobs_is_correction": True}, "rl_importance_sampling_truncation_coef must be given"),
    ],
)
def test_arguments_that_cannot_be_honoured(changed, message):
    standin.arguments(**changed)
    with pytest.raises(ValueError, match=message):
        plugin.policy_loss_config(standin.ARGS)


def test_the_examples_arguments_become_entcovs_configuration():
    standin.arguments(rl_inference_logprobs_is_correction=True, rl_importance_sampling_truncation_coef=3.0)
    assert plugin.policy_loss_config(standin.ARGS) == PolicyLossConfig(
        clip_low=0.01, clip_high=0.01, kl_coef=0.001, kl_estimator="k3", tis_cap=3.0
    )


def test_removal_leaves_megatron_as_it_was(megatron):
    before = {name: getattr(standin, name) for name in REPLACED}
    handle = plugin.entcov_grpo(CLIP_COV)
    assert all(getattr(standin, name) is not before[name] for name in REPLACED)
    with pytest.raises(RuntimeError, match="installed already"):
        plugin.entcov_grpo(CLIP_COV)
    handle.remove()
    assert {name: getattr(standin, name) for name in REPLACED} == before


def test_a_changed_signature_is_named(megatron, monkeypatch):
    monkeypatch.setattr(standin, "get_logprobs", lambda model, ids: None)
    with pytest.raises(RuntimeError, match=r"get_logprobs must have the parameters tokens.*d98e8a6.*it has model, ids"):
        plugin.entcov_grpo(CLIP_COV)
    monkeypatch.delattr(standin, "get_logprobs")
    with pytest.raises(RuntimeError, match=r"get_logprobs must be a function"):
        plugin.entcov_grpo(CLIP_COV)


def test_without_megatrons_training_package_the_error_says_so():
    with pytest.raises(RuntimeError, match=r"megatron.training.training must be importable.*d98e8a6"):
        plugin.entcov_grpo(CLIP_COV)


def test_controls_over_the_rollout_need_one_update_a_rollout(megatron):
    standin.arguments(global_batch_size=4)
    standin.STATE.last_collection_iteration = 0
    with plugin.entcov_grpo({"clip_v": {}}), pytest.raises(ValueError, match="global_batch_size must be grpo_prompts"):
        standin.train_step(None, None, None, None, None, None, None, iteration=0)


def test_old_log_probabilities_are_float32(megatron):
    """In bfloat16 one of -7.3 is off by up to 0.03, three times the example's default clip."""

    class Model(torch.nn.Module):
        def forward(self, tokens, places, mask, **named):
            return torch.zeros(*tokens.shape, 1500)

    batches = [(torch.ones(1, 3, dtype=torch.int64), None)]
    with plugin.entcov_grpo({}, vocab_size=1500) as handle:
        # without a process group; its own is in test_divided_updates.py
        handle.replace(standin, "selective_log_softmax", lambda logits, index: logits.log_softmax(-1)[..., 0])
        found = standin.compute_logprobs_batch(model=Model(), batches=batches, dtype=torch.bfloat16)
        with pytest.raises(RuntimeError, match="must be called with the keyword dtype"):
            standin.compute_logprobs_batch(Model(), batches, torch.bfloat16)
    assert found.dtype == torch.float32
    assert (found.exp() * 1500 - 1).abs().max() < 1e-5


def test_a_script_without_get_logprobs_is_refused(megatron, monkeypatch):
    with plugin.entcov_grpo(CLIP_COV) as handle:
        ours = standin.train_step.__self__
        handle.replace(ours.mpu, "is_pipeline_last_stage", lambda: False)
        handle.replace(ours.hooks, "get_num_microbatches", lambda: 0)
        with pytest.raises(RuntimeError, match="forward_step must call get_logprobs"):
            standin.train_step(test_a_script_without_get_logprobs_is_refused, iter([]), *[None] * 5, iteration=0)


def test_a_resumed_run_needs_its_state(megatron, tmp_path):
    standin.arguments(load=str(tmp_path))
    state = {"updates": 6, "controls": [{"name": "adaptive_bonus", "state": {"coef": 0.25, "enabled": True}}]}
    with plugin.entcov_grpo({"adaptive_bonus": {}}):
        ours = standin.train_step.__self__
        with pytest.raises(FileNotFoundError, match=r"entcov/8.json: must hold the state of entcov's controls"):
            ours.start(standin.ARGS, 8)
        (tmp_path / "entcov").mkdir()
        (tmp_path / "entcov" / "8.json").write_text(json.dumps(state))
        ours.start(standin.ARGS, 8)
        assert ours.controlled.state_dict() == state
