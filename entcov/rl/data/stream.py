"""Datasets in verl's row format, and the stream of prompts that the trainer's loop reads.

A row is {data_source, prompt: [{role, content}, ...], ability, reward_model: {style, ground_truth}, extra_info}, plus
an optional `solution`. Files are parquet or JSON lines.
"""

from __future__ import annotations

import io
import json
import os
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from entcov import arguments as check
from entcov.rl.data.tokenizer import encode
from entcov.rl.recipe import naming
from entcov.rl.record.durable import atomic_write
from entcov.rl.tasks.base import Task, make_task
from entcov.rl.types import Example, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SHOWN_OFFENDERS = 5
_RETRY_STRIDE = 1 << 40  # a generator's index space for redraws; no run reaches this many prompts
_MAX_RETRIES = 100


# ---- rows ----------------------------------------------------------------------------------------------------------


def to_row(example: Example) -> dict[str, Any]:
    """The example as verl's row."""
    row: dict[str, Any] = {
        "data_source": example.data_source,
        "prompt": [dict(message) for message in example.prompt],
        "ability": example.ability,
        "reward_model": {"style": example.style, "ground_truth": example.ground_truth},
    }
    if example.extra_info:
        row["extra_info"] = dict(example.extra_info)
    if example.solution is not None:
        row["solution"] = example.solution
    return row


def from_row(row: Any) -> Example:
    """The row as an example. Keys beyond the format are ignored, as verl does.

    Raises:
        ValueError: the row breaks the format; the message names the key, the rule and the value.
    """
    if not isinstance(row, dict):
        raise ValueError(f"the row must be an object, got {_kind(row)}")
    reward_model = _field(row, "reward_model", dict, "an object")
    extra_info = row.get("extra_info") or {}
    if not isinstance(extra_info, dict):
        raise ValueError(f"extra_info must be an object, got {_kind(extra_info)}")
    return Example(
        data_source=_text(row, "data_source"),
        prompt=_messages(row),
        ground_truth=_ground_truth(reward_model),
        ability=_text(row, "ability", default=""),
        style=_text(reward_model, "style", default="rule", prefix="reward_model."),
        # Parquet stores one schema: a key that only other rows have comes back as None here.
        extra_info={key: value for key, value in extra_info.items() if value is not None},
        solution=_text(row, "solution", default=None, empty=True),
    )


def _kind(value: Any) -> str:
    return f"{type(value).__name__} {check.shown(value)}"


def _field(row: dict, key: str, kind: type, rule: str) -> Any:
    if key not in row:
        raise ValueError(f"{key} is missing")
    if not isinstance(row[key], kind):
        raise ValueError(f"{key} must be {rule}, got {_kind(row[key])}")
    return row[key]


_REQUIRED: Any = object()


def _text(row: dict, key: str, *, default: Any = _REQUIRED, prefix: str = "", empty: bool = False) -> Any:
    value = row.get(key)
    if value is None and default is not _REQUIRED:
        return default
    if key not in row:
        raise ValueError(f"{prefix}{key} is missing")
    if not isinstance(value, str) or not (value or empty or default == ""):
        raise ValueError(f"{prefix}{key} must be a {'' if empty else 'non-empty '}string, got {_kind(value)}")
    return value


def _messages(row: dict) -> tuple[dict[str, str], ...]:
    messages = _field(row, "prompt", list, "a list of messages {role, content}")
    if not messages:
        raise ValueError("prompt must have at least one message, got []")
    out = []
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            raise ValueError(f"prompt[{i}] must be an object {{role, content}}, got {_kind(message)}")
        prefix = f"prompt[{i}]."
        out.append({"role": _text(message, "role", prefix=prefix), "content": _text(message, "content", prefix=prefix)})
    return tuple(out)


def _ground_truth(reward_model: dict) -> str:
    if "ground_truth" not in reward_model:
        raise ValueError("reward_model.ground_truth is missing")
    value = reward_model["ground_truth"]
    if isinstance(value, bool) or not isinstance(value, (str, int, float)) or value == "":
        raise ValueError(f"reward_model.ground_truth must be a non-empty string or a number, got {_kind(value)}")
    return str(value)


# ---- files ---------------------------------------------------------------------------------------------------------


def load_rows(*paths: str | os.PathLike[str]) -> list[Example]:
    """All examples of one or several .parquet / .jsonl files, in order.

    Raises:
        FileNotFoundError: a file that does not exist.
        ValueError: another suffix, an unreadable or empty file, or malformed rows: one error for the file that counts
            them and names place, key and rule of the first few ("row" counts from 0, "line" from 1).
    """
    examples: list[Example] = []
    for path in map(Path, paths):
        found, offenders = [], []
        for place, row in raw_rows(path):
            try:
                found.append(from_row(json.loads(row) if isinstance(row, str) else row))
            except json.JSONDecodeError as error:
                offenders.append(f"{place}: not JSON ({error})")
            except ValueError as error:
                offenders.append(f"{place}: {error}")
        if offenders:
            more = len(offenders) - _SHOWN_OFFENDERS
            lines = offenders[:_SHOWN_OFFENDERS] + ([f"... and {more} more"] if more > 0 else [])
            raise ValueError(f"{path}: {len(offenders)} malformed rows:\n  " + "\n  ".join(lines))
        if not found:
            raise ValueError(f"{path}: the file has no rows")
        examples += found
    return examples


