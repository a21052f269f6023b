"""`python -m entcov check`: compares every public function with its float64 oracle on this machine; prints a table."""

import platform
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TextIO

import torch
from torch import Tensor

from entcov.ops.core import isa
from entcov.stats.linear_token_stats import linear_token_stats
from entcov.stats.logit_covariance import logit_covariance
from entcov.stats.token_stats import TokenStats, token_stats
from entcov.verify import reference
from entcov.verify.row_kinds import KINDS, gradient_bound, make_rows, value_bound

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHAPES = ((6, 7), (4, 1000), (2, 151936))
CLAMP_P = 0.3
TEMPERATURE = 0.7


@dataclass(frozen=True)
class CheckRow:
    """One line: the worst error of one output over one tensor, and the share of its bound that it uses."""

    op: str
    output: str
    shape: tuple[int, int]
    dtype: str
    kind: str
    max_abs: float
    max_rel: float
    used: float  # max of error / bound; the line passes up to 1

    @property
    def passed(self) -> bool:
        return self.used <= 1.0  # False for NaN

    def cells(self) -> list[str]:
        shape, verdict = "x".join(map(str, self.shape)), "PASS" if self.passed else "FAIL"
        errors = [f"{self.max_abs:.1e}", f"{self.max_rel:.1e}", f"{self.used:.3f}"]
        return [self.op, self.output, shape, self.dtype, self.kind, *errors, verdict]


HEADER = ["op", "output", "shape", "dtype", "rows", "max abs", "max rel", "of bound", ""]


def _compare(name: str, got: Tensor, expected: Tensor, bound: Tensor) -> tuple[float, float, float]:
    same = got.double() == expected  # infinities agree, and 0 / 0 is no error
    error = torch.where(same, 0.0, (got.double() - expected).abs())
    relative = torch.where(same, 0.0, error / expected.abs().clamp(min=1e-300))
    return tuple(float(x.max()) if x.numel() else 0.0 for x in (error, relative, error / bound))


def _check_token_stats(
    logits: Tensor, seed: int, function: Callable[..., TokenStats] | None = None
) -> Iterable[tuple[str, Tensor, Tensor, Tensor]]:
    """(output, got, expected, bound), values first, then the gradient of each."""
    rng = torch.Generator().manual_seed(seed)
    T, V = logits.shape
    # Every second target is the likeliest token: the digits of a peaked row show there.
    target = torch.randint(0, V, (T,), generator=rng)
    target[::2] = logits[::2].float().argmax(-1)
    got_leaf, expected_leaf = logits.clone().requires_grad_(), logits.double().requires_grad_()
    target = torch.where(logits.gather(1, target[:, None])[:, 0] == -torch.inf, logits.float().argmax(-1), target)
    settings = {"temperature": TEMPERATURE, "clamp_p": CLAMP_P}
    got = (function or token_stats)(got_leaf, target, moments=True, **settings)
    expected = reference.token_stats(expected_leaf, target, **settings)
    for name, value in expected.items():
        yield name, getattr(got, name).detach(), value.detach(), value_bound(name, value.detach())
    # One output at a time: mixed, their gradients could cancel and leave nothing to measure.
    log_p = reference.log_probs(logits, TEMPERATURE)
    kept = reference.clamp_weights(logits, reference.kept_count(V, CLAMP_P, None))
    log_kept = log_p.masked_fill(kept == 0, -torch.inf).log_softmax(-1)
    terms = {
        "logprob": log_p.exp() + torch.nn.functional.one_hot(target, V),
        "entropy": entropy_terms(log_p),
        "clamped_entropy": entropy_terms(log_kept),
    }
    yield from _check_gradients(got, expected, got_leaf, expected_leaf, terms, rng)


