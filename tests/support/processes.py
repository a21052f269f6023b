"""Commands that tests run in processes of their own.

LIMIT ends a test that hangs and measures nothing: no machine, however busy, may reach it. A command that does reach it
fails the test with what it printed and with the Python stacks of its processes.
"""

import os
import signal
import subprocess
import tempfile
from collections.abc import Sequence

import psutil

LIMIT = 600.0  # seconds


def run_command(command: Sequence[object], *, limit: float = LIMIT, **options) -> subprocess.CompletedProcess:
    """subprocess.run(command, **options) with the texts of stdout and stderr; AssertionError after `limit` seconds."""
    environment = {**options.pop("env", os.environ), "PYTHONFAULTHANDLER": "1"}  # prints the stacks at SIGABRT
    words = [str(word) for word in command]
    # Files, not pipes: a process that outlives its parent would keep a pipe open.
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(words, stdout=out, stderr=err, text=True, env=environment, **options)
        late = False
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            late = True
        finally:
            if process.poll() is None:
                _end(process)
        out.seek(0), err.seek(0)
        done = subprocess.CompletedProcess(words, process.returncode, out.read(), err.read())
    if late:
        raise AssertionError(f"{words} ran for more than {limit} s\n{done.stdout[-4000:]}\n{done.stderr[-16000:]}")
    return done


def _end(process: subprocess.Popen) -> None:
    """Ends a process and its descendants, which torchrun puts into sessions of their own; one by one, so that their
    stacks do not mix."""
    first = psutil.Process(process.pid)
    for one in [first, *first.children(recursive=True)]:
        for how in (signal.SIGABRT, signal.SIGKILL):
            try:
                one.send_signal(how)
                one.wait(5)
            except psutil.NoSuchProcess:
                break
            except psutil.TimeoutExpired:
                continue
    process.wait()
