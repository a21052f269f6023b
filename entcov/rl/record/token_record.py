"""A small record of some responses, token by token, which `python -m entcov report` shows.

RUN/tokens/train/step_N.json has responses that step N trained on: the text of each token, the policy's entropy and
log-probability before the step's first update and its log-probability after the last one, the advantage, the
covariance as `actor/cov_mean` averages it, and which tokens a control chose. RUN/tokens/held_out/step_N.json has
held-out responses of the evaluation after step N, with entropy and log-probability alone.

The size is bounded whatever the run's length: each of the two folders has at most KEPT + 3 files, and each file at most
that part of half of `max_mb`. A run that has taken more steps keeps every second, every fourth ... record. Which steps
are kept, which responses are chosen and what is cut depends on the step and on the responses alone, so a resumed run
ends with the files of one that was left alone.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from entcov.controls import Selection
from entcov.rl.batch import Batch, pack
from entcov.rl.record.durable import atomic_write, clear_leftovers, make_folder
from entcov.rl.types import RIGHT, Rollout

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

FOLDER, SPLITS = "tokens", ("train", "held_out")
KEPT = 32  # records of each split that are kept, besides the first one, the last one and one that is being written
PROMPTS, RESPONSES = 4, 2  # in a record, and of each prompt
_NAME = re.compile(r"step_(\d+)\.json")
_LEAST_BYTES = 20  # that a token takes in a file; typical are 40
_LONGEST_CHARACTER = 4  # tokens: UTF-8 has at most 4 bytes, and a token at least one


@dataclass
class Watched:
    """The chosen responses of the step under way; tensors are [n], the tokens of these responses in order."""

    rollouts: list[Rollout]
    solved: dict[str, list[int]]  # key of a prompt -> [right responses, responses], of all prompts of the step
    batch: Batch  # the chosen responses as they were scored
    columns: dict[str, Tensor] = field(default_factory=dict)
    chosen: dict[str, Tensor] = field(default_factory=dict)  # by control: bool

    def __post_init__(self) -> None:
        at = self.batch.loss_mask
        self.ids = self.batch.token_id[at]
        self.columns = {"entropy": self.batch.entropy[at], "logprob": self.batch.old_logprob[at]}

    def shaped(self, token_id: Tensor, dropped: Tensor | None, **values: Tensor) -> None:
        """Takes the advantages and covariances of the rollout's loss tokens; other tokens have left the loss."""
        where, known = self._places(token_id)
        for name, value in values.items():
            self.columns[name] = torch.full(self.ids.shape, math.nan, device=self.ids.device)
            self.columns[name][where] = value[known].float()
        self.chosen["dropped"] = torch.ones_like(self.ids, dtype=torch.bool)
        self.chosen["dropped"][where] = False if dropped is None else dropped[known]

    def selected(self, control: str, token_id: Tensor, selection: Selection) -> None:
        """Takes what a control chose of one micro-batch; a token counts as chosen if one update chose it."""
        where, known = self._places(token_id.cpu())
        for name, part in ((control, selection.mask), (control, selection.weight), ("dropped", selection.drop)):
            if part is not None:
                mask = self.chosen.setdefault(name, torch.zeros_like(self.ids, dtype=torch.bool))
                mask[where] |= part.cpu()[known] != 0

    def updated(self, logprob: Tensor, anywhere: Callable[[Tensor], Tensor]) -> None:
        """Takes the log-probabilities of `batch` under the policy after the updates, and what other processes saw.

        Collective, as `entcov.rl.interfaces.Actor.anywhere` is.
        """
        self.columns["logprob_after"] = logprob[self.batch.loss_mask]
        self.chosen = {name: anywhere(self.chosen[name]) for name in sorted(self.chosen)}

    def _places(self, token_id: Tensor) -> tuple[Tensor, Tensor]:
        """(index into the watched tokens, mask of `token_id`) of those that are watched."""
        at = torch.searchsorted(self.ids, token_id).clamp(max=len(self.ids) - 1)
        known = self.ids[at] == token_id
        return at[known], known


