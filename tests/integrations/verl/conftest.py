"""The tests of the verl plug-in run in their own environment: where verl is not installed, none is collected."""

from importlib.util import find_spec

import pytest

if find_spec("verl") is None:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """The folder of a tiny Qwen2, and this process a group of one rank."""
    from tests.integrations.verl import worker

    worker.start()
    return worker.tiny_model(str(tmp_path_factory.mktemp("qwen2")))
