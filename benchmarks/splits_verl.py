"""`python -m benchmarks splits` in verl: its clip_cov and kl_cov beside entcov's, in its TrainingWorker."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist

from benchmarks.splits import LAYOUTS, RANKS, Found, Outcome, silent, silent_processes, watched_ours
from tests.integrations.verl import worker

LONGEST = 32  # tokens of a response
_COV = {"clip_cov_lb": 1.0, "clip_cov_ub": 5.0}  # verl's defaults
_KL = {"kl_cov_ratio": 0.1, "ppo_kl_coef": 1.0}
# Keys of policy_loss. No draw: fewer candidates than clip_cov_ratio allows, so all are taken and none is drawn.
WHO = {
    "verl clip_cov": {"loss_mode": "clip_cov", "clip_cov_ratio": 0.1, **_COV},
    "entcov_clip_cov": {"loss_mode": "entcov_clip_cov", "clip_cov_ratio": 0.1, **_COV},
    "verl clip_cov, no draw": {"loss_mode": "clip_cov", "clip_cov_ratio": 0.5, **_COV},
    "entcov clip_cov, no draw": {"controls": {"clip_cov": {"clip_cov_ratio": 0.5, "semantics": "reference", **_COV}}},
    "verl kl_cov": {"loss_mode": "kl_cov", **_KL},
    "entcov_kl_cov": {"loss_mode": "entcov_kl_cov", **_KL},
}
PAIRS = {
    "clip_cov, no draw": ("verl clip_cov, no draw", "entcov clip_cov, no draw"),
    "kl_cov": ("verl kl_cov", "entcov_kl_cov"),
}
ABOUT = (
    f"8 responses of 2 to {LONGEST} tokens; clip_cov_ratio and kl_cov_ratio 0.1 (0.5 for 'no draw'), covariance\n"
    "between 1 and 5, old log-probabilities with noise of 0.1, as in a later update on a rollout"
)


def measured(folder: Path, progress: Callable[[str], None]) -> Found:
    """Every row of WHO in every layout."""
    with silent():
        worker.start()
        model = worker.tiny_model(str(folder / "model"))
    found: Found = {who: {} for who in WHO}
    for layout, (rows, ranks) in LAYOUTS.items():
        for who in WHO:
            if ranks == 1:
                progress(f"{who}, micro-batch {layout}")
                found[who][layout] = step(model, who, rows)
    for who in WHO:
        progress(f"{who}, micro-batch {RANKS}")
        if who == next(iter(WHO)):
            with silent_processes():  # all of them in the same two processes: importing takes longest
                together = worker.on_ranks(2, on_rank, model, folder=str(folder))
        chosen = set.union(*(found[who].chosen for found in together))
        one = together[0][who]
        found[who][RANKS] = Outcome(chosen, one.norm, one.parameters, one.moved)
    return found


def on_rank(model: str) -> dict[str, Outcome]:
    """All of WHO in the layout RANKS, on this rank, with what this rank chose."""
    return {who: step(model, who, LAYOUTS[RANKS][0]) for who in WHO}


def step(model: str, who: str, rows: int) -> Outcome:
    """One update of a new worker, in micro-batches of `rows`."""
    keys = WHO[who]
    with silent():
        made = worker.make_worker(model, micro=rows, policy_loss=worker.policy_loss_config(keys))
        batch = worker.rollout(longest=LONGEST)
        worker.score(made, batch, moved=0.1)
        before = worker.parameters(made)
        torch.manual_seed(dist.get_rank())
        ours = who.startswith("entcov")
        # A response has one advantage, which no other one has: it names the response.
        watched = watched_ours(_key) if ours else watched_verls(keys["loss_mode"])
        with watched as chosen:
            metrics = worker.train(made, batch)
    after = worker.parameters(made)
    norm = metrics["grad_norm"]
    norm = float(norm[0] if isinstance(norm, list) else norm)
    return Outcome(chosen, norm, after, float((after - before).abs().max()))


def _key(tokens) -> list[tuple]:
    return list(zip(tokens.advantage.tolist(), tokens.position.tolist(), strict=True))


@contextlib.contextmanager
def watched_verls(mode: str) -> Iterator[set]:
    """The tokens that verl's loss chooses in the block, read off the losses that it hands to its agg_loss.

    clip_cov: those with loss 0. kl_cov: those whose loss is not -A r.
    """
    from verl.trainer.ppo import core_algos

    chosen, own, aggregate = set(), core_algos.POLICY_LOSS_REGISTRY[mode], core_algos.agg_loss

    def observed(*, old_log_prob, log_prob, advantages, response_mask, **others):
        def agg_loss(loss_mat, **rest):
            plain = 0 if mode == "clip_cov" else -advantages * torch.exp(log_prob - old_log_prob)
            taken = (loss_mat == plain) if mode == "clip_cov" else (loss_mat != plain)
            for row, position in (taken & response_mask.bool()).nonzero().tolist():
                chosen.add((float(advantages[row, position]), position))
            return aggregate(loss_mat=loss_mat, **rest)

        with mock.patch.object(core_algos, "agg_loss", agg_loss):
            return own(old_log_prob=old_log_prob, log_prob=log_prob, advantages=advantages,
                       response_mask=response_mask, **others)  # fmt: skip

    with mock.patch.dict(core_algos.POLICY_LOSS_REGISTRY, {mode: observed}):
        yield chosen
