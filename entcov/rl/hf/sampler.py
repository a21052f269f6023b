"""The sampler in this process: batched generation from the model that is being trained."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache

from entcov.rl.batch import IGNORE_INDEX, micro_batches
from entcov.rl.collect import as_rollout, temperature_of_each
from entcov.rl.hf.model import forward
from entcov.rl.interfaces import NamedWeights
from entcov.rl.types import Prompt, Rollout
from entcov.stats.token_stats import token_stats

_PROMPT_TOKENS = 4096  # of one forward pass over prompts, padding included: it has logits for each


class InProcessSampler:
    """Samples responses and records each token's log-probability under the policy softmax(logits / temperature).

    The model is the trainer's own, so no weights are copied. One uniform number per (sequence, position) is drawn
    before generation starts: a response does not depend on the other sequences of its batch, but for rounding.
    """

    def __init__(self, model: nn.Module, tokenizer, *, batch_size: int):
        self.model = model
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.weight_version = 0

    def sync(self, weight_version: int, named_weights: NamedWeights) -> None:
        """Sets the version. The weights are the trainer's own."""
        self.weight_version = weight_version

    def sleep(self, *, sync_follows: bool) -> None:
        """Nothing: the weights are the trainer's own, and the cache is gone."""

    @torch.no_grad()
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
        """As `entcov.rl.interfaces.Sampler.generate`; `progress` is called after each generation batch."""
        noise = torch.rand(
            (len(prompts) * group_size, max_response_length),
            dtype=torch.float64,
            generator=torch.Generator().manual_seed(seed),
        )
        temperatures = temperature_of_each(temperature, len(prompts))
        was_training = self.model.training
        self.model.eval()
        # Prompts of similar length share a batch: less padding. Results are put back in the caller's order.
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].tokens))
        per_batch = max(1, self.batch_size // group_size)
        out: list[Rollout | None] = [None] * (len(prompts) * group_size)
        for start in range(0, len(order), per_batch):
            chosen = order[start : start + per_batch]
            rows = [i * group_size + g for i in chosen for g in range(group_size)]
            own = [temperatures[i] for i in chosen]
            responses = self._generate_batch(
                [prompts[i] for i in chosen], group_size, own, (top_p, top_k), max_response_length, noise[rows]
            )
            for row, (tokens, logprob) in zip(rows, responses, strict=True):
                prompt, sample = prompts[row // group_size], row % group_size
                out[row] = as_rollout(prompt, sample, tokens, logprob, self.weight_version, self.tokenizer)
                if on_done is not None:
                    on_done(out[row])
            if progress is not None:
                progress(min(len(order), start + per_batch) * group_size, len(out))
        self.model.train(was_training)
        return out  # type: ignore[return-value]  # every row was filled

    @torch.no_grad()
    def prompt_logprobs(self, prompts: Sequence[Prompt]) -> list[list[float]]:
        """As `entcov.rl.interfaces.Sampler.prompt_logprobs`."""
        was_training = self.model.training
        self.model.eval()
        out: list[list[float]] = [[] for _ in prompts]
        lengths = [len(prompt.tokens) for prompt in prompts]
        for group in micro_batches(lengths, max([_PROMPT_TOKENS, *lengths]), padded=True):
            tokens = [torch.tensor(prompts[i].tokens, device=self.model.device) for i in group]
            ids = pad_sequence(tokens, batch_first=True)
            mask = pad_sequence([torch.ones_like(row) for row in tokens], batch_first=True)
            target = [F.pad(row[1:], (0, 1), value=IGNORE_INDEX) for row in tokens]
            target = pad_sequence(target, batch_first=True, padding_value=IGNORE_INDEX)
            logits = forward(self.model, input_ids=ids, attention_mask=mask, use_cache=False).logits
            stats = token_stats(logits, target, ignore_index=IGNORE_INDEX)
            for i, row in zip(group, stats.logprob.tolist(), strict=True):
                out[i] = row[: lengths[i] - 1]
        self.model.train(was_training)
        return out

    def _generate_batch(self, prompts, group_size, temperatures, top, max_response_length, noise):
        device = self.model.device
        temperature = temperatures[0]
        if len(set(temperatures)) > 1:  # else a number, so that nothing changes in the last digit
            temperature = torch.tensor(temperatures, device=device).repeat_interleave(group_size)
        noise, eos_id = noise.to(device), self.tokenizer.eos_token_id
        width = max(len(p.tokens) for p in prompts)
        pad = self.tokenizer.pad_token_id
        ids = torch.tensor([[pad] * (width - len(p.tokens)) + list(p.tokens) for p in prompts], device=device)
        mask = torch.tensor(
            [[0] * (width - len(p.tokens)) + [1] * len(p.tokens) for p in prompts], device=device
        )  # left padding: every response starts in the same column
        cache = DynamicCache(config=self.model.config)
        logits = self._forward(ids, mask, mask.cumsum(1).sub(1).clamp(min=0), cache)
        # Prompts are read once; their cache and last logits are then repeated for the group.
        cache.batch_repeat_interleave(group_size)
        logits, mask = logits.repeat_interleave(group_size, 0), mask.repeat_interleave(group_size, 0)
        rows = torch.arange(len(prompts) * group_size, device=device)  # sequences still running
        tokens = torch.zeros((len(rows), max_response_length), dtype=torch.int64, device=device)
        logprob = torch.zeros((len(rows), max_response_length), dtype=torch.float32, device=device)
        length = torch.full((len(rows),), max_response_length, device=device)
        for t in range(max_response_length):
            own = temperature[rows] if isinstance(temperature, Tensor) else temperature
            token, token_logprob = draw(logits, noise[rows, t], own, *top)
            tokens[rows, t], logprob[rows, t] = token, token_logprob
            done = token == eos_id
            length[rows[done]] = t + 1
            running = ~done
            if not running.any() or t + 1 == max_response_length:
                break
            if done.any():
                rows, mask, token = rows[running], mask[running], token[running]
                cache.batch_select_indices(running.nonzero()[:, 0])
            mask = torch.cat((mask, mask.new_ones(len(rows), 1)), 1)
            logits = self._forward(token[:, None], mask, mask.sum(1, keepdim=True) - 1, cache)
        tokens, logprob = tokens.int().cpu().numpy(), logprob.cpu().numpy()
        return [(tokens[r, :n].copy(), logprob[r, :n].copy()) for r, n in enumerate(length.tolist())]

    def _forward(self, ids: Tensor, mask: Tensor, position: Tensor, cache: DynamicCache) -> Tensor:
        out = forward(
            self.model,
            input_ids=ids,
            attention_mask=mask,
            position_ids=position,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return out.logits[:, -1]


def draw(
    logits: Tensor, uniform: Tensor, temperature: float | Tensor, top_p: float = 1.0, top_k: int = 0
) -> tuple[Tensor, Tensor]:
    """One token a row by inverting the distribution function at `uniform`, and its log-probability.

    Args:
        logits: [B, V].
        uniform: [B] float64 in [0, 1).
        temperature: one number, 0 takes the likeliest token instead; or [B], each greater than 0.
        top_p, top_k: see `likeliest`.

    Returns:
        token [B] int64, and logprob [B] float32 under softmax(likeliest(logits / temperature)); softmax(logits) at 0.
    """
    logits = logits.float()
    if isinstance(temperature, Tensor):
        temperature = temperature[:, None]
    elif temperature == 0:
        token = logits.argmax(-1)
        return token, logits.log_softmax(-1).gather(1, token[:, None])[:, 0]
    logp = likeliest(logits / temperature, top_p, top_k).log_softmax(-1)
    cumulative = logp.double().exp().cumsum(-1)
    point = uniform[:, None] * cumulative[:, -1:]  # the sum is 1 but for rounding
    # The first column whose cumulative mass exceeds the point: a token of probability 0 is never it.
    token = torch.searchsorted(cumulative, point, right=True).clamp(max=logits.shape[1] - 1)
    return token[:, 0], logp.gather(1, token)[:, 0]


def likeliest(logits: Tensor, top_p: float, top_k: int) -> Tensor:
    """The logits [B, V] with -inf in place of all but the `top_k` largest (0: all), as vLLM removes them.

    Of those, `top_p` < 1 keeps the fewest likeliest that hold this share of their probability. A logit that equals the
    smallest of the `top_k` stays too.
    """
    if 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[..., -1:], -torch.inf)
    if top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
        mass = ordered.double().softmax(-1)
        beyond = mass.cumsum(-1) - mass >= top_p  # those before it hold the share already
        logits = logits.masked_fill(beyond.scatter(-1, order, beyond), -torch.inf)
    return logits
