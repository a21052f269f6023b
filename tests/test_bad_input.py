"""The list of bad inputs that a user is most likely to bring, each with the error it gets.

One line each, from the op to the run's folder; the details are tested beside each part.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from contextlib import nullcontext
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors import SafetensorError

from entcov import Tokens, fit_law, logit_covariance, policy_loss, token_stats
from entcov.cli import main
from entcov.controls import make_control, select
from entcov.integrations.plugin import make_controls
from entcov.objective.token_covariance import token_covariance
from entcov.objective.tokens import PolicyLossConfig
from entcov.rl.data.stream import load_rows
from entcov.rl.load_config import parse_config
from entcov.rl.record.checkpoint import CheckpointError, load_latest, save_checkpoint
from entcov.rl.record.durable import as_os_error
from entcov.rl.record.metrics import RunLogger, read_metrics
from entcov.rl.run import train
from tests.support.bad_recipes import CHANGES, COMMANDS, DATA, RECIPES
from tests.support.thread_ranks import ThreadRanks
from tests.support.tiny_run import recipe

REWARD = {"style": "exact", "ground_truth": "1"}
BIG = str(Path(__file__).parents[1] / "examples" / "qwen2.5_32b_dapo_math.yaml")
PATHS = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
LOGITS, TARGET = torch.linspace(-3, 3, 24).view(3, 8), torch.tensor([1, 2, 3])


def with_row(row: int, value: float) -> torch.Tensor:
    logits = LOGITS.clone()
    logits[row] = value
    return logits


def tokens(mask: list[bool], **fields) -> Tokens:
    ones = torch.ones(len(mask))
    values = {"logprob": -ones, "old_logprob": -ones, "advantage": ones, "loss_mask": torch.tensor(mask)}
    return Tokens(**(values | fields))


BAD_CALLS = {
    "target of another shape": (
        lambda: token_stats(LOGITS, TARGET[:2]),
        ValueError,
        r"target must have the leading shape of logits, \(3,\), got \(2,\)",
    ),
    "logits of float64": (
        lambda: token_stats(LOGITS.double(), TARGET),
        TypeError,
        "logits must be .*got torch.float64",
    ),
    "target of int32": (
        lambda: token_stats(LOGITS, TARGET.int()),
        TypeError,
        "target must be torch.int64, got torch.int32",
    ),
    "vocabulary not contiguous": (
        lambda: token_stats(LOGITS.t().contiguous().t(), TARGET),
        ValueError,
        "logits .*stride 1",
    ),
    "target outside the vocabulary": (
        lambda: token_stats(LOGITS, torch.tensor([1, 8, 3])),
        ValueError,
        r"target .*8.*",
    ),
    "target in the padding": (
        lambda: token_stats(LOGITS, torch.tensor([1, 2, 7]), vocab_size=7),
        ValueError,
        r"target .*7",
    ),
    "a row that is all -inf": (
        lambda: token_stats(with_row(1, -torch.inf), TARGET),
        ValueError,
        r"1 rows have no finite logit \(first: row 1\)",
    ),
    "percent for fraction, clamp": (
        lambda: token_stats(LOGITS, TARGET, clamp_p=33),
        ValueError,
        r"clamp_p must be in \[0, 1\), a fraction, not percent, got 33",
    ),
    "top_k beyond the vocabulary": (
        lambda: token_stats(LOGITS, TARGET, top_k=9),
        ValueError,
        "top_k must be in .*8.*got 9",
    ),
    "temperature 0": (
        lambda: token_stats(LOGITS, TARGET, temperature=0.0),
        ValueError,
        "temperature must be positive.*got 0",
    ),
    "covariance of other shapes": (
        lambda: logit_covariance(LOGITS, LOGITS[:2]),
        ValueError,
        "logits_old must have the shape of logits_new",
    ),
    "second derivative": (
        lambda: second_derivative(),
        RuntimeError,
        "second derivative",
    ),
    "controls of a plug-in as a list": (
        lambda: make_controls(["clip_cov"]),
        TypeError,
        r"controls must be a mapping of names to knobs, got \['clip_cov'\]",
    ),
    "knobs of a plug-in's control as a number": (
        lambda: make_controls({"clip_cov": 0.1}),
        TypeError,
        "controls: the knobs of clip_cov must be a mapping, got 0.1",
    ),
    "no token under the mask": (
        lambda: policy_loss(tokens([False, False])),
        ValueError,
        "loss_mask must have a True token",
    ),
    "no token under the mask, selection": (
        lambda: token_covariance(torch.zeros(2), torch.zeros(2), torch.zeros(2, dtype=torch.bool)),
        ValueError,
        "mask must have a True token on at least one rank",
    ),
    "NaN advantage": (
        lambda: policy_loss(tokens([True, True], advantage=torch.tensor([1.0, torch.nan]))),
        ValueError,
        "advantage.*finite",
    ),
    "NaN log-probability in a selection": (
        lambda: select(
            [make_control("kl_cov")],
            [tokens([True, True], logprob=torch.full((2,), torch.nan), token_id=torch.arange(2))],
            step=0,
            config=PolicyLossConfig(),
        ),
        ValueError,
        "must be finite",
    ),
    "a field that the control needs": (
        lambda: policy_loss(tokens([True]), controls=[make_control("entropy_bonus", entropy_coef=0.1)]),
        ValueError,
        r"tokens\.entropy must be given",
    ),
    "percent for fraction, KL-Cov": (
        lambda: make_control("kl_cov", kl_cov_ratio=20),
        ValueError,
        "kl_cov_ratio.*20.*not a percent",
    ),
    "law of too few points": (
        lambda: fit_law([0.5] * 7, [0.5] * 7),
        ValueError,
        "entropy must have at least 8 points for a fit, got 7",
    ),
    "law of a flat entropy": (lambda: fit_law([0.5] * 9, [0.5] * 9), ValueError, "entropy must vary for a fit"),
    "unknown control": (lambda: make_control("clip_cow"), ValueError, "control name must be one of .*got 'clip_cow'"),
}


def second_derivative() -> None:
    logits = LOGITS.clone().requires_grad_()
    (grad,) = torch.autograd.grad(token_stats(logits, TARGET).entropy.sum(), logits, create_graph=True)
    grad.square().sum().backward()


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_call(name):
    call, error, message = BAD_CALLS[name]
    with pytest.raises(error, match=message):
        call()


def test_nan_logits_stay_in_their_row():
    """Not an error of the op: it may not read values on an accelerator. The loss and the trainer stop at the NaN."""
    stats = token_stats(with_row(1, torch.nan), TARGET, clamp_p=0.3, moments=True)
    for value in stats:
        assert value.isnan().tolist() == [False, True, False]
    with pytest.raises(ValueError, match="logprob.*finite"):
        policy_loss(tokens([True] * 3, logprob=stats.logprob))


@pytest.mark.parametrize(
    "other, message",
    [
        ({"temperature": 2.0}, "temperature"),
        ({"clamp_p": 0.3}, "same outputs .moments, clamp."),
        ({"vocab_size": 15}, "vocab_size|vocabulary"),
        ({"target": torch.tensor([1, 2, 4])}, "target"),
        ({"logits": LOGITS.bfloat16()}, "dtype"),
        ({"logits": LOGITS[:2], "target": TARGET[:2]}, "number of tokens|T ="),
    ],
)
def test_ranks_that_call_differently(monkeypatch, other, message):
    ranks = ThreadRanks(2, monkeypatch)

    def call(rank):
        arguments = {"logits": LOGITS, "target": TARGET} | (other if rank == 1 else {})
        with pytest.raises(RuntimeError, match=message) as error:
            token_stats(arguments.pop("logits"), arguments.pop("target"), group=ranks, **arguments)
        return str(error.value)

    ranks.run(call)  # both ranks get the error


def test_corrupt_checkpoint(tmp_path):
    save_checkpoint(tmp_path, 1, {"model": lambda path: path.write_bytes(bytes(1000))}, {"x": 1}, keep=2)
    save_checkpoint(tmp_path, 2, {"model": lambda path: path.write_bytes(bytes(1000))}, {"x": 2}, keep=2)
    (tmp_path / "step_2" / "model").write_bytes(bytes(999) + b"x")
    with pytest.raises(CheckpointError, match=r"step_2/model is not what was written.*Step 1 is intact"):
        load_latest(tmp_path)


@pytest.mark.parametrize(
    "row, message",
    [
        ("{", "line 2: .*JSON"),
        ("[1]", "line 2: "),
        (json.dumps({"data_source": "x", "reward_model": REWARD, "prompt": "text"}), "line 2: prompt"),
        (json.dumps({"data_source": "x", "reward_model": REWARD, "prompt": [{"role": "user"}]}), "line 2: prompt"),
        (json.dumps({"data_source": "x", "prompt": [{"role": "user", "content": "q"}]}), "line 2: reward_model"),
    ],
)
def test_malformed_dataset_row(tmp_path, row, message):
    good = {"data_source": "x", "prompt": [{"role": "user", "content": "q"}], "reward_model": REWARD}
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(good) + "\n" + row + "\n")
    with pytest.raises(ValueError, match=r"rows\.jsonl: 1 malformed rows:\n  " + message):
        load_rows(path)


def test_full_disk(tmp_path, monkeypatch):
    with RunLogger(tmp_path, tensorboard=False) as logger:
        logger.log(1, {"x": 1.0})
        with monkeypatch.context() as full:

            def write(fd, data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

            full.setattr(os, "write", write)
            with pytest.raises(OSError, match=r"disk full: cannot write .*metrics\.jsonl; step 2 is not recorded"):
                logger.log(2, {"x": 2.0})
        logger.log(3, {"x": 3.0})
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 3]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Folder with a recipe, a file that is none, and an empty folder."""
    base = tmp_path_factory.mktemp("bad")
    short = {"steps": 0, "warm_start.steps": 1, "eval.prompts": 1, "eval.samples": 1}  # of what is not refused
    (base / "recipe.yaml").write_text(yaml.safe_dump(recipe(base / "run", **short)))
    (base / "file.txt").write_text("no recipe")
    (base / "folder").mkdir()
    return base


