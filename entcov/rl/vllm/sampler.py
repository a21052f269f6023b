"""The sampler on vLLM: an engine in this process, or a server."""

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from entcov.rl.collect import as_rollout, derived_seed, temperature_of_each
from entcov.rl.config import RolloutConfig
from entcov.rl.interfaces import NamedWeights
from entcov.rl.types import Prompt, Rollout
from entcov.rl.vllm.client import ServerEngine
from entcov.rl.vllm.engine import Completion, LocalEngine, Request
from entcov.rl.vllm.weight_sync import ByReference, Engine, ExpectedWeights, WeightSync


class GeneratingEngine(Engine, Protocol):
    def generate(self, requests: Sequence[Request]) -> Iterator[tuple[int, Completion]]: ...

    def sleep(self, *, sync_follows: bool) -> bool:
        """As `LocalEngine.sleep`."""


class VllmSampler:
    """Samples responses from vLLM, with each token's log-probability under the policy softmax(logits / temperature).

    Every response has its own request, with a seed made of (seed, prompt, sample): it does not depend on the other
    requests but for rounding, which in vLLM changes with the batch. Token ids go in and come out; the text is decoded
    by the trainer's tokenizer.

    Args:
        engine: answers requests.
        sync: sends it the trainer's weights.
        tokenizer: decodes responses; its end-of-sequence token ends them.
        max_model_len: tokens of prompt and response together, which the engine was started for.
    """

    def __init__(
        self, engine: GeneratingEngine, sync: WeightSync, tokenizer: PreTrainedTokenizerBase, *, max_model_len: int
    ) -> None:
        self.engine, self.tokenizer, self.max_model_len = engine, tokenizer, max_model_len
        self._sync = sync

    def sync(self, weight_version: int, named_weights: NamedWeights) -> None:
        """Gives the engine the trainer's weights. No request may be running. Collective where `named_weights` is.

        Raises: see `WeightSync`.
        """
        self._sync(weight_version, named_weights)

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        group_size: int,
        temperature: float | Sequence[float],
        max_response_length: int,
        seed: int,
        top_p: float = 1.0,
        top_k: int = 0,
        progress: Callable[[int, int], None] | None = None,
        on_done: Callable[[Rollout], None] | None = None,
    ) -> list[Rollout]:
        """As `entcov.rl.interfaces.Sampler.generate`.

        Raises:
            ValueError: a temperature that vLLM does not sample at, or more tokens than the engine was started for.
            RuntimeError: the engine has no weights yet, or parts of two sets, or others than the trainer's last ones.
        """
        temperatures = temperature_of_each(temperature, len(prompts))
        for value in set(temperatures):
            _check_temperature("temperature", value)
        longest = max((len(prompt.tokens) for prompt in prompts), default=0)
        if longest + max_response_length > self.max_model_len:  # vLLM would cut responses off before their limit
            raise ValueError(
                f"max_response_length: prompt and response must fit into {self.max_model_len} tokens, got "
                f"{max_response_length} after a prompt of {longest}"
            )
        stop = (self.tokenizer.eos_token_id,)
        requests = [
            Request(
                prompt.tokens, derived_seed(seed, prompt.uid, sample), own, max_response_length, stop, top_p, top_k
            )
            for prompt, own in zip(prompts, temperatures, strict=True)
            for sample in range(group_size)
        ]  # fmt: skip
        out: list[Rollout | None] = [None] * len(requests)
        for done, (row, completion) in enumerate(self._answers(requests), start=1):
            prompt, sample, version = prompts[row // group_size], row % group_size, self._sync.version
            out[row] = as_rollout(prompt, sample, completion.tokens, completion.logprob, version, self.tokenizer)
            if on_done is not None:
                on_done(out[row])
            if progress is not None:
                progress(done, len(out))
        return out  # type: ignore[return-value]  # every request has been answered

    def prompt_logprobs(self, prompts: Sequence[Prompt]) -> list[list[float]]:
        """As `entcov.rl.interfaces.Sampler.prompt_logprobs`. Raises as `generate`."""
        # vLLM samples one token at least.
        requests = [Request(prompt.tokens, 0, 1.0, 1, (), prompt_logprob=True) for prompt in prompts]
        found = {row: completion.prompt_logprob for row, completion in self._answers(requests)}
        return [found[row] for row in range(len(prompts))]

    def sleep(self, *, sync_follows: bool) -> None:
        """As `entcov.rl.interfaces.Sampler.sleep`. Without the sync that was promised, `generate` is an error."""
        if self.engine.sleep(sync_follows=sync_follows):
            self._sync.version = None

    def _answers(self, requests: Sequence[Request]) -> Iterator[tuple[int, Completion]]:
        """The engine's answers, all from the weights of the last sync."""
        version = self._sync.version
        if version is None:
            raise RuntimeError("generate: vLLM does not hold the trainer's weights; a whole sync must come first")
        for row, completion in self.engine.generate(requests):
            if completion.versions != (str(version),):
                raise RuntimeError(
                    f"generate: a response came from weights {' and '.join(completion.versions)}, and the trainer's "
                    f"last sync was {version}: somebody else updates this engine"
                )
            yield row, completion


def build_vllm_sampler(
    config: RolloutConfig, max_prompt_length: int, model: PretrainedConfig, dtype: torch.dtype,
    tokenizer: PreTrainedTokenizerBase,
) -> VllmSampler:  # fmt: skip
    """The sampler of `rollout.sampler: vllm`. Its weights come by `sync`.

    Args:
        model: the policy's configuration.
        dtype: of vLLM's weights and computation.

    Raises:
        ImportError: vLLM is not installed.
        ValueError: settings that cannot hold on this machine, or a server that does not fit.
    """
    _check_temperature("rollout.temperature", config.temperature)
    longest = max_prompt_length + config.max_response_length
    expected = ExpectedWeights(model)
    if config.vllm.mode == "server":
        engine = ServerEngine(config.vllm, expected, max_model_len=longest, dtype=dtype)
        transport = engine.transport()
    else:
        engine, transport = LocalEngine(model, config.vllm, max_model_len=longest, dtype=dtype), ByReference()
    return VllmSampler(engine, WeightSync(engine, expected, transport, dtype=dtype), tokenizer, max_model_len=longest)


def _check_temperature(name: str, value: float) -> None:
    """vLLM refuses more than 2, and samples at 0.01 where less was asked for."""
    if value != 0 and not 0.01 <= value <= 2:
        raise ValueError(f"{name}: vLLM samples at temperatures from 0.01 to 2, or at 0 (greedy), got {value}")
