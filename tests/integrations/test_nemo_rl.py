"""The plug-in for NeMo-RL, on stand-ins made from its published signatures: its loss and its driver's part."""

import json
import sys

import pytest
import torch

from entcov.controls import make_control, mini_batch_totals, needs, select
from entcov.integrations import nemo_rl as plugin
from entcov.objective.policy_loss import policy_loss
from entcov.objective.tokens import PolicyLossConfig, Tokens, Totals
from tests.support import nemo_rl_standin as standin

VOCAB, ROWS, LENGTH = 23, 8, 9
CLIP_COV = {"clip_cov": {"clip_cov_ratio": 0.2, "clip_cov_lb": 0.05}}
CFG = {
    "train_global_batch_size": ROWS,
    "sequence_packing": {"enabled": False},
    "generation": {"top_k": None, "top_p": 1.0},
}


@pytest.fixture
def nemo(monkeypatch):
    with standin.modules():
        yield sys.modules["nemo_rl.algorithms.grpo"], sys.modules["nemo_rl.models.policy.lm_policy"].Policy


def model() -> torch.nn.Module:
    torch.manual_seed(4)
    return torch.nn.Sequential(torch.nn.Embedding(VOCAB, 5), torch.nn.Linear(5, VOCAB, bias=False))


def statistics(net, ids):
    logp = net(ids)[:, :-1].double().log_softmax(-1)
    return logp.gather(-1, ids[:, 1:, None])[..., 0].flatten(), -(logp.exp() * logp).sum(-1).flatten()


def train_data(net) -> dict[str, torch.Tensor]:
    """NeMo-RL's columns, before policy.train; the last row is masked as a whole."""
    draw = torch.Generator().manual_seed(2)
    ids = torch.randint(0, VOCAB, (ROWS, LENGTH), generator=draw)
    token_mask = torch.zeros(ROWS, LENGTH)
    for i, (start, end) in enumerate([(2, 9), (3, 7), (2, 8), (4, 9), (2, 5), (5, 9), (3, 9), (2, 9)]):
        token_mask[i, start:end] = 1
    with torch.no_grad():
        prev = statistics(net, ids)[0].float().view(ROWS, LENGTH - 1)
    # the policy's own but for some noise: KL-Cov's |log r| has no gradient at 0, only that of rounding
    prev = torch.cat([torch.zeros(ROWS, 1), prev + 0.05 * torch.randn(prev.shape, generator=draw)], dim=1)
    advantages = torch.randn(ROWS, 1, generator=draw).expand(ROWS, LENGTH).clone()
    return {
        "input_ids": ids, "token_mask": token_mask, "sample_mask": torch.tensor([1.0] * 7 + [0.0]),
        "prev_logprobs": prev,
        "advantages": advantages, "generation_logprobs": prev + 0.01, "reference_policy_logprobs": prev - 0.1,
        "input_lengths": torch.full((ROWS,), LENGTH),
    }  # fmt: skip


def expected(controls, cfg, net):
    """Gradients and metrics of the mini-batch in one piece, with plain log-softmax."""
    data, config = train_data(net), plugin.policy_loss_config(cfg)
    controls = [make_control(name, **knobs) for name, knobs in controls.items()]
    logprob, entropy = statistics(net, data["input_ids"])
    mask = data["token_mask"][:, 1:] * data["sample_mask"][:, None] > 0
    row = torch.arange(ROWS)[:, None].expand(mask.shape)
    place = torch.arange(LENGTH - 1).expand(mask.shape)
    names = {"old_logprob": "prev_logprobs", "advantage": "advantages", "rollout_logprob": "generation_logprobs"}
    flat = {name: data[key][:, 1:].flatten().double() for name, key in names.items()}
    if config.kl_coef:
        flat["ref_logprob"] = data["reference_policy_logprobs"][:, 1:].flatten().double()
    lengths = mask.sum(1, keepdim=True).expand(mask.shape).flatten()
    tokens = Tokens(
        logprob=logprob, entropy=entropy, loss_mask=mask.flatten(), sequence=row.flatten(), sequence_length=lengths,
        token_id=(row * plugin.STRIDE + place).flatten(), **flat,
    )  # fmt: skip
    bare = Tokens(**vars(tokens) | {"logprob": flat["old_logprob"], "entropy": None})
    chosen, metrics = select(controls, [bare], step=0, config=config)
    totals = Totals(mini_batch_totals([bare], chosen).num_tokens, 7)
    loss, more = policy_loss(tokens, config, totals=totals, controls=controls, selections=chosen[0])
    gradients = torch.autograd.grad(loss, list(net.parameters()))
    return gradients, (metrics if "selection" in needs(controls) else {}) | more


