"""The losses and advantages of the real TRL package against ours: TRL's own methods, over random batches.

A real GRPOTrainer on the CPU; only what a model would give is replaced: log-probabilities, entropies, completions and
rewards.
"""

import math
from dataclasses import replace

import pytest
import torch

pytest.importorskip("trl")

from datasets import Dataset  # noqa: E402
from tokenizers import Tokenizer, models  # noqa: E402
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM  # noqa: E402
from trl import GRPOConfig, GRPOTrainer  # noqa: E402

from entcov.controls import AdaptiveBonus, EntropyBonus, HighEntropyTokens, Progress, select  # noqa: E402
from entcov.objective.advantages import make_estimator  # noqa: E402
from entcov.objective.policy_loss import policy_loss  # noqa: E402
from entcov.objective.responses import Responses  # noqa: E402
from entcov.objective.tokens import PolicyLossConfig  # noqa: E402
from tests.support.padded_batch import PaddedBatch, assert_same_loss  # noqa: E402

SEEDS = range(20)
MEAN, INF = "seq-mean-token-mean", math.inf


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    vocabulary = {"<pad>": 0, "<eos>": 1, "<unk>": 2, "a": 3}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>")), pad_token="<pad>",
        eos_token="<eos>", unk_token="<unk>",
    )  # fmt: skip
    size = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1)
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=4, eos_token_id=1, pad_token_id=0, bos_token_id=None, **size))
    args = GRPOConfig(
        output_dir=str(tmp_path_factory.mktemp("trl")), per_device_train_batch_size=12, num_generations=4,
        max_completion_length=9, report_to=[], save_strategy="no", use_cpu=True, bf16=False, disable_tqdm=True,
    )  # fmt: skip
    data = Dataset.from_dict({"prompt": ["a"] * 12})
    made = GRPOTrainer(
        model=model, reward_funcs=lambda **_: [0.0], args=args, train_dataset=data, processing_class=tokenizer
    )
    made.current_gradient_accumulation_steps = 1
    made.model.train()
    return made


def trl_loss(trainer, monkeypatch, batch, *, advantage=None, sampled=False, ratio=None, args=None, **attributes):
    """`_compute_loss` of TRL for the batch, with these attributes of the trainer and knobs of its args."""
    for name, value in attributes.items():
        assert hasattr(trainer, name), name
        monkeypatch.setattr(trainer, name, value)
    for name, value in (args or {}).items():
        assert hasattr(trainer.args, name), name
        monkeypatch.setattr(trainer.args, name, value)
    statistics = batch.logprob, batch.entropy, None
    monkeypatch.setattr(trainer, "_get_per_token_logps_and_entropies", lambda *_, **__: statistics)
    ones = torch.ones(len(batch.mask), 1, dtype=torch.long)
    inputs = {
        "prompt_ids": ones, "prompt_mask": ones, "completion_ids": batch.mask.long(),
        "completion_mask": batch.mask.long(), "advantages": batch.advantage[:, 0],
        "old_per_token_logps": batch.old_logprob, "ref_per_token_logps": batch.ref_logprob,
        "num_items_in_batch": batch.mask.sum(),
    }  # fmt: skip
    if sampled:
        inputs["sampling_per_token_logps"] = batch.rollout_logprob
    if ratio is not None:
        inputs["importance_sampling_ratio"] = ratio
        monkeypatch.setattr(trainer, "use_vllm", True)
    return trainer._compute_loss(trainer.model, inputs)


VESPO = {"vespo_k_pos": 1.5, "vespo_lambda_pos": 0.8, "vespo_k_neg": 0.5, "vespo_lambda_neg": 1.2}
CLIP = {"epsilon_low": 0.1, "epsilon_high": 0.28}
OURS = {"clip_low": 0.1, "clip_high": 0.28}
LOSSES = {
    "grpo": (CLIP, {}, {**OURS, "aggregation": MEAN}),
    "bnpo": (CLIP, {}, OURS),
    "dapo": (CLIP, {}, OURS),
    "dr_grpo": (CLIP, {}, {**OURS, "aggregation": "seq-mean-token-sum-norm", "max_response_length": 9}),
    "cispo": ({"epsilon_high": 1.4}, {}, {"objective": "cispo", "clip_low": 1.0, "clip_high": 0.4}),
    "sapo": (
        {}, {"sapo_temperature_pos": 1.3, "sapo_temperature_neg": 2.0},
        {"objective": "sapo", "tau_pos": 1.3, "tau_neg": 2.0, "aggregation": MEAN},
    ),
    "vespo": ({}, VESPO, {"objective": "vespo", **VESPO}),
    # the recommended setups of GSPO and LUSPO
    "grpo, sequence": (
        {**CLIP, "importance_sampling_level": "sequence"}, {}, {"objective": "gspo", **OURS, "aggregation": MEAN},
    ),
    "luspo, sequence": (
        {**CLIP, "importance_sampling_level": "sequence"}, {},
        {"objective": "gspo", **OURS, "aggregation": "seq-mean-token-sum"},
    ),
    # two-sided clip: delta is the dual clip, where it is at least 1 + epsilon_high
    "dapo, delta": (CLIP, {"delta": 1.5}, {**OURS, "dual_clip": 1.5}),
    "dapo, delta 1.28": (CLIP, {"delta": 1.28}, {**OURS, "dual_clip": 1.28}),
    "dapo, KL": (
        {"beta": 0.3}, {"use_bias_correction_kl": True}, {"kl_coef": 0.3, "kl_weight": "ratio"},
    ),
    "grpo, plain KL": (
        {"beta": 0.3}, {"use_bias_correction_kl": False}, {"kl_coef": 0.3, "aggregation": MEAN},
    ),
    "cispo, KL": (
        {"beta": 0.3, "epsilon_high": 1.4}, {"use_bias_correction_kl": True},
        {"objective": "cispo", "clip_low": 1.0, "clip_high": 0.4, "kl_coef": 0.3, "kl_weight": "ratio"},
    ),
    "dapo, off-policy mask": ({"off_policy_mask_threshold": 0.05}, {}, {"off_policy_mask_threshold": 0.05}),
}  # fmt: skip


