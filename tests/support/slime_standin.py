"""slime's functions that the plug-in meets, written for these tests after their published signatures and docstrings.

Real are the process groups of Megatron-Core. The model is an embedding and a vocabulary-parallel head: its logits at a
position depend on that token alone, so that context parallelism needs no attention.
"""

import sys
from argparse import Namespace
from contextlib import ExitStack
from types import ModuleType

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region
from torch import Tensor, nn

PACKAGE = "slime.backends.megatron_utils"


def arguments(**changed) -> Namespace:
    """slime's arguments that the plug-in reads, with slime's defaults (eps_clip_high is set to eps_clip by slime)."""
    args = Namespace(
        loss_type="custom_loss", custom_loss_function_path="entcov.integrations.slime.loss", entropy_coef=0.0,
        rollout_top_p=1.0, rollout_temperature=1.0, use_rollout_logprobs=False, keep_old_actor=False,
        compute_advantages_and_returns=True, recompute_loss_function=False, use_opsm=False, get_mismatch_metrics=False,
        use_unbiased_kl=False, custom_tis_function_path=None, advantage_estimator="grpo", eps_clip=0.2,
        eps_clip_high=0.2, eps_clip_c=None, calculate_per_token_loss=False, use_kl_loss=False, kl_loss_coef=0.0,
        kl_loss_type="k1", use_tis=False, tis_clip=2.0, tis_clip_low=0.0, allgather_cp=False, vocab_size=37,
        use_routing_replay=False, n_samples_per_prompt=2, num_rollout=3, save=None, load=None,
    )  # fmt: skip
    return Namespace(**(vars(args) | changed))


class DataIterator:
    def __init__(self, rollout_data, micro_batch_indices):
        self.rollout_data, self.micro_batch_indices, self.offset = rollout_data, micro_batch_indices, 0

    def get_next(self, keys):
        samples, self.offset = self.micro_batch_indices[self.offset], self.offset + 1
        return {key: None if self.rollout_data.get(key) is None else [self.rollout_data[key][i] for i in samples]
                for key in keys}  # fmt: skip

    def reset(self):
        self.offset = 0
        return self


