"""The plug-in for slime: what it refuses, what it finds missing, what it leaves behind, what it keeps.

Its updates, over micro-batches and ranks: test_divided_updates.py. Everything here is on stand-ins.
"""

import json
import sys

import pytest
import torch

from entcov.integrations import slime as plugin
from entcov.objective.tokens import PolicyLossConfig
from tests.support import slime_standin as standin

CLIP_COV = {"controls": {"clip_cov": {}}}
MODEL, ACTOR = f"{standin.PACKAGE}.model", f"{standin.PACKAGE}.actor"


@pytest.fixture
def slime():
    with standin.modules():
        yield


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"entropy_coef": 0.01}, "entropy_coef must be 0: take the control entropy_bonus"),
        ({"rollout_top_p": 0.9}, "rollout_top_p must be 1"),
        ({"use_rollout_logprobs": True}, "use_rollout_logprobs must be off"),
        ({"keep_old_actor": True}, "keep_old_actor must be off"),
        ({"compute_advantages_and_returns": False}, "compute_advantages_and_returns must be on"),
        ({"recompute_loss_function": True}, "recompute_loss_function must be off"),
        ({"use_opsm": True}, "use_opsm, get_mismatch_metrics"),
        ({"custom_tis_function_path": "a.b"}, "use_opsm, get_mismatch_metrics"),
        ({"loss_type": "policy_loss"}, "loss_type must be custom_loss"),
        ({"custom_loss_function_path": "mine.loss"}, "custom_loss_function_path entcov.integrations.slime.loss"),
        ({"entcov": {"control": {}}}, "--custom-config-path must give a mapping entcov"),
        ({"entcov": {"controls": {"clip_cow": {}}}}, "clip_cow"),
        ({"kl_loss_type": "k7", "use_kl_loss": True}, "kl_estimator must be one of"),
    ],
)
def test_arguments_that_cannot_be_honoured(slime, changed, message):
    before = sys.modules[MODEL].train_one_step
    with pytest.raises(ValueError, match=message):
        plugin.install(standin.arguments(**{"entcov": CLIP_COV} | changed))
    assert sys.modules[MODEL].train_one_step is before


def test_slimes_arguments_become_entcovs_configuration():
    args = standin.arguments(
        eps_clip_high=0.28, eps_clip_c=3.0, use_kl_loss=True, kl_loss_coef=0.01, kl_loss_type="low_var_kl",
        use_tis=True, tis_clip=2.0, tis_clip_low=0.5, calculate_per_token_loss=True, advantage_estimator="ppo",
    )  # fmt: skip
    assert plugin.policy_loss_config(args) == PolicyLossConfig(
        clip_high=0.28, dual_clip=3.0, kl_coef=0.01, kl_estimator="k3", tis_cap=2.0, tis_floor=0.5
    )
    cispo = plugin.policy_loss_config(standin.arguments(advantage_estimator="cispo"))
    assert (cispo.objective, cispo.aggregation) == ("cispo", "seq-mean-token-mean")


def test_removal_leaves_slime_as_it_was(slime):
    places = [(MODEL, "train_one_step"), (MODEL, "save_checkpoint"), (ACTOR, "get_log_probs_and_entropy")]
    before = [getattr(sys.modules[module], name) for module, name in places]
    handle = plugin.install(standin.arguments(entcov=CLIP_COV))
    assert not {getattr(sys.modules[module], name) for module, name in places} & set(before)
    with pytest.raises(RuntimeError, match="entcov is installed already"):
        plugin.install(standin.arguments(entcov=CLIP_COV))
    handle.remove()
    assert [getattr(sys.modules[module], name) for module, name in places] == before
    with pytest.raises(RuntimeError, match="--custom-megatron-init-path must be"):
        plugin.loss(standin.arguments(), {}, torch.zeros(1), None)


