"""What the token lens of a report shows: a run's record of responses, as the plain data that the page's script reads.

Text of models and of data sets becomes visible text here: whatever would act (control characters, marks of writing
direction, lone surrogates) is replaced by its name, such as ⟨U+202E⟩.
"""

from __future__ import annotations

import json
import math
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from entcov.rl.record.token_record import FOLDER, SPLITS, record_files

Record = dict[str, Any]  # as entcov/rl/record/token_record.py writes it

# Quantity of a token -> (title, unit, whether it has two signs), in the order in which the page offers them.
QUANTITIES = {
    "entropy": ("Entropy of the policy", "nats", False),
    "covariance": ("Covariance of log-probability and advantage", "nats", True),
    "advantage": ("Advantage", "", True),
    "change": ("Change of the token's probability by the step", "", True),
    "probability": ("Probability of the token", "", False),
}
_TITLES = {"train": "responses that were trained on", "held_out": "held-out responses"}
_LIMIT = 0.98  # quantile of a quantity's size where its colour scale ends


def read_records(run_dir: str | Path) -> dict[str, list[Record]]:
    """The records of a run by split, in the order of their steps; empty for a run that kept none.

    Raises:
        ValueError: a damaged file; the message names it.
    """
    found: dict[str, list[Record]] = {}
    for split in SPLITS:
        for path, _ in record_files(Path(run_dir) / FOLDER / split):
            try:
                found.setdefault(split, []).append(_as_record(json.loads(path.read_bytes())))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"{path} is damaged ({error}); remove the file to report on the rest") from None
    return found


def lens(runs: Mapping[str, Mapping[str, Sequence[Record]]], max_bytes: int) -> dict[str, Any]:
    """The lens of runs by label: {"scales", "runs"}, which takes at most `max_bytes` as `to_json` writes it.

    Where it would be larger, every second, every fourth ... record is left out, and "left_out" says how many.
    """
    runs = {label: splits for label, splits in runs.items() if any(splits.values())}
    total = sum(len(records) for splits in runs.values() for records in splits.values())
    stride = 1
    while True:
        # Counted from the end, so that the last record is always there.
        shown = {label: {s: r[::-1][::stride][::-1] for s, r in splits.items()} for label, splits in runs.items()}
        left_out = total - sum(len(records) for splits in shown.values() for records in splits.values())
        data = {
            "scales": _scales(shown),
            "left_out": left_out,
            "runs": [
                {"label": visible(label), "splits": [_split(name, records) for name, records in splits.items()]}
                for label, splits in shown.items()
            ],
        }
        if len(to_json(data)) <= max_bytes or stride > total:
            return data
        stride *= 2


def to_json(data: Any) -> str:
    """JSON of ASCII without <, > and &: it can stand inside any element of a page and ends none."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def visible(text: str) -> str:
    """The text with everything that is not seen, or that changes how the rest is laid out, replaced by its name.

    A line feed becomes ⏎ and stays.
    """
    return "".join(map(_visible, text))


def _visible(character: str) -> str:
    if character == "\n":
        return "⏎\n"
    # C: control, format (direction, joiners, byte order mark), surrogate, private, unassigned; Zl, Zp: separators.
    if unicodedata.category(character)[0] == "C" or unicodedata.category(character) in ("Zl", "Zp"):
        return f"⟨U+{ord(character):04X}⟩"
    return character


def _as_record(value: Record) -> Record:
    """The record, if it has what the page reads."""
    for prompt in value["prompts"]:
        for response in prompt["responses"]:
            lengths = {len(response[name]) for name in ("pieces", "entropy", "logprob")}
            if len(lengths) != 1 or not isinstance(response["chosen"], dict):
                raise ValueError("columns of different lengths")
    int(value["step"]), dict(value["solved"])
    return value


def _split(name: str, records: Sequence[Record]) -> dict[str, Any]:
    return {
        "title": _TITLES[name],
        "steps": [
            {"step": record["step"], "prompts": [_prompt(prompt, records) for prompt in record["prompts"]]}
            for record in records
        ],
    }


def _prompt(prompt: Record, records: Sequence[Record]) -> dict[str, Any]:
    key = prompt["key"]
    return {
        "key": key,
        "prompt": visible(prompt["prompt"]),
        "answer": visible(prompt["answer"]),
        "source": visible(prompt["source"]),
        "history": [[one["step"], *one["solved"][key]] for one in records if key in one["solved"]],
        "responses": [_response(response) for response in prompt["responses"]],
    }


def _response(response: Record) -> dict[str, Any]:
    columns = {name: values for name, values in _values(response).items() if any(v is not None for v in values)}
    return {
        "score": response["score"], "finished": response["finished"], "length": response["length"],
        "pieces": [visible(piece) for piece in response["pieces"]], "values": columns,
        "chosen": {visible(name): at for name, at in response["chosen"].items() if at},
    }  # fmt: skip


def _values(response: Record) -> dict[str, list[float | None]]:
    """The quantities of QUANTITIES that the response has, token by token."""
    before, after = (
        [None if value is None else math.exp(value) for value in response.get(name, ())]
        for name in ("logprob", "logprob_after")
    )
    values = {name: response[name] for name in ("entropy", "covariance", "advantage") if name in response}
    if after:
        pairs = zip(before, after, strict=True)
        values["change"] = [None if b is None or a is None else _short(a - b) for b, a in pairs]
    return values | {"probability": [None if b is None else _short(b) for b in before]}


def _scales(runs: Mapping[str, Mapping[str, Sequence[Record]]]) -> list[dict[str, Any]]:
    """Of each quantity that any response has, its title, unit, and where its colours end: one scale for all runs."""
    sizes: dict[str, list[float]] = {}
    for splits in runs.values():
        for records in splits.values():
            for record in records:
                for prompt in record["prompts"]:
                    for response in prompt["responses"]:
                        for name, values in _values(response).items():
                            sizes.setdefault(name, []).extend(abs(v) for v in values if v is not None)
    found = []
    for name, (title, unit, signed) in QUANTITIES.items():
        if own := sorted(sizes.get(name, ())):
            end = 1.0 if name == "probability" else _short(own[int(_LIMIT * (len(own) - 1))], 2) or 1.0
            found.append({"name": name, "title": title, "unit": unit, "signed": signed, "end": end})
    return found


def _short(value: float, digits: int = 3) -> float:
    return float(f"{value:.{digits}g}")
