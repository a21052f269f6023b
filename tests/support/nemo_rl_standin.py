"""NeMo-RL's classes that the plug-in meets, written for these tests after their published signatures.

Workers are in this process: the policy divides the data over replicas and micro-batches, pickles the loss as Ray would,
and adds up the gradients, as both of NeMo-RL's workers do.
"""

import enum
import pickle
import sys
from contextlib import ExitStack
from types import ModuleType, SimpleNamespace

import torch

NAMES = ("nemo_rl", "nemo_rl.algorithms", "nemo_rl.algorithms.grpo", "nemo_rl.algorithms.loss",
         "nemo_rl.algorithms.loss.interfaces", "nemo_rl.models", "nemo_rl.models.policy",
         "nemo_rl.models.policy.lm_policy")  # fmt: skip


class LossInputType(enum.Enum):
    LOGIT = "logit"
    LOGPROB = "logprob"


class LossType(enum.Enum):
    TOKEN_LEVEL = "token_level"
    SEQUENCE_LEVEL = "sequence_level"


def loss_config(**changed) -> SimpleNamespace:
    """ClippedPGLossConfig with NeMo-RL's defaults, but no reference policy."""
    knobs = dict(
        disable_ppo_ratio=False, token_level_loss=True, sequence_level_importance_ratios=False, ratio_clip_min=0.2,
        ratio_clip_max=0.2, ratio_clip_c=None, reference_policy_kl_penalty=0.0, reference_policy_kl_type="k3",
        use_kl_in_reward=False, use_importance_sampling_correction=False, truncated_importance_sampling_type=None,
        truncated_importance_sampling_ratio=None, truncated_importance_sampling_ratio_min=None,
        use_on_policy_kl_approximation=False, force_on_policy_ratio=False, positive_example_nll_weight=0.0,
        use_cispo=False,
    )  # fmt: skip
    return SimpleNamespace(**knobs | changed)


class ClippedPGLossFn:
    input_type = LossInputType.LOGPROB

    def __init__(self, cfg, use_fused_linear_logprobs=False):
        self.loss_type = LossType.TOKEN_LEVEL if cfg.token_level_loss else LossType.SEQUENCE_LEVEL

    def __call__(self, next_token_logprobs, data, global_valid_seqs, global_valid_toks):
        mask = data["token_mask"][:, 1:] * data["sample_mask"][:, None]
        off = ((data["generation_logprobs"] - data["prev_logprobs"])[:, 1:] * mask).sum() / global_valid_toks
        assert next_token_logprobs.shape == mask.shape and not next_token_logprobs.requires_grad
        return off, {"loss": 0.0, "gen_kl_error": off.item(), "num_valid_samples": data["sample_mask"].sum().item()}


class Policy:
    """replicas x micro-batches of a plain model, or of one whose logits are padded as in packed micro-batches."""

    def __init__(self, config, model=None, replicas=1, micro_batch=8, pad=0, weights_path=None):
        self.cfg, self.model, self.replicas, self.micro_batch, self.pad = config, model, replicas, micro_batch, pad

    def train(self, data, loss_fn, eval_mode=False, gbs=None, mbs=None, timer=None, check_dim_skip_keys=None):
        metrics, size = {}, len(data["input_ids"]) // self.replicas
        valid = data["sample_mask"].sum(), (data["token_mask"][:, 1:] * data["sample_mask"][:, None]).sum()
        for value in data.values():
            assert value.dim() < 2 or value.shape[1] == data["input_ids"].shape[1], "dim 1 must be the sequence dim"
        for replica in range(self.replicas):
            own = {name: value[replica * size : (replica + 1) * size] for name, value in data.items()}
            loss = pickle.loads(pickle.dumps(loss_fn))
            for start in range(0, size, self.micro_batch):
                part = {name: value[start : start + self.micro_batch] for name, value in own.items()}
                logits = self.model(part["input_ids"])
                logits = torch.nn.functional.pad(logits, (0, 0, 0, self.pad), value=torch.nan)
                value, found = loss(logits=logits, data=part, global_valid_seqs=valid[0], global_valid_toks=valid[1])
                value.backward()
                for name, one in found.items():
                    metrics.setdefault(name, []).append(one)
        return {"loss": sum(metrics["loss"]), "all_mb_metrics": metrics}

    def save_checkpoint(self, weights_path, optimizer_path=None, tokenizer_path=None, checkpointing_cfg=None):
        pass


def modules() -> ExitStack:
    """NeMo-RL's modules, importable until the stack is closed."""
    made = ExitStack()
    for name in NAMES:
        sys.modules[name] = ModuleType(name)
        sys.modules[name].__path__ = []
        made.callback(sys.modules.pop, name, None)
    sys.modules["nemo_rl.algorithms.grpo"].ClippedPGLossFn = ClippedPGLossFn
    sys.modules["nemo_rl.algorithms.loss.interfaces"].LossInputType = LossInputType
    policy = type("Policy", (Policy,), dict(vars(Policy)))  # a class of its own, which the plug-in changes
    sys.modules["nemo_rl.models.policy.lm_policy"].Policy = policy
    return made