@pytest.fixture(scope="module")
def finished(place):
    """The folder of a finished run, beside the recipe."""
    run = place / "finished"
    tiny = recipe(run, steps=0, **{"warm_start.steps": 1, "eval.prompts": 1, "eval.samples": 1})
    train(parse_config(tiny), display=False)
    return run


def refused(arguments: list[str], words: tuple[str, ...], capsys, main=main) -> str:
    """Runs a command line that must end with code 2 and a short message; what it says on stderr."""
    try:
        code = main(arguments)
    except SystemExit as exit:  # argparse's
        code = exit.code
    said = capsys.readouterr()
    assert code == 2, said.err
    assert said.out == "" and "Traceback" not in said.err
    lines = said.err.strip().splitlines()
    if lines[0].startswith("usage"):
        lines = lines[-1:]
    assert len(lines) == 1 or len(said.err) < 1000 and len(lines) <= 12, said.err
    without_folders = re.sub(r"/\S+/", "", lines[0])  # how long a test's own folder is named depends on the machine
    assert len(lines) > 1 or len(without_folders) < 400, said.err
    for word in words:
        assert word in said.err
    return said.err


def tree(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*")}


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change[:60])
def test_a_bad_change_of_the_recipe(place, capsys, change):
    shutil.rmtree(place / "run", ignore_errors=True)  # of a change that was not refused
    before = tree(place)
    said = refused(["train", str(place / "recipe.yaml"), *change.split(" ")], CHANGES[change], capsys)
    key = change.split(" ")[-1].partition("=")[0].rpartition(".")[2]
    assert key[:60] in said
    assert tree(place) == before


