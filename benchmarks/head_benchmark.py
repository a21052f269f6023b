"""Forward and backward of a micro-batch in the transformers actor: the statistics from logits, or from hidden states.

A model of one layer whose vocabulary grows, on this CPU, in turn. The actor takes hidden states where the logits would
be larger than entcov.rl.hf.model.LARGE_LOGITS. The memory is what torch's allocator held at most.
"""

import argparse
import time
from functools import partial
from unittest import mock

import torch
from torch import nn

from benchmarks import measure
from benchmarks.measure import interleaved_seconds, peak_allocated_bytes, print_table
from entcov.rl.batch import Batch, pack
from entcov.rl.config import ModelConfig
from entcov.rl.hf import model as actor_model
from entcov.rl.hf.model import batch_token_stats, build_model
from entcov.rl.types import Example, Prompt, Rollout

WAYS = {"logits": float("inf"), "hidden states": -1}  # LARGE_LOGITS that leads there
PROMPT = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--vocab", type=int, nargs="+", default=[1024, 8192, 32768, 151936])
    parser.add_argument("--tokens", type=int, default=256, help="of each response")
    parser.add_argument("--responses", type=int, default=4)
    parser.add_argument("--width", type=int, default=256, help="of the hidden states")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="model.compute_dtype")
    parser.add_argument("--packing", action="store_true")
    measure.add_arguments(parser, repeats=5)


def run(args: argparse.Namespace) -> int:
    measure.set_threads(args.threads)
    rows = [row for vocab in args.vocab for row in _measure(args, vocab)]
    report = {"machine": measure.machine(), "arguments": {k: str(v) for k, v in vars(args).items()}, "rows": rows}
    print(f"{args.responses} responses of {args.tokens} tokens, width {args.width}, {args.dtype}; processor time")
    header = ["vocabulary", "logits MiB", "from", "peak MiB", "saved MiB", "median ms", "x logits", "range"]
    print_table(header, [
        [
            f"{row['vocab']:,}",
            f"{row['logits_bytes'] / 2**20:,.1f}",
            row["way"],
            f"{row['peak_bytes'] / 2**20:,.1f}",
            f"{row['saved_bytes'] / 2**20:,.1f}",
            f"{row['median_ms']:.1f}",
            f"{row['ratio']['median']:.2f}",
            f"{row['ratio']['min']:.2f}-{row['ratio']['max']:.2f}",
        ]
        for row in rows
    ])  # fmt: skip
    measure.keep(report, args.json)
    return 0


def _measure(args, vocab: int) -> list[dict]:
    settings = {
        "model_type": "qwen3", "hidden_size": args.width, "intermediate_size": args.width, "num_hidden_layers": 1,
        "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16, "tie_word_embeddings": False,
        "vocab_size": vocab, "max_position_embeddings": PROMPT + args.tokens,
    }  # fmt: skip
    config = ModelConfig(config=settings, tokenizer="char", compute_dtype=args.dtype)
    model, _ = build_model(config, seed=0, device=torch.device("cpu"))
    batch = _batch(args.responses, args.tokens, vocab)
    calls = {name: partial(_update, model, batch, args.packing, limit) for name, limit in WAYS.items()}
    seconds = interleaved_seconds(calls, args.repeats, time.process_time)
    peaks = {name: peak_allocated_bytes(call) for name, call in calls.items()}
    return [
        {
            "vocab": vocab,
            "logits_bytes": batch.num_loss_tokens * vocab * model.compute_dtype.itemsize,
            "way": name,
            "peak_bytes": peaks[name],
            "saved_bytes": peaks["logits"] - peaks[name],
            **measure.times_of(times, seconds["logits"]),
        }
        for name, times in seconds.items()
    ]


def _batch(responses: int, tokens: int, vocab: int) -> Batch:
    generator = torch.Generator().manual_seed(0)
    made = []
    for row in range(responses):
        drawn = torch.randint(0, vocab, (PROMPT + tokens,), generator=generator).tolist()
        prompt = Prompt(uid=row, row=row, tokens=tuple(drawn[:PROMPT]), example=Example("", "", "benchmark"))
        made.append(Rollout(prompt, 0, drawn[PROMPT:], [-1.0] * tokens, finished=True, weight_version=0))
    return pack(made)


def _update(model: nn.Module, batch: Batch, packing: bool, limit: float) -> None:
    with mock.patch.object(actor_model, "LARGE_LOGITS", limit):
        stats = batch_token_stats(model, batch, packing=packing)
    (-stats.logprob - 0.01 * stats.entropy).sum().backward()
    model.zero_grad(set_to_none=True)
