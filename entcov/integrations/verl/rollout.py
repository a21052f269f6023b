"""The tokens of a rollout as verl's workers get them, numbered in the same way for every division over ranks."""

from collections.abc import Sequence
from dataclasses import replace
from hashlib import blake2b

import torch
import torch.distributed as dist
from tensordict import TensorDict
from torch import Tensor
from verl.utils import tensordict_utils as tu
from verl.workers.utils.padding import no_padding_2_padding

from entcov.objective.tokens import Tokens

POSITIONS = 2**32  # token_id = number of the sequence * POSITIONS + position in the response
REWARDS = ("token_level_scores", "rm_scores")  # verl's names of the scores, before a penalty in the reward


def response_column(data: TensorDict, name: str) -> Tensor | None:
    """[B, R] of a field of responses, padded on the right; None where the data have no such field."""
    value = data.get(name, None)
    return torch.nested.to_padded_tensor(value, 0) if value is not None and value.is_nested else value


def output_column(output: dict, name: str, data: TensorDict) -> Tensor | None:
    """[B, R] of a statistic in an engine's model_output: of the response tokens, padded on the right."""
    value = output.get(name)
    return None if value is None else no_padding_2_padding(value, data).float()


def contents(data: TensorDict) -> list[bytes]:
    """What each sequence consists of, as 16 bytes: the hash of its tokens and of the length of its response."""
    responses = data["responses"]
    if responses.is_nested:
        lengths = responses.offsets().diff()
    else:
        lengths = data["attention_mask"][:, -responses.shape[1] :].sum(1)
    rows = data["input_ids"].unbind()
    return [_hash(16, row, length) for row, length in zip(rows, lengths.cpu(), strict=True)]


class Scored:
    """What the policy of the moment said of some sequences: the statistics of a forward pass."""

    def __init__(self, data: TensorDict, output: dict, names: Sequence[str]):
        self.contents, self.temperature = contents(data), _temperature(data)
        made = {name: output_column(output, name, data) for name in names}
        self.columns = {name: value for name, value in made.items() if value is not None}

    def places(self, data: TensorDict) -> list[int] | None:
        """Where each sequence of `data` is in `columns`; None where one is not there, or it is not certain which."""
        wanted = contents(data)
        if _temperature(data) != self.temperature:
            return None
        if wanted == self.contents:
            return list(range(len(wanted)))
        index = {content: i for i, content in enumerate(self.contents)}
        if len(index) < len(self.contents) or any(content not in index for content in wanted):
            return None
        return [index[content] for content in wanted]


class Rollout:
    """The loss tokens of this rank's sequences, packed row after row.

    Sequences are numbered over all ranks by their content, so a token has the same `token_id` wherever its sequence
    is: prompt and response first; among equal ones the loss mask and the advantages, then the prompt's uid, then the
    old log-probabilities. Those that are equal in all of this are exchangeable: whichever of them a control takes, the
    gradient is the same.

    Args:
        data: this rank's sequences, as `TrainingWorker.train_mini_batch` gets them.
        group: the data-parallel ranks.
        device: of the tokens.
    Collectives: 1 all-gather of objects over `group`, some 50 bytes a sequence.
    """

    def __init__(self, data: TensorDict, group: dist.ProcessGroup | None, device: torch.device | str):
        mask = response_column(data, "response_mask").bool().cpu()
        self.mask, rows = mask, mask.nonzero()[:, 0]
        number, prompt = _numbers(data, mask, group)
        lengths = mask.sum(1)
        self._ends = [0, *lengths.cumsum(0).tolist()]
        integers = {"sequence": number[rows], "position": mask.nonzero()[:, 1], "sequence_length": lengths[rows]}
        integers["token_id"] = integers["sequence"] * POSITIONS + integers["position"]
        if prompt is not None:
            integers["group"] = prompt[rows]
        score = next((x for name in REWARDS if (x := response_column(data, name)) is not None), None)
        floats = {
            "old_logprob": self.packed(response_column(data, "old_log_probs")),
            "advantage": self.packed(response_column(data, "advantages")),
            "ref_logprob": self.packed(response_column(data, "ref_log_prob")),
            "rollout_logprob": self.packed(response_column(data, "rollout_log_probs")),
            "reward": None if score is None else score.sum(1).float().cpu()[rows],
        }
        columns = integers | {name: value.to(device) for name, value in floats.items() if value is not None}
        columns = {name: value.to(device) for name, value in columns.items()}
        self.tokens = Tokens(
            logprob=columns["old_logprob"], loss_mask=torch.ones(len(rows), dtype=torch.bool, device=device), **columns
        )

    def packed(self, column: Tensor | None) -> Tensor | None:
        """[tokens] of a column [B, R] of this rank's sequences in the order of the rollout."""
        return None if column is None else column[self.mask.to(column.device)].float()

    def length(self, row: int) -> int:
        """Loss tokens of a row."""
        return self._ends[row + 1] - self._ends[row]

    def index(self, rows: Sequence[int]) -> Tensor:
        """[n] int64: the positions in `tokens` of the loss tokens of these rows, row after row."""
        parts = [torch.arange(self._ends[row], self._ends[row + 1]) for row in rows]
        return torch.cat(parts).to(self.tokens.loss_mask.device)


def taken(tokens: Tokens, index: Tensor, **fields: Tensor | None) -> Tokens:
    """The tokens at `index`, with other `fields` of theirs."""
    held = {name: value if value is None else value[index] for name, value in vars(tokens).items()}
    return replace(tokens, **(held | fields))


def _numbers(data: TensorDict, mask: Tensor, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor | None]:
    """[B] int64 twice: the number of each sequence over all ranks, and that of its prompt (None without uid)."""
    uids = tu.get(data, "uid")
    uids = [None] * len(data) if uids is None else [str(uid) for uid in uids]
    old, advantage = (response_column(data, name).cpu() for name in ("old_log_probs", "advantages"))
    own = []
    for i, content in enumerate(contents(data)):
        prompt = b"" if uids[i] is None else blake2b(uids[i].encode(), digest_size=16).digest()
        own.append((content, _hash(16, mask[i].nonzero(), advantage[i][mask[i]]), prompt, _hash(16, old[i][mask[i]])))
    ranks: list = [own]
    rank = 0
    if group is not None:
        ranks, rank = [None] * dist.get_world_size(group), dist.get_rank(group)
        dist.all_gather_object(ranks, own, group=group)
    order = sorted((key, r, i) for r, keys in enumerate(ranks) for i, key in enumerate(keys))
    number = torch.zeros(len(own), dtype=torch.int64)
    first: dict[bytes, int] = {}  # of each prompt, its first sequence
    for n, (key, r, i) in enumerate(order):
        first.setdefault(key[2], n)
        if r == rank:
            number[i] = n
    if None in uids:
        return number, None
    return number, torch.tensor([first[key[2]] for key in own])


def _hash(size: int, *parts: Tensor) -> bytes:
    made = blake2b(digest_size=size)
    for part in parts:
        made.update(part.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return made.digest()


def _temperature(data: TensorDict) -> object:
    value = tu.get_non_tensor_data(data, "temperature", None)
    return value.tolist() if isinstance(value, Tensor) else value