def test_the_space_in_an_override_is_no_separator(place, capsys):
    refused(["train", str(place / "recipe.yaml"), "actor lr=1"], ("key=value",), capsys)


@pytest.mark.parametrize("name", RECIPES)
def test_a_bad_recipe_file(tmp_path, capsys, name):
    content, words = RECIPES[name]
    (tmp_path / "recipe.yaml").write_bytes(content)
    refused(["train", str(tmp_path / "recipe.yaml")], ("recipe.yaml", *words), capsys)
    assert list(tree(tmp_path)) == ["recipe.yaml"]


def test_a_recipe_that_may_not_be_read(place, capsys, monkeypatch):
    def refuse(self, **options):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))

    monkeypatch.setattr(Path, "read_text", refuse)
    words = ("recipe.yaml: cannot be read", "Permission denied")
    refused(["train", str(place / "recipe.yaml")], words, capsys)


@pytest.mark.parametrize("name", DATA)
def test_a_bad_data_file(tmp_path, capsys, name):
    file, content, words = DATA[name]
    path = tmp_path / file
    if content is not None:
        path.write_bytes(content)
    files = {"train_files": [str(path)], "val_files": [str(path)], "max_prompt_length": 16}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe(tmp_path / "run", data=files)))
    refused(["train", str(tmp_path / "recipe.yaml")], words, capsys)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("line", COMMANDS)
