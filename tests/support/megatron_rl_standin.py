"""Megatron-LM's functions that the plug-in meets, written for these tests after their published signatures.

One module stands for megatron.training.training, megatron.training.global_vars and megatron.rl.rl_utils. Real are, from
Megatron-Core: the model, its schedule, the process groups, the data iterator and the micro-batch calculator.
"""

import sys
from argparse import Namespace
from contextlib import ExitStack, nullcontext
from types import ModuleType, SimpleNamespace

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from torch import nn

NAMES = ("megatron.training.training", "megatron.training.global_vars", "megatron.rl.rl_utils")
ARGS = Namespace()
STATE = SimpleNamespace(packing_context=None, last_collection_iteration=0, sequences_this_iteration_on_rank=0,
                        latest_batch_num_sequences=0)  # fmt: skip


def arguments(**changed) -> None:
    """Sets the arguments that the plug-in reads, with the example's defaults."""
    vars(ARGS).clear()
    vars(ARGS).update(
        perform_rl_step=True, grpo_entropy_term_weight=0.0, context_parallel_size=1, cuda_graph_impl="none",
        virtual_pipeline_model_parallel_size=None, rl_inference_logprobs_is_correction=False, grpo_kl_beta=0.001,
        rl_importance_sampling_truncation_coef=None, grpo_clamp_eps_lower=0.01, grpo_clamp_eps_upper=0.01,
        grpo_prompts_per_step=4, grpo_group_size=2, global_batch_size=8, grpo_iterations=2, train_iters=4,
        rl_use_sequence_packing=False, seq_length=12, micro_batch_size=2, decoder_seq_length=None, save=None, load=None,
    )  # fmt: skip
    vars(ARGS).update(changed)


def get_args():
    return ARGS


def get_tokenizer():
    return SimpleNamespace(vocab_size=ARGS.vocab_size)


def get_rl_runtime_state():
    return STATE


def selective_log_softmax(logits, index):
    return logits.log_softmax(-1).gather(-1, index[..., None])[..., 0]


def get_logprobs(model, tokens, position_ids, no_grad=False, sequence_packing=False, packed_seq_params=None):
    with torch.no_grad() if no_grad else nullcontext():
        logits = model(tokens, position_ids, None, runtime_gather_output=True, fp32_output=True)
    return selective_log_softmax(logits[:, :-1, :], tokens[:, 1:])


def compute_logprobs_batch(model, batches, dtype):
    """Old log-probabilities of this rank's rows; the example asserts their dtype."""
    found = torch.cat([get_logprobs(model, tokens, places, no_grad=True) for tokens, places in batches])
    assert found.dtype == dtype
    return found


def load_packed_data_by_index(bin_idx, packing_context, logprobs_is_correction):
    one = packing_context[bin_idx]
    mask, old = one["loss_mask"][:, 1:], one.get("old_logprobs")
    return (one["tokens"], one["advantages"], old, mask, one["position_ids"], one.get("ref_logprobs"), None,
            one["seq_starts"], one["seq_lengths"], one["seq_indices"], None)  # fmt: skip


def save_checkpoint(iteration, model, optimizer, opt_param_scheduler, num_floating_point_operations_so_far):
    pass


def train_step(
    forward_step_func, data_iterator, model, optimizer, opt_param_scheduler, config, forward_backward_func,
    iteration=None, pg_collection=None, p2p_communicator=None,
):  # fmt: skip
    """Megatron's reduction of gradients: the mean over replicas, or their sum over all tokens."""
    from megatron.core.num_microbatches_calculator import get_num_microbatches

    optimizer.zero_grad()
    group, tokens = mpu.get_data_parallel_group(), []
    config.finalize_model_grads_func = lambda model, num_tokens=None, **_: tokens.append(num_tokens)
    reports = forward_backward_func(
        forward_step_func=forward_step_func, data_iterator=data_iterator, model=model,
        num_microbatches=get_num_microbatches(), seq_length=ARGS.seq_length, micro_batch_size=ARGS.micro_batch_size,
        decoder_seq_length=ARGS.decoder_seq_length, forward_only=False,
    )  # fmt: skip
    divisor = torch.tensor(float(dist.get_world_size(group)))
    if config.calculate_per_token_loss:
        divisor = tokens[0].clone()
        dist.all_reduce(divisor, group=group)
    for parameter in model[0].parameters():
        dist.all_reduce(parameter.grad, group=group)
        parameter.grad /= divisor
    optimizer.step()
    shown = {}
    for name in reports[0]:
        value = torch.stack([report[name] for report in reports]).sum(0)
        dist.all_reduce(value, group=group)
        shown[name] = value[0] / value[1]
    return shown, 0, False, False, 0, 0.0, 0, 0


def modules() -> ExitStack:
    """Megatron-LM's modules, importable until the stack is closed."""
    made = ExitStack()
    for name in ("megatron.training", "megatron.rl"):
        sys.modules[name] = ModuleType(name)
        sys.modules[name].__path__ = []
        made.callback(sys.modules.pop, name, None)
    for name in NAMES:
        sys.modules[name] = sys.modules[__name__]
        made.callback(sys.modules.pop, name, None)
    return made


class Wrapped(nn.Module):
    """What DDP and Float16Module are around the model: takes fp32_output, and passes the rest on."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module, self.config = module, module.config

    def forward(self, *args, fp32_output=True, **named):
        assert not named["runtime_gather_output"] and not fp32_output, "the vocabulary was gathered"
        return self.module(*args, **named)
