"""What the plug-ins share: bad controls are errors that name the argument, the rule and the value."""

from types import SimpleNamespace

import pytest

from entcov.integrations.plugin import Patches, check_signature, make_controls


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        (["clip_cov"], TypeError, r"controls must be a mapping of names to knobs, got \['clip_cov'\]"),
        ({"clip_cov": 0.1}, TypeError, "controls: the knobs of clip_cov must be a mapping, got 0.1"),
        ({"clip_cow": {}}, ValueError, "clip_cow"),
        ({"clip_cov": {"ratio": 0.1}}, ValueError, "control clip_cov has no knob 'ratio'"),
        ({"clip_cov": {"clip_cov_ratio": 2}}, ValueError, "clip_cov_ratio must be"),
    ],
)
def test_bad_controls(settings, error, message):
    with pytest.raises(error, match=message):
        make_controls(settings)


def test_knobs_may_be_left_out():
    assert [(c.name, c.clip_cov_ratio) for c in make_controls({"clip_cov": None})] == [("clip_cov", 0.0002)]


def test_patches_come_off_in_reverse_once_and_after_an_error():
    owner, names = SimpleNamespace(f=1), {"g": 2}
    with pytest.raises(ZeroDivisionError):
        with Patches() as patches:
            assert patches.replace(owner, "f", 3) == 1
            assert patches.replace(owner, "f", 4) == 3
            assert patches.replace(names, "g", 5) == 2
            assert (owner.f, names["g"]) == (4, 5)
            _ = 1 / 0
    assert (owner.f, names["g"]) == (1, 2)
    owner.f = 6
    patches.remove()
    assert owner.f == 6


def test_a_signature_may_have_more_parameters():
    module = SimpleNamespace(__name__="trainer", step=lambda a, b, c=0: None)
    assert check_signature(module, "step", ["b", "a"], "1.0") is module.step
    with pytest.raises(RuntimeError, match=r"trainer.step must have the parameters d, as in .*\(1.0\); it has a, b, c"):
        check_signature(module, "step", ["a", "d"], "1.0")
