"""The display of a run: a live panel on a terminal, a plain line every ten seconds or more elsewhere."""

import math
import time
from collections.abc import Callable, Sequence
from typing import Self

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from entcov.rl.threads import no_thread, say

_SPARKS = "▁▂▃▄▅▆▇█"
# Metrics of every run. What else is under _OF_METHODS comes from the controls and other methods of the recipe.
_OF_EVERY_RUN = frozenset(
    f"actor/{name}"
    for name in (
        "cov_max", "cov_mean", "cov_p999", "cov_top_0.0002", "cov_top_0.002", "cov_top_0.02", "cov_top_0.2",
        "cov_top_0.5", "entropy", "entropy_change", "entropy_change_error", "entropy_change_predicted", "entropy_drift",
        "entropy_response_mean", "grad_norm", "loss", "lr", "mismatch", "pg_clipfrac", "pg_clipfrac_lower", "pg_loss",
        "ppo_kl", "sampled_entropy",
    )
)  # fmt: skip
_OF_METHODS = ("actor/", "critic/shaping/", "prompts/", "reward_model/", "training/dropped_", "training/rejected_")
_MOST_OF_METHODS = 8
PLAIN_SECONDS = 10.0  # a plain log gets at most a line per so many seconds, besides evaluations, first and last step


class _Display:
    """A context manager that shows itself live on a terminal, else lets its methods print plain lines."""

    def __init__(self, enabled: bool | str, console: Console | None):
        self._console = console or Console()
        live = enabled is True or (enabled == "auto" and self._console.is_terminal)
        self._plain = enabled == "auto" and not live
        self._live = Live(self, console=self._console, refresh_per_second=4) if live else None

    def __enter__(self) -> Self:
        try:
            if self._live:
                self._live.start()
        except RuntimeError as error:
            if not no_thread(error):
                raise
            self._live.stop()
            self._live, self._plain = None, True
            say(f"{error}: no live display, plain lines instead")
        return self

    def __exit__(self, *exc: object) -> None:
        if self._live:
            self._live.stop()


