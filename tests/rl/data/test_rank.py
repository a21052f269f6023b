"""Rankings of a data set: the entropy over answers by hand, K-means against its definition, going on after a stop."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from entcov.cli import main
from entcov.rl.collect import derived_seed
from entcov.rl.data.kmeans import kmeans, nearest_members, squared_distances
from entcov.rl.data.rank import (
    Sample,
    count_solved,
    different_prompts,
    prompt_features,
    sample_answers,
    semantic_entropy,
)
from entcov.rl.data.stream import PromptStream, load_rows, raw_rows, write_rows
from entcov.rl.data.tokenizer import char_tokenizer
from entcov.rl.hf.model import build_model
from entcov.rl.load_config import parse_config
from entcov.rl.tasks.base import make_task
from entcov.rl.types import Example, Prompt, Rollout
from tests.support.tiny_run import prompts, recipe


def samples(*found: tuple[str | None, float, int]) -> list[Sample]:
    return [Sample(answer, math.log(p), length) for answer, p, length in found]


def test_semantic_entropy_by_hand():
    """Answer a has 0.2 + 0.1 of 0.4, no answer the rest: H(3/4, 1/4)."""
    found = samples(("a", 0.2, 1), (None, 0.1, 1), ("a", 0.1, 1))
    h = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert semantic_entropy(found) == (pytest.approx(h), 2)
    assert semantic_entropy(samples(("a", 0.3, 5), ("a", 0.01, 9))) == (0.0, 1)
    assert semantic_entropy([Sample(str(i), -5000.0, 900) for i in range(4)]) == (pytest.approx(math.log(4)), 4)
    # Normalised by length: 0.01^(1/2) = 0.1 against 0.1^(1/1).
    two = samples(("a", 0.01, 2), ("b", 0.1, 1))
    assert semantic_entropy(two, length_normalized=True)[0] == pytest.approx(math.log(2))
    assert semantic_entropy(two)[0] == pytest.approx(-(math.log(1 / 11) / 11 + math.log(10 / 11) * 10 / 11))


def test_kmeans_finds_separate_clusters_and_stands_still():
    rng = np.random.default_rng(0)
    middle = rng.normal(size=(6, 3)) * 100
    points = np.concatenate([centre + rng.normal(size=(n, 3)) for n, centre in enumerate(middle, start=3)])
    truth = np.repeat(np.arange(6), np.arange(3, 9))
    for seed in range(4):
        centres, cluster = kmeans(points, 6, seed=seed)
        assert all(len({int(c) for c in cluster[truth == t]}) == 1 for t in range(6)) and len(set(cluster)) == 6
        for c in range(6):
            np.testing.assert_allclose(centres[c], points[cluster == c].mean(0) - points.mean(0), atol=1e-9)
        rows, sizes = nearest_members(points, 6, seed=seed)
        for row, size in zip(rows, sizes, strict=True):
            own = points[truth == truth[row]]
            far = np.linalg.norm(own - own.mean(0), axis=1)
            assert size == len(own) and np.isclose(np.linalg.norm(points[row] - own.mean(0)), far.min())
        assert rows.tolist() == sorted(rows)


def test_kmeans_leaves_no_cluster_empty_and_refuses_too_many():
    points = np.array([[0.0], [0.0], [0.0], [1.0], [5.0]])
    for seed in range(5):
        assert sorted(np.bincount(kmeans(points, 3, seed=seed)[1])) == [1, 1, 3]
    with pytest.raises(ValueError, match="k: must be at most the number of different points, got 4 for 5 points"):
        kmeans(points, 4, seed=0)
    with pytest.raises(ValueError, match="finite"):
        kmeans(np.array([[0.0], [np.nan]]), 1, seed=0)
    distance = squared_distances(np.array([[3.0, 0.0]]), np.array([[0.0, 4.0], [3.0, 0.0]]))
    assert distance.tolist() == [[25.0, 0.0]]


def test_features_are_the_mean_hidden_state_whatever_the_batch():
    config = parse_config(recipe("unused"))
    model, _ = build_model(config.model, seed=0, device=torch.device("cpu"))
    some = prompts(5)
    features = prompt_features(model, some)
    for prompt, row in zip(some, features, strict=True):
        with torch.no_grad():
            states = model.eval()(torch.tensor([prompt.tokens]), output_hidden_states=True).hidden_states[-1]
        np.testing.assert_allclose(row, states[0].mean(0).numpy(), atol=1e-5)


class Answering:
    """Its responses say which call and which seed made them."""

    def __init__(self, most: int = 99):
        self.calls, self.most = 0, most

    def generate(self, prompts, *, group_size, temperature, max_response_length, seed, progress=None, on_done=None):
        self.calls += 1
        if self.calls > self.most:
            raise KeyboardInterrupt
        return [
            Rollout(prompt, i, [3, 4], [-0.5, -seed % 7 / 8], True, 0, text=f"#{(seed + prompt.uid + i) % 5}")
            for prompt in prompts
            for i in range(group_size)
        ]


def test_an_interrupted_ranking_goes_on_where_it_stopped(tmp_path):
    config = parse_config(recipe("unused", **{"rollout.prompts_per_step": 3}))
    some = [Prompt(i, Example("entcov/countdown", (), "1"), (1 + i,)) for i in range(8)]
    straight = sample_answers(Answering(), some, tmp_path / "straight", samples=2, config=config)
    assert [len(own) for own in straight] == [2] * 8 and straight[0][0].length == 2
    with pytest.raises(KeyboardInterrupt):
        sample_answers(Answering(most=2), some, tmp_path / "cut", samples=2, config=config)
    rest, shown = Answering(), []
    again = sample_answers(
        rest, some, tmp_path / "cut", samples=2, config=config, progress=lambda *done: shown.append(done)
    )
    assert again == straight and rest.calls == 1 and shown == [(3, 8), (6, 8), (8, 8)]
    with pytest.raises(ValueError, match="holds samples made with other samples; remove it"):
        sample_answers(Answering(), some, tmp_path / "cut", samples=3, config=config)


@pytest.fixture
def dataset(tmp_path):
    task = make_task("carry_arithmetic", max_digits=2, styles=["direct"])
    write_rows([task.example("train", i) for i in range(12)], tmp_path / "rows.parquet")
    tree = recipe(
        tmp_path / "run",
        data={"train_files": [str(tmp_path / "rows.parquet")], "max_prompt_length": 16},
        **{"eval.prompts": 0, "warm_start.steps": 30, "warm_start.batch_size": 16},
    )
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(tree))  # JSON is YAML
    return path


def test_the_command_writes_stages_of_rising_entropy(dataset, capsys):
    out = dataset.parent / "ranked"
    command = ["data", "rank", str(dataset), "--out", str(out), "--samples", "4", "--stages", "3"]
    assert main(command) == 0
    printed = capsys.readouterr().out.split()
    assert printed == [str(out / f"stage_{i}.parquet") for i in (1, 2, 3)]
    rows = [row for path in printed for _, row in raw_rows(out / path)]
    entropies = [row["semantic_entropy"] for row in rows]
    assert entropies == sorted(entropies) and entropies[-1] > entropies[0]
    assert [row["stage"] for row in rows] == [1] * 4 + [2] * 4 + [3] * 4
    original = load_rows(dataset.parent / "rows.parquet")
    assert sorted(map(repr, load_rows(*printed))) == sorted(map(repr, original))
    before = [path.read_bytes() for path in sorted(out.glob("*.parquet"))]
    assert main(command) == 0 and [path.read_bytes() for path in sorted(out.glob("*.parquet"))] == before


def test_the_command_writes_a_subset_in_file_order(dataset, capsys):
    out = dataset.parent / "subset"
    assert (
        main(["data", "rank", str(dataset), "warm_start.steps=0", "--by", "kmeans", "--count", "5", "--out", str(out)])
        == 0
    )
    rows = [row for _, row in raw_rows(out / "subset.parquet")]
    assert len(rows) == 5 and sum(row["cluster_size"] for row in rows) == 12
    original = load_rows(dataset.parent / "rows.parquet")
    places = [original.index(example) for example in load_rows(out / "subset.parquet")]
    assert places == sorted(set(places))


def test_every_part_of_a_ranking_has_draws_of_its_own(tmp_path):
    config = parse_config(recipe("unused", **{"rollout.prompts_per_step": 3}))
    sampler, seeds = Answering(), []
    sampler.generate = lambda prompts, *, seed, **options: (
        seeds.append(seed) or Answering.generate(sampler, prompts, seed=seed, **options)
    )
    some = [Prompt(i, Example("entcov/countdown", (), "1"), (1 + i,)) for i in range(8)]
    sample_answers(sampler, some, tmp_path, samples=2, config=config)
    assert len(set(seeds)) == 3


def test_a_data_source_without_a_rule_is_refused_before_anything_is_sampled(dataset, capsys):
    rows = dataset.parent / "rows.parquet"
    write_rows([*load_rows(rows), Example("my/data", ({"role": "user", "content": "1+1"},), "2")], rows)
    out = dataset.parent / "ranked"
    assert main(["data", "rank", str(dataset), "warm_start.steps=0", "--out", str(out)]) == 2
    assert "no reward for data_source 'my/data'" in capsys.readouterr().err and not out.exists()


def test_answers_that_cannot_be_found_are_an_error(dataset, capsys):
    out = dataset.parent / "ranked"
    command = ["data", "rank", str(dataset), "warm_start.steps=0", "rollout.max_response_length=1", "--out", str(out)]
    assert main([*command, "--samples", "2"]) == 2
    assert "none of 24 responses has a final answer" in capsys.readouterr().err


def fifths(example, response):
    """Right, half right or wrong by the response's number."""
    return {"#0": 1.0, "#1": 0.5, "#2": 1.5}.get(response, 0.0)


