"""The sandbox: hostile programs and answers leave no trace, earn nothing, and do not touch what comes after them."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from entcov.rl.sandbox import Budget, IsolationError, SandboxPool, isolation, pool, programs, run_program
from entcov.rl.sandbox.cores import free_cores

needs_isolation = pytest.mark.skipif(bool(isolation.missing()), reason=f"this system lacks {isolation.missing()}")
LIMIT = 60  # seconds until a wait that should end at once fails the test


# ---- hostile programs ----------------------------------------------------------------------------------------------

# What each tries, and whether the traces that the tests look for appear when the same program runs without a sandbox.
# CANARY is a folder, SECRET a file, PORT and SOCKET listen, VICTIM is a process, all of the same user.
TRACES = {
    "a shell command": "import os; os.system('touch CANARY/x')",
    "a subprocess": "import subprocess; subprocess.run(['touch', 'CANARY/x'])",
    "exec": "import os; os.execv('/bin/touch', ['touch', 'CANARY/x'])",
    "posix_spawn": "import os; os.waitpid(os.posix_spawn('/bin/touch', ['touch', 'CANARY/x'], {}), 0)",
    "fork": "import os\npid = os.fork()\nif pid == 0: open('CANARY/x', 'w').close(); os._exit(0)\nos.waitpid(pid, 0)",
    "C's system": "import ctypes; ctypes.CDLL(None).system(b'touch CANARY/x')",
    "C's fopen": "import ctypes; ctypes.CDLL(None).fopen(b'CANARY/x', b'w')",
    "a new file": "open('CANARY/x', 'w')",
    "a file in /tmp": "import tempfile; print(tempfile.NamedTemporaryFile(dir='CANARY', delete=False).name)",
    "appending": "open('SECRET', 'a').write('more')",
    "truncating by opening": "import os; os.open('SECRET', os.O_RDONLY | os.O_TRUNC)",
    "truncating": "import os; os.truncate('SECRET', 0)",
    "deleting": "import os; os.unlink('SECRET')",
    "renaming": "import os; os.rename('SECRET', 'SECRET.old')",
    "a symbolic link": "import os; os.symlink('/etc', 'CANARY/x')",
    "a hard link": "import os; os.link('SECRET', 'CANARY/x')",
    "a folder": "import os; os.mkdir('CANARY/x')",
    "a FIFO": "import os; os.mkfifo('CANARY/x')",
    "permissions": "import os; os.chmod('SECRET', 0o777)",
    "times": "import os; os.utime('SECRET', (1, 1))",
    "extended attributes": "import os; os.setxattr('SECRET', 'user.x', b'1'); os.utime('SECRET', (1, 1))",
    "reading a file": "print(open('SECRET').read())",
    "reading a file through C": "import ctypes\nb = ctypes.create_string_buffer(99)\nc = ctypes.CDLL(None)\n"
    "c.read(c.open(b'SECRET', 0), b, 99)\nprint(b.value.decode())",
    "listing a folder": "import os; print(os.listdir('FOLDER'))",
    "the accounts": "print(open('/etc/passwd').read())",
    "the environment of the parent": "import os; print(open(f'/proc/{os.getppid()}/environ').read())",
    "the environment": "import os; print(dict(os.environ))",
    "the memory of the parent": "import os; open(f'/proc/{os.getppid()}/mem', 'r+b'); open('CANARY/x', 'w')",
    "the kernel's list of processes": "import os\n"
    "for p in os.listdir('/proc'):\n    if p == 'VICTIM': print(open(f'/proc/{p}/cmdline').read())",
    "a connection": "import socket; socket.create_connection(('127.0.0.1', PORT))",
    "a Unix connection": "import socket; socket.socket(socket.AF_UNIX).connect('SOCKET')",
    "an abstract Unix connection": "import socket; socket.socket(socket.AF_UNIX).connect('\\0ABSTRACT')",
    "a connection through C": "import ctypes, socket\nc = ctypes.CDLL(None)\ns = c.socket(2, 1, 0)\n"
    "socket.socket(fileno=s).connect(('127.0.0.1', PORT))",
    "killing another process": "import os; os.kill(VICTIM, 9)",
    "stopping another process": "import os; os.kill(VICTIM, 19)",
    "a signal through a pipe's owner": "import fcntl, os, signal\nr, w = os.pipe()\n"
    "fcntl.fcntl(r, fcntl.F_SETOWN, VICTIM)\nfcntl.fcntl(r, 10, signal.SIGKILL)\n"
    "fcntl.fcntl(r, fcntl.F_SETFL, os.O_ASYNC)\nos.write(w, b'x')",
    "tracing another process": "import ctypes; ctypes.CDLL(None).ptrace(16, VICTIM, 0, 0) == 0 and "
    "ctypes.CDLL(None).kill(VICTIM, 9)",
    "limits of another process": "import resource; resource.prlimit(VICTIM, resource.RLIMIT_CPU, (0, 0)); "
    "__import__('os').kill(VICTIM, 9)",
    "killing from a thread": "import os, threading\n"
    "t = threading.Thread(target=os.kill, args=(VICTIM, 9))\nt.start()\nt.join()",
}  # fmt: skip

# Programs that would disturb the machine or the sandbox rather than leave a trace, and how they must end: the limit
# that ends them, or their exit status (None: any).
DISTURBANCES = {
    "an endless loop": ("while True: pass", "time"),
    "an endless loop in C": ("9 ** 9 ** 9", None),  # never returns to the interpreter, unless memory ends it
    "no time limit": ("import signal; signal.setitimer(signal.ITIMER_REAL, 0, 0)\nwhile True: pass", "time"),
    "no signals": ("import signal; signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))\nwhile True: pass", "time"),
    "sleeping": ("import time; time.sleep(1000)", "time"),
    "closing every file and going on": ("import os; os.closerange(0, 999)\nwhile True: pass", "time"),
    "waiting for input": ("import os\nr, w = os.pipe()\nos.read(r, 1)", "time"),
    "stopping itself": ("import os, signal; os.kill(os.getpid(), signal.SIGSTOP)", 1),
    "killing its group": ("import os, signal; os.killpg(0, signal.SIGKILL)", 1),
    "killing its parent": ("import os, signal; os.kill(os.getppid(), signal.SIGKILL)", 1),
    "killing everything": ("import os, signal; os.kill(-1, signal.SIGKILL)", 1),
    "a fork bomb": ("import os\nwhile True: os.fork()", 1),
    "a fork bomb of threads' making": (
        "import os, threading\nfor _ in range(5): threading.Thread(target=os.fork).start()", 0,
    ),
    "a thread bomb": (
        "import threading, time\nthreading.stack_size(1 << 16)\n"
        "while True: threading.Thread(target=time.sleep, args=(99,), daemon=True).start()",
        "threads",
    ),
    "a memory bomb": ("x = bytearray(1 << 40)", 1),
    "a growing memory bomb": ("import mmap\nx = []\nwhile True: x.append(mmap.mmap(-1, 1 << 26))", 1),
    "a mapped memory bomb": ("import mmap; mmap.mmap(-1, 1 << 40)", 1),
    "open files without end": ("x = [open('/dev/null') for _ in range(10000)]", 1),
    "output without end": ("while True: print('x' * 10000)", "output"),
    "output without end on the error pipe": ("import os\nfor _ in range(1000): os.write(2, b'x' * 100000)", 0),
    "writing to every file it has": (
        "import os\nfor f in range(3, 99):\n    try: os.write(f, b'{\"nonce\": 1, \"score\": 1}\\n')\n"
        "    except OSError: pass", 0,
    ),
    "writing to its own input": ("import os\nos.write(0, b'x')", 1),
    "reading the worker's request pipe": ("import os\nprint(os.read(0, 99))", 0),
    "the files of its parent": ("import os; open(f'/proc/{os.getppid()}/fd/1', 'w')", 1),
    "its own files by name": ("open('/proc/self/fd/1', 'w')", 1),
    "raising its limits": ("import resource; resource.setrlimit(resource.RLIMIT_CPU, (999, 999))", 1),
    "a namespace": ("import ctypes; print(ctypes.CDLL(None).unshare(0x10000000))", 0),
    "changing the root": ("import os; os.chroot('/')", 1),
    "a session of its own": ("import os; os.setsid()", 1),
    "another user": ("import os; os.setuid(65534)", 1),
    "an end without clean-up": ("import os; os._exit(0)", 0),
    "a crash": ("import ctypes; ctypes.string_at(0)", -signal.SIGSEGV),
    "deep recursion": ("import sys; sys.setrecursionlimit(10**9)\ndef f(): return f()\nf()", None),
    "deep recursion in C": (
        "import sys; sys.setrecursionlimit(10**9)\nx = None\nfor _ in range(10**5): x = [x]\nrepr(x)", None,
    ),
    "breaking the interpreter's modules": ("import sys, os\nsys.modules.clear()\nos._exit = os.write = print", 0),
    "breaking the built-ins": ("import builtins\nbuiltins.__dict__.clear()", None),
    "a trace function": ("import sys, os\nsys.settrace(lambda *a: os._exit(7))\ndef f(): pass\nf()", 7),
    "an exit handler": ("import atexit, time; atexit.register(time.sleep, 1000)", 0),
    "source that does not parse": ("def", 1),
    "source with a NUL": ("print(1)\0", 1),
    "source that nests": ("(" * 10000, 1),
    "surrogates": ("print('\ud800')", None),
}  # fmt: skip


@dataclass
class Surroundings:
    """What a hostile program could leave a trace in."""

    folder: Path
    victim: subprocess.Popen = field(init=False)

    def __post_init__(self) -> None:
        self.canary, self.secret = self.folder / "canary", self.folder / "home" / "secret"
        self.unix, self.abstract = self.folder / "socket", f"entcov-{os.getpid()}-{self.folder.name}"
        self.canary.mkdir()
        self.secret.parent.mkdir()
        self.listeners = [socket.create_server(("127.0.0.1", 0))]
        for address in (str(self.unix), f"\0{self.abstract}"):
            listener = socket.socket(socket.AF_UNIX)
            listener.bind(address)
            listener.listen()
            self.listeners.append(listener)
        for listener in self.listeners:
            listener.setblocking(False)
        self.restore()

    def restore(self) -> None:
        for left in [*self.canary.iterdir(), *self.secret.parent.iterdir()]:
            left.rmdir() if left.is_dir() and not left.is_symlink() else left.unlink()
        self.secret.write_text("the-secret-text")
        self.secret.chmod(0o600)
        self.before = self.state()
        self.victim = subprocess.Popen(["sleep", "1000"])

    def state(self) -> tuple:
        stat = self.secret.stat() if self.secret.exists() else None
        names = sorted(p.name for p in [*self.canary.iterdir(), *self.secret.parent.iterdir()])
        return names, stat and (stat.st_mode, stat.st_mtime_ns, stat.st_size, stat.st_nlink)

    def traces(self, output: str) -> list[str]:
        """What has changed, was connected to, or came out."""
        found = [] if self.state() == self.before else ["files"]
        for listener in self.listeners:
            try:
                listener.accept()[0].close()
                found.append("connection")
            except BlockingIOError:
                pass
        with open(f"/proc/{self.victim.pid}/stat") as file:
            if file.read().rsplit(")", 1)[1].split()[0] in "ZTt":
                found.append("process")
        # The secret, its name in a listing, /etc/passwd, this process's environment, and a command line.
        told = ("the-secret-text", "'secret'", "root:", "ENTCOV_TEST_TOKEN", "PATH=", "sleep")
        return found + [text for text in told if text in output]

    def fill_in(self, source: str) -> str:
        values = {
            "CANARY": self.canary, "SECRET": self.secret, "FOLDER": self.secret.parent, "SOCKET": self.unix,
            "ABSTRACT": self.abstract, "PORT": self.listeners[0].getsockname()[1], "VICTIM": self.victim.pid,
        }  # fmt: skip
        for name, value in values.items():
            source = source.replace(name, str(value))
        return source

    def close(self) -> None:
        self.victim.kill()
        self.victim.wait()
        for listener in self.listeners:
            listener.close()


@pytest.fixture
def surroundings(tmp_path, monkeypatch):
    monkeypatch.setenv("ENTCOV_TEST_TOKEN", "x")
    around = Surroundings(tmp_path)
    yield around
    around.close()


@needs_isolation
def test_programs_leave_no_trace(surroundings):
    for name, source in TRACES.items():
        done = run_program(surroundings.fill_in(source), limit=LIMIT)
        assert surroundings.traces(done.stdout) == [], (name, done)
        assert done.ended_by == "", (name, done)


def test_the_same_programs_leave_traces_without_a_sandbox(surroundings):
    """So the test above can fail."""
    silent = []
    for name, source in TRACES.items():
        command = [sys.executable, "-S", "-E", "-c", surroundings.fill_in(source)]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        if not surroundings.traces(done.stdout):
            silent.append(name)
        surroundings.victim.kill()
        surroundings.victim.wait()
        surroundings.restore()
    # Not every system lets a process read the memory of its parent, or trace another one. pytest-xdist writes its
    # workers' titles over the environment that /proc shows.
    may_be = {"the memory of the parent", "the environment of the parent", "tracing another process"}
    assert set(silent) <= {*may_be, "extended attributes"}


@needs_isolation
def test_disturbances_are_ended_and_the_next_program_runs(surroundings):
    for name, (source, end) in DISTURBANCES.items():
        done = run_program(source, limit=0.5 if end in ("time", None) else LIMIT)
        if isinstance(end, str):
            assert done.ended_by == end, (name, done)
        elif end is not None:
            assert (done.status, done.ended_by) == (end, ""), (name, done)
        assert len(done.stdout) <= 1 << 16 and "nonce" not in done.stdout, (name, done)
        assert run_program("print(6 * int(input()))", "7\n").stdout == "42\n", name
    assert surroundings.traces("") == []


@needs_isolation
def test_a_program_has_less_than_2_gib():
    for size, status in ((1 << 30, 0), (2 << 30, 1)):
        assert run_program(f"import mmap; mmap.mmap(-1, {size})", limit=LIMIT).status == status


@needs_isolation
def test_a_program_cannot_write_to_the_trainer():
    source = DISTURBANCES["writing to every file it has"][0]
    assert (run_program(source).status, run_program(source).stdout) == (0, "")
    assert run_program("print(6 * int(input()))", "7\n").stdout == "42\n"


@needs_isolation
def test_no_program_outlives_its_end():
    """Not one of the programs above, nor of these, leaves a process behind: the worker is alone in its group."""
    worker = next_worker()
    for source in ("while True: pass", "import os\nos.closerange(0, 99)\nwhile True: pass"):
        assert run_program(source, limit=0.2).ended_by == "time"
    assert children_of(worker.process.pid) == []


def next_worker() -> pool._Worker:
    """The one that runs the next program."""
    assert run_program("").status == 0
    return programs._pool()._idle[-1]


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@needs_isolation
@pytest.mark.parametrize(
    ("source", "stdin", "stdout", "status"),
    [
        ("print(sum(map(int, input().split())))", "1 2 3", "6\n", 0),
        ("import sys; print(sys.stdin.read().count('x'))", "x" * 1_000_000, "1000000\n", 0),
        ("print('é', end='')", "", "é", 0),
        ("import sys; sys.exit(3)", "", "", 3),
        ("import sys; sys.exit('no')", "", "", 1),
        ("print(1); raise ValueError", "", "1\n", 1),
        ("if __name__ == '__main__': print(__name__)", "", "__main__\n", 0),
        ("import math, json, re, heapq, bisect, collections; print(math.comb(5, 2))", "", "10\n", 0),
        ("import sys; print(sys.argv)", "", "['program.py']\n", 0),
        ("import random, numpy; print(numpy.arange(3).sum(), 0 <= random.random() < 1)", "", "3 True\n", 0),
        ("import sys, threading\nsys.setrecursionlimit(10**5)\nthreading.stack_size(1 << 26)\n"
         "t = threading.Thread(target=lambda: print('in a thread'))\nt.start()", "", "in a thread\n", 0),
    ],
)  # fmt: skip
def test_honest_programs_run(source, stdin, stdout, status):
    done = run_program(source, stdin, limit=30.0)
    assert (done.stdout, done.status, done.ended_by) == (stdout, status, "")


@needs_isolation
def test_output_is_cut_at_its_limit():
    done = run_program("print('x' * 1000)", most_output=10)
    assert (done.stdout, done.ended_by) == ("x" * 10, "output")
    for wrong in ({"limit": 0}, {"most_output": -1}):
        with pytest.raises(ValueError, match="limit and most_output must be positive, got"):
            run_program("", **wrong)


@needs_isolation
def test_a_program_that_is_stopped_from_outside_is_ended():
    """A stopped child once blocked the trainer for ever."""
    worker = next_worker()
    with ThreadPoolExecutor(1) as executor:
        done = executor.submit(run_program, "while True: pass", limit=1.0)
        deadline = time.monotonic() + LIMIT
        while not (running := children_of(worker.process.pid)) and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(running[0], signal.SIGSTOP)
        assert done.result(LIMIT).ended_by == "time"
    assert programs._pool()._idle[-1] is worker  # which ended it: the trainer's own, longer limit was not needed


@needs_isolation
def test_a_program_ends_with_the_trainer():
    source = (
        "import os, threading, time\n"
        "from entcov.rl.sandbox import programs, run_program\n"
        "run = lambda: run_program('while True: pass', limit=1000)\n"
        "threading.Thread(target=run, daemon=True).start()\n"
        "worker = None\n"
        "from pathlib import Path\n"
        "children = lambda pid: Path(f'/proc/{pid}/task/{pid}/children').read_text().split()\n"
        "while True:\n"
        "    for worker in [c for t in os.listdir('/proc/self/task') "
        "for c in Path(f'/proc/self/task/{t}/children').read_text().split()]:\n"
        "        if children(worker) and not programs._pool()._idle:\n"
        "            time.sleep(0.2)\n"
        "            print(worker, *children(worker), flush=True)\n"
        "            os.kill(os.getpid(), 9)\n"
        "    time.sleep(0.01)\n"
    )
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=LIMIT)
    pids = [int(pid) for pid in done.stdout.split()]
    assert len(pids) == 2, done
    deadline = time.monotonic() + LIMIT
    while any(is_running(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(is_running(pid) for pid in pids)


def is_running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@needs_isolation
def test_the_process_of_math_verify_is_confined_and_runs_no_answer(tmp_path, monkeypatch):
    pytest.importorskip("math_verify")
    monkeypatch.setenv("ENTCOV_TEST_TOKEN", "x")
    mark, math = tmp_path / "mark", SandboxPool("math", limit=LIMIT, extra="train")
    for answer in (
        f"__import__('os').system('touch {mark}')",
        f"1+1; open('{mark}', 'w')",
        f"\\text{{open('{mark}', 'w')}}",
        f"$open('{mark}', 'w')$",
        "1+1.__class__",
        "exit()",
        '{"score": 1}\n{"score": 1}',
    ):
        assert math.score(gold="2/7", answer=answer) == 0.0 and not mark.exists(), answer
        assert math.score(gold="2/7", answer="\\frac{4}{14}") == 1.0, answer
    [worker] = math._idle
    process = Path(f"/proc/{worker.process.pid}")
    status = process.joinpath("status").read_text()
    for line in ("NoNewPrivs:\t1", "Seccomp:\t2", "CapEff:\t0000000000000000", "CapPrm:\t0000000000000000"):
        assert line in status
    names = {entry.partition("=")[0] for entry in process.joinpath("environ").read_text().split("\0")}
    assert "ENTCOV_TEST_TOKEN" not in names and "HOME" not in names and "PYTHONHASHSEED" in names
    limits = process.joinpath("limits").read_text()
    assert limits.count("Max file size             0                    0") == 1
    math.close()


# ---- the protocol --------------------------------------------------------------------------------------------------

# A worker that has been taken over: what it does is the request's answer.
TAKEN_OVER = r"""
import json, os, signal, sys, time
def say(**message): os.write(1, json.dumps(message).encode() + b"\n")
sys.stdin.readline(); say(lacking={})
for line in sys.stdin:
    request = json.loads(line)
    right, what = {"nonce": request["nonce"], "score": 1}, request["answer"]
    if what == "honest": say(**right)
    elif what == "wrong nonce": say(nonce="0" * 32, score=1)
    elif what == "no nonce": say(score=1)
    elif what == "twice": os.write(1, 2 * (json.dumps(right).encode() + b"\n"))
    elif what == "for the next twenty":
        for _ in range(21): say(**right)
        time.sleep(99)
    elif what == "more later": say(**right); time.sleep(0.1); say(**right)
    elif what == "ready": say(ready=True); say(**right)
    elif what == "garbage": os.write(1, b"\xff{{{\n")
    elif what == "a list": os.write(1, b"[1]\n")
    elif what == "no end": os.write(1, b"x" * 100); time.sleep(99)
    elif what == "silence": time.sleep(99)
    elif what == "stopped": os.kill(os.getpid(), signal.SIGSTOP)
    elif what == "closed": os.close(1); time.sleep(99)
    elif what == "ended": sys.exit()
    elif what == "slow": say(nonce=request["nonce"], score=0, seconds=7, timed_out=True)