def _check_linear_token_stats(logits: Tensor, seed: int) -> Iterable[tuple[str, Tensor, Tensor, Tensor]]:
    """As `_check_token_stats`, in two chunks. The hidden states are the rows of the unit matrix, so the products are
    exact and the logits are the columns of the weight. Rows with -inf are left out: 0 * -inf is NaN."""
    if not logits.isfinite().all():
        return
    unit = torch.eye(len(logits), dtype=logits.dtype)

    def head(leaf: Tensor, target: Tensor, **settings) -> TokenStats:
        return linear_token_stats(unit, leaf.t(), target, chunk_size=max(len(unit) // 2, 1), **settings)

    yield from _check_token_stats(logits, seed, head)


def entropy_terms(log_p: Tensor) -> Tensor:
    """p_j (|log p_j| + H): what the two terms of an entropy's gradient add up to in size."""
    size = reference.where_possible(log_p, log_p).abs()
    return log_p.exp() * (size + reference.entropy_of(log_p)[:, None])


def _check_gradients(got, expected: dict, got_leaf, expected_leaf, terms: dict[str, Tensor], rng):
    for name, size in terms.items():
        weight = torch.rand(len(size), generator=rng) + 0.5
        (grad,) = torch.autograd.grad(getattr(got, name), got_leaf, weight, retain_graph=True)
        (wanted,) = torch.autograd.grad(expected[name], expected_leaf, weight.double(), retain_graph=True)
        yield f"d {name}", grad, wanted, gradient_bound(wanted, size * weight[:, None] / TEMPERATURE, grad.dtype)


def _check_logit_covariance(logits: Tensor, seed: int) -> Iterable[tuple[str, Tensor, Tensor, Tensor]]:
    rng = torch.Generator().manual_seed(seed)
    new = (logits.float() + 0.25 * torch.randn(logits.shape, generator=rng)).to(logits.dtype)
    got_leaf, expected_leaf = new.clone().requires_grad_(), new.double().requires_grad_()
    got = logit_covariance(logits, got_leaf, temperature=TEMPERATURE)
    expected = reference.logit_covariance(logits, expected_leaf, temperature=TEMPERATURE)
    for name, value in expected.items():
        yield name, getattr(got, name).detach(), value.detach(), value_bound(name, value.detach())
    old, after = (reference.log_probs(z, TEMPERATURE) for z in (logits, new))
    terms = {"covariance": entropy_terms(old), "entropy_change": entropy_terms(after), "kl": old.exp() + after.exp()}
    yield from _check_gradients(got, expected, got_leaf, expected_leaf, terms, rng)


CHECKS = {
    "token_stats": _check_token_stats,
    "linear_token_stats": _check_linear_token_stats,
    "logit_covariance": _check_logit_covariance,
}


def check_rows(
    shapes: Iterable[tuple[int, int]] = SHAPES,
    dtypes: Iterable[str] = tuple(DTYPES),
    kinds: Iterable[str] = tuple(KINDS),
    ops: Iterable[str] = tuple(CHECKS),
) -> Iterable[CheckRow]:
    """Runs the checks of these public functions and yields their lines."""
    for op in ops:
        for shape in shapes:
            for dtype in dtypes:
                for kind in kinds:
                    logits = make_rows(kind, *shape, DTYPES[dtype])
                    for output, got, expected, bound in CHECKS[op](logits, seed=1):
                        yield CheckRow(op, output, shape, dtype, kind, *_compare(output, got, expected, bound))


def run_check(*, verbose: bool = False, file: TextIO | None = None, **selection) -> int:
    """Prints the table and returns an exit code: 0 if every line passes, 1 if not.

    Args:
        verbose: print every line; otherwise each op's output once, with its worst line.
        file: where to print; default standard output.
        selection: shapes, dtypes, kinds, ops, as for `check_rows`.
    """
    file = file or sys.stdout
    rows = list(check_rows(**selection))
    failed = [row for row in rows if not row.passed]
    shown = rows
    if not verbose:
        worst: dict[tuple[str, str], CheckRow] = {}
        for row in rows:
            known = worst.get((row.op, row.output))
            if known is None or not row.used <= known.used:
                worst[row.op, row.output] = row
        shown = [row for key, row in worst.items()] + [row for row in failed if row not in worst.values()]
    print(f"entcov on {platform.machine()}, {isa()} kernels, torch {torch.__version__}, "
          f"{torch.get_num_threads()} threads; errors against float64", file=file)  # fmt: skip
    _print_table(HEADER, [row.cells() for row in shown], file)
    note = "" if verbose else "; the worst of each output is shown"
    print(f"{len(rows)} checks, {len(failed)} failed{note}", file=file)
    return 1 if failed else 0


def _print_table(header: list[str], rows: list[list[str]], file: TextIO) -> None:
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
        for cells in (header, *rows):
            print("  ".join(cell.ljust(w) for cell, w in zip(cells, widths, strict=True)).rstrip(), file=file)
        return
    table = Table(box=None, pad_edge=False)
    for name in header:
        table.add_column(name, no_wrap=True)
    for cells in rows:
        table.add_row(*cells, style=None if cells[-1] == "PASS" else "bold red")
    Console(file=file, width=None if file.isatty() else 200).print(table)
