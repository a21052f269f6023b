"""Checkpoints: exact contents, real kills at every file operation and at random moments, damage, a full disk."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import OrderedDict

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from entcov.rl.record.checkpoint import CheckpointError, list_steps, load_checkpoint, load_latest, save_checkpoint
from tests.support.fused_adam import FusedAdam
from tests.support.recorded_disk import flip_bit


def content(step):
    """Weights and state that only this step has."""
    generator = torch.Generator().manual_seed(step)
    weights = {"w": torch.randn(64, 33, generator=generator), "b": torch.randn(5, generator=generator).bfloat16()}
    state = {
        "step": step,
        "optimizer": {"state": {0: {"exp_avg": torch.randn(7, generator=generator)}}, "param_groups": [{"lr": 1e-3}]},
        "rng": {"torch": generator.get_state(), "python": random.Random(step).getstate()},
        "controls": [OrderedDict(coef=0.1 * step), None, "clip_cov", b"\0", (1, 2.5)],
    }
    return weights, state


def save(directory, step, keep=2):
    weights, state = content(step)

    def tokenizer(path):  # a writer that leaves a folder, as save_pretrained does
        (path / "deep").mkdir(parents=True)
        (path / "deep" / "vocab.json").write_text(json.dumps({"step": step}))

    return save_checkpoint(
        directory,
        step,
        {"model.safetensors": lambda path: save_file(weights, path), "tokenizer": tokenizer},
        state,
        keep,
    )


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and type(a) is type(b) and all(map(equal, a, b))
    return a == b


def assert_is(checkpoint, step):
    weights, state = content(step)
    assert checkpoint.step == step
    assert equal(load_file(checkpoint.file("model.safetensors")), weights)
    assert json.loads((checkpoint.file("tokenizer") / "deep" / "vocab.json").read_text()) == {"step": step}
    assert equal(checkpoint.state, state)


def leftovers(directory):
    return [path.name for path in directory.iterdir() if path.name.startswith((".tmp", ".old"))]


def test_round_trip_and_keep(tmp_path):
    assert load_latest(tmp_path) is None and load_latest(tmp_path / "absent") is None
    for step in (0, 10, 20, 30):
        assert save(tmp_path, step, keep=2) == tmp_path / f"step_{step}"
        assert_is(load_latest(tmp_path), step)
    assert list_steps(tmp_path) == [20, 30]
    assert_is(load_checkpoint(tmp_path / "step_20"), 20)
    with pytest.raises(CheckpointError, match="has no entry 'critic'"):
        load_latest(tmp_path).file("critic")


def test_going_back_keeps_what_latest_names(tmp_path):
    """After a return to step 10 the next checkpoint is older than stored ones, and must not be the one removed."""
    for step in (10, 20, 30):
        save(tmp_path, step, keep=3)
    save(tmp_path, 11, keep=1)
    assert_is(load_latest(tmp_path), 11)
    assert list_steps(tmp_path) == [11, 20, 30]


def test_same_step_is_replaced(tmp_path):
    save_checkpoint(tmp_path, 5, {}, {"try": 1}, keep=1)
    save_checkpoint(tmp_path, 5, {}, {"try": 2}, keep=1)
    assert load_latest(tmp_path).state == {"try": 2}
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "latest", "step_5"]


def test_a_checkpoint_that_was_about_to_be_replaced_is_put_back(tmp_path):
    """Killed between the two renames: the old one has lost its name, and the new one has not got it."""
    save(tmp_path, 5)
    (tmp_path / "step_5").rename(tmp_path / ".old_step_5.4711")
    (tmp_path / ".tmp_step_5.4711").mkdir()
    assert_is(load_latest(tmp_path), 5)
    assert not leftovers(tmp_path)


def run_in_child(action, before):
    """Fork, run `before` then `action` in the child, and return its wait status: torch is not imported once more."""
    pid = os.fork()
    if pid:
        return os.waitpid(pid, 0)[1]
    code = 1
    try:
        before()
        action()
        code = 0
    finally:
        os._exit(code)


@pytest.mark.parametrize("step", [20, 30], ids=["same step again", "next step"])
def test_kill_before_every_file_operation(tmp_path, step):
    """Every open, mkdir, rename and remove of a save is hit once by SIGKILL; an audit event announces each."""
    operation, status = 0, -1
    while status != 0:
        directory = tmp_path / str(operation)
        save(directory, 10, keep=2)
        save(directory, 20, keep=2)
        seen = 0

        def kill_at_operation(event, args, directory=str(directory), operation=operation):
            nonlocal seen
            if event.partition(".")[0] in ("open", "os", "shutil") and any(directory in str(arg) for arg in args):
                seen += 1
                if seen > operation:
                    os.kill(os.getpid(), signal.SIGKILL)

        def install(hook=kill_at_operation):
            sys.addaudithook(hook)

        status = run_in_child(lambda directory=directory: save(directory, step, keep=2), install)
        assert status == 0 or os.WTERMSIG(status) == signal.SIGKILL
        checkpoint = load_latest(directory)
        assert checkpoint.step in (20, step) and (status or checkpoint.step == step)
        assert_is(checkpoint, checkpoint.step)
        assert not leftovers(directory)
        for stored in list_steps(directory):  # no half-removed or half-written directory carries a checkpoint's name
            load_checkpoint(directory / f"step_{stored}")
        save(directory, 40, keep=1)
        assert list_steps(directory) == [40] and not leftovers(directory)
        operation += 1
    assert operation > 20


def test_kill_9_at_random_moments(tmp_path):
    """A process that does nothing but checkpoint is killed 40 times; each time the next one continues where it was.

    It is killed some way into a checkpoint, after 0 to 2 whole ones: the moment follows the machine's own pace.
    """
    draw, last, kept = random.Random(0), -1, 0
    began = time.monotonic()
    save(tmp_path / "pace", 0)
    pace = time.monotonic() - began  # seconds a checkpoint takes here

    def loop(report):
        step = last
        while True:
            step += 1
            save(tmp_path / "run", step, keep=2)
            os.write(report, b".")

    for _ in range(40):
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                loop(writer)
            finally:
                os._exit(1)
        os.close(writer)
        for _ in range(draw.randrange(3)):
            kept += len(os.read(reader, 1))
        time.sleep(draw.uniform(0, 1.2 * pace))
        os.kill(pid, signal.SIGKILL)
        assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
        os.close(reader)
        checkpoint = load_latest(tmp_path / "run")
        if checkpoint is not None:
            assert checkpoint.step >= last
            assert_is(checkpoint, checkpoint.step)
            last = checkpoint.step
        assert last + 1 >= kept  # a checkpoint that was reported as written is never lost
        assert not leftovers(tmp_path / "run")
    assert kept > 20  # the process was making progress


def test_leftovers_of_a_process_that_is_writing_are_left_alone(tmp_path):
    save(tmp_path, 1)
    (tmp_path / ".tmp_step_2.77").mkdir()
    program = f"""