@pytest.mark.parametrize("name", LOSSES)
def test_losses(name, trainer, monkeypatch):
    attributes, args, knobs = LOSSES[name]
    config = PolicyLossConfig(**knobs)
    for seed in SEEDS:
        batch = PaddedBatch.random(seed)
        tokens = replace(batch.tokens(), rollout_logprob=None)
        expected = trl_loss(trainer, monkeypatch, batch, args=args, loss_type=name.split(",")[0], **attributes)
        # TRL rounds the knobs of sapo and vespo to float32
        assert_same_loss(policy_loss(tokens, config)[0], expected, batch.logprob, rel=1e-6)


def test_the_off_policy_mask_reads_the_sampler_where_it_is_known(trainer, monkeypatch):
    for seed in SEEDS:
        batch = PaddedBatch.random(seed)
        expected = trl_loss(trainer, monkeypatch, batch, sampled=True, loss_type="dapo", off_policy_mask_threshold=0.1)
        loss, metrics = policy_loss(batch.tokens(), PolicyLossConfig(off_policy_mask_threshold=0.1))
        assert_same_loss(loss, expected, batch.logprob)


def test_every_loss_type_is_compared():
    known = set(GRPOConfig.__dataclass_fields__["loss_type"].metadata["help"].replace("`", "'").split("'"))
    assert {"grpo", "bnpo", "dapo", "dr_grpo", "cispo", "sapo", "vespo", "luspo"} <= known
    assert {name.split(",")[0] for name in LOSSES} == {
        "grpo", "bnpo", "dapo", "dr_grpo", "cispo", "sapo", "vespo", "luspo",
    }  # fmt: skip


# ---- the generation batch: importance weights and advantages ---------------------------------------------------------


def trl_scored(trainer, monkeypatch, batch, rewards, **attributes):
    """What `_generate_and_score_completions` of TRL makes of the batch and of rewards [B, functions]."""
    for name, value in attributes.items():
        assert hasattr(trainer, name), name
        monkeypatch.setattr(trainer, name, value)
    lengths = batch.length.tolist()
    completions = [[3] * n for n in lengths]
    sampled = [row[:n] for row, n in zip(batch.rollout_logprob.tolist(), lengths, strict=True)]
    made = [[3]] * len(lengths), completions, None, ["a"] * len(lengths), sampled, {}, None, None
    monkeypatch.setattr(trainer, "_generate", lambda prompts: made)
    monkeypatch.setattr(trainer, "_calculate_rewards", lambda *_: rewards)
    monkeypatch.setattr(trainer, "reward_weights", torch.ones(rewards.shape[1]))
    monkeypatch.setattr(trainer, "reward_funcs", [None] * rewards.shape[1])
    monkeypatch.setattr(trainer, "reward_func_names", [f"f{i}" for i in range(rewards.shape[1])])
    statistics = batch.old_logprob, None, None
    monkeypatch.setattr(trainer, "_get_per_token_logps_and_entropies", lambda *_, **__: statistics)
    monkeypatch.setattr(trainer.args, "gradient_accumulation_steps", 3)  # so that TRL computes old log-probabilities
    with torch.no_grad():
        return trainer._generate_and_score_completions([{"prompt": "a"}] * len(lengths))


