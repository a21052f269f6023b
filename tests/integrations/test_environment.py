"""The environment of a trainer (scripts/setup.sh verl | trl): the versions that are stated, and this clone's entcov."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import torch

import entcov

ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ.get("ENTCOV_ENVIRONMENT")
OTHER = {"verl": "trl", "trl": "verl"}
in_environment = pytest.mark.skipif(ENVIRONMENT is None, reason="this is no environment of scripts/test_plugins.sh")


def stated(environment: str) -> dict[str, str]:
    lines = (ROOT / f"constraints-{environment}.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


def installed() -> dict[str, metadata.Distribution]:
    """By name. Of this environment's folder alone: ray puts another one on the path, with packages of its own."""
    found = metadata.distributions(path=[sysconfig.get_path("purelib")])
    return {re.sub(r"[-_.]+", "-", one.metadata["Name"]).lower(): one for one in found}


@in_environment
def test_what_is_installed_is_what_is_stated():
    found = {name: one.version.partition("+")[0] for name, one in installed().items() if name not in ("entcov", "pip")}
    if torch.version.cuda is None:
        assert found == stated(ENVIRONMENT)
    else:  # torch brings its libraries of CUDA
        assert found.items() >= stated(ENVIRONMENT).items()


@in_environment
def test_entcov_works_beside_the_trainer():
    importlib.import_module(ENVIRONMENT)
    assert importlib.util.find_spec(OTHER[ENVIRONMENT]) is None
    assert json.loads(installed()["entcov"].read_text("direct_url.json")) == {
        "url": ROOT.as_uri(), "dir_info": {"editable": True},
    }  # fmt: skip
    stats = entcov.token_stats(torch.tensor([[0.0, 0.0, float("-inf"), 0.0]]), torch.tensor([1]))
    torch.testing.assert_close(stats.entropy, torch.tensor([3.0]).log())


@pytest.mark.parametrize("environment", OTHER)
def test_the_stated_trainer_is_one_that_the_extra_allows(environment):
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert extras[environment][0] == f"{environment}>={stated(environment)[environment]}"


@pytest.mark.parametrize("environment", OTHER)
def test_all_environments_have_one_torch(environment):
    assert f"torch=={stated(environment)['torch']}" in (ROOT / "constraints.txt").read_text().splitlines()


@pytest.mark.parametrize("environment", [None, "verl"])
@pytest.mark.parametrize(
    "text",
    ["import pytest\npytest.importorskip('no_such_trainer')", "import pytest\n@pytest.mark.skip\ndef test(): pass"],
    ids=["file", "test"],
)
def test_a_skip_in_an_environment_of_a_trainer_is_a_failure(tmp_path, monkeypatch, environment, text):
    monkeypatch.delenv("ENTCOV_ENVIRONMENT", raising=False)
    if environment is not None:
        monkeypatch.setenv("ENTCOV_ENVIRONMENT", environment)
    shutil.copy(Path(__file__).parent / "conftest.py", tmp_path)
    (tmp_path / "test_one.py").write_text(f"{text}\n")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--rootdir", tmp_path, tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    if environment is None:
        assert done.returncode in (0, 5) and "1 skipped" in done.stdout
    else:
        assert done.returncode in (1, 2) and "skipped in the environment of verl" in done.stdout, done.stdout