import fcntl, sys
file = open({str(tmp_path / ".lock")!r}, "r+")
fcntl.lockf(file, fcntl.LOCK_EX)
print("locked", flush=True)
sys.stdin.read()
"""
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout.readline() == b"locked\n"
        assert_is(load_latest(tmp_path), 1)
        assert leftovers(tmp_path) == [".tmp_step_2.77"]
    assert_is(load_latest(tmp_path), 1)
    assert leftovers(tmp_path) == []


def test_pointer_missing_after_the_very_first_checkpoint(tmp_path):
    save(tmp_path, 10)
    (tmp_path / "latest").unlink()
    assert_is(load_latest(tmp_path), 10)


@pytest.mark.parametrize(
    "file, damage, message",
    [
        ("model.safetensors", flip_bit, r"the content of .*model\.safetensors is not what was written"),
        ("state.pt", lambda path: os.truncate(path, 100), r"state\.pt has 100 bytes instead of \d+"),
        ("tokenizer/deep/vocab.json", os.unlink, r"tokenizer/deep/vocab\.json is missing"),
        ("manifest.json", os.unlink, r"manifest\.json cannot be read"),
        ("manifest.json", lambda path: path.write_text("[]"), r"manifest\.json is not a manifest"),
        ("manifest.json", lambda path: os.truncate(path, 50), r"manifest\.json is not a manifest"),
        (
            "manifest.json",
            lambda path: path.write_text(path.read_text().replace('"step": 30', '"step": 29')),
            r"manifest\.json says step 29",
        ),
    ],
)
def test_damage_is_named_and_the_way_back_is_told(tmp_path, file, damage, message):
    for step in (10, 20, 30):
        save(tmp_path, step, keep=3)
    damage(tmp_path / "step_30" / file)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_latest(tmp_path)
    assert f"Step 20 is intact: to go back to it, --resume {tmp_path / 'step_20'}" in str(caught.value)
    assert_is(load_checkpoint(tmp_path / "step_20"), 20)

    flip_bit(tmp_path / "step_20" / "state.pt")
    with pytest.raises(CheckpointError, match="Step 10 is intact"):
        load_latest(tmp_path)
    flip_bit(tmp_path / "step_10" / "state.pt")
    with pytest.raises(CheckpointError, match="No earlier step in .* is intact"):
        load_latest(tmp_path)


def test_missing_directory_pointer_and_version(tmp_path):
    save(tmp_path, 10)
    (tmp_path / "latest").write_text("step_11\n")
    with pytest.raises(CheckpointError, match=r"step_11 is missing\. Step 10 is intact"):
        load_latest(tmp_path)
    (tmp_path / "latest").write_text("../elsewhere\n")
    with pytest.raises(CheckpointError, match=r"latest is damaged: it must name a checkpoint .* got '\.\./elsewhere'"):
        load_latest(tmp_path)
    with pytest.raises(ValueError, match="is named step_N, got"):
        load_checkpoint(tmp_path)
    manifest = tmp_path / "step_10" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"format_version": 1', '"format_version": 9'))
    with pytest.raises(CheckpointError, match="format version 9, and this version of entcov reads 1"):
        load_checkpoint(tmp_path / "step_10")


def test_state_that_a_safe_load_would_refuse(tmp_path):
    with pytest.raises(TypeError, match=r"state\['rng'\]\[1\] has type numpy.ndarray"):
        save_checkpoint(tmp_path, 1, {}, {"rng": ["MT19937", np.zeros(3)]}, keep=1)
    with pytest.raises(TypeError, match=r"state\['lr'\] has type numpy.float64"):
        save_checkpoint(tmp_path, 1, {}, {"lr": np.float64(1)}, keep=1)
    assert load_latest(tmp_path) is None


def test_a_failing_writer_leaves_the_earlier_checkpoint(tmp_path):
    save(tmp_path, 1)

    def broken(path):
        path.write_text("half")
        raise KeyError("a bug in the writer")

    with pytest.raises(KeyError, match="a bug in the writer"):
        save_checkpoint(tmp_path, 2, {"model": broken}, {}, keep=1)
    with pytest.raises(CheckpointError, match="writer of 'model' returned and wrote nothing"):
        save_checkpoint(tmp_path, 2, {"model": lambda path: None}, {}, keep=1)
    assert list_steps(tmp_path) == [1] and not leftovers(tmp_path)
    assert_is(load_latest(tmp_path), 1)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 512 KiB, where this user may mount one."""
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", tmp_path], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"mounting a small tmpfs is not permitted here: {mounted.stderr.strip()}")
    yield tmp_path
    subprocess.run(["umount", tmp_path], check=True)


