"""The plug-in for slime on real process groups, against one process with plain torch."""

from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state as mpu

from entcov.controls import Progress, begin, make_control, mini_batch_totals, needs, select
from entcov.integrations import slime as plugin
from entcov.objective.policy_loss import policy_loss
from entcov.objective.tokens import Tokens
from tests.support import slime_standin as standin

VOCAB, PADDED, WIDTH, LR = 37, 40, 6, 2.0
PROMPT = [3, 2, 3, 2, 4, 4, 2, 2]
RESPONSE = [5, 9, 2, 7, 6, 4, 8, 3]
REWARD = [1.0, -0.6, 0.3, -1.2, 0.8, 1.5, -0.4, 0.9]


def samples() -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    return [torch.randint(0, VOCAB, (p + r,), generator=draw) for p, r in zip(PROMPT, RESPONSE, strict=True)]


def masks() -> list[torch.Tensor]:
    found = [torch.ones(r, dtype=torch.int32) for r in RESPONSE]
    found[1][2:4] = 0  # tool output
    found[6][:] = 0  # a removed sample, which counts in slime's divisor
    return found


def steps_of(case: dict[str, Any]) -> list[list[list[list[int]]]]:
    """[step][rank][micro-batch]: samples, as slime divides them."""
    size, ranks = case["micro_batch"], mpu.get_data_parallel_world_size()
    steps = []
    for first in (0, 4):
        batches = [list(range(first + i, first + i + size)) for i in range(0, 4, size)]
        steps.append([batches[rank::ranks] for rank in range(ranks)])
    return steps


def rollout_data(case) -> tuple[dict[str, Any], list[list[list[int]]]]:
    """This rank's part, and its micro-batches by step, in its own numbering."""
    own = [step[mpu.get_data_parallel_rank()] for step in steps_of(case)]
    partition = sum((sum(step, []) for step in own), [])
    local = {sample: i for i, sample in enumerate(partition)}
    data = {"partition": partition, "sample_indices": [16 + i for i in partition]}
    for name, values in (("tokens", samples()), ("loss_masks", masks()), ("response_lengths", RESPONSE)):
        data[name] = [values[i] for i in partition]
    data["total_lengths"] = [PROMPT[i] + RESPONSE[i] for i in partition]
    data["rewards"] = data["local_raw_reward"] = [REWARD[i] for i in partition]
    data["rollout_mask_sums"] = torch.tensor([float(masks()[i].sum()) for i in partition])
    return data, [[[local[i] for i in batch] for batch in step] for step in own]


def drift_of(weights: list[torch.Tensor], i: int) -> torch.Tensor:
    """d entropy / d step along each token's own gradient, from its definition: docs/math.md (9)."""
    tokens, first = samples()[i], PROMPT[i] - 1
    logp = (weights[0][tokens] @ weights[1][:VOCAB].T).log_softmax(-1)[first:-1]
    p, entropy = logp.exp(), -(logp.exp() * logp).sum(-1, keepdim=True)
    slope = -p * (logp + entropy)  # d entropy / d logit
    return (slope * (torch.nn.functional.one_hot(tokens[first + 1 :], VOCAB) - p)).sum(-1)