def owned(total: int) -> list[int]:
    """The positions of a sequence that this context-parallel rank has: the r-th and the r-th last of 2 CP chunks."""
    ranks, rank = mpu.get_context_parallel_world_size(), mpu.get_context_parallel_rank()
    if ranks == 1:
        return list(range(total))
    chunk = -(-total // (2 * ranks))
    last = 2 * ranks - 1 - rank
    return [*range(rank * chunk, (rank + 1) * chunk), *range(last * chunk, (last + 1) * chunk)]


def slice_log_prob_with_cp(log_prob, total_length, response_length):
    first = total_length - response_length - 1
    return log_prob[[p - first for p in owned(total_length) if first <= p < total_length - 1]]


def _build_shifted_tokens(T, device, unconcat_tokens, total_lengths, response_lengths, allgather_cp):
    stream = []
    for tokens, total in zip(unconcat_tokens, total_lengths, strict=True):
        stream += [int(tokens[p + 1]) if p + 1 < total else 0 for p in owned(total)]
    return torch.tensor(stream + [0] * (T - len(stream)), device=device)


def _extract_per_sample(log_prob_full, entropy_full, total_lengths, response_lengths, allgather_cp):
    start, found = 0, []
    for total, response in zip(total_lengths, response_lengths, strict=True):
        places = owned(total)
        at = [start + i for i, p in enumerate(places) if total - response - 1 <= p < total - 1]
        found.append(log_prob_full[at])
        start += len(places)
    return found, []


def _allgather_cp_redistribute(res, *, logits_local_len, total_lengths, response_lengths):
    raise NotImplementedError("no test has allgather_cp")


class Head(nn.Module):
    """Full weights are equal on all ranks; this rank's columns of the head are vocab_padded / TP of them."""

    def __init__(self, vocab: int, padded: int, width: int):
        super().__init__()
        draw = torch.Generator().manual_seed(5)
        self.embedding = nn.Parameter(torch.randn(vocab, width, generator=draw))
        whole = torch.randn(padded, width, generator=draw)
        ranks, rank = mpu.get_tensor_model_parallel_world_size(), mpu.get_tensor_model_parallel_rank()
        self.head = nn.Parameter(whole.chunk(ranks)[rank].clone())

    def forward(self, tokens: Tensor) -> Tensor:
        return copy_to_tensor_model_parallel_region(self.embedding[tokens]) @ self.head.T


def get_batch(iterator: DataIterator, keys, pad: int = 8):
    batch = iterator.get_next(keys)
    batch["unconcat_tokens"] = batch["tokens"]
    parts = [torch.tensor([int(t[p]) if p < len(t) else 0 for p in owned(len(t))]) for t in batch["tokens"]]
    stream = torch.cat(parts)
    batch["tokens"] = torch.cat([stream, stream.new_zeros(-len(stream) % pad)])[None]
    return batch


def forward_only(f, args, model, data_iterator, num_microbatches, store_prefix=""):
    """A pass over all micro-batches; a list over samples for each name, in the order of the samples."""
    iterator, found = data_iterator[0].reset(), {}
    keys = ["tokens", "loss_masks", "total_lengths", "response_lengths"]
    for _ in range(sum(num_microbatches)):
        batch = get_batch(iterator, keys)
        with torch.no_grad():
            logits = model[0](batch["tokens"])
        _, values = f(logits, args=args, unconcat_tokens=batch["unconcat_tokens"], with_entropy=False,
                      total_lengths=batch["total_lengths"], response_lengths=batch["response_lengths"])  # fmt: skip
        for name, value in values.items():
            found.setdefault(store_prefix + name, []).extend(value)
    order = sum(iterator.micro_batch_indices, [])
    return {name: [column[order.index(i)] for i in range(len(order))] for name, column in found.items()}


def get_log_probs_and_entropy(
    logits, *, args, unconcat_tokens, total_lengths, response_lengths, with_entropy=False, non_loss_data=True,
    top_p_token_ids=None, top_p_token_offsets=None,
):  # fmt: skip
    raise AssertionError("the plug-in stands in this place")


def train_one_step(
    args, rollout_id, step_id, data_iterator, model, optimizer, opt_param_scheduler, num_microbatches,
    step_global_batch_size, microbatch_pbar=None,
):  # fmt: skip
    """One update: slime's scaling of the loss, Megatron's of the micro-batches and of the gradients."""
    from entcov.integrations import slime

    group = mpu.get_data_parallel_group(with_context_parallel=True)
    ranks, context = dist.get_world_size(group), mpu.get_context_parallel_world_size()
    optimizer.zero_grad()
    seen, logged = torch.zeros(()), torch.zeros(())
    for _ in range(num_microbatches):
        names = ["tokens", "loss_masks", "total_lengths", "response_lengths", "advantages", "log_probs"]
        batch = get_batch(data_iterator[0], names)
        logits = model[0](batch["tokens"])
        before = logits.detach().clone()
        loss, log = slime.loss(args, batch, logits, None)
        assert torch.equal(before, logits.detach())
        logged += log["loss"]
        seen += sum(mask.sum().clamp(min=1) for mask in batch["loss_masks"])
        if args.calculate_per_token_loss:
            loss = loss * context
        else:
            loss = loss * num_microbatches / step_global_batch_size * ranks / num_microbatches
        loss.backward()
    dist.all_reduce(seen, group=group)
    dist.all_reduce(logged, group=group)
    divisor = seen if args.calculate_per_token_loss else torch.tensor(float(ranks))
    for parameter in model[0].parameters():
        dist.all_reduce(parameter.grad, group=group)
        parameter.grad /= divisor
    optimizer.step()
    denominator = seen / context if args.calculate_per_token_loss else step_global_batch_size
    return {"loss": float(logged / denominator)}, 0.0


def save_checkpoint(iteration, model, optimizer, opt_param_scheduler, num_floating_point_operations_so_far):
    pass


def modules() -> ExitStack:
    """slime's modules, importable until the stack is closed."""
    made = ExitStack()
    contents = {
        "model": [train_one_step, forward_only, save_checkpoint],
        "actor": [get_log_probs_and_entropy],
        "loss": [_build_shifted_tokens, _extract_per_sample, _allgather_cp_redistribute],
        "cp_utils": [slice_log_prob_with_cp],
        "data": [DataIterator],
    }
    for name in ("slime", "slime.backends", PACKAGE):
        sys.modules[name] = ModuleType(name)
        sys.modules[name].__path__ = []
        made.callback(sys.modules.pop, name, None)
    for name, functions in contents.items():
        module = ModuleType(f"{PACKAGE}.{name}")
        for function in functions:
            setattr(module, function.__name__, function)
        sys.modules[module.__name__] = module
        setattr(sys.modules[PACKAGE], name, module)
        made.callback(sys.modules.pop, module.__name__, None)
    return made


def train(args, rollout_id, model, optimizer, data, rows) -> list[dict[str, float]]:
    """What slime's actor does with a rollout: old log-probabilities, advantages, then the steps."""
    actor, module = sys.modules[f"{PACKAGE}.actor"], sys.modules[f"{PACKAGE}.model"]
    iterator = DataIterator(data, sum(rows, []))
    data["num_microbatches"] = [len(step) for step in rows]
    data |= forward_only(actor.get_log_probs_and_entropy, args, model, [iterator], data["num_microbatches"])
    data["advantages"] = [torch.full_like(x, a) for x, a in zip(data["log_probs"], data["rewards"], strict=True)]
    iterator.reset()
    losses = []
    for step_id, step in enumerate(rows):
        rest = (model, optimizer, None, len(step), args.global_batch_size)
        losses.append(module.train_one_step(args, rollout_id, step_id, [iterator], *rest)[0])
    return losses