def raw_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """(place, row) of a .parquet or .jsonl file, row by row: "row 0" and an object, or "line 1" and its JSON text."""
    _check_suffix(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such dataset file: {path}")
    if path.suffix == ".jsonl":
        try:
            with path.open(encoding="utf-8") as file:
                for number, line in enumerate(file, start=1):
                    if line.strip():
                        yield f"line {number}", line
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not UTF-8 text ({error})") from error
        return
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    yield f"row {number}", row
                    number += 1
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: not a readable parquet file ({error})") from error


def write_rows(
    examples: Iterable[Example], path: str | os.PathLike[str], columns: Mapping[str, Sequence[Any]] | None = None
) -> int:
    """Writes examples as verl's rows to a .parquet or .jsonl file and returns how many.

    `columns`: further columns, a value for each example; `load_rows` and verl ignore them.

    A failure (full disk, a value the format cannot hold) leaves an earlier file of that name as it was.

    Raises:
        ValueError: another suffix, no examples, or extra_info values whose type differs from row to row (parquet).
    """
    path = Path(path)
    _check_suffix(path)
    rows = [to_row(example) for example in examples]
    for name, values in (columns or {}).items():
        for row, value in zip(rows, values, strict=True):
            row[name] = value
    if not rows:
        raise ValueError(f"{path}: no examples to write")
    if path.suffix == ".jsonl":
        data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    else:
        data = _parquet_bytes(rows, path)
    atomic_write(path, data)
    return len(rows)


def _parquet_bytes(rows: list[dict[str, Any]], path: Path) -> bytes:
    import pyarrow
    from pyarrow import parquet

    file = io.BytesIO()
    # Columns one by one: Table.from_pylist would keep the keys of the first row only.
    keys = dict.fromkeys(key for row in rows for key in row)
    try:
        table = pyarrow.table({key: pyarrow.array([row.get(key) for row in rows]) for key in keys})
        parquet.write_table(table, file)
        return file.getvalue()
    except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError, pyarrow.ArrowNotImplementedError) as error:
        raise ValueError(f"{path}: these rows do not fit one parquet schema ({error})") from error


def _check_suffix(path: Path) -> None:
    if path.suffix not in (".parquet", ".jsonl"):
        raise ValueError(f"a dataset file must end in .parquet or .jsonl, got {str(path)!r}")


# ---- the stream ----------------------------------------------------------------------------------------------------


