"""The documents: their links lead somewhere, their commands are understood, and their Python code runs."""

import copy
import re
import shlex
from contextlib import redirect_stderr
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

import entcov
from benchmarks.__main__ import _parser as benchmarks_parser
from entcov import PolicyLossConfig, Tokens, Totals, policy_loss, token_stats
from entcov.cli import make_parser
from entcov.cli.command_line import parse
from entcov.controls import make_control, select
from entcov.integrations.controlled_loss import ControlledLoss
from entcov.rl.load_config import load_config

ROOT = Path(__file__).parents[1]
PAGES = [
    *ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "benchmarks").glob("*.md"),
    *(ROOT / "megatron_integration").rglob("*.md"), *(ROOT / "examples").rglob("*.md"),
]  # fmt: skip
HISTORY = ("CHANGELOG.md", "experiments.md")  # commands of the past
BLOCK = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.M | re.S)


# ---- links -----------------------------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """The names that GitHub gives to the page's headings."""
    text = BLOCK.sub("", page.read_text())
    headings = (re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", line) for line in re.findall(r"^#+ +(.*)$", text, re.M))
    return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(page):
    text = BLOCK.sub("", page.read_text())
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, heading = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), f"{target}: no such file"
        assert not heading or heading in anchors(file), f"{target}: {file.name} has {sorted(anchors(file))}"


# ---- commands --------------------------------------------------------------------------------------------------------


def commands() -> list[tuple[str, list[str]]]:
    """(module, arguments) of every command line of this package in a block of code."""
    found = []
    for page in PAGES:
        if page.name in HISTORY:
            continue
        for _, block in BLOCK.findall(page.read_text()):
            for line in block.replace("\\\n", " ").splitlines():
                match = re.match(
                    r"(?:\$ )?(?:\w+=\S+ )*(?:python|torchrun .*?)(?: -m) (entcov|benchmarks|megatron_\w+) ", line
                )
                if match:
                    text = line[match.end() :].replace("[key=value ...]", "").replace("...", "")
                    words = [word for word in shlex.split(text, comments=True) if word != "&"]
                    if words[:2] == ["data", "rank"]:  # the parser's name for it is one word
                        words[:2] = ["data rank"]
                    found.append((match[1], words))
    return found


COMMANDS = commands()


def test_there_are_commands_of_every_kind():
    assert len(COMMANDS) > 50 and {module for module, _ in COMMANDS} == {"entcov", "benchmarks", "megatron_integration"}


@pytest.mark.parametrize("module, words", COMMANDS, ids=lambda own: own if isinstance(own, str) else " ".join(own))
def test_commands_are_understood(module, words):
    """By the parser of their program; recipes of examples/ take the overrides."""
    if module == "megatron_integration":
        pytest.importorskip("megatron.core")
        from megatron_integration.__main__ import _parser as parser
    else:
        parser = {"entcov": make_parser, "benchmarks": lambda: benchmarks_parser(words)}[module]
    told = StringIO()
    try:
        with redirect_stderr(told):
            args = parse(parser(), words)
    except SystemExit:
        raise AssertionError(told.getvalue()) from None
    recipe = getattr(args, "recipe", None)
    if recipe and recipe.startswith("examples/"):
        always = ["actor.backend=megatron"] if module == "megatron_integration" else []
        load_config(ROOT / recipe, [*always, *args.overrides])


# ---- Python code -----------------------------------------------------------------------------------------------------


def code(name: str) -> list[str]:
    return [text for language, text in BLOCK.findall((ROOT / name).read_text()) if language == "python"]


def logits_and_more() -> dict:
    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=g)  # noqa: E731
    return {
        "torch": torch, "entcov": entcov, "temperature": 1.0,
        "logits": (3 * draw(2, 5, 40)).requires_grad_(), "target": torch.randint(40, (2, 5), generator=g),
        "advantage": draw(2, 5), "old_logits": draw(6, 40), "new_logits": draw(6, 40), "logits_before": draw(6, 40),
        "logits_after": draw(6, 40), "tokens": torch.randint(40, (2, 5), generator=g),
        "hidden": draw(2, 5, 16).requires_grad_(), "lm_head": nn.Linear(16, 40, bias=False),
    }  # fmt: skip


def same_as_the_usual_formula(names: dict, stats) -> None:
    for name in ("logprob", "entropy"):
        torch.testing.assert_close(getattr(stats, name).double(), names[name], atol=1e-5, rtol=0)


def test_readme_ops():
    names = logits_and_more()
    ops, usual, _ = code("README.md")
    exec(ops, names)
    assert names["logits"].grad.abs().sum() > 0 and names["lm_head"].weight.grad is None
    assert names["stats"].logprob.shape == (2, 5) and names["change"].kl.shape == (6,)
    stats = token_stats(names["logits"], names["target"])
    exec(usual, names)
    same_as_the_usual_formula(names, stats)


