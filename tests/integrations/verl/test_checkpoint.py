"""The controls' state in verl's checkpoints: a resumed run continues bit for bit."""

import json
import os

import pytest
import torch

pytest.importorskip("verl")

from tests.integrations.verl.cases import CONTROLS
from tests.integrations.verl.worker import make_worker, parameters, policy_loss_config, rollout, score, train

ADAPTIVE = ["entropic", "adaptive_bonus", "aent", "positive_advantage_reweighting", "clip_cov"]


def step(worker, number):
    batch = rollout(seed=number)
    score(worker, batch, moved=0.1)
    return train(worker, batch, epochs=2)


def worker_of(model, *names, **keys):
    return make_worker(
        model, policy_loss=policy_loss_config({"controls": {name: CONTROLS[name] for name in names}}), **keys
    )


@pytest.mark.parametrize("name", ADAPTIVE)
def test_a_resumed_run_continues_bit_for_bit(model, tmp_path, name):
    folder = str(tmp_path / "global_step_1" / "actor")
    straight = worker_of(model, name)
    step(straight, 0)
    straight.save_checkpoint(folder, global_step=1)
    expected = step(straight, 1)

    resumed = worker_of(model, name)
    resumed.load_checkpoint(folder)
    found = step(resumed, 1)
    assert torch.equal(parameters(resumed), parameters(straight))
    ours = {key: value for key, value in expected.items() if key.startswith("entcov/")}
    assert ours == {key: found[key] for key in ours}
    assert resumed.engine.training.state_dict() == straight.engine.training.state_dict()
    assert resumed.engine.training.step == 2
    assert os.listdir(folder).count("entcov.json") == 1 and not [n for n in os.listdir(folder) if "entcov.json." in n]


@pytest.fixture(scope="module")
def stored(model, tmp_path_factory):
    """A checkpoint of aent after one step."""
    folder = tmp_path_factory.mktemp("stored")
    worker = worker_of(model, "aent")
    step(worker, 0)
    worker.save_checkpoint(str(folder))
    return folder


def test_what_is_stored(stored):
    state = json.loads((stored / "entcov.json").read_text())
    assert state["step"] == 1 and state["loss"]["updates"] == 2
    assert state["loss"]["controls"][0] == {"name": "aent", "state": {"coef": state_of(state)["coef"], "steps": 1}}


def state_of(state):
    return state["loss"]["controls"][0]["state"]


def test_a_checkpoint_of_other_controls_or_without_state_is_refused(model, stored, tmp_path):
    with pytest.raises(ValueError, match=r"entcov.json: state must be that of the controls \['clip_b'"):
        worker_of(model, "clip_b").load_checkpoint(str(stored))
    plain = make_worker(model)
    plain.save_checkpoint(str(tmp_path / "plain"))
    assert not (tmp_path / "plain" / "entcov.json").exists()
    with pytest.raises(FileNotFoundError, match="was written without a loss mode of entcov"):
        worker_of(model, "aent").load_checkpoint(str(tmp_path / "plain"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "must hold JSON"),
        ("{}", "must hold step and loss"),
        ('{"step": -1, "loss": {}}', "step must be at least 0, got -1"),
        ('{"step": 1, "loss": {"updates": 2, "controls": [{"name": "aent"}]}}', "entcov.json"),
    ],
)
def test_a_damaged_state_is_refused(model, stored, text, message):
    path = stored / "entcov.json"
    good = path.read_text()
    try:
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            worker_of(model, "aent").load_checkpoint(str(stored))
    finally:
        path.write_text(good)


def test_a_run_without_entcov_ignores_the_state(model, stored):
    make_worker(model).load_checkpoint(str(stored))
