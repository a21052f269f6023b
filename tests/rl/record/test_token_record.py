"""The record of responses: its numbers by hand, what a control chose, texts of tokens, and its bound."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from entcov.controls import Selection
from entcov.rl.batch import pack
from entcov.rl.data.tokenizer import char_tokenizer
from entcov.rl.load_config import parse_config
from entcov.rl.loop import Loop
from entcov.rl.record import token_record
from entcov.rl.record.token_record import KEPT, TokenRecord, Watched, choose, is_kept, prompt_key, token_texts
from entcov.rl.run import train
from entcov.rl.types import Example, Prompt, Rollout
from tests.support.scripted_loop import Actor, Sampler, Stream, reward
from tests.support.tiny_run import recipe, timeless, token_files


class Words:
    """A tokenizer whose token 11 is the text "<11>"."""

    def decode(self, tokens):
        return "".join(f"<{token}>" for token in tokens)


class Choosing(Actor):
    """Tells that a control chose token 15 by its mask, 17 by its weight, and dropped 12."""

    on_selection = None

    def update(self, batch, *, step):
        at = batch.loss_mask
        target = batch.target[at]
        if self.on_selection is not None:
            self.on_selection("masks", batch.token_id[at], Selection(target == 15))
            self.on_selection("weighs", batch.token_id[at], Selection(weight=(target == 17) * 0.5))
            self.on_selection("drops", batch.token_id[at], Selection(drop=target == 12))
        return super().update(batch, step=step)

    def compute_logprobs(self, batch):
        stats = super().compute_logprobs(batch)
        return stats | {"logprob": stats["logprob"] - self.weight}


def record_of(folder, every=10, max_bytes=8_000_000, steps=100, eval_every=0) -> TokenRecord:
    return TokenRecord(folder, Words(), every, eval_every, max_bytes, steps)


def rollout(text="a prompt", answer="1", sample=0, tokens=(11, 12), score=1.0) -> Rollout:
    prompt = Prompt(0, Example("test", ({"role": "user", "content": text},), answer), (5, 6))
    return Rollout(prompt, sample, list(tokens), [-1.0] * len(tokens), True, 0, text="1", reward=score)


def read(folder: Path, name: str) -> dict:
    return json.loads((folder / f"{name}.json").read_bytes())


def test_a_step_by_hand(tmp_path):
    changes = {"rollout": {"prompts_per_step": 2, "group_size": 2}, "actor.updates_per_rollout": 2, "seed": 7}
    config = parse_config(recipe("unused", **changes))
    record = record_of(tmp_path, steps=2)
    loop = Loop(config, Choosing(), Sampler(), Stream(), [], reward, token_record=record)
    loop.step()
    record.keep_step(1, loop.watched)
    found = read(tmp_path, "train/step_1")
    # Both of the scripted prompts have the same text; the best and the worst of their four responses are taken.
    (prompt,) = found["prompts"]
    assert found["solved"] == {prompt["key"]: [2, 4]} and prompt["answer"] == "1" and prompt["source"] == "test"
    first, second = prompt["responses"]
    assert (first["pieces"], first["score"], first["finished"]) == (["<11>", "<12>"], 1.0, True)
    assert (second["pieces"], second["score"], second["finished"]) == (["<17>", "<18>"], 0.0, True)
    assert first["entropy"] == [1.1, 1.2] and first["logprob"] == [-1.1, -1.8]
    assert first["logprob_after"] == pytest.approx([-2.1, -2.8])  # two updates of 0.5
    a = 0.5 / (math.sqrt(0.5) + 1e-6)
    assert first["advantage"] == pytest.approx([a, a], rel=1e-2)
    assert second["advantage"] == pytest.approx([-a, -a], rel=1e-2)
    # Of all eight loss tokens: log-probabilities sum to -11.1, advantages (2 - 1 + 3 - 2) a.
    mean, mean_a = -11.1 / 8, 2 * a / 8
    assert first["covariance"] == pytest.approx([(-1.1 - mean) * (a - mean_a), (-1.8 - mean) * (a - mean_a)], rel=1e-2)
    assert first["chosen"] == {"dropped": [1], "masks": [], "weighs": []}
    assert second["chosen"] == {"dropped": [], "masks": [], "weighs": [0]}
    assert loop.step() and loop.watched is not None  # the last step is due
    loop.config.steps = record.steps = 100
    loop.step()
    assert loop.watched is None and loop.actor.on_selection is None


def test_a_token_counts_as_chosen_if_one_update_chose_it():
    batch = pack([rollout(), rollout(sample=1)])
    batch.assign_scores({name: torch.zeros(len(batch.tokens)) for name in ("logprob", "entropy", "entropy_drift")}, 0)
    watched = Watched([rollout(), rollout(sample=1)], {}, batch)
    ids = batch.token_id[batch.loss_mask]
    elsewhere = torch.tensor([1 << 40])
    for chosen in ([True, False, False, False], [False, False, True, False], [False] * 4):
        watched.selected("clip_cov", torch.cat([ids, elsewhere]), Selection(torch.tensor([*chosen, True])))
    assert watched.chosen["clip_cov"].tolist() == [True, False, True, False]


def test_what_clip_cov_chose_are_the_tokens_in_its_bounds(tmp_path):
    """All of them, as they are fewer than the ratio. Of a rollout's one update the covariance is the recorded one."""
    knobs = {"clip_cov_ratio": 0.5, "clip_cov_lb": 0.05, "clip_cov_ub": 1.0}
    changes = {"control": ["clip_cov"], "controls": {"clip_cov": knobs}, "actor.updates_per_rollout": 1, "steps": 1}
    train(parse_config(recipe(tmp_path / "with", **changes)), display=False)
    counts = {True: 0, False: 0}
    for prompt in read(tmp_path / "with" / "tokens", "train/step_1")["prompts"]:
        for response in prompt["responses"]:
            assert response["logprob_after"] != response["logprob"]
            for i, covariance in enumerate(response["covariance"]):
                if min(abs(covariance - bound) for bound in (0.05, 1.0)) > 5e-3:  # else rounding decides
                    assert (i in response["chosen"]["clip_cov"]) == (0.05 < covariance < 1.0)
                    counts[0.05 < covariance < 1.0] += 1
    assert min(counts.values()) > 3
    train(parse_config(recipe(tmp_path / "without", **changes, **{"token_record.max_mb": 0})), display=False)
    assert not token_files(tmp_path / "without")
    ours, others = ([dict(row) for row in timeless(tmp_path / name)] for name in ("with", "without"))
    assert ours == others  # recording changes nothing


