"""The display: what a terminal, a pipe and a narrow window get to see."""

import io
import math

import pytest
from rich.console import Console

from entcov.rl.load_config import parse_config
from entcov.rl.loop import Loop
from entcov.rl.record.progress import PLAIN_SECONDS, Progress, RunsProgress, duration, sparkline
from tests.support.scripted_loop import Actor, Sampler, Stream, reward
from tests.support.tiny_run import recipe


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def metrics(step):
    return {
        "critic/score/mean": 0.3 + step / 200,
        "actor/entropy": math.exp(-step / 20),
        "actor/cov_mean": 0.0123,
        "actor/cov_p999": 4.31,
        "training/mismatch": 1.2e-7,
        "actor/ppo_kl": 3.1e-4,
        "actor/pg_clipfrac": 0.0123,
        "response_length/mean": 14.31,
        "perf/throughput": 5123.4,
        "actor/grad_norm": 0.432,
    }


def panel(width, enabled=True):
    console = Console(file=io.StringIO(), width=width, force_terminal=True, record=True)
    clock = Clock()
    progress = Progress(100, "tiny", enabled, console=console, clock=clock)
    for step in range(1, 41):
        clock.now += 2
        progress.update(step, metrics(step) | ({"val-core/sums/acc/mean@1": 0.61} if step == 20 else {}))
    return console, clock, progress


@pytest.mark.parametrize("width", [80, 111, 112, 160])
def test_live_panel_shows_everything_uncut(width):
    console, clock, progress = panel(width)
    progress.phase("rollout")
    clock.now += 3
    console.print(progress)
    text = console.export_text()
    for part in (
        *("tiny", "step 40/100", "1:23 gone, 1:57 left", "rollout  0:03", "reward", "0.500", "entropy", "0.135 nats"),
        *(
            "0.0123 / 4.31",
            "0.00031 / 0.012",
            "1.2e-07 nats",
            "14.3 tokens",
            "0.432",
            "5,123",
            "held-out accuracy",
            "0.610",
        ),
        *(sparkline([metrics(s)[key] for s in range(1, 41)], 18) for key in ("actor/entropy", "critic/score/mean")),
    ):
        assert part in text, part
    assert "…" not in text and max(map(len, text.splitlines())) <= width


def test_metrics_of_the_recipe_s_own_methods_are_shown_by_name():
    """And none that every run has: a step of the loop without any control adds nothing to the display."""
    console, _, progress = panel(120)
    before = {name for name, _, _ in progress._cells()}
    small = {"rollout": {"prompts_per_step": 2, "group_size": 2}, "actor.updates_per_rollout": 1}
    config = parse_config(recipe("unused", **small))
    progress.update(41, Loop(config, Actor(), Sampler(), Stream(), [], reward).step())
    assert {name for name, _, _ in progress._cells()} == before
    own = {
        "actor/entropy_coef": 0.002,
        "prompts/p_easy": 0.5,
        "critic/shaping/overlong": -0.25,
        "prompts/temperature/max": 9,
    }
    progress.update(42, own | {f"actor/x_{n}": 1.0 for n in range(9)})
    shown = {name: value for name, value, _ in progress._cells() if name not in before}
    assert len(shown) == 8 and shown["entropy coef"] == "0.002" and "temperature/max" not in shown
    console.print(progress)
    assert "entropy coef" in console.export_text()


def test_warm_start_bar_ends_with_its_phase():
    console, _, progress = panel(80)
    progress.phase("warm start")
    progress.sub_bar(130, 400, "loss 0.412 nats")
    console.print(progress)
    assert "130/400  loss 0.412 nats" in console.export_text()
    progress.phase("rollout")
    console.print(progress)
    assert "130/400" not in console.export_text()


def test_terminal_gets_the_live_panel_and_a_pipe_does_not():
    terminal, pipe = (Console(file=io.StringIO(), width=80, force_terminal=flag) for flag in (True, False))
    for console in (terminal, pipe):
        with Progress(2, "tiny", console=console) as progress:
            progress.update(1, metrics(1))
            progress.update(2, metrics(2))
    assert (
        "╭─" in terminal.file.getvalue() and "\x1b[" in terminal.file.getvalue() and "done" in terminal.file.getvalue()
    )
    assert "╭─" not in pipe.file.getvalue() and "\x1b[" not in pipe.file.getvalue()


