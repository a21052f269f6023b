"""The moments of a control around the loss: begin, what a selection drops, totals; and a control of another package."""

import re
import sys
import textwrap
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from entcov.controls import (
    CONTROLS,
    ClipCov,
    Control,
    KLCov,
    Progress,
    Selection,
    Shaping,
    begin,
    check_composition,
    make_control,
    mini_batch_totals,
    select,
)
from entcov.objective.policy_loss import policy_loss
from entcov.objective.sequences import SequenceIndex
from entcov.objective.tokens import AGGREGATIONS, PolicyLossConfig, Tokens, Totals
from entcov.registry import Registry
from entcov.rl.load_config import parse_config
from entcov.rl.run import train
from tests.support.objective_oracle import PROGRESS, make_tokens
from tests.support.tiny_run import recipe

ROOT = Path(__file__).parents[2]


@dataclass
class Given(Control):
    """Returns what it was made with."""

    name: ClassVar[str] = "given"
    shaping: Shaping = field(default_factory=Shaping)
    scope: str = "global"

    def begin(self, rollout, progress):
        return self.shaping


def rollout(n: int = 6) -> Tokens:
    logprob = -torch.arange(1.0, n + 1)
    advantage = torch.linspace(-1, 2, n)
    ids = torch.arange(n)
    return Tokens(
        logprob, logprob.clone(), advantage, torch.ones(n, dtype=torch.bool), token_id=ids, sequence=ids // 2,
        sequence_length=torch.full((n,), 2),
    )  # fmt: skip


# ---- begin -----------------------------------------------------------------------------------------------------------


def test_shapings_compose_in_any_order():
    tokens = rollout()
    two, three = torch.full((6,), 2.0), torch.full((6,), 3.0)
    drop = torch.tensor([True, False, False, False, False, False])
    controls = [
        Given(Shaping(multiplier=two, bonus=torch.full((6,), 0.5), metrics={"a": 1.0})),
        Given(Shaping(multiplier=three, drop=drop)),
        Given(Shaping(bonus=torch.full((6,), -0.25), drop=drop.flip(0), metrics={"b": 2.0})),
        Given(),
    ]
    for order in (controls, controls[::-1]):
        shaped = begin(order, tokens, PROGRESS)
        assert shaped.advantage.tolist() == pytest.approx((tokens.advantage * 6 + 0.25).tolist())
        assert shaped.drop.tolist() == [True, False, False, False, False, True]
        assert shaped.metrics == {"a": 1.0, "b": 2.0}
    assert torch.equal(begin([Given()], tokens, PROGRESS).advantage, tokens.advantage)


@pytest.mark.parametrize(
    "control, error, message",
    [
        (Given(Shaping(multiplier=torch.ones(5))), ValueError, r"multiplier of control given must have shape \(6,\)"),
        (Given(Shaping(drop=torch.ones(6))), TypeError, "drop of control given must be torch.bool"),
        (Given(Shaping(bonus=torch.full((6,), torch.inf))), ValueError, "advantage must be finite: 6 of 6"),
        (Given(scope="rollout"), ValueError, "given has scope rollout and must select tokens in begin, got None"),
    ],
)
def test_a_bad_shaping_is_named(control, error, message):
    with pytest.raises(error, match=message):
        begin([control], rollout(), PROGRESS)


@pytest.mark.parametrize(
    "make",
    [
        lambda **k: ClipCov(clip_cov_ratio=0.5, clip_cov_lb=-1e3, clip_cov_ub=1e3, **k),
        lambda **k: KLCov(kl_cov_ratio=0.4, **k),
    ],
)
def test_rollout_scope_chooses_what_the_global_scope_chooses_on_the_whole_rollout(make):
    tokens = rollout(40)
    wide, narrow = make(scope="rollout"), make()
    (row,), _ = select([narrow], [tokens], step=7, config=PolicyLossConfig())
    shaped = begin([wide], tokens, replace(PROGRESS, update=7))
    assert row[0].mask.any() and torch.equal(shaped.selected[wide.name], row[0].mask)
    assert select([wide], [tokens], step=7, config=PolicyLossConfig())[0] == [[None]]
    other = begin([wide], tokens, replace(PROGRESS, update=8)).selected[wide.name]
    assert torch.equal(other, row[0].mask) == (wide.name == "kl_cov")  # Clip-Cov draws anew for every rollout


@dataclass
class Late(Control):
    """Selects the tokens of number 3 and more, and drops that of number 5."""

    name: ClassVar[str] = "late"
    needs: ClassVar[frozenset[str]] = frozenset({"selection"})
    reads: ClassVar[tuple[str, ...]] = ("token_id",)
    scope: str = "rollout"

    def select(self, tokens, *, step, config, group=None):
        return Selection(tokens.token_id >= 3, drop=tokens.token_id == 5, metrics={"late": torch.tensor(float(step))})


