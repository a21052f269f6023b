"""Sends the trainer's weights to a vLLM engine. An incomplete or changed set is an error.

vLLM takes weights by start_weight_update -> update_weights (any number) -> finish_weight_update. By itself it also
accepts an incomplete set, in which the missing weights keep their old values, and goes on using cached prefixes of the
old weights. So everything goes through `WeightSync`, which

- compares names and shapes with the model that the engine was built for, before anything is sent;
- compares every later set with the first one, tensor by tensor, while it is being sent;
- empties the prefix cache, and checks that it was emptied;
- has `version` None while the engine has no weights, or parts of two sets: the sampler then refuses to generate.

This module does not import vLLM; `entcov.rl.vllm.transfer` is the receiving side.
"""

from __future__ import annotations

import copy
import os
import stat
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig

from entcov.rl.interfaces import NamedWeights

Stream = Iterator[tuple[str, Tensor]]
CHUNK_BYTES = 1 << 30  # of weights that are gathered before vLLM gets them; one tensor may be larger
_SHOWN = 8  # names that an error lists of each kind


class Engine(Protocol):
    """What a sync needs of an engine: the four methods of vLLM's VLLMWeightSyncClient, and the prefix cache.

    leads: whether this process sends commands to the engine. Where several of the trainer's processes share one, rank 0
        does; the others only iterate over their weights.
    """

    leads: bool

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None: ...

    def start_weight_update(self) -> None: ...

    def update_weights(self, update_info: dict[str, Any]) -> None: ...

    def finish_weight_update(self, weight_version: str | None = None) -> None: ...

    def reset_prefix_cache(self) -> bool:
        """Whether it is empty now; where processes share the engine, returns when it is so for all of them."""


@dataclass(frozen=True)
class Weight:
    """Name in a Hugging Face checkpoint, full shape, and the data type it is sent in."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype


class Transport(Protocol):
    """Carries tensors to an engine."""

    def send(self, engine: Engine, weights: Sequence[Weight], stream: Stream, version: str) -> None:
        """A whole update, from start to finish. `stream` yields exactly `weights`, in order."""


class ExpectedWeights:
    """Names, shapes and ties of the weights of a model.

    Args:
        config: the transformers configuration that the engine was built with.
    """

    def __init__(self, config: PretrainedConfig) -> None:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(copy.deepcopy(config))
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.tied: dict[str, str] = {}  # name -> the weight that it shares its storage with, which comes first
        first: dict[int, str] = {}
        for name, weight in model.state_dict(keep_vars=True).items():
            self.shapes[name] = tuple(weight.shape)
            if first.setdefault(id(weight), name) != name:
                self.tied[name] = first[id(weight)]

    def same_as(self, other: ExpectedWeights) -> bool:
        return self.shapes == other.shapes and self.tied == other.tied

    def check(self, found: Sequence[tuple[str, tuple[int, ...]]]) -> None:
        """Names and shapes of a whole set, in any order. Of tied weights the first is needed, the others are allowed.

        Raises:
            ValueError: the set is not the model's; the message lists what is missing, unknown, repeated or misshaped.
        """
        shapes = dict(found)
        names = [name for name, _ in found]
        faults = {
            "missing": [name for name in self.shapes if name not in shapes and name not in self.tied],
            "unknown": [name for name in shapes if name not in self.shapes],
            "repeated": sorted({name for name in names if names.count(name) > 1}) if len(shapes) < len(names) else [],
            "misshaped": [
                f"{name} (is {list(shape)}, must be {list(self.shapes[name])})"
                for name, shape in shapes.items()
                if name in self.shapes and shape != self.shapes[name]
            ],
        }
        lines = [f"  {kind}: {_listed(items)}" for kind, items in faults.items() if items]
        if lines:
            raise ValueError(
                f"named_weights: must be the {len(self.shapes) - len(self.tied)} weights of the sampler's model under "
                "their names in a Hugging Face checkpoint; nothing was sent\n" + "\n".join(lines)
            )

    def without_tied(self, weights: Stream) -> Stream:
        """The weights without those that vLLM takes from another one.

        Raises:
            ValueError: such a weight differs from the other one, or comes before it.
        """
        sources = set(self.tied.values())
        shared: dict[str, Tensor] = {}
        for name, weight in weights:
            tensor, source = weight.detach(), self.tied.get(name)
            if source is None:
                if name in sources:
                    shared[name] = tensor
                yield name, tensor
            elif source not in shared:
                raise ValueError(f"named_weights: {name} shares the weight of {source}, which must come before it")
            elif tensor.data_ptr() != shared[source].data_ptr() and not torch.equal(tensor, shared[source]):
                raise ValueError(
                    f"named_weights: {name} must equal {source}, as the model's configuration ties them; they differ "
                    f"by up to {float((tensor - shared[source]).abs().max()):.3g}"
                )


class WeightSync:
    """Sends the trainer's weights to one engine.

    Args:
        engine: receives them.
        expected: of the model that the engine was built for.
        transport: sends them.
        dtype: the engine's own type; weights are converted to it.
    """

    def __init__(self, engine: Engine, expected: ExpectedWeights, transport: Transport, *, dtype: torch.dtype) -> None:
        self.engine, self.expected, self.transport, self.dtype = engine, expected, transport, dtype
        self.version: int | None = None  # of the weights that the engine holds; None: not all of one set
        self._found: list[tuple[str, tuple[int, ...]]] | None = None  # the trainer's set, tied names included
        self._broken = False

    def __call__(self, version: int, named_weights: NamedWeights) -> None:
        """Sends all weights. On the first call they are iterated over once more before, to be checked.

        A tensor must stay as it is until this returns. Collective where `named_weights` is: every rank calls it.

        Raises:
            ValueError: the set is not the model's, or tied weights differ; nothing was sent. Or, later, that a set
                differs from the first one.
            RuntimeError: an earlier sync ended in the middle of a set, or the prefix cache could not be emptied.
        """
        if self._broken:
            raise RuntimeError(
                "sync: an earlier one ended in the middle of the weights, so the engine holds parts of two sets; start "
                "the engine anew"
            )
        if self._found is None:
            found = [(name, tuple(tensor.shape)) for name, tensor in named_weights()]
            self.expected.check(found)
            if any(name in self.expected.tied for name, _ in found):
                for _ in self.expected.without_tied(named_weights()):
                    pass
            self._found = found
        weights = [Weight(name, shape, self.dtype) for name, shape in self._found if name not in self.expected.tied]
        self.version, self._broken = None, True
        self.transport.send(self.engine, weights, self._stream(named_weights), str(version))
        if not self.engine.reset_prefix_cache():
            raise RuntimeError(
                "sync: vLLM did not empty its prefix cache, so responses would start from the old weights' keys and "
                "values; no request may be running during a sync"
            )
        self.version, self._broken = version, False

    def _stream(self, named_weights: NamedWeights) -> Stream:
        """The tensors to send. Each is compared with the first set before it is sent."""
        for name, tensor in self.expected.without_tied(self._as_before(named_weights)):
            yield name, tensor.to(self.dtype)

    def _as_before(self, named_weights: NamedWeights) -> Stream:
        for place, (expected, item) in enumerate(zip_longest(self._found, named_weights())):
            found = None if item is None else (item[0], tuple(item[1].shape))
            if expected != found:
                raise ValueError(
                    f"named_weights: weight {place} was {expected} in the first set and is {found}; the set may not "
                    "change during a run, and the engine holds parts of two sets now"
                )
            yield item


class ByReference:
    """For an engine in this process, on CPU or GPU: vLLM copies its shard out of the trainer's tensors."""

    def send(self, engine: Engine, weights: Sequence[Weight], stream: Stream, version: str) -> None:
        engine.start_weight_update()
        for chunk in _chunks(stream, CHUNK_BYTES):
            engine.update_weights({"weights": chunk})
        engine.finish_weight_update(version)