def test_plain_lines_come_at_a_modest_rate():
    console, clock = Console(file=io.StringIO(), width=40, force_terminal=False), Clock()
    with Progress(1000, "tiny", console=console, clock=clock) as progress:
        for step in range(1, 1001):
            clock.now += 1
            progress.update(step, {"actor/entropy": 0.5} | ({"val-core/x/acc/mean@1": 1.0} if step == 777 else {}))
    lines = console.file.getvalue().splitlines()  # the width of a console does not fold them: logs are grepped
    assert lines[0] == "step 1/1000  entropy 0.500 nats"
    assert lines[1] == "step 11/1000  entropy 0.500 nats  left 16:29"
    assert any(line.startswith("step 777/1000") for line in lines)
    assert lines[-1].startswith("step 1000/1000") and "left" not in lines[-1]
    assert 1000 / PLAIN_SECONDS <= len(lines) <= 1000 / PLAIN_SECONDS + 4


def test_disabled_is_silent():
    console = Console(file=io.StringIO(), force_terminal=True)
    with Progress(1, "tiny", enabled=False, console=console) as progress:
        progress.phase("eval")
        progress.sub_bar(1, 1)
        progress.update(1, metrics(1))
    assert console.file.getvalue() == ""


def test_time_left_follows_the_recent_pace():
    clock = Clock()
    progress = Progress(100, "tiny", False, clock=clock)
    assert progress.seconds_left() is None
    for step in range(1, 51):
        clock.now += 10 if step <= 20 else 1
        progress.update(step, {})
    assert progress.seconds_left() == 50
    clock.now += 5
    assert progress.seconds_left() == 45
    clock.now += 500
    assert progress.seconds_left() == 0


def test_nan_metrics_do_not_break_the_display():
    console, _, progress = panel(80)
    for step in range(41, 81):
        progress.update(step, {"actor/entropy": math.nan, "critic/score/mean": math.inf})
    console.print(progress)
    text = console.export_text()
    assert "nan nats" in text and "·" in text


@pytest.mark.parametrize("width", [80, 120])
def test_runs_side_by_side(width):
    console = Console(file=io.StringIO(), width=width, force_terminal=True, record=True)
    runs = RunsProgress(["none seed 0", "clip_cov seed 0", "kl_cov seed 0"], 100, console=console)
    runs.state("none seed 0", "running")
    runs.metrics("none seed 0", [{"step": s, **metrics(s)} for s in range(1, 31)])
    runs.state("clip_cov seed 0", "failed (exit 1)")
    console.print(runs)
    text = console.export_text()
    assert "30/100" in text and "0.223" in text and "0.450" in text and "failed (exit 1)" in text
    assert text.count("waiting") == 1 and "…" not in text


def test_runs_on_a_pipe():
    console = Console(file=io.StringIO(), force_terminal=False)
    with RunsProgress(["a", "b"], console=console) as runs:
        runs.state("a", "running")
        runs.state("a", "finished in 0:10")
        runs.state("b", "failed (exit 1)")
    assert console.file.getvalue().splitlines() == [
        "[0/2] a: running",
        "[1/2] a: finished in 0:10",
        "[2/2] b: failed (exit 1)",
    ]


def test_sparkline_and_duration_by_hand():
    assert sparkline([], 5) == ""
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8) == "▁▂▃▄▅▆▇█"
    assert sparkline([0, 0, 7, 7], 2) == "▁█"
    assert sparkline([3.0, 3.0], 8) == "▄▄"
    assert sparkline([math.nan, 1.0, 2.0, math.nan], 4) == "·▁█·"
    assert [duration(s) for s in (0, 59.9, 61, 3600, 7325)] == ["0:00", "0:59", "1:01", "1:00:00", "2:02:05"]


def test_a_warning_where_entropy_will_be_gone_before_the_last_step():
    """Once in a plain log, for as long as it holds in the panel; a step whose entropy does not fall takes it back."""
    law = {"law/ceiling": 0.493, "law/entropy_left": 0.234}
    console = Console(file=io.StringIO(), width=100, record=True)
    progress = Progress(100, "tiny", console=console, clock=Clock())
    with progress:
        progress.update(20, metrics(20) | law | {"law/gone_step": 100.2})
        assert progress.warning() is None
        for step in (21, 22):
            progress.update(step, metrics(step) | law | {"law/gone_step": 61.4})
        text = "entropy will be gone at about step 61 of 100; 23% of what the run began with is left"
        assert progress.warning() == text
        panel = Console(file=io.StringIO(), width=100, record=True)
        panel.print(progress)
        shown = panel.export_text()
        assert f"warning: {text}" in shown and "ceiling of the law" in shown and "0.493" in shown
        progress.update(23, metrics(23) | law)
        assert progress.warning() is None
        progress.update(70, metrics(70) | law | {"law/gone_step": 61.4})
        assert progress.warning().startswith("entropy was gone at about step 61 of 100")
    printed = console.export_text()
    assert printed.count("warning: ") == 2 and printed.count(f"warning: {text}") == 1