def test_a_control_of_scope_rollout_chooses_and_drops_by_its_select():
    shaped = begin([Late()], rollout(), replace(PROGRESS, update=9))
    assert shaped.selected["late"].tolist() == [False] * 3 + [True] * 3
    assert shaped.drop.tolist() == [False] * 5 + [True] and shaped.metrics == {"late": 9.0}


@pytest.mark.parametrize("name", [name for name in CONTROLS if CONTROLS[name].reads])
def test_a_field_that_a_selection_reads_is_named(name):
    tokens = replace(rollout(), entropy=torch.ones(6))
    for field_name in CONTROLS[name].reads:
        with pytest.raises(ValueError, match=f"tokens.{field_name} must be given, control {name} reads it; got None"):
            select([make_control(name)], [replace(tokens, **{field_name: None})], step=0, config=PolicyLossConfig())


# ---- what a selection drops ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_a_dropped_token_is_as_if_it_were_not_there(aggregation):
    tokens, sequence = make_tokens()
    tokens.sequence = sequence
    config = PolicyLossConfig(
        aggregation=aggregation, max_response_length=9 if aggregation == "seq-mean-token-sum-norm" else None
    )
    drop = torch.zeros_like(tokens.loss_mask)
    drop[::3] = True
    chosen = [[Selection(tokens.loss_mask, drop=drop)]]
    without = replace(tokens, loss_mask=tokens.loss_mask & ~drop)
    length = torch.zeros(int(sequence.max()) + 1).index_add_(0, sequence, without.loss_mask.float())
    without.sequence_length = length.long()[sequence]
    totals = mini_batch_totals([tokens], chosen)
    expected, _ = policy_loss(without, config, totals=totals)
    for own in (totals, None):
        got, metrics = policy_loss(tokens, config, totals=own, controls=[Given()], selections=chosen[0])
        assert got.item() == pytest.approx(expected.item(), rel=1e-12)
    assert totals.num_tokens == without.loss_mask.sum() < tokens.loss_mask.sum()
    assert totals.num_sequences == (length > 0).sum()


def test_totals_of_any_split_and_of_a_mini_batch_without_a_token():
    tokens = rollout(12)
    drop = torch.isin(tokens.sequence, torch.tensor([1, 4])) | (tokens.token_id == 0)
    parts = [tokens.sequence < 2, tokens.sequence >= 2]
    micro = [Tokens(**{n: v[p] for n, v in vars(tokens).items() if v is not None}) for p in parts]
    chosen = [[Selection(drop=drop[p]), None] for p in parts]
    totals = mini_batch_totals(micro, chosen)
    assert (int(totals.num_tokens), int(totals.num_sequences)) == (7, 4)
    nothing = mini_batch_totals([tokens], [[Selection(drop=tokens.loss_mask)]])
    loss, _ = policy_loss(tokens, totals=nothing, controls=[Given()], selections=[Selection(drop=tokens.loss_mask)])
    assert (nothing, loss.item()) == (Totals(torch.tensor(1), torch.tensor(1)), 0.0)


# ---- sums over responses ---------------------------------------------------------------------------------------------


def test_sums_over_responses():
    index = SequenceIndex(torch.tensor([2, 0, 2, 2]), 4)
    assert index.totals(torch.tensor([1.0, 2.0, 3.0, 4.0])).tolist() == [2, 0, 8, 0]
    assert index.sum(torch.tensor([True, True, False, True])).tolist() == [2, 1, 2, 2]
    assert SequenceIndex.of(torch.tensor([30, 7, 30, 9])).sum(torch.ones(4)).tolist() == [2, 1, 2, 1]
    with pytest.raises(ValueError, match=r"index must be in \[0, 2\), got 0 to 2"):
        SequenceIndex(torch.tensor([0, 2]), 2)


# ---- controls of other packages --------------------------------------------------------------------------------------


def package(folder: Path, code: str, entries: dict[str, str]) -> None:
    """An installed package "stranger" of one module."""
    (folder / "stranger.py").write_text(code)
    info = folder / "stranger-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: stranger\nVersion: 1.0\n")
    lines = [f"{name} = {value}" for name, value in entries.items()]
    (info / "entry_points.txt").write_text("[entcov.controls]\n" + "\n".join(lines) + "\n")


@pytest.fixture
def installed(tmp_path, monkeypatch):
    import entcov.controls
    import entcov.rl.config

    def install(code: str, entries: dict[str, str]) -> Registry:
        package(tmp_path, code, entries)
        monkeypatch.syspath_prepend(tmp_path)
        known = entcov.controls.CONTROLS
        fresh = Registry(known.kind, known.base, tuple(known._classes.values()), known.group)
        monkeypatch.setattr(entcov.rl.config, "CONTROLS", fresh)
        return fresh

    yield install
    sys.modules.pop("stranger", None)