def test_nothing_is_changed_by_the_import(nemo):
    assert nemo[0].ClippedPGLossFn is standin.ClippedPGLossFn


@pytest.mark.parametrize(
    ("replicas", "micro_batch", "pad"),
    [(1, 8, 0), (1, 2, 3), (2, 1, 0)],
    ids=["whole", "padded logits", "two replicas"],
)
@pytest.mark.parametrize(
    ("controls", "knobs"),
    [
        (CLIP_COV, {}),
        ({"kl_cov": {"kl_cov_ratio": 0.2}, "entropy_bonus": {"entropy_coef": 0.02}}, {"token_level_loss": False}),
        (CLIP_COV, {"sequence_level_importance_ratios": True, "token_level_loss": False,
                    "reference_policy_kl_penalty": 0.05}),  # gspo with a reference policy
    ],
    ids=["clip_cov", "kl_cov and bonus", "gspo"],
)  # fmt: skip
def test_equals_the_loss_of_the_whole_mini_batch(nemo, replicas, micro_batch, pad, controls, knobs):
    grpo, policy_class = nemo
    net, cfg = model(), standin.loss_config(**knobs)
    with plugin.install(controls):
        loss_fn = grpo.ClippedPGLossFn(cfg, use_fused_linear_logprobs=False)
        policy = policy_class(CFG, net, replicas, micro_batch, pad)
        data = train_data(net)
        names = set(data)
        results = policy.train(data, loss_fn, timer=None)
        assert set(data) == names, "columns stayed in the trainer's data"
    gradients, metrics = expected(controls, cfg, net)
    for parameter, want in zip(net.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, want, atol=1e-6, rtol=0)
    found = results["all_mb_metrics"]
    for name, want in metrics.items():
        (value,) = found["entcov/" + name.removeprefix("actor/")]
        assert value == pytest.approx(float(want), abs=2e-6), name
    assert results["loss"] == pytest.approx(float(metrics["actor/loss"]), abs=2e-6)
    assert sum(found["gen_kl_error"]) == pytest.approx(0.01, abs=1e-6)  # NeMo-RL's own metrics go on


def test_a_resumed_run_goes_on_with_the_state(nemo, tmp_path):
    grpo, policy_class = nemo
    controls = {"adaptive_bonus": {}}
    with plugin.install(controls):
        policy = policy_class(CFG, model())
        loss_fn = grpo.ClippedPGLossFn(standin.loss_config())
        policy.train(train_data(policy.model), loss_fn)
        policy.save_checkpoint(str(tmp_path / "policy" / "weights"))
    state = json.loads((tmp_path / "policy" / "entcov" / "0.json").read_text())
    assert state["updates"] == 1
    with plugin.install(controls):
        policy = policy_class(CFG, model(), weights_path=str(tmp_path / "policy" / "weights"))
        policy.train(train_data(policy.model), grpo.ClippedPGLossFn(standin.loss_config()))
        policy.save_checkpoint(str(tmp_path / "later" / "weights"))
        assert json.loads((tmp_path / "later" / "entcov" / "0.json").read_text())["updates"] == 2
    with plugin.install(controls):
        policy = policy_class(CFG, model(), weights_path=str(tmp_path / "elsewhere" / "weights"))
        with pytest.raises(FileNotFoundError, match="must hold the state of entcov's controls"):
            policy.train(train_data(policy.model), grpo.ClippedPGLossFn(standin.loss_config()))


def test_removal_leaves_nemo_rl_as_it_was(nemo):
    grpo, policy_class = nemo
    before = grpo.ClippedPGLossFn, policy_class.train, policy_class.save_checkpoint, policy_class.__init__
    handle = plugin.install(CLIP_COV)
    assert grpo.ClippedPGLossFn is not before[0] and policy_class.train is not before[1]
    handle.remove()
    assert before == (grpo.ClippedPGLossFn, policy_class.train, policy_class.save_checkpoint, policy_class.__init__)