@dataclass
class TokenRecord:
    """Writes the record of a run. Every process calls it alike; `folder` is None on those that do not write.

    Args:
        every: training steps between two records of training responses.
        eval_every: steps between two evaluations, 0: after the last step alone.
        max_bytes: bound of all files together.
        steps: of the run; the last one is recorded too.
    """

    folder: Path | None
    tokenizer: Tokenizer
    every: int
    eval_every: int
    max_bytes: int
    steps: int

    @property
    def budget(self) -> int:
        """Bytes of one file."""
        return self.max_bytes // (len(SPLITS) * (KEPT + 3))

    def due(self, step: int, split: str) -> bool:
        every = self._every(split)
        return step == self.steps or is_kept(step, step, every)

    def watch(self, step: int, rollouts: Sequence[Rollout], batch: Batch) -> Watched | None:
        """The chosen responses of a training step whose `batch` of these rollouts has been scored. None: not due."""
        if not self.due(step, "train"):
            return None
        chosen = choose(rollouts)
        return Watched([rollouts[i] for i in chosen], self._solved(rollouts), batch.subset(chosen))

    def keep_step(self, step: int, watched: Watched) -> None:
        """Writes the record of a training step."""
        columns = {name: column.tolist() for name, column in watched.columns.items()}
        chosen = {name: mask.tolist() for name, mask in watched.chosen.items()}
        self._keep(step, "train", watched.rollouts, watched.solved, columns, chosen)

    def keep_evaluation(self, step: int, rollouts: Sequence[Rollout], actor: Any) -> None:
        """Scores and writes some held-out responses. Collective."""
        if not rollouts or not self.due(step, "held_out"):
            return
        some = [rollouts[i] for i in choose(rollouts)]
        batch = pack(some)
        stats = actor.compute_logprobs(batch)
        columns = {name: stats[name][batch.loss_mask].tolist() for name in ("entropy", "logprob")}
        self._keep(step, "held_out", some, self._solved(rollouts), columns, {})

    def go_back(self, step: int) -> None:
        """Removes what a run wrote after `step`, from which it goes on, and what a killed process left."""
        for folder in (self.folder / split for split in SPLITS):
            clear_leftovers(folder)
            for path, number in record_files(folder):
                if number > step:
                    path.unlink()

    def _every(self, split: str) -> int:
        return self.every if split == "train" else self.eval_every or self.steps or 1

    def _solved(self, rollouts: Sequence[Rollout]) -> dict[str, list[int]]:
        counts: dict[str, list[int]] = defaultdict(lambda: [0, 0])
        for rollout in rollouts:
            entry = counts[prompt_key(rollout)]
            entry[0] += rollout.reward is not None and rollout.reward >= RIGHT
            entry[1] += 1
        return {key: counts[key] for key in sorted(counts)[: self.budget // 100]}

    def _keep(
        self, step: int, split: str, rollouts: Sequence[Rollout], solved: Mapping[str, list[int]],
        columns: Mapping[str, list[float]], chosen: Mapping[str, list[bool]],
    ) -> None:  # fmt: skip
        if self.folder is None:
            return
        prompts: dict[str, dict[str, Any]] = {}
        most = self.budget // (_LEAST_BYTES * len(rollouts))  # tokens of a response: more would not fit
        room = self.budget // 60  # characters of a prompt, of 6 bytes at most: all of them get less than half of a file
        start = 0
        for rollout in rollouts:
            key, example = prompt_key(rollout), rollout.prompt.example
            if key not in prompts:
                text = "\n".join(message["content"] for message in example.prompt)
                prompts[key] = {
                    "key": key,
                    "prompt": _cut(text, room),
                    "answer": _cut(example.ground_truth, room // 8),
                    "source": _cut(example.data_source, 60),
                    "responses": [],
                }
            own = slice(start, start + min(most, len(rollout.tokens)))
            prompts[key]["responses"].append(
                {
                    "sample": rollout.sample,
                    "score": rollout.reward,
                    "finished": rollout.finished,
                    "length": len(rollout.tokens),
                    "pieces": token_texts(self.tokenizer, rollout.tokens[:most].tolist()),
                    **{name: [_short(value) for value in column[own]] for name, column in columns.items()},
                    "chosen": {name: [i for i, one in enumerate(mask[own]) if one] for name, mask in chosen.items()},
                }
            )
            start += len(rollout.tokens)
        record = {"step": step, "solved": dict(solved), "prompts": list(prompts.values())}
        folder = self.folder / split
        make_folder(folder)
        atomic_write(folder / f"step_{step}.json", _encoded(record, self.budget))
        for path, number in record_files(folder):
            if number != step and not is_kept(number, step, self._every(split)):
                path.unlink()


def is_kept(step: int, now: int, every: int) -> bool:
    """Whether the record of `step` is kept after that of step `now`: the first, and at most KEPT others."""
    stride = every
    while now // stride > KEPT:
        stride *= 2
    return step <= 1 or step % stride == 0


def record_files(folder: Path) -> list[tuple[Path, int]]:
    """The records in a folder with their steps, in the order of these."""
    paths = folder.iterdir() if folder.is_dir() else ()
    found = [(path, int(match[1])) for path in paths if (match := _NAME.fullmatch(path.name))]
    return sorted(found, key=lambda one: one[1])


def prompt_key(rollout: Rollout) -> str:
    """8 hexadecimal digits that depend on the prompt's text, answer and source alone."""
    example = rollout.prompt.example
    said = [example.data_source, example.ground_truth, *(message["content"] for message in example.prompt)]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()[:8]


def choose(rollouts: Sequence[Rollout]) -> list[int]:
    """Indices of at most PROMPTS * RESPONSES rollouts, ascending.

    Half of the prompts are those of the smallest keys, so that a prompt that comes again is chosen again. The others
    are the next ones whose responses have different scores, as far as there are any. Of each prompt the best response
    and the worst are taken.
    """
    groups: dict[str, list[int]] = defaultdict(list)
    for i, rollout in enumerate(rollouts):
        groups[prompt_key(rollout)].append(i)
    keys = sorted(groups)
    first, rest = keys[: PROMPTS // 2], keys[PROMPTS // 2 :]
    rest.sort(key=lambda key: len({rollouts[i].reward for i in groups[key]}) == 1)
    chosen = []
    for key in first + rest[: PROMPTS - len(first)]:
        order = sorted(groups[key], key=lambda i: -(rollouts[i].reward or 0.0))
        chosen += [order[0], *order[1:][1 - RESPONSES :]]
    return sorted(chosen)


def token_texts(tokenizer: Tokenizer, tokens: Sequence[int]) -> list[str]:
    """The text that each token adds. Where several tokens make one character, the last of them has it."""
    texts: list[str] = []
    start = done = 0  # the text of tokens[:done] is out; decoding from `start` gives white space its context
    for i in range(len(tokens)):
        text = tokenizer.decode(tokens[start : i + 1])
        if text.endswith("\ufffd") and i + 1 < len(tokens) and i - done + 1 < _LONGEST_CHARACTER:
            texts.append("")
            continue
        texts.append(text[len(tokenizer.decode(tokens[start:done])) :])
        start, done = done, i + 1
    return texts


def _encoded(record: dict[str, Any], budget: int) -> bytes:
    """The record as JSON of ASCII; responses are cut to as many tokens as fit into `budget` bytes."""
    responses = [response for prompt in record["prompts"] for response in prompt["responses"]]
    limit = max(response["length"] for response in responses)
    while True:
        data = json.dumps(record, separators=(",", ":"), allow_nan=False).encode() + b"\n"
        if len(data) <= budget or not limit:
            return data
        limit = limit * budget // len(data) * 9 // 10
        for response in responses:
            for name, value in response.items():
                if isinstance(value, list):
                    response[name] = value[:limit]
            response["chosen"] = {name: [i for i in at if i < limit] for name, at in response["chosen"].items()}


def _short(value: float) -> float | None:
    """Three significant digits; None for NaN and infinities."""
    return float(f"{value:.3g}") if math.isfinite(value) else None


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[:length] + " …"