def test_an_interrupted_count_of_right_responses_goes_on_where_it_stopped(tmp_path):
    config = parse_config(recipe("unused", **{"rollout.prompts_per_step": 3}))
    some = [Prompt(i, Example("a", (), "1"), (1 + i,)) for i in range(8)]
    straight = count_solved(Answering(), some, fifths, tmp_path / "straight", samples=4, config=config)
    texts = Answering().generate(
        some[:3], group_size=4, temperature=1, max_response_length=8, seed=derived_seed(0, (1 << 40) + 1, 0)
    )
    by_hand = [sum(r.text in ("#0", "#2") for r in texts if r.prompt is prompt) for prompt in some[:3]]
    assert straight[:3] == by_hand and len(straight) == 8 and len(set(straight)) > 1
    with pytest.raises(KeyboardInterrupt):
        count_solved(Answering(most=2), some, fifths, tmp_path / "cut", samples=4, config=config)
    rest, shown = Answering(), []
    again = count_solved(
        rest, some, fifths, tmp_path / "cut", samples=4, config=config, progress=lambda *done: shown.append(done)
    )
    assert again == straight and rest.calls == 1 and shown == [(3, 8), (6, 8), (8, 8)]
    other = [Prompt(p.uid, Example("a", (), "2"), p.tokens) for p in some]  # the same words, another right answer
    with pytest.raises(ValueError, match="holds samples made with other rows; remove it"):
        count_solved(rest, other, fifths, tmp_path / "cut", samples=4, config=config)