def test_held_out_responses_are_the_policy_s(tmp_path):
    some = [rollout(sample=0), rollout(sample=1, tokens=(17,), score=0.0), rollout("another", sample=0, score=0.0)]
    record_of(tmp_path, steps=4).keep_evaluation(4, some, Actor())
    found = read(tmp_path, "held_out/step_4")
    assert found["solved"] == {prompt_key(some[0]): [1, 2], prompt_key(some[2]): [0, 1]}
    responses = {(p["prompt"], r["sample"]): r for p in found["prompts"] for r in p["responses"]}
    assert responses["a prompt", 1]["entropy"] == [1.7] and responses["a prompt", 1]["logprob"] == [-2.0]
    assert responses["another", 0]["pieces"] == ["<11>", "<12>"] and responses["another", 0]["chosen"] == {}
    record_of(None, steps=4).keep_evaluation(4, some, Actor())  # another rank scores, and writes nothing


def test_the_same_prompts_are_chosen_again_and_mixed_ones_beside_them():
    def groups(names):
        return [rollout(name, sample=s, score=float(name == "mixed" and s == 1)) for name in names for s in range(3)]

    names = [f"prompt {i}" for i in range(20)]
    keys = sorted(prompt_key(rollout(name)) for name in names)
    chosen = choose(groups([*names, "mixed"]))
    assert chosen == sorted(chosen) and len(chosen) == 8
    rows = groups([*names, "mixed"])
    found = {prompt_key(rows[i]) for i in chosen}
    assert len(found) == 4 and set(keys[:2]) <= found and prompt_key(rollout("mixed")) in found
    assert [rows[i].sample for i in chosen if prompt_key(rows[i]) == prompt_key(rollout("mixed"))] == [1, 2]
    again = groups(names[10:])
    kept = {key for key in keys[:2] if key in {prompt_key(row) for row in again}}
    assert kept <= {prompt_key(again[i]) for i in choose(again)}
    assert choose([rollout()]) == [0]


