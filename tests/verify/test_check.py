"""`python -m entcov check`: passes on this build, fails when an op is wrong, with or without rich."""

import builtins
import io

import torch

from entcov.verify import check
from entcov.verify.check import run_check

SMALL = {"shapes": [(3, 9)], "dtypes": ["float32", "bfloat16"], "kinds": ["gaussian", "ties", "-inf columns"]}


def text_of(**options):
    file = io.StringIO()
    code = run_check(file=file, **{**SMALL, **options})
    return code, file.getvalue()


def test_passes_and_shows_the_worst_line_of_every_output():
    code, text = text_of()
    assert code == 0 and "FAIL" not in text and "0 failed" in text
    for output in ("logprob", "entropy", "clamped_entropy", "collision", "d entropy", "kl", "d covariance"):
        assert text.count(f" {output} ") >= 1, output
    # Values and gradients of token_stats, linear_token_stats and logit_covariance.
    assert text.count("PASS") == (6 + 3) + (6 + 3) + (4 + 3)
    # dtypes x kinds; a head makes no rows with -inf
    assert text_of(verbose=True)[1].count("PASS") == 9 * 2 * 3 + 9 * 2 * 2 + 7 * 2 * 3


def test_plain_text_without_rich(monkeypatch):
    real = builtins.__import__

    def without_rich(name, *args, **kwargs):
        if name.split(".")[0] == "rich":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_rich)
    code, text = text_of()
    assert code == 0
    header = next(line for line in text.splitlines() if line.startswith("op "))
    assert header.split() == ["op", "output", "shape", "dtype", "rows", "max", "abs", "max", "rel", "of", "bound"]
    assert "PASS" in text


def test_a_wrong_op_fails(monkeypatch):
    real = check.token_stats

    def slightly_hot(logits, target, *, temperature, **rest):
        return real(logits, target, temperature=1.0003 * temperature, **rest)

    monkeypatch.setattr(check, "token_stats", slightly_hot)
    code, text = text_of()
    assert code == 1 and "FAIL" in text


def test_a_nan_fails(monkeypatch):
    real = check.token_stats

    def broken(logits, target, **rest):
        out = real(logits, target, **rest)
        return out._replace(entropy=out.entropy * torch.nan)

    monkeypatch.setattr(check, "token_stats", broken)
    assert text_of()[0] == 1