def test_a_bad_command_line(place, finished, capsys, monkeypatch, line):
    monkeypatch.chdir(place)
    names = {"recipe": "recipe.yaml", "run": "finished", "file": "file.txt", "folder": "folder", "big": BIG}
    before = tree(place)
    refused(shlex.split(line.format(**names)), COMMANDS[line], capsys)
    assert tree(place) == before


@pytest.mark.parametrize("damage", ["no config.json", "no JSON", "no weights", "a cut file", "a stub", "another kind"])
def test_a_bad_model_folder(finished, tmp_path, capsys, damage):
    model = tmp_path / "model"
    shutil.copytree(finished / "checkpoints" / "step_0" / "model", model)
    weights = model / "model.safetensors"
    if damage == "no config.json":
        (model / "config.json").unlink()
    elif damage == "no JSON":
        (model / "config.json").write_text("{")
    elif damage == "another kind":
        (model / "config.json").write_text('{"model_type": "clip"}')
    elif damage == "no weights":
        weights.unlink()
    elif damage == "a cut file":
        weights.write_bytes(weights.read_bytes()[:-9])
    else:
        weights.write_text("version https://git-lfs.github.com/spec/v1\n")
    changed = recipe(tmp_path / "run", model={"path": str(model), "tokenizer": "char"})
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(changed))
    refused(["train", str(tmp_path / "recipe.yaml")], ("model.path", str(model)), capsys)
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_that_torch_refuses_to_unpickle(finished, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    step = run / "checkpoints" / "step_0"
    torch.save({"loss": Fraction(1, 2)}, step / "state.pt")
    manifest = json.loads((step / "manifest.json").read_text())
    content = (step / "state.pt").read_bytes()
    manifest["files"]["state.pt"] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (step / "manifest.json").write_text(json.dumps(manifest))
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(yaml.safe_load((run / "config.yaml").read_text())))
    words = ("state.pt", "cannot be loaded safely")
    refused(["train", str(tmp_path / "recipe.yaml"), f"run_dir={run}", "steps=1", "--no-display"], words, capsys)


def test_a_run_folder_that_is_a_file(place, tmp_path, capsys):
    (tmp_path / "run").write_text("mine")
    arguments = ["train", str(place / "recipe.yaml"), f"run_dir={tmp_path / 'run'}"]
    refused(arguments, ("run_dir", "cannot be made", str(tmp_path / "run")), capsys)
    assert (tmp_path / "run").read_text() == "mine"


@pytest.mark.skipif(torch.cuda.is_available(), reason="the device is there")
def test_a_gpu_that_is_not_there(place, capsys):
    refused(
        ["train", str(place / "recipe.yaml"), "device=cuda"], ("device: torch finds 0 devices of type cuda",), capsys
    )