@pytest.mark.parametrize("who", ["model.safetensors", "state.pt", "plain.bin"])
def test_full_disk(small_disk, who):
    """torch, safetensors and plain files each report a full disk in their own words; the user reads one."""
    save(small_disk, 1)
    big = torch.zeros(1 << 18)
    writers = {
        "model.safetensors": {"model.safetensors": lambda path: save_file({"w": big}, path)},
        "plain.bin": {"plain.bin": lambda path: path.write_bytes(bytes(1 << 20))},
        "state.pt": {},
    }[who]
    with pytest.raises(CheckpointError, match=rf"disk full: cannot write {who} of step 2 in .* are intact"):
        save_checkpoint(small_disk, 2, writers, {"big": big} if who == "state.pt" else {}, keep=1)
    assert not leftovers(small_disk)
    assert_is(load_latest(small_disk), 1)
    save(small_disk, 3)
    assert_is(load_latest(small_disk), 3)


def test_full_disk_seen_by_a_process_with_a_file_size_limit(tmp_path):
    """Where no file system can be mounted, RLIMIT_FSIZE makes the kernel refuse just as really."""
    save(tmp_path, 1)
    program = f"""
import resource, torch
from entcov.rl.record.checkpoint import save_checkpoint
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
save_checkpoint({str(tmp_path)!r}, 2, {{"plain.bin": lambda path: path.write_bytes(bytes(1 << 20))}}, {{}}, keep=1)
"""
    child = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "CheckpointError: disk full: cannot write plain.bin of step 2" in child.stderr
    assert not leftovers(tmp_path)
    assert_is(load_latest(tmp_path), 1)


@pytest.mark.parametrize("master_weights", [False, True])
def test_what_transformer_engines_adam_saves_is_stored_and_goes_on(tmp_path, master_weights):
    """Its layout: a step a group and none a parameter, master weights, numbers of Python's own types."""

    def start():
        weights = [torch.nn.Parameter(torch.ones(3, 2, dtype=torch.bfloat16)), torch.nn.Parameter(torch.ones(4))]
        groups = [{"params": weights, "wd_mult": 1.0, "is_expert_parallel": False}, {"params": []}]
        return weights, FusedAdam(groups, lr=0.1, weight_decay=0.01, master_weights=master_weights)

    def update(weights, optimizer, seed):
        for weight in weights:
            weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed)).to(weight.dtype)
        optimizer.step()

    weights, optimizer = start()
    for seed in (0, 1):
        update(weights, optimizer, seed)
    state = {"name": "fused", "optimizer": optimizer.state_dict(), "weights": [w.detach() for w in weights]}
    save_checkpoint(tmp_path, 2, {}, state, keep=1)
    stored = load_latest(tmp_path).state
    assert [group["step"] for group in stored["optimizer"]["param_groups"]] == [2, 2]
    names = {"exp_avg", "exp_avg_sq", *(["master_param"] if master_weights else [])}
    assert all(set(own) == names for own in stored["optimizer"]["state"].values())
    others, resumed = start()
    with torch.no_grad():
        for weight, value in zip(others, stored["weights"], strict=True):
            weight.copy_(value)
    resumed.load_state_dict(stored["optimizer"])
    update(weights, optimizer, 2)
    update(others, resumed, 2)
    assert all(map(torch.equal, weights, others))
