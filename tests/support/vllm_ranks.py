"""One engine over two processes. rl/vllm/test_engine.py runs
`torchrun --nproc-per-node 2 -m tests.support.vllm_ranks`."""

from __future__ import annotations

import torch
import torch.distributed as dist

from tests.support.list_batch import said
from tests.support.vllm_policies import (
    OPTIONS,
    TOLERANCE,
    gap,
    policy,
    prompts,
    reshuffle,
    settings,
    vllm_sampler,
    weights,
)


def main() -> None:
    dist.init_process_group("gloo")
    config = settings("qwen3")
    config.rollout.vllm.tensor_parallel = 2
    model, tokenizer = policy("qwen3")
    sampler = vllm_sampler(config, model, tokenizer)
    for version in (1, 2):
        reshuffle(model, seed=version)
        sampler.sync(version, weights(model))
        rollouts = sampler.generate(prompts(6), **OPTIONS)
        assert gap(model, rollouts) < TOLERANCE, gap(model, rollouts)
        everywhere: list = [None, None]
        dist.all_gather_object(everywhere, [said(rollout) for rollout in rollouts])
        assert everywhere[0] == everywhere[1]
    shard = sampler.engine._llm.llm_engine.model_executor.driver_worker.model_runner.model.model.embed_tokens.weight
    assert shard.shape[0] < len(tokenizer)  # half of the padded vocabulary: it is sharded, not copied
    del shard
    sampler.engine.close()
    total = torch.full((1,), float(dist.get_rank() + 1))
    dist.all_reduce(total)  # the trainer's own group outlives the engine
    assert float(total) == 3.0
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
