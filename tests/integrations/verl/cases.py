"""Controls of every moment, and the divisions of one rollout over micro-batches and ranks that must not change them."""

import torch.distributed as dist

from tests.integrations.verl import megatron_worker
from tests.integrations.verl.worker import (
    Case,
    Outcome,
    make_worker,
    policy_loss_config,
    record_selections,
    rollout,
    run,
    score,
    train,
)

# `begin` decides: clip_b, positive_advantage_reweighting. `select`: clip_cov, kl_cov, entropic. `apply` alone:
# entropy_bonus; entropy_ratio_clip, which is given the rollout's entropies. `after_update`: adaptive_bonus by TRL's
# rule, entropic. `after_step`: aent, ..._reweighting.
CONTROLS = {
    "clip_cov": {"clip_cov_ratio": 0.1, "clip_cov_lb": 0.01, "clip_cov_ub": 50.0},
    "kl_cov": {"kl_cov_ratio": 0.1, "ppo_kl_coef": 1.0},
    "entropic": {"prob_threshold": 0.01, "ki": 0.1, "kp": 0.1},
    "entropy_bonus": {"entropy_coef": 0.01},
    "adaptive_bonus": {"rule": "trl", "target": 4.0, "entropy_coef": 0.01},
    "aent": {"warmup": 0, "entropy_coef": 5e-3},
    "clip_b": {"mu": 0.5},
    "entropy_ratio_clip": {"entropy_ratio_low": 1e-3, "entropy_ratio_high": 1e-3},
    "positive_advantage_reweighting": {"weight": 0.3, "target": 4.0},
}
IN_MEGATRON = ("clip_cov", "entropic", "aent", "clip_b", "entropy_ratio_clip")
SHUFFLED = [3, 6, 0, 2, 7, 1, 5, 4]
ROLLOUTS = 2


def case(name: str, rows: list[int] | None = None, **worker) -> Case:
    return Case({"controls": {name: CONTROLS[name]}}, worker, rows=rows, rollouts=ROLLOUTS)


def on_two_ranks(model: str, folder: str) -> tuple[dict[str, Outcome], dict]:
    """All controls, on this rank; the rows are dealt to the ranks in another order than on one.

    Returns: (outcomes, the state that is stored where rank 0 has no outputs of the model, like a first pipeline stage).
    """
    from entcov.integrations.verl import checkpoint  # brings verl, which `start` must have prepared

    outcomes = {name: run(model, case(name, SHUFFLED, micro=2)) for name in CONTROLS}
    outcomes["dynamic"] = run(model, case("clip_cov", max_tokens=24))
    training = make_worker(model, policy_loss=policy_loss_config({"controls": {"aent": {}}})).engine.training
    training.has_outputs, training.step = bool(dist.get_rank()), 7 * dist.get_rank()
    checkpoint.save(training, folder)
    return outcomes, checkpoint.read(folder)


def on_tensor_parallel_ranks(model: str) -> dict[str, tuple[dict | None, list[list[int]]]]:
    """Controls in verl's Megatron engine on this rank, which has half of the vocabulary: (metrics, tokens chosen)."""
    from verl.workers.engine.base import EngineRegistry

    megatron_worker.start(model)
    from verl.workers.engine.megatron.transformer_impl import MegatronEngineWithLMHead

    register = EngineRegistry.register(model_type="language_model", backend="megatron", device="cpu")
    register(MegatronEngineWithLMHead)
    found = {}
    for name in IN_MEGATRON:
        policy_loss = policy_loss_config({"controls": {name: CONTROLS[name]}})
        worker, batch = megatron_worker.make_worker(model, policy_loss=policy_loss), rollout()
        chosen, batch.shared = record_selections(worker), True
        score(worker, batch, moved=0.1)
        found[name] = (train(worker, batch, epochs=2), chosen)
    return found


def in_two_processes(model: str, folder: str) -> tuple:
    """What `on_two_ranks` and `on_tensor_parallel_ranks` return; the second changes the process."""
    return *on_two_ranks(model, folder), on_tensor_parallel_ranks(model)
