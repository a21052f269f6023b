"""The evaluation protocol: k and temperature of each data source, mean@k and best@k by hand, the table."""

from __future__ import annotations

import math

import pytest
import torch

from entcov.rl.config import EvalConfig, SourceEvalConfig
from entcov.rl.evaluation import evaluate, format_table, response_entropy, summarize
from entcov.rl.load_config import parse_config
from entcov.rl.recipe import ConfigError
from entcov.rl.types import Example, Prompt, Rollout
from tests.support.tiny_run import recipe


class Scripted:
    """A sampler whose i-th response to a prompt is right where the prompt's text has a 1 at place i."""

    def __init__(self):
        self.calls, self.slept = [], []

    def sleep(self, *, sync_follows):
        self.slept.append((sync_follows, len(self.calls)))

    def generate(
        self, prompts, *, group_size, temperature, max_response_length, seed, top_p, top_k, progress=None, on_done=None
    ):
        self.calls.append(([p.uid for p in prompts], group_size, temperature, top_p, top_k, seed))
        out = []
        for number, prompt in enumerate(prompts):
            text = prompt.example.prompt[0]["content"]
            for sample in range(group_size):
                tokens = [7] * (sample + 1)
                out.append(Rollout(prompt, sample, tokens, [0.0] * len(tokens), sample < 2, 0, text=text[sample]))
                if on_done and number % 2:  # a sampler may announce its responses or not
                    on_done(out[-1])
            if progress:
                progress((number + 1) * group_size, len(prompts) * group_size)
        return out


def prompts(*pairs):
    return [Prompt(i, Example(s, ({"role": "user", "content": text},), "1"), (1,)) for i, (s, text) in enumerate(pairs)]


def right(example, response):
    return float(response == example.ground_truth)


SETTINGS = EvalConfig(
    prompts=None, samples=1, temperature=0.0, top_p=0.9, top_k=20,
    sources={"aime24": SourceEvalConfig(samples=4, temperature=0.6, top_p=0.95, top_k=0)},
)  # fmt: skip


def test_every_data_source_has_its_own_protocol():
    sampler, shown = Scripted(), []
    metrics, rollouts = evaluate(
        sampler,
        prompts(("math500", "1000"), ("aime24", "1010"), ("math500", "0111"), ("aime24", "0000"), ("olympiad", "1000")),
        right,
        settings=SETTINGS,
        max_response_length=8,
        seed=5,
        progress=lambda *counts: shown.append(counts),
    )
    assert sampler.calls == [([0, 2, 4], 1, 0.0, 0.9, 20, 5), ([1, 3], 4, 0.6, 0.95, 0, 6)]
    assert sampler.slept == [(False, 2)]  # once, with the weights that the next step samples with
    assert [(r.prompt.uid, r.sample) for r in rollouts] == [
        (0, 0), (1, 0), (1, 1), (1, 2), (1, 3), (2, 0), (3, 0), (3, 1), (3, 2), (3, 3), (4, 0),
    ]  # fmt: skip
    core = {name: value for name, value in metrics.items() if name.startswith("val-core/")}
    assert core == {
        "val-core/aime24/acc/mean@4": 0.25,
        "val-core/aime24/acc/best@4/mean": 0.5,
        "val-core/aime24/acc/pass@1": 0.25,
        "val-core/aime24/acc/pass@2": pytest.approx(5 / 12),  # 1 - C(2, 2) / C(4, 2) and 0
        "val-core/aime24/acc/pass@4": 0.5,
        "val-core/aime24/acc/maj@4/mean": 0.0,  # no response has an answer in a box
        "val-core/math500/acc/mean@1": 0.5,
        "val-core/olympiad/acc/mean@1": 1.0,
    }
    assert metrics["val-aux/aime24/response_length/mean"] == 2.5
    assert metrics["val-aux/aime24/response_length/clip_ratio"] == 0.5
    assert metrics["val-aux/math500/response_length/clip_ratio"] == 0.0
    assert shown == [(1, 11), (2, 11), (3, 11), (7, 11), (11, 11)]


