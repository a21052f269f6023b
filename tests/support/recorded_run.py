"""Folders of finished runs with a record of responses, made up: for the tests of the report."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from pathlib import Path

WORDS = ("3", " plus", " 4", " is", " 7", ".", "\n", " so", " the", " answer", " carries", " one")
HOSTILE = (
    "<script>window.pwned = 1</script>", "</script>", "</script >", "<!--", "\"'`",
    "<img src=x onerror='window.pwned=1'>",
    "\x00", "\u2028", "\u202e", "\ud800", "&lt;", "]]>", "${window.pwned=1}", "\n", "שלום", " </style>",
)  # fmt: skip


def made_up_run(
    folder: Path, *, seed: int = 0, steps: int = 40, every: int = 10, tokens: int = 24, prompts: int = 4,
    control: str = "clip_cov", pieces: Sequence[str] = WORDS, floor: float = 0.1,
) -> Path:  # fmt: skip
    """A run with metrics of every step, and records of `prompts` prompts with two responses each, on both splits."""
    draw = random.Random(seed)
    rows = [{"step": 0, "val-core/sums/acc/mean@2": 0.25}]
    for step in range(1, steps + 1):
        row = {
            "step": step,
            "actor/entropy": (entropy := floor + math.exp(-step / steps * 4) + draw.gauss(0, 0.01)),
            "actor/entropy_response_mean": abs(entropy) * 0.98,
            "critic/score/mean": 0.8 - 0.5 * math.exp(-step / steps * 4) + draw.gauss(0, 0.02),
            "response_length/mean": 14 + draw.gauss(0, 0.5),
            "actor/cov_mean": 0.02 + draw.gauss(0, 0.003),
            "actor/cov_p999": 4 + draw.gauss(0, 0.3),
            "actor/cov_max": 9 + draw.gauss(0, 0.5),
            "training/mismatch": 1e-6 * draw.random(),
        }
        rows.append(row | ({"val-core/sums/acc/mean@2": 0.3 + step / steps / 2} if step % every == 0 else {}))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    at = sorted({1, *range(every, steps + 1, every)})
    for split, recorded in (("train", at), ("held_out", [0, *at[1:]])):
        (folder / "tokens" / split).mkdir(parents=True, exist_ok=True)
        for step in recorded:
            keys = [f"{p:08x}" for p in range(prompts)]
            record = {
                "step": step,
                "solved": {key: [min(8, int(8 * step / steps) + p), 8] for p, key in enumerate(keys)},
                "prompts": [_prompt(draw, key, p, split, tokens, control, pieces) for p, key in enumerate(keys)],
            }
            (folder / "tokens" / split / f"step_{step}.json").write_text(json.dumps(record))
    return folder


def _prompt(draw, key, number, split, tokens, control, pieces) -> dict:
    responses = []
    for sample, advantage in enumerate((0.9, -1.1)):
        shown = [draw.choice(pieces) for _ in range(tokens)]
        own = {"entropy": [], "logprob": [], "logprob_after": [], "covariance": [], "advantage": [advantage] * tokens}
        for _ in shown:
            p = min(0.999, draw.betavariate(3, 1) + 1e-3)
            own["logprob"].append(round(math.log(p), 3))
            own["logprob_after"].append(round(math.log(min(0.999, p * math.exp(draw.gauss(0.1 * advantage, 0.1)))), 3))
            own["entropy"].append(round(-1.4 * math.log(p) + 0.05 * draw.random(), 3))
            own["covariance"].append(round((math.log(p) + 0.4) * (advantage - 0.1), 3))
        chosen = {
            control: sorted(draw.sample(range(tokens), min(2, tokens))),
            "dropped": [tokens - 1] if sample else [],
        }
        if split == "held_out":
            own, chosen = {name: own[name] for name in ("entropy", "logprob")}, {}
        responses.append(
            {
                "sample": sample, "score": float(sample == 0), "finished": sample == 0, "length": tokens + 5 * sample,
                "pieces": shown, **own, "chosen": chosen,
            }
        )  # fmt: skip
    text = f"Prompt {number}: what is 3 + {number}?"
    return {"key": key, "prompt": text, "answer": str(3 + number), "source": "sums", "responses": responses}