def test_texts_of_tokens_join_to_the_text():
    letters = char_tokenizer()
    ids = letters.encode("12+34=46\n so 46")
    assert token_texts(letters, [*ids, letters.eos_token_id]) == [*"12+34=46\n so 46", "<eos>"]
    # Bytes: a character of several tokens is with the last of them, and a broken one does not swallow what follows.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({one: i for i, one in enumerate(alphabet)}, []))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    text = "é = 🎲\u2028!"
    texts = token_texts(core, core.encode(text).ids)
    assert "".join(texts) == text and texts[:2] == ["", "é"] and texts[5:9] == ["", "", "", "🎲"]
    first = core.encode("🎲").ids[0]
    texts = token_texts(core, [first] * 9 + core.encode(" ok").ids)
    assert "".join(texts).endswith(" ok") and "".join(texts).count("\ufffd") == 9 and texts[-1] == "k"


@pytest.mark.parametrize("every", [1, 3, 10])
def test_few_records_are_kept_however_long_the_run_is(every):
    kept: set[int] = set()
    for step in range(1, 700):
        if is_kept(step, step, every):
            kept = {one for one in kept if is_kept(one, step, every)} | {step}
        assert len(kept) <= KEPT + 1
        if step % 23:
            continue
        assert kept == {one for one in range(1, max(kept) + 1) if is_kept(one, max(kept), every)}  # of the step alone
    assert 1 in kept and len(kept) > KEPT // 2


def test_the_record_is_bounded(tmp_path):
    """Long responses, and prompts of characters that take six bytes: files stay within the bound, and go in time."""
    long = [rollout(f"{i}" + "\u2028" * 5000, "\u2028" * 900, tokens=range(100, 900)) for i in range(8)]
    for step in range(100):
        record = record_of(tmp_path / "tokens", every=1, eval_every=1, max_bytes=1_000_000)
        if step == 5:  # the end of a run that then was made longer
            record.steps = 5
        record.keep_evaluation(step, long, Bare())
    files = token_files(tmp_path)
    steps = sorted(int(Path(name).stem.removeprefix("step_")) for name in files)
    assert steps == [0, 1, *range(4, 100, 4)]
    assert all(len(data) <= 1_000_000 // 70 for data in files.values()) and sum(map(len, files.values())) < 500_000
    response = read(tmp_path / "tokens", "held_out/step_96")["prompts"][0]["responses"][0]
    assert response["length"] == 800 and 20 < len(response["pieces"]) < 200
    assert len(response["entropy"]) == len(response["pieces"])
    record_of(tmp_path / "tokens").go_back(8)
    assert sorted(token_files(tmp_path)) == [f"held_out/step_{step}.json" for step in (0, 1, 4, 8)]


class Bare(Actor):
    def compute_logprobs(self, batch):
        values = torch.where(batch.loss_mask, 0.1234567, 0.0)
        return {"logprob": -values, "entropy": values}


def test_what_is_not_finite_is_null(tmp_path, monkeypatch):
    actor = Bare()
    monkeypatch.setattr(actor, "compute_logprobs", lambda batch: dict.fromkeys(
        ("entropy", "logprob"), torch.full((len(batch.tokens),), math.nan)
    ))  # fmt: skip
    record_of(tmp_path, steps=1).keep_evaluation(0, [rollout()], actor)
    assert read(tmp_path, "held_out/step_0")["prompts"][0]["responses"][0]["entropy"] == [None, None]
    assert token_record._short(0.123456) == 0.123 and token_record._short(-1234.5) == -1230