def test_the_table_holds_accuracies_in_percent_and_the_interval_over_prompts():
    _, rollouts = evaluate(
        Scripted(), prompts(("aime24", "1010"), ("aime24", "0000"), ("math500", "1")), right,
        settings=SETTINGS, max_response_length=8, seed=0,
    )  # fmt: skip
    results = summarize(rollouts)
    # Two prompts with accuracies 1/2 and 0: standard deviation 1/sqrt(8), t(1) = 12.706.
    assert results[0].half_width == pytest.approx(12.7062 * math.sqrt(1 / 8) / math.sqrt(2), rel=1e-5)
    assert math.isnan(results[1].half_width)
    lines = format_table(results, SETTINGS).splitlines()
    assert lines[2].split() == ["aime24", "2", "4", "0.6", "25.0", "317.7", "50.0", "2", "50%"]
    assert lines[3].split() == ["math500", "1", "1", "0", "100.0", "-", "100.0", "1", "0%"]
    assert lines[4].split()[-1] == "62.5" and len(lines) == 5


def test_recipes_say_how_a_source_is_evaluated(tmp_path):
    config = parse_config(recipe(tmp_path, **{"eval.sources": {"amc": {"samples": 32, "temperature": 0.6}}}))
    assert config.eval.settings("amc") == (32, 0.6, 1.0, 0) and config.eval.settings("aime24") == (2, 1.0, 1.0, 0)
    with pytest.raises(ConfigError, match="eval.sources.amc.temperature: .*greater than or equal to 0, got -1"):
        parse_config(recipe(tmp_path, **{"eval.sources": {"amc": {"temperature": -1}}}))
    with pytest.raises(ConfigError, match="eval.sources.amc.min_p: unknown key"):
        parse_config(recipe(tmp_path, **{"eval.sources": {"amc": {"min_p": 1}}}))


def test_held_out_entropy_is_a_mean_over_responses_first_of_each_source():
    """Not over tokens: the second response is as long as the first three samples' tokens together."""
    sampler, asked = Scripted(), []

    def entropy_of(rollouts):
        asked.append([(r.prompt.uid, r.sample) for r in rollouts])
        return [float(10 * r.prompt.uid + len(r.tokens)) for r in rollouts]

    options = {"settings": SETTINGS, "max_response_length": 8, "seed": 0}
    held_out = prompts(("aime24", "1010"), ("math500", "1"), ("math500", "0"))
    metrics, rollouts = evaluate(sampler, held_out, right, **options, entropy_of=entropy_of)
    assert asked == [[(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (2, 0)]]
    assert metrics["val-aux/aime24/entropy/mean"] == 2.5 and metrics["val-aux/math500/entropy/mean"] == 16.0
    assert [r.entropy for r in rollouts] == [1.0, 2.0, 3.0, 4.0, 11.0, 21.0]
    metrics, _ = evaluate(sampler, held_out, right, **options)
    assert not any("entropy" in name for name in metrics)


def test_response_entropy_takes_a_few_responses_at_a_time_at_temperature_1():
    """Entropy of a token: its id / 10. Outside the mask the actor says 99, which must not count."""
    calls = []

    class Actor:
        def once_a_node(self, make):
            return make()

        def compute_entropy(self, batch, *, temperature):
            calls.append((batch.num_sequences, temperature))
            return torch.where(batch.loss_mask, batch.target / 10, 99.0)

    (prompt,) = prompts(("aime24", "1"))
    responses = [[10, 20, 30], [40], [50, 60]]
    rollouts = [Rollout(prompt, i, tokens, [0.0] * len(tokens), True, 0) for i, tokens in enumerate(responses)]
    assert response_entropy(Actor(), rollouts, at_once=2) == pytest.approx([2.0, 4.0, 5.5])
    assert calls == [(2, 1.0), (1, 1.0)]