def response_tokens(count: int = 24, first: int = 0) -> Tokens:
    """Of responses of four tokens each."""
    g = torch.Generator().manual_seed(first)
    at = torch.arange(first, first + count)
    logprob = -torch.rand(count, generator=g) - 0.1
    return Tokens(
        logprob, logprob.clone(), torch.randn(count, generator=g), torch.ones(count, dtype=torch.bool),
        entropy=torch.rand(count, generator=g), token_id=at, sequence=at // 4,
    )  # fmt: skip


def test_readme_losses_and_controls():
    micro_batches = [response_tokens(24, first) for first in (0, 24)]
    for part in micro_batches:
        part.logprob.requires_grad_()
    names = {
        "micro_batches": micro_batches, "update": 1, "config": PolicyLossConfig(),
        "totals": Totals(num_tokens=48, num_sequences=12),
    }  # fmt: skip
    text = code("README.md")[2].replace("clip_cov_ratio=2e-4", "clip_cov_ratio=0.1, clip_cov_lb=0.0")
    exec(text, names)
    assert sum(int((part.logprob.grad == 0).sum()) for part in micro_batches) >= 4  # a tenth of 48 tokens is clipped
    assert {"select", "make_control"} <= set(names) and names["controls"][0].name == "clip_cov"
    assert select is names["select"] and make_control is names["make_control"] and policy_loss is names["policy_loss"]


@pytest.fixture
def alone(tmp_path):
    """A process group of one."""
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_ops_page(alone):
    names = logits_and_more()
    ops, usual, shifted, linear, sharded, change = code("docs/ops.md")
    exec(ops, names)
    stats = names["stats"]
    exec(usual, names)
    same_as_the_usual_formula(names, stats)
    exec(linear, names)
    assert names["lm_head"].weight.grad.abs().sum() > 0 and names["hidden"].grad.abs().sum() > 0
    exec(sharded, names | {"shard": names["logits"], "tp_group": alone, "true_vocab": 40, "start": 0})
    exec(change, names)
    assert (names["change"].kl > 0).all()
    tokens, before = names["tokens"], names["target"]
    exec(shifted, names)
    assert torch.equal(names["target"][:, :-1], tokens[:, 1:]) and (names["target"][:, -1] == -100).all()
    assert before.shape == names["target"].shape


def test_law_page():
    entropy = torch.linspace(1.5, 0.2, 60).double().numpy()
    noise = 1e-3 * torch.randn(60, generator=torch.Generator().manual_seed(0)).double().numpy()
    reward = -0.2 * torch.from_numpy(entropy).exp().numpy() + 1.0 + noise
    names = {"entcov": entcov, "entropy": entropy[:40], "reward": reward[:40]}
    names |= {"later_entropy": entropy[40:], "later_reward": reward[40:]}
    exec(code("docs/law.md")[0], names)
    assert names["law"].a == pytest.approx(0.2, abs=0.01) and names["found"].rmse < 0.01


def test_the_loop_of_your_own():
    """Two steps of two updates each, in three micro-batches, of a table of logits."""
    weights = nn.Parameter(torch.zeros(96, 10))
    target = torch.arange(96) % 10
    optimizer = torch.optim.SGD([weights], lr=0.1)
    saved = []

    def rollout() -> Tokens:
        return response_tokens(96)

    def forward(tokens: Tokens):
        return token_stats(weights[tokens.token_id], target[tokens.token_id])

    def part(tokens: Tokens, at) -> Tokens:
        own = vars(tokens).items()
        return replace(tokens, **{name: value[at] for name, value in own if isinstance(value, torch.Tensor)})

    names = {
        "torch": torch, "replace": replace, "ControlledLoss": ControlledLoss, "make_control": make_control,
        "PolicyLossConfig": PolicyLossConfig, "data_parallel_group": None, "steps": 2, "forward": forward,
        "sample_and_score": rollout, "optimizer": optimizer, "save": lambda state: saved.append(copy.deepcopy(state)),
        "divide": lambda tokens: [part(tokens, tokens.sequence % 2 == i) for i in range(2)],
        "micro_batches": lambda tokens: [part(tokens, tokens.sequence % 3 == i) for i in range(3)],
    }  # fmt: skip
    exec(code("docs/own_loop.md")[0], names)
    assert len(saved) == 2 and weights.abs().sum() > 0 and "actor/pg_loss" in names["metrics"]


def test_code_that_only_has_to_be_python():
    """It needs other packages, or leaves parts open."""
    for name in ("docs/tasks.md", "docs/trl.md", "docs/other_trainers.md"):
        for text in code(name):
            compile(text, name, "exec")