def test_yaml_that_nests_too_deep_ends_in_a_message(tmp_path):
    """It ended in a segmentation fault, so in a process of its own."""
    texts = "a: " + "[" * 100_000, "{a: " * 100_000, "\n".join(" " * level + "a:" for level in range(2000))
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.yaml").write_text(text)
    program = "from entcov.cli import main; print([main(['train', f'{number}.yaml']) for number in range(3)])"
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, env=PATHS)
    assert done.stdout == "[2, 2, 2]\n" and done.stderr.count("at most 20 levels") == 3 and len(done.stderr) < 400


def test_runs_of_one_name_are_all_plotted(tmp_path, capsys):
    for parent in ("a", "b"):
        with RunLogger(tmp_path / parent / "run", tensorboard=False) as logger:
            logger.log(1, {"actor/entropy": 1.0})
    seen = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("entcov.report.plots.plot_runs", lambda runs, out: seen.update(runs) or [])
        assert main(["plot", str(tmp_path / "a" / "run"), str(tmp_path / "b" / "run"), "--out", str(tmp_path)]) == 0
    assert list(seen) == [str(tmp_path / "a" / "run"), str(tmp_path / "b" / "run")]


MEGATRON = {
    "train {recipe} actor.lrr=1": ("error: rank 0: ", "did you mean actor.lr?"),
    "train {recipe} model.gradient_checkpointing=true": ("set megatron.recompute",),
    "train {recipe} device=cuda:99": ("device: torch finds", "got 'cuda:99'"),
    "train {folder}": ("is not a file",),
    "train {recipe} --speed": ("unrecognized arguments: --speed",),
    "eval {folder}": ("must be the folder of a run",),
    "eval {run} actor.lr=1": ("has no effect on an evaluation",),
    "eval {run} device=gpu": ("device: must be auto, cpu",),
}


@pytest.mark.filterwarnings("ignore:Unable to enable fault handler")
@pytest.mark.parametrize("line", MEGATRON)
def test_a_bad_command_line_of_megatron(place, finished, capsys, monkeypatch, line):
    pytest.importorskip("megatron.core")
    pytest.importorskip("mbridge")
    from megatron_integration.__main__ import main as megatron

    monkeypatch.chdir(place)
    names = {"recipe": "recipe.yaml", "run": "finished", "folder": "folder"}
    before = tree(place)
    refused(shlex.split(line.format(**names)), MEGATRON[line], capsys, megatron)
    assert tree(place) == before


def test_a_full_disk_under_megatron(tmp_path, monkeypatch):
    """Megatron-Core's error is no Exception: it passed by everything that reports one, and ended in a traceback."""
    pytest.importorskip("megatron.core")
    pytest.importorskip("mbridge")
    from torch.distributed.checkpoint.api import CheckpointException

    from megatron_integration import checkpoint as sharded
    from megatron_integration.node import PeerError

    failures = {0: (RuntimeError("Worker failure: [Errno 28] No space left on device"), None)}

    def refuse(state, folder):
        raise CheckpointException("write", failures)

    layout = SimpleNamespace(control=None, running=nullcontext)
    actor = SimpleNamespace(gather_parameters=lambda: None, groups=layout)
    monkeypatch.setattr(sharded.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(sharded.dist, "barrier", lambda group: None)
    monkeypatch.setattr(sharded, "_tree", lambda actor, is_loading: {})
    monkeypatch.setattr(sharded.dist_checkpointing, "save", refuse)
    writers = {"megatron": lambda path: sharded.save_sharded(actor, path)}
    with pytest.raises(CheckpointError, match="disk full: cannot write megatron of step 1"):
        save_checkpoint(tmp_path, 1, writers, {}, keep=1)
    failures.clear()  # as the ranks have it that do not coordinate
    with pytest.raises(PeerError, match="another rank could not write"):
        save_checkpoint(tmp_path, 1, writers, {}, keep=1)


def test_a_full_disk_under_safetensors(tmp_path):
    with (
        pytest.raises(OSError, match="cannot write .*model: .*No space left") as error,
        as_os_error(tmp_path / "model"),
    ):
        raise SafetensorError("I/O error: No space left on device (os error 28)")
    assert error.value.errno == errno.ENOSPC