class ByFile:
    """For a server on the CPU of the same machine: a safetensors file, removed when vLLM has read it."""

    def send(self, engine: Engine, weights: Sequence[Weight], stream: Stream, version: str) -> None:
        if not engine.leads:
            for _ in stream:
                pass
            return
        with tempfile.TemporaryDirectory(prefix="entcov-weights-") as folder:
            path = os.path.join(folder, "weights.safetensors")
            save_file({name: tensor.cpu().contiguous() for name, tensor in stream}, path)
            engine.start_weight_update()
            engine.update_weights({"path": path})
            engine.finish_weight_update(version)


def check_weights_file(path: object) -> str:
    """The path of `ByFile`'s file, as a server should see it before it reads what a client names.

    Raises:
        ValueError: it is not a regular .safetensors file of this process's user, in a folder of theirs that nobody else
            may write to: a device, a pipe, a link, or somebody else's file.
    """
    rule = "must be a regular .safetensors file of the server's user, in a folder that only this user may write to"
    if not isinstance(path, str) or not os.path.isabs(path) or not path.endswith(".safetensors"):
        raise ValueError(f"update_info.path: {rule}, got {path!r}")
    try:
        file, folder = os.lstat(path), os.lstat(os.path.dirname(path))
    except (OSError, ValueError) as error:  # ValueError: a null byte
        raise ValueError(f"update_info.path: {rule}, got {path!r} ({error})") from None
    own = file.st_uid == folder.st_uid == os.geteuid() and not folder.st_mode & 0o022
    if not (stat.S_ISREG(file.st_mode) and stat.S_ISDIR(folder.st_mode) and own):
        raise ValueError(f"update_info.path: {rule}, got {path!r}")
    return path


def _chunks(stream: Stream, limit: int) -> Iterator[list[tuple[str, Tensor]]]:
    chunk: list[tuple[str, Tensor]] = []
    size = 0
    for name, tensor in stream:
        chunk.append((name, tensor))
        size += tensor.nbytes
        if size >= limit:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _listed(items: list[str]) -> str:
    shown = ", ".join(items[:_SHOWN])
    return shown if len(items) <= _SHOWN else f"{shown} and {len(items) - _SHOWN} more"