def test_the_command_writes_the_prompts_in_a_range_of_solve_rates(dataset, capsys):
    out = dataset.parent / "hard"
    command = ["data", "rank", str(dataset), "--by", "solve_rate", "--samples", "6", "--out", str(out)]
    assert main([*command, "--least", "1", "--most", "5"]) == 0
    assert capsys.readouterr().out.split() == [str(out / "subset.parquet"), str(out / "solve_counts.json")]
    counts = json.loads((out / "solve_counts.json").read_text())
    solved, original = counts["solved"], load_rows(dataset.parent / "rows.parquet")
    assert len(solved) == 12 == sum(counts["histogram"]) and counts["samples"] == 6
    assert counts["histogram"] == [solved.count(c) for c in range(7)] and 0 < max(solved) <= 6
    rows = [row for _, row in raw_rows(out / "subset.parquet")]
    chosen = [place for place, count in enumerate(solved) if 1 <= count <= 5]
    assert load_rows(out / "subset.parquet") == [original[place] for place in chosen]
    assert [(row["solved"], row["samples"]) for row in rows] == [(solved[place], 6) for place in chosen]
    # Other bounds: nothing is sampled again.
    stored = {path: path.stat().st_mtime_ns for path in (out / "solves").iterdir()}
    assert main([*command, "--most", "0"]) == 0
    assert {path: path.stat().st_mtime_ns for path in (out / "solves").iterdir()} == stored
    assert len(load_rows(out / "subset.parquet")) == counts["histogram"][0]


def test_prompts_of_a_task_are_ranked_once_each_and_after_the_warm_starts(tmp_path):
    tree = recipe(tmp_path / "run", **{"warm_start.steps": 2, "warm_start.batch_size": 16, "eval.prompts": 0})
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(tree))
    out = tmp_path / "hard"
    command = ["data", "rank", str(path), "--by", "solve_rate", "--samples", "2", "--out", str(out)]
    assert main([*command, "--prompts", "9", "--most", "2"]) == 0
    found = load_rows(out / "subset.parquet")
    stream = PromptStream.from_config(parse_config(tree).data, char_tokenizer(), seed=0)
    drawn = [prompt.example for prompt in stream.take(32, 60)]
    assert len({repr(example.prompt) for example in found}) == 9 == len(found)
    assert found == [e for place, e in enumerate(drawn) if e.prompt not in [d.prompt for d in drawn[:place]]][:9]
    with pytest.raises(ValueError, match="prompts: 6000 draws of the task have .* different ones, got 300"):
        different_prompts(stream, 0, 300)


def test_no_prompt_in_the_range_says_where_they_are(dataset, capsys):
    out = dataset.parent / "hard"
    command = [
        "data",
        "rank",
        str(dataset),
        "warm_start.steps=0",
        "rollout.max_response_length=1",
        "--by",
        "solve_rate",
    ]
    assert main([*command, "--samples", "2", "--least", "2", "--most", "2", "--out", str(out)]) == 2
    assert "solved 2 to 2 times of 2; prompts by count, from 0 on: [12, 0, 0]" in capsys.readouterr().err