class Progress(_Display):
    """Shows the steps of one run. A context manager; every method may be called at any time inside it.

    Args:
        total_steps: steps of the whole run, also when it is resumed in the middle.
        run_name: title of the display.
        enabled: "auto" shows the live panel on a terminal and plain lines elsewhere; True the live panel always; False
            nothing.
        console: where to write; a new one on stdout if None.
        clock: seconds, for the time left.
    """

    def __init__(
        self,
        total_steps: int,
        run_name: str,
        enabled: bool | str = "auto",
        *,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(enabled, console)
        self.total_steps, self.run_name = total_steps, run_name
        self._clock = clock
        self._started = clock()
        self._step, self._phase, self._phase_since = 0, "starting", self._started
        self._sub: tuple[int, int, str] | None = None
        self._steps_seen: list[tuple[float, int]] = []  # (time, step) at the ends of steps
        self._last: dict[str, float] = {}
        self._history: dict[str, list[float]] = {}
        self._last_line = -math.inf
        self._warned = False

    def __exit__(self, *exc: object) -> None:
        self._phase = "stopped" if exc[0] is not None else "done"
        self._sub = None
        super().__exit__(*exc)

    def phase(self, name: str) -> None:
        """Name the current phase: "rollout", "update", "eval", ...; ends the sub-bar of the phase before."""
        self._phase, self._phase_since, self._sub = name, self._clock(), None

    def sub_bar(self, done: int, total: int, text: str = "") -> None:
        """Progress inside the current phase, e.g. a warm start; `text` says how it goes."""
        self._sub = (done, total, text)
        self._line(f"{self._phase} {done}/{total}  {text}", force=done == total)

    def update(self, step: int, metrics: dict[str, float]) -> None:
        """Step `step` has ended with `metrics` (verl's names); metrics that it does not have keep their last value."""
        self._step, self._sub = step, None
        self._steps_seen.append((self._clock(), step))
        self._last.pop("law/gone_step", None)  # absent where entropy does not fall
        self._last.update(metrics)
        for key in ("critic/score/mean", "actor/entropy"):
            if key in metrics:
                self._history.setdefault(key, []).append(metrics[key])
        evaluated = any(key.startswith("val-core/") for key in metrics)
        text = "  ".join(f"{name} {value}" for name, value, _ in self._cells())
        self._line(f"step {step}/{self.total_steps}  {text}", force=evaluated or step in (1, self.total_steps))
        warned, self._warned = self._warned, self.warning() is not None
        if self._warned and not warned:
            self._line(f"warning: {self.warning()}", force=True)

    def warning(self) -> str | None:
        """That the run's entropy will be gone before its last step (entcov.law.entropy_lasts); None: it is not so."""
        gone, left = self._last.get("law/gone_step", math.inf), self._last.get("law/entropy_left", math.nan)
        if not gone < self.total_steps:
            return None
        when = f"was gone at about step {gone:.0f}" if gone <= self._step else f"will be gone at about step {gone:.0f}"
        return f"entropy {when} of {self.total_steps}; {left:.0%} of what the run began with is left"

    def seconds_left(self) -> float | None:
        """From the mean duration of the last 20 steps; None before two have ended."""
        recent = self._steps_seen[-21:]
        if len(recent) < 2 or recent[-1][1] == recent[0][1]:
            return None
        rate = (recent[-1][0] - recent[0][0]) / (recent[-1][1] - recent[0][1])
        return max(0.0, rate * (self.total_steps - self._step) - (self._clock() - recent[-1][0]))

    def _line(self, text: str, *, force: bool) -> None:
        now = self._clock()
        if self._plain and (force or now - self._last_line >= PLAIN_SECONDS):
            left = self.seconds_left()
            suffix = "" if left is None or self._step >= self.total_steps else f"  left {duration(left)}"
            self._console.print(text.rstrip() + suffix, highlight=False, markup=False, soft_wrap=True)
            self._last_line = now

    def _cells(self) -> list[tuple[str, str, str]]:
        """(name, value with unit, sparkline) of every number there is, in reading order."""
        last = self._last

        def show(*keys: str, digits: str = ".3f") -> str | None:
            values = [format(last[key], digits) for key in keys if key in last]
            return " / ".join(values) if values else None

        def spark(key: str) -> str:
            return sparkline(self._history.get(key, []), width=18)

        evaluated = sorted(key for key in last if key.startswith("val-core/"))
        accuracy = [key for key in evaluated if "/acc/mean@" in key]
        held_out = f"{sum(last[key] for key in accuracy) / len(accuracy):.3f}" if accuracy else None
        rows = [
            ("reward", show("critic/score/mean"), spark("critic/score/mean")),
            ("entropy", _unit(show("actor/entropy"), "nats"), spark("actor/entropy")),
            ("held-out accuracy", held_out, ""),
            ("ceiling of the law", show("law/ceiling"), ""),
            ("covariance mean / p99.9", show("actor/cov_mean", "actor/cov_p999", digits=".3g"), ""),
            ("kl / clip fraction", show("actor/ppo_kl", "actor/pg_clipfrac", digits=".2g"), ""),
            ("mismatch", _unit(show("training/mismatch", digits=".2g"), "nats"), ""),
            ("response length", _unit(show("response_length/mean", digits=".1f"), "tokens"), ""),
            ("gradient norm", show("actor/grad_norm", digits=".3g"), ""),
            ("tokens/s", show("perf/throughput", digits=",.0f"), ""),
        ]
        own = [key for key in sorted(last) if key.startswith(_OF_METHODS) and not key.endswith(("/max", "/min"))]
        own = [key for key in own if key not in _OF_EVERY_RUN]
        rows += [(_short(key), show(key, digits=".3g"), "") for key in own[:_MOST_OF_METHODS]]
        return [(name, value, curve) for name, value, curve in rows if value is not None]

    def __rich__(self) -> Panel:
        """The live panel; rich calls this at every refresh."""
        now = self._clock()
        head = Table.grid(padding=(0, 1), expand=True)
        head.add_column(ratio=1)
        head.add_column(justify="right", no_wrap=True)
        left = self.seconds_left()
        times = f"{duration(now - self._started)} gone" + ("" if left is None else f", {duration(left)} left")
        head.add_row(
            ProgressBar(total=max(1, self.total_steps), completed=self._step),
            Text(f"step {self._step}/{self.total_steps}  {times}"),
        )
        parts: list[object] = [head]
        if self._sub is not None:
            done, total, text = self._sub
            sub = Table.grid(padding=(0, 1), expand=True)
            sub.add_column(no_wrap=True)
            sub.add_column(ratio=1)
            sub.add_column(justify="right", no_wrap=True)
            sub.add_row(
                Text(self._phase, style="cyan"),
                ProgressBar(total=max(1, total), completed=done, complete_style="cyan"),
                Text(f"{done}/{total}  {text}".rstrip()),
            )
            parts.append(sub)
        else:
            parts.append(Text(f"{self._phase}  {duration(now - self._phase_since)}", style="cyan"))
        if (warning := self.warning()) is not None:
            parts.append(Text(f"warning: {warning}", style="yellow"))
        cells = self._cells()
        if cells:
            # Two columns where the terminal is wide enough for them, else one.
            columns = 2 if self._console.width >= 112 else 1
            table = Table.grid(padding=(0, 1), expand=False)
            for _ in range(columns):
                table.add_column(style="dim", no_wrap=True)
                table.add_column(no_wrap=True, min_width=20 if columns == 2 else 0)
                table.add_column(style="green", no_wrap=True, min_width=2)
            per_column = -(-len(cells) // columns)
            for row in range(per_column):
                line = [cells[i] for i in range(row, len(cells), per_column)]
                table.add_row(*(text for cell in line for text in cell))
            parts += [Text(), table]
        return Panel(Group(*parts), title=Text(self.run_name, style="bold"), title_align="left", border_style="dim")


class RunsProgress(_Display):
    """Shows several runs at once: a bar, entropy, reward and state of each.

    Args:
        labels: the runs, in the order of display.
        total_steps: steps of each; None if unknown, and then steps are counted without a bar's end.
        enabled, console: as for `Progress`.
    """

    def __init__(
        self,
        labels: Sequence[str],
        total_steps: int | None = None,
        enabled: bool | str = "auto",
        *,
        console: Console | None = None,
    ) -> None:
        super().__init__(enabled, console)
        self._total = total_steps
        self._rows: dict[str, tuple[str, list[dict[str, float]]]] = {label: ("waiting", []) for label in labels}

    def state(self, label: str, state: str) -> None:
        """Say what run `label` is doing: "running", "finished in 1:20", "failed", ..."""
        self._rows[label] = (state, self._rows[label][1])
        if self._plain:
            done = sum(not s.startswith(("waiting", "running")) for s, _ in self._rows.values())
            self._console.print(f"[{done}/{len(self._rows)}] {label}: {state}", highlight=False, markup=False)

    def metrics(self, label: str, rows: list[dict[str, float]]) -> None:
        """All metrics that run `label` has logged so far."""
        self._rows[label] = (self._rows[label][0], rows)

    def __rich__(self) -> Table:
        wide = self._console.width >= 110
        spark = 14 if wide else 6
        table = Table(box=None, pad_edge=False, header_style="dim")
        table.add_column("run", no_wrap=True)
        table.add_column("step", justify="right", no_wrap=True)
        table.add_column("")
        for name in ("entropy, nats" if wide else "nats", "reward"):
            table.add_column(name, justify="right", no_wrap=True)
            table.add_column("", no_wrap=True)
        table.add_column("state", no_wrap=True)
        for label, (state, rows) in self._rows.items():
            step = int(rows[-1]["step"]) if rows else 0
            cells = []
            for key in ("actor/entropy", "critic/score/mean"):
                values = [row[key] for row in rows if key in row]
                cells += [f"{values[-1]:.3f}" if values else "", Text(sparkline(values, width=spark), style="green")]
            steps = f"{step}/{self._total}" if self._total else str(step)
            bar = ProgressBar(total=self._total, completed=step, width=spark) if self._total else ""
            style = "red" if state.startswith("failed") else "cyan" if state.startswith("running") else "dim"
            table.add_row(label, steps, bar, *cells, Text(state, style=style))
        return table


class PartsProgress(_Display):
    """Shows how many parts of a long work are done, the last ones, and the time left.

    Args:
        total: how many there are.
        enabled, console: as for `Progress`.
    """

    _SHOWN = 5

    def __init__(self, total: int, enabled: bool | str = "auto", *, console: Console | None = None) -> None:
        super().__init__(enabled, console)
        self._total, self._done, self._before, self._started = total, 0, 0, time.monotonic()
        self._last: list[str] = []

    def stored(self, count: int) -> None:
        """So many were done by an earlier call."""
        self._done += count
        self._before += count
        if count and self._plain:
            self._console.print(f"[{self._done}/{self._total}] {count} were done before", highlight=False)

    def done(self, label: str, seconds: float) -> None:
        """One more is done, and took so long."""
        self._done += 1
        self._last = [*self._last, f"{label}: {duration(seconds)}"][-self._SHOWN :]
        if self._plain:
            self._console.print(f"[{self._done}/{self._total}] {self._last[-1]}", highlight=False, markup=False)

    def seconds_left(self) -> float | None:
        """At the pace of this call; None before its first part."""
        own = self._done - self._before
        return (time.monotonic() - self._started) * (self._total - self._done) / own if own else None

    def __rich__(self) -> Group:
        left = self.seconds_left()
        table = Table.grid(padding=(0, 1))
        bar = ProgressBar(total=self._total, completed=self._done, width=40)
        table.add_row(bar, f"{self._done} of {self._total}", "" if left is None else f"{duration(left)} left")
        return Group(table, *(Text(line, style="dim") for line in self._last))


def sparkline(values: Sequence[float], width: int) -> str:
    """The series as at most `width` block characters, each the mean of a stretch; NaN is a dot."""
    values = list(values)
    if not values:
        return ""
    count = min(width, len(values))
    edges = [round(i * len(values) / count) for i in range(count + 1)]
    means = [_finite_mean(values[a:b]) for a, b in zip(edges, edges[1:], strict=False)]
    finite = [mean for mean in means if math.isfinite(mean)]
    if not finite:
        return "·" * count
    low, span = min(finite), max(finite) - min(finite)
    # A flat series sits in the middle: at the bottom it would look like a series of zeros.
    level = (lambda mean: round((mean - low) / span * (len(_SPARKS) - 1))) if span > 0 else (lambda mean: 3)
    return "".join(_SPARKS[level(mean)] if math.isfinite(mean) else "·" for mean in means)


def duration(seconds: float) -> str:
    """Seconds as m:ss, or h:mm:ss from an hour on."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _finite_mean(values: Sequence[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan


def _short(key: str) -> str:
    """A metric's name for the display: actor/entropy_coef is entropy coef."""
    return key.partition("/")[2].removesuffix("/mean").replace("_", " ")


def _unit(text: str | None, unit: str) -> str | None:
    return None if text is None else f"{text} {unit}"