class PromptStream:
    """The endless sequence of training prompts, addressed by position, and the fixed list of held-out ones.

    `take(position, n)` is a pure function of its arguments, so a resumed run needs one integer to go on with the same
    prompts. A generator's position is its index; a list of examples is read epoch by epoch, in an order by
    (seed, epoch) or in that of its files. Prompts are tokenised with the tokenizer's chat template (generation prompt
    added) where it has one, else as the messages' contents joined by newlines.

    Args:
        source: a task (endless), or a list of examples (see `load_rows`).
        tokenizer: a Hugging Face tokenizer, see `load_tokenizer`.
        seed: of the epochs' orders; without effect on a task, which has a seed of its own.
        max_prompt_length: tokens a prompt may have.
        held_out: held-out examples; default: the held-out split of a task, none for a list.
        order: of a list in each epoch: "shuffled" by (seed, epoch), or as in the "file".
        overlong: what to do with longer prompts. "error" refuses them: a list's at construction, a task's when met.
            "filter" leaves them out of a list, and lets a task draw another example; `num_filtered` counts them.

    Raises:
        ValueError: an overlong prompt, or one the tokenizer cannot spell.
    """

    def __init__(
        self,
        source: Task | Sequence[Example],
        tokenizer: PreTrainedTokenizerBase,
        *,
        seed: int,
        max_prompt_length: int,
        held_out: Sequence[Example] | None = None,
        overlong: str = "error",
        order: str = "shuffled",
    ) -> None:
        self.tokenizer = tokenizer
        self.seed = seed
        self.max_prompt_length = max_prompt_length
        self.overlong, self.order = overlong, order
        self.num_filtered = 0
        self._task = source if isinstance(source, Task) else None
        self._rows = [] if self._task is not None else self._fitting(source, "source")
        self._held_out = None if held_out is None else self._fitting(held_out, "held_out")
        self._drawn_held_out: list[Prompt] = []
        self._rows_of_epoch: tuple[int, list[int]] = (-1, [])

    @classmethod
    def from_config(cls, data: Any, tokenizer: PreTrainedTokenizerBase, *, seed: int) -> PromptStream:
        """The stream that a recipe's `data` section describes: `task` with `settings`, or `train_files`, `val_files`.

        A task draws with the run's seed unless its settings name one.
        """
        options = {"seed": seed, "max_prompt_length": data.max_prompt_length, "overlong": data.overlong}
        if data.task is not None:
            with naming("data.task"):
                task = make_task(data.task, **{"seed": seed, **data.settings})
            return cls(task, tokenizer, **options)
        with naming("data.val_files"):
            held_out = load_rows(*data.val_files) if data.val_files else None
        with naming("data.train_files"):
            rows = load_rows(*data.train_files)
        return cls(rows, tokenizer, held_out=held_out, order=data.order, **options)

    @property
    def num_rows(self) -> int | None:
        """Prompts in an epoch; None for a task, which has no epochs."""
        return None if self._task is not None else len(self._rows)

    def take(self, position: int, n: int) -> list[Prompt]:
        """The prompts at positions [position, position + n); `uid` is the position."""
        return [self._at(place) for place in range(position, position + n)]

    def rows(self) -> list[Prompt]:
        """All prompts of a list in the order of its files; `uid` is the row.

        Raises:
            ValueError: the stream is that of a task.
        """
        if self._task is not None:
            raise ValueError(f"rows: a generated task has none, got task {self._task.name!r}; give data.train_files")
        return [Prompt(row, example, tuple(self._encode(example)), row) for row, example in enumerate(self._rows)]

    def held_out(self, n: int | None = None) -> list[Prompt]:
        """The first n held-out prompts of each data source, the same at every call; `uid` counts from 0.

        A list gives at most what it has; `n=None`: all of it.
        """
        if self._held_out is None and self._task is None:
            raise ValueError("held_out: this stream was built from a list of examples without held-out ones")
        if self._held_out is None:
            if n is None:
                raise ValueError("held_out: n must be given for a task, whose held-out split has no end")
            known = self._drawn_held_out  # kept: some tasks take long to draw, and every evaluation asks
            known += [self._drawn("held_out", index) for index in range(len(known), n)]
            return known[:n]
        chosen, seen = [], Counter()
        for example in self._held_out:
            if n is None or seen[example.data_source] < n:
                seen[example.data_source] += 1
                chosen.append(example)
        return [Prompt(i, example, tuple(self._encode(example))) for i, example in enumerate(chosen)]

    def _at(self, position: int) -> Prompt:
        if self._task is not None:
            return self._drawn("train", position)
        epoch, offset = divmod(position, len(self._rows))
        if self._rows_of_epoch[0] != epoch:
            rows = list(range(len(self._rows)))
            if self.order == "shuffled":
                random.Random(f"{self.seed}|{epoch}").shuffle(rows)
            self._rows_of_epoch = (epoch, rows)
        row = self._rows_of_epoch[1][offset]
        return Prompt(position, self._rows[row], tuple(self._encode(self._rows[row])), row)

    def _drawn(self, split: str, index: int) -> Prompt:
        for retry in range(_MAX_RETRIES):
            example = self._task.example(split, index + retry * _RETRY_STRIDE)
            tokens = self._encode(example)
            if self._fits(tokens, f"{split} example {index}"):
                return Prompt(index, example, tuple(tokens))
            self.num_filtered += 1
        raise ValueError(
            f"{_MAX_RETRIES} draws for {split} example {index} of task {self._task.name!r} are all longer than "
            f"max_prompt_length = {self.max_prompt_length} tokens"
        )

    def _fitting(self, examples: Sequence[Example], what: str) -> list[Example]:
        kept = [e for i, e in enumerate(examples) if self._fits(self._encode(e), f"{what}[{i}]")]
        self.num_filtered += len(examples) - len(kept)
        if not kept:
            raise ValueError(
                f"{what}: no examples are left of {len(examples)} "
                f"(max_prompt_length = {self.max_prompt_length}, overlong = {self.overlong!r})"
            )
        return kept

    def _fits(self, tokens: list[int], what: str) -> bool:
        if len(tokens) <= self.max_prompt_length:
            return True
        if self.overlong == "error":
            raise ValueError(
                f"{what}: the prompt has {len(tokens)} tokens, max_prompt_length is {self.max_prompt_length}; "
                f"raise it, or set overlong to 'filter'"
            )
        return False

    def _encode(self, example: Example) -> list[int]:
        messages = [dict(message) for message in example.prompt]
        if self.tokenizer.chat_template:
            return self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        text = "\n".join(message["content"] for message in messages)
        tokens = encode(self.tokenizer, text, add_special_tokens=True)
        if not tokens or tokens[-1] == self.tokenizer.eos_token_id:
            raise ValueError(
                f"a prompt must not be empty or end in the end-of-sequence token, got token ids {tokens} for {text!r}"
            )
        return tokens