def test_several_updates_a_rollout_are_refused(nemo):
    grpo, policy_class = nemo
    with plugin.install(CLIP_COV):
        policy = policy_class(CFG | {"train_global_batch_size": 4}, model())
        loss_fn = grpo.ClippedPGLossFn(standin.loss_config())
        with pytest.raises(ValueError, match="train_global_batch_size must be the rollout's 8 responses, got 4"):
            policy.train(train_data(policy.model), loss_fn)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sequence_packing": {"fuse_loss": True}}, "fuse_loss must be false"),
        ({"generation": {"top_p": 0.9}}, "top_p must be off"),
    ],
)
def test_settings_that_hide_the_logits_are_refused(nemo, change, message):
    grpo, policy_class = nemo
    with plugin.install(CLIP_COV):
        policy = policy_class(CFG | change, model())
        loss_fn = grpo.ClippedPGLossFn(standin.loss_config())
        with pytest.raises(ValueError, match=message):
            policy.train(train_data(policy.model), loss_fn)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"disable_ppo_ratio": True}, "disable_ppo_ratio must be false"),
        ({"force_on_policy_ratio": True}, "force_on_policy_ratio must be false"),
        ({"use_on_policy_kl_approximation": True}, "use_on_policy_kl_approximation must be false"),
        ({"positive_example_nll_weight": 0.1}, "positive_example_nll_weight must be 0"),
        ({"use_importance_sampling_correction": True}, "truncated_importance_sampling_type must be tis or icepop"),
    ],
)
def test_a_loss_that_entcov_has_not_is_refused(knobs, message):
    with pytest.raises(ValueError, match=message):
        plugin.policy_loss_config(standin.loss_config(**knobs))


def test_the_loss_section_becomes_entcovs_configuration():
    cfg = standin.loss_config(
        ratio_clip_max=0.28, ratio_clip_c=3.0, use_importance_sampling_correction=True, use_cispo=False,
        truncated_importance_sampling_type="icepop", truncated_importance_sampling_ratio=2.0,
        truncated_importance_sampling_ratio_min=0.5, reference_policy_kl_penalty=0.01,
    )  # fmt: skip
    assert plugin.policy_loss_config(cfg) == PolicyLossConfig(
        clip_high=0.28, dual_clip=3.0, tis_cap=2.0, tis_floor=0.5, tis_mode="mask", kl_coef=0.01, kl_estimator="k3+"
    )


@pytest.mark.parametrize(
    ("control", "reason"),
    [
        ("high_entropy_tokens", "before the update it reads entropy"),
        ("clip_v", "it shapes advantages by statistics"),
        ("entropy_ratio_clip", "it compares entropies with those of the rollout"),
    ],
)
def test_controls_that_need_what_the_driver_lacks_are_refused(nemo, control, reason):
    with pytest.raises(ValueError, match=f"control {control} cannot be had: {reason}"):
        plugin.install({control: {}})


def test_workers_without_the_columns_fail(nemo):
    with plugin.install(CLIP_COV):
        loss_fn = nemo[0].ClippedPGLossFn(standin.loss_config())
        net = model()
        data = train_data(net)
        with pytest.raises(RuntimeError, match="data_plane.enabled must be false"):
            loss_fn(logits=net(data["input_ids"]), data=data, global_valid_seqs=7, global_valid_toks=1)


def test_logits_of_a_part_of_each_row_are_refused(nemo):
    with plugin.install(CLIP_COV):
        loss_fn = nemo[0].ClippedPGLossFn(standin.loss_config())
        net = model()
        data = train_data(net)
        with pytest.raises(ValueError, match="context_parallel_size must be 1: the logits have 4 of 9"):
            loss_fn.statistics(net(data["input_ids"])[:, :4], data)


def test_a_changed_signature_is_named(nemo, monkeypatch):
    def train(self, batch, loss_fn, eval_mode=False, gbs=None):
        pass

    monkeypatch.setattr(nemo[1], "train", train)
    with pytest.raises(RuntimeError, match=r"Policy.train must have the parameters data.*it has self, batch, loss_fn"):
        plugin.install(CLIP_COV)


def test_without_nemo_rl_the_error_says_so():
    with pytest.raises(RuntimeError, match="nemo_rl.algorithms.grpo must be importable"):
        plugin.install(CLIP_COV)


def test_the_launch_script_runs_the_trainers_script(nemo, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["nemo_rl"])
    script = tmp_path / "run_grpo.py"
    script.write_text(
        "import sys\nfrom nemo_rl.algorithms.grpo import ClippedPGLossFn\n"
        "print(sys.argv[1:], __name__, ClippedPGLossFn.__name__)\n"
    )
    plugin.main([json.dumps(CLIP_COV), str(script), "--config", "x.yaml"])
    assert capsys.readouterr().out == "['--config', 'x.yaml'] __main__ make_loss\n"
    assert nemo[0].ClippedPGLossFn is standin.ClippedPGLossFn
    for arguments, message in ((["{}"], "usage"), (["{clip", str(script)], "the controls must be JSON")):
        with pytest.raises(SystemExit, match=message):
            plugin.main(arguments)