def test_the_control_of_the_documentation_trains_from_a_package_of_its_own(installed, tmp_path):
    page = (ROOT / "docs/controls.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.S)
    (name, value) = re.search(r'"entcov.controls"\]\n(\w+) = "my_package:(\w+)"', page).groups()
    installed(code, {name: f"stranger:{value}"})
    config = parse_config(
        recipe(
            tmp_path / "run",
            steps=2,
            control=[name],
            controls={name: {"target": 9.0}},
            **{"warm_start.steps": 0, "eval.prompts": 0},
        )  # fmt: skip
    )
    assert "stranger" in sys.modules and train(config, display=False)["actor/entropy_focus"] == 0.01
    with pytest.raises(ValueError, match=f"control {name} has no knob 'targt'; it has step_size, target; did you mean"):
        parse_config(recipe(tmp_path / "run", controls={name: {"targt": 9.0}}))


def test_a_package_is_imported_when_its_control_is_asked_for(installed):
    known = installed("raise RuntimeError('was imported')", {"theirs": "stranger:X"})
    assert "theirs" in known and "none" in known and len(list(known)) == len(known)
    with pytest.raises(ValueError, match=r"entry point theirs = stranger:X of stranger .*RuntimeError: was imported"):
        known.make("theirs")


@pytest.mark.parametrize(
    "code, entries, error, message",
    [
        ("class X: pass", {"theirs": "stranger:X"}, TypeError, "must be a class that derives from Control, got"),
        (
            """
            from entcov.controls import Control
            class X(Control):
                name = "other"
            """,
            {"theirs": "stranger:X"},
            ValueError,
            "its class must have name = 'theirs', got 'other'",
        ),
        ("X = 1", {"aent": "stranger:X"}, ValueError, "there is a control of the name 'aent' already"),
    ],
)
def test_a_bad_entry_point_is_named(installed, code, entries, error, message):
    known = installed(textwrap.dedent(code), entries)
    with pytest.raises(error, match=rf"entry point .* of stranger .group entcov.controls.: {message}"):
        known.make("theirs")


# ---- composition -----------------------------------------------------------------------------------------------------


def test_every_pair_of_controls_is_refused_by_name_or_trains_on_both():
    """The pairs that the documentation refuses, and no others; the rest give the same loss in both orders."""
    page = (ROOT / "docs/controls.md").read_text()
    refused = {frozenset(("none", name)) for name in CONTROLS}
    for line in re.findall(r"^\| the .*\| (.*) \|$", page, re.M):
        refused |= {frozenset(pair) for pair in combinations(line.split(", "), 2)}
    tokens, sequence = make_tokens(dtype=torch.float32)
    tokens.sequence, tokens.group = sequence, sequence // 2
    tokens.position = torch.zeros_like(sequence)
    tokens.reward = (sequence % 2).float()
    tokens.entropy_drift, tokens.lag = tokens.entropy / 7, torch.zeros_like(sequence)
    for a, b in combinations(sorted(CONTROLS), 2):
        losses = []
        for names in ((a, b), (b, a)):
            controls = [make_control(name) for name in names]
            if frozenset(names) in refused:
                with pytest.raises(ValueError, match=f"control: .*{names[0]}.*{names[1]}|none stands for no control"):
                    check_composition(controls)
                continue
            check_composition(controls)
            losses.append(loss_of(controls, tokens))
        if losses:
            assert losses[0] == pytest.approx(losses[1], rel=1e-6), (a, b)


def loss_of(controls: list[Control], tokens: Tokens) -> float:
    """A step of the loop on one mini-batch, through every moment."""
    at = tokens.loss_mask
    whole = Tokens(**{name: value[at] for name, value in vars(tokens).items() if value is not None})
    shaped = begin(controls, replace(whole, logprob=whole.old_logprob), Progress(1, 10, 0, epoch=1, epochs=2))
    kept = ~shaped.drop if shaped.drop is not None else torch.ones_like(whole.loss_mask)
    tokens = replace(whole, advantage=shaped.advantage, loss_mask=kept)
    (row,), _ = select(controls, [tokens], step=0, config=PolicyLossConfig())
    totals = mini_batch_totals([tokens], [row])
    loss, metrics = policy_loss(tokens, totals=totals, controls=controls, selections=row)
    means = {name.removeprefix("actor/"): float(value) for name, value in metrics.items()}
    for control in controls:
        control.after_update(means, PROGRESS)
        control.after_step({f"{when}/{n}": v for when in ("scored", "updated") for n, v in means.items()}, PROGRESS)
    return loss.item()
