"""What tests/megatron/test_checkpoint.py runs in several processes: checkpoints, exports, rollouts, agreement."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from entcov.rl.batch import pack
from entcov.rl.config import RolloutConfig
from entcov.rl.data.tokenizer import load_tokenizer
from entcov.rl.recipe import ConfigError
from entcov.rl.sandbox.budget import Charge
from megatron_integration.actor import MegatronActor
from megatron_integration.bridge import save_hf
from megatron_integration.checkpoint import load_sharded, save_sharded
from megatron_integration.node import PeerError
from megatron_integration.rollouts import CopySampler, SharedRollouts, sampler_ranks
from tests.support.megatron_cases import laid_out, load, megatron_actor, raises
from tests.support.tiny_run import prompts


def resharding(folder: Path, case: dict[str, Any]) -> str | None:
    """Two updates, a checkpoint, a third update; then the checkpoint and the third update at every layout of `to`.

    At the layout of the save the result is the same bit for bit, elsewhere the loaded weights are, and the third update
    equals to rounding.
    """
    batch = load(folder / "batch.pt")
    stored = folder / f"sharded_{case['number']}"

    def start(layout, megatron) -> MegatronActor:
        return megatron_actor(folder / case["model"], layout, megatron, dtype=getattr(torch, case["dtype"]))

    def update(actor) -> dict[str, torch.Tensor]:
        actor.update(batch, step=1)
        return {name: weight.clone() for name, weight in actor.named_weights()}

    with laid_out(**case["megatron"]) as (megatron, layout):
        actor = start(layout, megatron)
        batch.assign_scores(actor.compute_logprobs(batch), version=-1)
        update(actor)
        saved = update(actor)
        save_sharded(actor, stored)
        want = update(actor)
    for there in (case["megatron"], *case["to"]):
        with laid_out(**there) as (megatron, layout):
            actor = start(layout, megatron)
            load_sharded(actor, stored)
            loaded = {name: weight.clone() for name, weight in actor.named_weights()}
            got = update(actor)
        if actor.weight_version != 3:
            return f"{there}: weight_version is {actor.weight_version}"
        if loaded.keys() != saved.keys() or not all(torch.equal(loaded[name], saved[name]) for name in saved):
            return f"{there}: the loaded weights are not those that were saved"
        limit = 0.0 if there == case["megatron"] else 1e-6
        worst = max((got[name] - want[name]).abs().max().item() for name in want)
        if not worst <= limit:
            return f"{there}: the third update is off by {worst}"
        if torch.equal(got["model.norm.weight"], saved["model.norm.weight"]):
            return f"{there}: the third update changed nothing"
    return None


def wrong_load(folder: Path, case: dict[str, Any]) -> str | None:
    """What cannot be restored is refused: another optimizer, a step count that is off, nothing there at all."""
    batch = load(folder / "batch.pt")
    stored = folder / "sharded_wrong"
    with laid_out(**case["megatron"]) as (megatron, layout):
        actor = megatron_actor(folder / case["model"], layout, megatron)
        save_sharded(actor, folder / "sharded_fresh")
        load_sharded(actor, folder / "sharded_fresh")  # before its first step the optimizer has no state
        batch.assign_scores(actor.compute_logprobs(batch), version=-1)
        actor.update(batch, step=1)
        actor.weight_version = 7
        save_sharded(actor, stored)
        other = dict(case["megatron"]) | {"distributed_optimizer": not megatron.distributed_optimizer}
        if not raises(lambda: load_sharded(actor, stored), "its own step count of 7, found [1.0]"):
            return "a wrong step count went through"
        if not raises(lambda: load_sharded(actor, folder / "nothing"), "holds no checkpoint of the megatron backend"):
            return "a missing checkpoint went through"
    with laid_out(**other) as (megatron, layout):
        actor = megatron_actor(folder / case["model"], layout, megatron)
        if not raises(lambda: load_sharded(actor, stored), "megatron.distributed_optimizer and model.compute_dtype"):
            return "another optimizer's state went through"
    return None


def export(folder: Path, case: dict[str, Any]) -> str | None:
    """Hugging Face weights through Megatron and back: the same bits, in files that from_pretrained loads."""
    out = folder / f"exported_{case['number']}"
    with laid_out(**case["megatron"]) as (megatron, layout):
        actor = megatron_actor(folder / case["model"], layout, megatron)
        tokenizer = load_tokenizer(str(folder / case["model"]))
        # A limit of one weight a file, so that the index is written as for large models.
        with mock.patch("megatron_integration.bridge._SHARD_BYTES", case["shard_bytes"]):
            save_hf(actor.bridge, actor.model, layout, tokenizer, out)
        dist.barrier()
    before = AutoModelForCausalLM.from_pretrained(folder / case["model"]).state_dict()
    after = AutoModelForCausalLM.from_pretrained(out).state_dict()
    if before.keys() != after.keys():
        return f"names differ: {before.keys() ^ after.keys()}"
    different = [name for name in before if not torch.equal(before[name], after[name])]
    generation = "generation_config.json"
    if (out / generation).read_bytes() != (folder / case["model"] / generation).read_bytes():
        return "the generation configuration differs"
    files = len(list(out.glob("*.safetensors")))
    if (files > 1) != case["many_files"] or list(out.glob("shard-*")):
        return f"files: {sorted(p.name for p in out.iterdir())}"
    return f"weights differ: {different}" if different else None


def agreement(folder: Path, case: dict[str, Any]) -> str | None:
    """What rank 0 has, every rank gets; its failure too."""
    first = dist.get_rank() == 0

    def fail():
        raise ConfigError("run_dir: taken")

    with laid_out(**case["megatron"]) as (_, layout):
        if (value := layout.broadcast_from_rank0(lambda: {"rank": dist.get_rank()})) != {"rank": 0}:
            return f"agreed on {value}"
        try:
            layout.broadcast_from_rank0(fail)
        except (ConfigError, PeerError) as error:
            wanted = (ConfigError, "run_dir: taken") if first else (PeerError, "rank 0: run_dir: taken")
            return None if (type(error), str(error)) == wanted else f"raised {error!r}"
        return "nothing was raised"


def rollouts(folder: Path, case: dict[str, Any]) -> str | None:
    """Two replicas share the prompts: all ranks get all rollouts, scored where they were sampled, by the actor's
    weights, at each prompt's temperature; and the log-probabilities of all prompts."""
    asked, temperatures = prompts(5), [0.8, 1.2, 0.6, 1.2, 0.8]
    with laid_out(**case["megatron"]) as (megatron, layout):
        actor = megatron_actor(folder / case["model"], layout, megatron)
        batch = load(folder / "batch.pt")
        batch.assign_scores(actor.compute_logprobs(batch), version=-1)
        actor.update(batch, step=1)  # so that the sampler's weights are not those of the folder
        hf = AutoModelForCausalLM.from_pretrained(folder / case["model"], dtype=torch.float32)
        hf.compute_dtype = torch.float32
        sampler = CopySampler(hf, load_tokenizer(str(folder / case["model"])), batch_size=8)
        ranks = sampler_ranks(layout, RolloutConfig())
        scored = []

        def score(example, text: str) -> float:
            scored.append(text)
            Charge.current().timed_out = bool(len(text) % 2)
            return len(text) + 0.5

        taken = replace(layout, control="taken", node="taken")  # by the training that goes on beside it
        shared = SharedRollouts(sampler if ranks.own is not None else None, ranks, taken, score)
        shared.sync(actor.weight_version, actor.named_weights)
        got = shared.generate(asked, group_size=3, temperature=temperatures, max_response_length=6, seed=3)
        of_prompts = shared.prompt_logprobs(asked)
        for rollout in got:
            rollout.temperature = temperatures[rollout.prompt.uid]
        if [(r.prompt.uid, r.sample) for r in got] != [(i, g) for i in range(5) for g in range(3)]:
            return f"order: {[(r.prompt.uid, r.sample) for r in got]}"
        everyones: list[Any] = [None] * dist.get_world_size()
        mine = [(r.tokens.tolist(), r.logprob.tolist(), r.reward, r.text, r.weight_version) for r in got]
        dist.all_gather_object(everyones, (mine, of_prompts))
        if everyones[0] != everyones[1]:
            return "ranks have different rollouts or prompts"
        for found, expected in zip(of_prompts, sampler.prompt_logprobs(asked), strict=True):
            if len(found) != len(expected) or any(abs(a - b) > 2e-5 for a, b in zip(found, expected, strict=True)):
                return f"a prompt's log-probabilities are {found}, and not {expected}"
        if any(r.reward != len(r.text) + 0.5 or r.weight_version != 1 for r in got):
            return "rewards or weight versions are wrong"
        if any(r.timed_out != bool(len(r.text) % 2) for r in got):
            return "time-outs got lost"
        own = got[: 3 * 2] if layout.replica == 0 else got[3 * 2 :]
        if sorted(scored) != sorted(r.text for r in own):
            return f"this rank scored {len(scored)} responses of {len(own)}"
        batch = pack(got)
        gap = (actor.compute_logprobs(batch)["logprob"] - batch.rollout_logprob)[batch.loss_mask].abs().max().item()
        if not gap < 2e-5:
            return f"trainer and sampler differ by {gap}"
        other = dict(actor.named_weights())
        other.pop("model.norm.weight")
        return (
            None
            if raises(lambda: sampler.sync(2, lambda: iter(other.items())), "did not get model.norm")
            else ("a missing weight went through")
        )