"""


@pytest.fixture
def taken_over(tmp_path, monkeypatch):
    script = tmp_path / "worker.py"
    script.write_text(TAKEN_OVER)
    monkeypatch.setattr(pool, "_SCRIPT", script)
    out = SandboxPool("math", limit=LIMIT, extra="train")
    yield out
    out.close()


@pytest.mark.parametrize(
    "attack", ["wrong nonce", "no nonce", "twice", "ready", "garbage", "a list", "closed", "ended"]
)
def test_a_reply_that_is_not_the_one_reply_scores_nothing(taken_over, attack):
    assert taken_over.score(answer="honest") == 1.0
    assert taken_over.score(answer=attack) == 0.0
    assert taken_over._idle == []  # the process has been ended
    assert taken_over.score(answer="honest") == 1.0


@pytest.mark.parametrize("attack", ["silence", "stopped", "no end"])
def test_a_process_that_does_not_answer_is_ended(taken_over, attack):
    with Budget(LIMIT).charged() as charge:
        assert taken_over.score(answer="honest") == 1.0 and not charge.timed_out
        assert taken_over.score(answer=attack, limit=0.3) == 0.0 and charge.timed_out
    assert taken_over._idle == [] and taken_over.score(answer="honest") == 1.0


def test_a_process_that_ends_is_replaced_once(taken_over, monkeypatch):
    """Anyone may have ended it, so another one gets the request; an answer that ends that one too scores nothing."""
    started = []

    class Ends:
        lacking: dict[str, str] = {}

        def __init__(self, kind, extra):
            started.append(self)

        def ask(self, request, seconds):
            if len(started) < 9:
                raise pool._Ended
            return {"score": 1}

        def end(self):
            pass

    monkeypatch.setattr(pool, "_Worker", Ends)
    assert taken_over.score(answer="ended") == 0.0 and len(started) == 2


def test_replies_in_advance_earn_nothing(taken_over):
    """A line written to the pipe once earned reward 1.0 for each of the next twenty answers."""
    taken_over.score(answer="for the next twenty")
    assert [taken_over.score(answer="wrong nonce") for _ in range(20)] == [0.0] * 20


def test_an_answer_does_not_pay_for_the_one_before(taken_over):
    """What came out of turn since the last reply ends the process, and another one scores the next answer."""
    for _ in range(2):
        taken_over.score(answer="more later")
        for worker in taken_over._idle:  # empty where both lines came at once
            select.select([worker.process.stdout], [], [], LIMIT)
        assert taken_over.score(answer="honest") == 1.0


def test_a_process_that_stops_reading_does_not_block(tmp_path, monkeypatch):
    """The pipe holds 64 KiB, of which it takes a part; the trainer must not wait in the middle of a longer request."""
    (tmp_path / "worker.py").write_text(
        "import os, signal\nos.read(0, 1 << 20)\nos.write(1, b'{\"lacking\": {}}\\n')\n"
        "os.read(0, 8192)\nos.kill(os.getpid(), signal.SIGSTOP)\n"
    )
    monkeypatch.setattr(pool, "_SCRIPT", tmp_path / "worker.py")
    stops, scores = SandboxPool("math", limit=0.5, extra="train"), []
    score = threading.Thread(target=lambda: scores.append(stops.score(answer="x" * 10_000_000)), daemon=True)
    score.start()
    score.join(LIMIT)
    assert scores == [0.0]


# ---- what is there -------------------------------------------------------------------------------------------------

# A process that lacks one system call, as in a container that forbids it, and all that it starts.
WITHOUT = """
import struct, sys
from entcov.rl.sandbox import isolation
isolation._prctl(isolation._PR_SET_NO_NEW_PRIVS, 1)
number = {number}
code = [(0x20, 0, 0, 0), (0x15, 0, 1, number), (0x06, 0, 0, 0x00050000 | {errno}), (0x06, 0, 0, 0x7FFF0000)]
isolation.install(b"".join(struct.pack("=HBBI", *c) for c in code))
from entcov.rl.rewards.rules import score
from entcov.rl.sandbox import run_program
from entcov.rl.tasks import make_task
from entcov.rl.types import Example
def attempt(f):
    try: print(f())
    except Exception as error: print(type(error).__name__, error)