def test_a_changed_signature_is_named(slime, monkeypatch):
    monkeypatch.setattr(sys.modules[MODEL], "train_one_step", lambda args, batches: None)
    with pytest.raises(RuntimeError, match=r"train_one_step must have the parameters rollout_id.*it has args, batches"):
        plugin.install(standin.arguments(entcov=CLIP_COV))
    monkeypatch.delattr(sys.modules[MODEL], "train_one_step")
    with pytest.raises(RuntimeError, match=r"model.train_one_step must be a function.*624b824.*got None"):
        plugin.install(standin.arguments(entcov=CLIP_COV))


def test_without_slime_the_error_says_so():
    with pytest.raises(RuntimeError, match=r"slime.backends.megatron_utils.model must be importable.*624b824"):
        plugin.install(standin.arguments(entcov=CLIP_COV))


def test_a_critics_step_is_slimes_own(slime, monkeypatch):
    calls = []
    args = [standin.arguments(entcov=CLIP_COV, loss_type="value_loss"), *range(8)]

    def train_one_step(
        args, rollout_id, step_id, data_iterator, model, optimizer, opt_param_scheduler, num_microbatches,
        step_global_batch_size, microbatch_pbar=None,
    ):  # fmt: skip
        calls.append((args, rollout_id, step_global_batch_size, microbatch_pbar))
        return {}, 0.0

    monkeypatch.setattr(sys.modules[MODEL], "train_one_step", train_one_step)
    with plugin.install(standin.arguments(entcov=CLIP_COV)):
        assert sys.modules[MODEL].train_one_step(*args, microbatch_pbar="bar") == ({}, 0.0)
    assert calls == [(args[0], 0, 7, "bar")]


def test_several_samples_of_one_rollout_need_the_mean_over_tokens(slime):
    args = standin.arguments(entcov=CLIP_COV)
    data = {
        "total_lengths": [5], "response_lengths": [3], "loss_masks": [torch.ones(3, dtype=torch.int32)],
        "rollout_mask_sums": torch.tensor([7.0]), "partition": [4], "sample_indices": [4], "rewards": [1.0],
    }  # fmt: skip
    with plugin.install(args):
        with pytest.raises(ValueError, match=r"sample 4 has 3 loss tokens and its rollout 7"):
            plugin._plugin.tokens(args, data, [0], {})


def test_a_batch_of_another_step_is_refused(slime):
    args = standin.arguments(entcov=CLIP_COV)
    with plugin.install(args):
        with pytest.raises(RuntimeError, match="unconcat_tokens must be the tensors of the step's rollout_data"):
            plugin.loss(args, {"unconcat_tokens": [torch.zeros(3)]}, torch.zeros(1, 3, 5), None)


def test_routing_replay_and_a_second_selection_do_not_go_together(slime):
    args = standin.arguments(entcov=CLIP_COV, use_routing_replay=True)
    with plugin.install(args):
        with pytest.raises(ValueError, match="use_routing_replay must be off"):
            plugin._plugin.current(args, None, {}, [], [], 1)


def test_a_resumed_run_needs_its_state(slime, tmp_path):
    args = standin.arguments(entcov={"controls": {"adaptive_bonus": {}}}, load=str(tmp_path))
    state = {"updates": 6, "controls": [{"name": "adaptive_bonus", "state": {"coef": 0.25, "enabled": True}}]}
    with plugin.install(args):
        ours = plugin._plugin
        with pytest.raises(FileNotFoundError, match=r"entcov/2.json: must hold the state of entcov's controls"):
            ours.resumed(args, 3)
        (tmp_path / "entcov").mkdir()
        (tmp_path / "entcov" / "2.json").write_text(json.dumps(state))
        ours.resumed(args, 3)
        assert ours.controlled.state_dict() == state
        ours.controlled.updates = 9
        ours.resumed(args, 4)  # not the first rollout of this process
        assert ours.controlled.updates == 9
    fresh = standin.arguments(entcov={"controls": {"adaptive_bonus": {}}, "resume": False}, load=str(tmp_path))
    with plugin.install(fresh):
        plugin._plugin.resumed(fresh, 3)
        assert plugin._plugin.controlled.updates == 0
