"""vLLM changes the process that it runs in, so its tests run in processes of their own, many in each."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest
import transformers

from entcov.rl.vllm.engine import configuration_folder
from tests.support.processes import run_command

ROOT = Path(__file__).parents[3]
if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed", allow_module_level=True)


def run(*arguments: str) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, *arguments]
    done = run_command(command, cwd=ROOT, env=environment, limit=1800)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-4000:]


@pytest.mark.parametrize("cases", ["vllm_cases.py vllm_run_cases.py", "vllm_server_cases.py"])
def test_in_a_process_of_its_own(cases):
    files = [f"tests/support/{name}" for name in cases.split()]
    run("-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", *files)


def test_one_engine_over_two_processes():
    torchrun = (
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "tests.support.vllm_ranks",
    )
    run(*torchrun)


def test_a_model_has_one_folder_for_every_start(tmp_path):
    """vLLM's compile cache is keyed by it."""
    model = transformers.Qwen2Config(hidden_size=16, architectures=None)
    folder = configuration_folder(model, tmp_path)
    assert folder == configuration_folder(transformers.Qwen2Config(hidden_size=16), tmp_path)
    assert folder != configuration_folder(transformers.Qwen2Config(hidden_size=32), tmp_path)
    assert transformers.AutoConfig.from_pretrained(folder).hidden_size == 16
    assert sorted(path.name for path in folder.iterdir()) == ["config.json"] and len(list(folder.parent.iterdir())) == 2