attempt(lambda: score(Example("math", (), "1/2"), r"\\boxed{{0.5}}"))
attempt(lambda: run_program("print(1)"))
"""
REASONING_GYM = """
attempt(lambda: make_task("reasoning_gym", dataset="countdown"))
composite = dict(datasets=[dict(name="chain_sum", weight=1, config={}), dict(name="n_queens", weight=1, config={})])
attempt(lambda: make_task("reasoning_gym", dataset="composite", settings=composite))
row = Example("reasoning_gym/spiral_matrix", ({"role": "user", "content": "?"},), "1",
              extra_info=dict(dataset="spiral_matrix", settings="{}", seed=1, size=10, item=1))
attempt(lambda: score(row, "<answer>1</answer>"))
example = make_task("reasoning_gym", dataset="chain_sum").example("train", 0)
attempt(lambda: score(example, example.solution))
"""


def run_without(number: int, errno: int, more: str = "") -> list[str]:
    source = WITHOUT.format(number=number, errno=errno) + more
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@needs_isolation
def test_without_landlock_evaluated_datasets_are_refused_by_name():
    pytest.importorskip("math_verify")
    pytest.importorskip("reasoning_gym")
    math, program, countdown, composite, row, chain_sum = run_without(444, 38, REASONING_GYM)
    assert math == "1.0" and chain_sum == "1.0"  # they evaluate nothing, and run with what there is
    refused = "must be confined by Landlock and seccomp, which is not possible here (no Landlock: this kernel is older"
    assert program.startswith(f"IsolationError programs {refused}")
    assert countdown.startswith(f"IsolationError reasoning_gym: countdown evaluates the answer and {refused}")
    assert composite.startswith("IsolationError reasoning_gym: n_queens evaluates the answer and must be confined")
    assert row.startswith("IsolationError reasoning_gym: spiral_matrix evaluates the answer and must be confined")
    assert all("It takes Linux 5.13 or newer" in line for line in (program, countdown, composite, row))


@needs_isolation
def test_without_seccomp_programs_are_refused():
    pytest.importorskip("math_verify")
    number = isolation._ARCHITECTURES[os.uname().machine][2]
    math, program = run_without(number, 1)
    assert math == "1.0" and "(no seccomp: this kernel or the container refuses filters" in program


def test_what_is_missing_is_said(monkeypatch):
    def fails_with(code):
        def call(*arguments):
            raise OSError(code, os.strerror(code))

        return call

    for code, reason in ((38, "older than 5.13"), (95, '"lsm="'), (1, "its seccomp profile must allow the landlock_")):
        monkeypatch.setattr(isolation, "_syscall", fails_with(code))
        assert reason in isolation.missing()["Landlock"]
    monkeypatch.setattr(isolation.platform, "machine", lambda: "riscv64")
    assert isolation.missing()["seccomp"] == "the filter is written for x86_64 and aarch64, this is riscv64"
    monkeypatch.setattr(isolation.sys, "platform", "darwin")
    monkeypatch.setattr(isolation.platform, "system", lambda: "Darwin")
    assert isolation.missing() == dict.fromkeys(("Landlock", "seccomp"), "only Linux has it, this is Darwin")


@needs_isolation
def test_a_layer_that_does_not_hold_is_noticed(tmp_path, monkeypatch):
    """The proof at the start of a worker is a real one: with a filter that lets everything pass, it does not start."""
    import shutil

    for file in Path(pool.__file__).parent.glob("*.py"):
        shutil.copy(file, tmp_path)
    code = (tmp_path / "isolation.py").read_text()
    (tmp_path / "isolation.py").write_text(code.replace("(return_, 0, 0, fail)", "(return_, 0, 0, allow)"))
    monkeypatch.setattr(pool, "_SCRIPT", tmp_path / "worker.py")
    with pytest.raises(
        RuntimeError, match="the sandbox does not hold: seccomp: a socket can be made; seccomp: a second"
    ):
        SandboxPool("program", limit=1.0, extra="").lacking()


@pytest.mark.parametrize("names", [("x86_64", 0), ("aarch64", 1)])
def test_system_call_numbers_differ(names):
    """A number that stands twice in a column is a slip of the pen."""
    numbers = [number[names[1]] for number in isolation._ALLOWED.values() if number[names[1]] is not None]
    numbers += [
        isolation._OPEN_TO_READ[0][names[1]],
        isolation._PLAIN_FCNTL[0][names[1]],
        isolation._NEW_THREAD[0][names[1]],
    ]
    assert len(set(numbers)) == len(numbers) > 50


@pytest.mark.parametrize(
    ("header", "column"),
    [("/usr/include/x86_64-linux-gnu/asm/unistd_64.h", 0), ("/usr/include/asm-generic/unistd.h", 1)],
)
def test_system_call_numbers_are_the_kernel_headers(header, column):
    import re

    if not Path(header).exists():
        pytest.skip("the kernel's headers are not installed")
    text = Path(header).read_text()
    known = dict(re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", text))
    known = {{"fstatat": "newfstatat"}.get(name, name): int(number) for name, number in known.items()}
    ours = {**isolation._ALLOWED, "openat": isolation._OPEN_TO_READ[0], "fcntl": isolation._PLAIN_FCNTL[0]}
    ours["clone"] = isolation._NEW_THREAD[0]
    for name, numbers in ours.items():
        if numbers[column] is not None:
            assert known[name] == numbers[column], name


# ---- cores ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cgroup", "files", "ranks", "cores"),
    [
        ("", {}, None, 8),
        ("0::/\n", {"cpu.max": "max 100000"}, None, 8),
        ("0::/a/b\n", {"a/cpu.max": "250000 100000", "a/b/cpu.max": "max 100000"}, None, 2),
        ("0::/not/here\n", {"cpu.max": "300000 100000"}, None, 3),
        ("0::/\n", {"cpu.max": "50000 100000"}, None, 1),
        (
            "4:cpu,cpuacct:/x\n3:memory:/\n",
            {"cpu/x/cpu.cfs_quota_us": "400000", "cpu/x/cpu.cfs_period_us": "100000"}, None, 4,
        ),
        ("4:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None, 8),
        ("", {}, "3", 2),
        ("", {}, "100", 1),
    ],
)  # fmt: skip
def test_free_cores(tmp_path, monkeypatch, cgroup, files, ranks, cores):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if ranks is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
    files = {"proc/self/cgroup": cgroup, **{f"sys/fs/cgroup/{name}": text for name, text in files.items()}}
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert free_cores(tmp_path) == cores


# ---- the budget ----------------------------------------------------------------------------------------------------


def test_a_budget_that_is_used_up_pays_for_nothing_more(taken_over):
    budget = Budget(LIMIT)
    with budget.charged() as charge:
        assert taken_over.score(answer="silence", limit=0.3) == 0.0 and charge.timed_out
    assert budget.seconds <= LIMIT - 0.3
    with budget.charged() as charge:
        assert taken_over.score(answer="honest") == 1.0 and not charge.timed_out
        charge.spend(LIMIT)
    before = budget.seconds
    with budget.charged() as charge:
        assert taken_over.score(answer="honest") == 0.0 and charge.timed_out and budget.seconds == before < 0
    assert taken_over.score(answer="honest") == 1.0  # outside of the budget


def test_a_time_out_that_the_process_kept_itself_counts_and_is_paid_by_its_own_clock(taken_over):
    budget = Budget(LIMIT)
    with budget.charged() as charge:
        assert taken_over.score(answer="slow") == 0.0 and charge.timed_out
    assert budget.seconds == LIMIT - 7


def test_threads_do_not_share_a_charge(taken_over):
    budget = Budget(LIMIT)
    meeting = threading.Barrier(2, timeout=LIMIT)

    def score(answer, limit):
        with budget.charged() as charge:
            meeting.wait()
            taken_over.score(answer=answer, limit=limit)
        return charge.timed_out

    with ThreadPoolExecutor(2) as executor:
        slow, honest = executor.submit(score, "silence", 0.3), executor.submit(score, "honest", LIMIT)
        assert (slow.result(LIMIT), honest.result(LIMIT)) == (True, False)


def test_an_isolation_error_is_a_runtime_error_that_names_layer_and_reason():
    error = IsolationError("programs", {"Landlock": "it is switched off"})
    assert isinstance(error, RuntimeError) and "no Landlock: it is switched off" in str(error)