@pytest.mark.parametrize("mode", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
def test_importance_weights(mode, trainer, monkeypatch):
    """vllm_importance_sampling_mode, with both bounds; and VESPO with the weights of tokens."""
    level, form = mode.split("_")
    knobs = {"tis_cap": 1.3, "tis_floor": 0.7, "tis_level": level, "tis_mode": form}
    bounds = {"vllm_importance_sampling_clip_max": 1.3, "vllm_importance_sampling_clip_min": 0.7}
    for seed in SEEDS:
        batch = PaddedBatch.random(seed)
        scored = trl_scored(
            trainer, monkeypatch, batch, torch.rand(12, 1), use_vllm=True, vllm_importance_sampling_mode=mode, **bounds
        )
        ratio = scored["importance_sampling_ratio"].double()
        expected = trl_loss(trainer, monkeypatch, batch, ratio=ratio, loss_type="dapo")
        assert_same_loss(policy_loss(batch.tokens(), PolicyLossConfig(**knobs))[0], expected, batch.logprob, rel=1e-5)
        if level == "token":
            expected = trl_loss(trainer, monkeypatch, batch, ratio=ratio, loss_type="vespo", args=VESPO)
            config = PolicyLossConfig(objective="vespo", **VESPO, **knobs)
            assert_same_loss(policy_loss(batch.tokens(), config)[0], expected, batch.logprob, rel=1e-5)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_scale_rewards(scale, trainer, monkeypatch):
    """Equal but for what is added to the std: 1e-4 in TRL, 1e-6 here."""
    for seed in SEEDS:
        batch = PaddedBatch.random(seed)
        g = torch.Generator().manual_seed(seed)
        reward = torch.randint(0, 4, (12,), generator=g) / 4.0
        reward[::4], reward[1::4] = 0.0, 1.0
        expected = trl_scored(trainer, monkeypatch, batch, reward[:, None], scale_rewards=scale)["advantages"]
        value = make_estimator("grpo", scale_rewards=scale)(Responses.of(reward, batch.group, batch.length)).value
        if scale != "none":
            grouped = reward.view(3, 4).double()
            std = grouped.std(1).repeat_interleave(4) if scale == "group" else reward.double().std()
            value = value * (std + 1e-6) / (std + 1e-4)
        torch.testing.assert_close(value.float(), expected, rtol=1e-5, atol=1e-6)


# ---- entropy ---------------------------------------------------------------------------------------------------------


def test_entropy_bonus(trainer, monkeypatch):
    batch = PaddedBatch.random(0)
    expected = trl_loss(trainer, monkeypatch, batch, loss_type="dapo", entropy_coef=0.3, _entropy_bonus_enabled=True)
    loss, _ = policy_loss(batch.tokens(), controls=[EntropyBonus(0.3)])
    assert_same_loss(loss, expected, batch.logprob)


def test_high_entropy_tokens(trainer, monkeypatch):
    """Where TRL's quantile falls between two tokens it keeps as many as we do."""
    control, compared = HighEntropyTokens(0.2, denominator="all"), 0
    for seed in SEEDS:
        batch = PaddedBatch.random(seed)
        if (int(batch.mask.sum()) - 1) % 5 == 0:
            continue  # it falls on a token: rounding decides whether TRL keeps that one
        expected = trl_loss(trainer, monkeypatch, batch, loss_type="dapo", top_entropy_quantile=0.2)
        tokens = batch.tokens()
        detached = replace(tokens, logprob=tokens.logprob.detach())
        ((selection,),), _ = select([control], [detached], step=0, config=PolicyLossConfig())
        loss, _ = policy_loss(tokens, controls=[control], selections=[selection])
        assert_same_loss(loss, expected, batch.logprob)
        compared += 1
    assert compared > 5


@pytest.mark.parametrize("initial, target", [(0.3, 2.0), (0.0, 2.0), (0.3, 0.05), (0.02, 0.8)])
def test_adaptive_bonus(initial, target, trainer, monkeypatch):
    """Ten updates: TRL's own controller and ours give the same loss, from the first, whose coefficient is 0."""
    control = AdaptiveBonus(rule="trl", target=target, entropy_coef=initial, delta=0.03, coef_min=0.0, coef_max=0.35)
    knobs = {"entropy_target": target, "entropy_coef_delta": 0.03, "entropy_coef_min": 0.0, "entropy_coef_max": 0.35}
    state = {"entropy_coef": initial, "use_adaptive_entropy": True, "_entropy_bonus_enabled": True}
    state |= {"_last_world_entropy": INF, "_entropy_window_stats": None}
    used = []
    for update in range(10):
        batch = PaddedBatch.random(update)
        batch.entropy *= 1.0 + 0.6 * math.sin(update)
        expected = trl_loss(trainer, monkeypatch, batch, loss_type="dapo", args=knobs, **state)
        state = {}  # from here on TRL keeps it
        used.append(control.applied)
        loss, metrics = policy_loss(batch.tokens(), controls=[control])
        assert_same_loss(loss, expected, batch.logprob)
        control.after_update({"entropy": float(metrics["actor/entropy"])}, Progress(update + 1, 10, update + 1))
        assert control.coef == pytest.approx(trainer.entropy_coef, abs=1e-12)
    assert used[0] == 0.0 and (len(set(used)) > 2 or target == 0.05)