def expected(case, args) -> tuple[list[torch.Tensor], list[dict[str, float]]]:
    """Both updates by one process over whole mini-batches, with plain log-softmax: weights and metrics."""
    draw = torch.Generator().manual_seed(5)
    weights = [torch.randn(VOCAB, WIDTH, generator=draw), torch.randn(PADDED, WIDTH, generator=draw)]
    weights = [w.double().requires_grad_() for w in weights]
    controls = [make_control(name, **knobs) for name, knobs in case["controls"].items()]
    config, old, found = plugin.policy_loss_config(args), {}, []

    def statistics(i):
        tokens, first = samples()[i], PROMPT[i] - 1
        logp = (weights[0][tokens] @ weights[1][:VOCAB].T / args.rollout_temperature).log_softmax(-1)[first:-1]
        return logp.gather(1, tokens[first + 1 :, None])[:, 0], -(logp.exp() * logp).sum(-1)

    def tokens_of(members, logprob, entropy, **more):
        sequence = torch.cat([torch.full((RESPONSE[i],), i) for i in members])
        return Tokens(
            logprob=logprob, entropy=entropy, old_logprob=torch.cat([old[i] for i in members]),
            advantage=torch.cat([torch.full((RESPONSE[i],), REWARD[i], dtype=torch.float64) for i in members]),
            loss_mask=torch.cat([masks()[i].bool() for i in members]), sequence=sequence,
            sequence_length=torch.cat([torch.full((RESPONSE[i],), int(masks()[i].sum())) for i in members]),
            token_id=sequence * plugin.STRIDE + torch.cat([torch.arange(RESPONSE[i]) for i in members]), **more,
        )  # fmt: skip

    with torch.no_grad():
        old = {i: statistics(i)[0] for i in range(8)}
        scored = [torch.cat(column) for column in zip(*map(statistics, range(8)), strict=True)]
        drift = torch.cat([drift_of(weights, i) for i in range(8)])
        rollout = tokens_of(range(8), *scored, entropy_drift=drift)
        at = rollout.loss_mask
        loss_tokens = Tokens(**{n: None if x is None else x[at] for n, x in vars(rollout).items()})
        shaped = torch.zeros_like(rollout.advantage)
        begun = begin(controls, loss_tokens, Progress(1, args.num_rollout, 0))
        shaped[at] = begun.advantage
    for step, members in enumerate(([0, 1, 2, 3], [4, 5, 6, 7])):
        logprob, entropy = (torch.cat(column) for column in zip(*map(statistics, members), strict=True))
        tokens = tokens_of(members, logprob, entropy)
        tokens.advantage = shaped[torch.isin(rollout.sequence, torch.tensor(members))]
        bare = Tokens(**(vars(tokens) | {"logprob": logprob.detach(), "entropy": entropy.detach()}))
        chosen, metrics = select(controls, [bare], step=step, config=config)
        totals = mini_batch_totals([bare], chosen)
        if not args.calculate_per_token_loss:
            totals = type(totals)(totals.num_tokens, 4)
        loss, more = policy_loss(tokens, config, totals=totals, controls=controls, selections=chosen[0])
        for weight, gradient in zip(weights, torch.autograd.grad(loss, weights), strict=True):
            weight.data -= LR * gradient
        metrics = (metrics if "selection" in needs(controls) else {}) | ({} if step else begun.metrics)
        found.append({name: float(value) for name, value in (metrics | more).items()})
    return [w.detach() for w in weights], found


def slime(folder: Path, case: dict[str, Any]) -> str | None:
    """Two updates of one rollout, in the case's layout and split."""
    mpu.initialize_model_parallel(case.get("tp", 1), context_parallel_size=case.get("cp", 1))
    try:
        with standin.modules():
            entcov = {"controls": case["controls"]}
            args = standin.arguments(global_batch_size=4, entcov=entcov, **case.get("args", {}))
            with plugin.install(args):
                data, rows = rollout_data(case)
                model = standin.Head(VOCAB, PADDED, WIDTH)
                optimizer = torch.optim.SGD(model.parameters(), lr=LR)
                got = standin.train(args, 0, [model], optimizer, data, rows)
        weights, metrics = expected(case, args)
        rank, ranks = mpu.get_tensor_model_parallel_rank(), mpu.get_tensor_model_parallel_world_size()
        want = {"embedding": weights[0], "head": weights[1].chunk(ranks)[rank]}
        for name, value in want.items():
            worst = (getattr(model, name) - value).abs().max().item()
            if not worst < 2e-6:  # fp32 against float64
                return f"{name} is off by {worst}"
        for step, (mine, theirs) in enumerate(zip(got, metrics, strict=True)):
            theirs = {"entcov/" + n.removeprefix("actor/"): x for n, x in theirs.items()} | {
                "loss": theirs["actor/loss"]
            }
            theirs |= {name: mine[name] for name in case.get("after_step", ()) if step == 1}
            if mine.keys() != theirs.keys():
                return f"step {step}: metrics differ by {mine.keys() ^ theirs.keys()}"
            for name, value in theirs.items():
                if not abs(mine[name] - value) <= 2e-5 * max(1.0, abs(value)):
                    return f"step {step}: {name} is {mine[name]} instead of {value}"
        return None
    finally:
        mpu.destroy_model_parallel()
