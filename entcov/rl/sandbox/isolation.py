"""What confines a process that works on model output. Linux, x86-64 and aarch64; no root, no packages, no namespaces.

`confine` is called by the process itself, between its last trusted action and the answer. It cannot be undone, and the
kernel enforces it from then on:

    resource limits     memory, processor time, open files, no byte into any file, no core dump
    capabilities        none, also for root, so the limits bind root too
    no_new_privs        nothing that is run later gains a right
    Landlock            files below the given folders may be read; nothing else, /proc included, can be opened
    seccomp             only the system calls of `_ALLOWED`, all others fail: no socket, no second process, no signal to
                        anyone, no program start, no file opened for writing, no metadata changed, no limit raised

User, network and process namespaces would add little to that list, and many containers and Ubuntu's AppArmor forbid
them, so they are not used. seccomp alone rules out the network and second processes; Landlock is what hides files.

The process that scores imports this file without the rest of entcov, so it imports the standard library alone.
"""

import ctypes
import functools
import os
import platform
import resource
import signal
import struct
import sys
from collections.abc import Iterable

# ---- system calls --------------------------------------------------------------------------------------------------

# Numbers on (x86-64, aarch64); None where the architecture has no such call. An interpreter that computes, reads its
# own library and writes to a pipe needs these. None of them can affect another process.
_ALLOWED: dict[str, tuple[int | None, int | None]] = {
    # memory
    "brk": (12, 214), "mmap": (9, 222), "munmap": (11, 215), "mremap": (25, 216), "mprotect": (10, 226),
    "madvise": (28, 233), "membarrier": (324, 283),
    # files and pipes that are open
    "read": (0, 63), "write": (1, 64), "readv": (19, 65), "writev": (20, 66), "pread64": (17, 67),
    "pwrite64": (18, 68), "lseek": (8, 62), "close": (3, 57), "dup": (32, 23), "dup2": (33, None), "dup3": (292, 24),
    "pipe": (22, None), "pipe2": (293, 59), "poll": (7, None), "ppoll": (271, 73), "select": (23, None),
    "pselect6": (270, 72),
    # names of files; Landlock says which may be opened
    "stat": (4, None), "lstat": (6, None), "fstat": (5, 80), "newfstatat": (262, 79), "statx": (332, 291),
    "getdents64": (217, 61), "getcwd": (79, 17),
    # time
    "clock_gettime": (228, 113), "clock_getres": (229, 114), "clock_nanosleep": (230, 115), "nanosleep": (35, 101),
    "gettimeofday": (96, 169), "times": (100, 153), "getrusage": (98, 165), "setitimer": (38, 103),
    "restart_syscall": (219, 128),
    # the process itself
    "exit": (60, 93), "exit_group": (231, 94), "futex": (202, 98), "getpid": (39, 172), "getppid": (110, 173),
    "gettid": (186, 178), "getuid": (102, 174), "geteuid": (107, 175), "getgid": (104, 176), "getegid": (108, 177),
    "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139), "sigaltstack": (131, 132),
    "sched_yield": (24, 124), "sched_getaffinity": (204, 123), "set_robust_list": (273, 99), "rseq": (334, 293),
    "set_tid_address": (218, 96), "getrandom": (318, 278), "uname": (63, 160), "sysinfo": (99, 179),
}  # fmt: skip

_WRITES = os.O_ACCMODE | os.O_CREAT | os.O_TRUNC
_CLONE_THREAD, _CLONE_NEW_ANYTHING = 0x10000, 0x7E020000
# Allowed for some arguments only: the number as above, which argument, the bits that are tested, and their values.
_OPEN_TO_READ = ((257, 56), 2, _WRITES, (os.O_RDONLY,))  # openat(folder, name, flags)
# fcntl(file, command): F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_DUPFD_CLOEXEC. F_SETOWN would send signals to others.
_PLAIN_FCNTL = ((72, 25), 1, 0xFFFFFFFF, (0, 1, 2, 3, 1030))
_NEW_THREAD = ((56, 220), 0, _CLONE_THREAD | _CLONE_NEW_ANYTHING, (_CLONE_THREAD,))  # clone(flags, ...)

# name of the architecture -> (column above, AUDIT_ARCH number, number of the seccomp call, of the capset call)
_ARCHITECTURES = {"x86_64": (0, 0xC000003E, 317, 126), "aarch64": (1, 0xC00000B7, 277, 91)}
_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446  # the same everywhere
_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS = 1, 38
_EPERM, _ENOSYS, _EOPNOTSUPP = 1, 38, 95


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _syscall(number: int, *arguments: object) -> int:
    values = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    result = _libc().syscall(ctypes.c_long(number), *values)
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def _prctl(option: int, value: int) -> None:
    if _libc().prctl(option, ctypes.c_ulong(value), 0, 0, 0) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


# ---- which layers the system has -----------------------------------------------------------------------------------


def missing() -> dict[str, str]:
    """The layers that this system lacks, and why. Empty: `confine` does all that the top of this file says."""
    if not sys.platform.startswith("linux"):
        return dict.fromkeys(("Landlock", "seccomp"), f"only Linux has it, this is {platform.system()}")
    out = {}
    try:
        _landlock_version()
    except OSError as error:
        out["Landlock"] = {
            _ENOSYS: "this kernel is older than 5.13 or built without it, or a container hides it",
            _EOPNOTSUPP: 'it is switched off; add it to the kernel\'s "lsm=" boot parameter',
            _EPERM: "the container forbids it; its seccomp profile must allow the landlock_* system calls",
        }.get(error.errno, str(error))
    if platform.machine() not in _ARCHITECTURES:
        known = " and ".join(_ARCHITECTURES)
        out["seccomp"] = f"the filter is written for {known}, this is {platform.machine()}"
    else:
        try:  # SECCOMP_GET_ACTION_AVAIL of SECCOMP_RET_ERRNO
            _syscall(_ARCHITECTURES[platform.machine()][2], 2, 0, ctypes.byref(ctypes.c_uint32(0x00050000)))
        except OSError as error:
            out["seccomp"] = f"this kernel or the container refuses filters ({error.strerror})"
    if not os.path.isdir("/proc/self/task"):
        out["/proc"] = "it is not mounted, and the number of threads is read there"
    return out


def escapes() -> list[str]:
    """Forbidden actions that succeed in the calling process after `confine`; empty if the sandbox holds."""
    import socket

    tries = {
        "Landlock: the root folder can be listed": lambda: os.listdir("/"),
        "Landlock: files in /proc can be read": lambda: os.close(os.open("/proc/self/environ", os.O_RDONLY)),
        "seccomp: a file can be opened for writing": lambda: os.close(os.open("/dev/null", os.O_WRONLY)),
        "seccomp: a socket can be made": lambda: socket.socket().close(),
        "seccomp: a second process can be started": lambda: os.fork() or os._exit(0),
    }
    found = []
    for what, attempt in tries.items():
        try:
            attempt()
        except OSError:
            continue
        found.append(what)
    return found


# ---- Landlock ------------------------------------------------------------------------------------------------------


def _landlock_version() -> int:
    return _syscall(_LANDLOCK_CREATE, None, 0, 1)


def readable(paths: Iterable[str]) -> int:
    """A file descriptor of Landlock rules: what lies below `paths` may be read, all else may not be opened at all."""
    version = _landlock_version()
    # All rights on files that this kernel knows: 13 at first, then renaming (2), truncating (3), device ioctl (5).
    rights = (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(version, 16)) - 1
    read_file, read_folder = 1 << 2, 1 << 3
    attributes = struct.pack("=Q", rights)
    ruleset = _syscall(_LANDLOCK_CREATE, attributes, len(attributes), 0)
    for path in paths:
        try:
            place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:  # no such folder on this system: nothing to allow
            continue
        allowed = read_file | read_folder if os.path.isdir(path) else read_file
        _syscall(_LANDLOCK_ADD, ruleset, 1, struct.pack("=Qi", allowed, place), 0)
        os.close(place)
    os.set_inheritable(ruleset, False)
    return ruleset


# ---- seccomp -------------------------------------------------------------------------------------------------------


@functools.cache  # a child inherits what its parent has made
def _program(threads: bool) -> bytes:
    """The filter as classic BPF: an allow-list. Every other call fails as if the kernel did not have it."""
    column, architecture, *_ = _ARCHITECTURES[platform.machine()]
    load, jump_equal, and_, return_ = 0x20, 0x15, 0x54, 0x06
    allow, fail, forbid, kill = 0x7FFF0000, 0x00050000 | _ENOSYS, 0x00050000 | _EPERM, 0x80000000
    code: list[tuple[int, int, int, int]] = []  # (operation, jump if true, jump if false, constant)
    # struct seccomp_data: number at 0, architecture at 4, arguments of 8 bytes from 16 on, the low half first.
    code += [(load, 0, 0, 4), (jump_equal, 1, 0, architecture), (return_, 0, 0, kill), (load, 0, 0, 0)]
    for numbers in _ALLOWED.values():
        if numbers[column] is not None:
            code += [(jump_equal, 0, 1, numbers[column]), (return_, 0, 0, allow)]
    for numbers, argument, bits, values in (_OPEN_TO_READ, _PLAIN_FCNTL, *([_NEW_THREAD] if threads else [])):
        body = [(load, 0, 0, 16 + 8 * argument), (and_, 0, 0, bits)]
        for value in values:
            body += [(jump_equal, 0, 1, value), (return_, 0, 0, allow)]
        body.append((return_, 0, 0, forbid))
        code += [(jump_equal, 0, len(body), numbers[column]), *body]
    code.append((return_, 0, 0, fail))
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in code)


def install(program: bytes) -> None:
    """Puts the calling thread, and all that it starts, under a seccomp filter; needs no_new_privs."""
    code = ctypes.create_string_buffer(program, len(program))
    filter_ = struct.pack("@HP", len(program) // 8, ctypes.addressof(code))
    _syscall(_ARCHITECTURES[platform.machine()][2], 1, 0, filter_)  # SECCOMP_SET_MODE_FILTER


# ---- confinement ---------------------------------------------------------------------------------------------------


def die_with(parent: int) -> None:
    """The kernel ends this process when `parent`, which has just forked it, ends. Linux; elsewhere nothing."""
    if sys.platform.startswith("linux"):
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it has ended already
            os._exit(1)


def limit(name: str, value: int) -> None:
    """Lowers a resource limit, which cannot be undone; a lower one stays."""
    kind = getattr(resource, name)
    hard = resource.getrlimit(kind)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    try:
        resource.setrlimit(kind, (value, value))
    except (ValueError, OSError):
        if sys.platform.startswith("linux"):  # other systems do not know every limit
            raise


def confine(*, files: int | None, memory: int, seconds: int | None, threads: bool, lacking: Iterable[str]) -> None:
    """Confines the calling process for good, as the top of this file says. It must have one thread.

    Args:
        files: rules of `readable`; None where Landlock is lacking.
        memory: bytes of address space.
        seconds: of processor time; None for no limit.
        threads: whether the process may start further threads.
        lacking: names of the layers that `missing` found, which are left out.
    """
    for name, value in (("RLIMIT_CORE", 0), ("RLIMIT_FSIZE", 0), ("RLIMIT_NOFILE", 64), ("RLIMIT_AS", memory)):
        limit(name, value)
    if seconds is not None:
        limit("RLIMIT_CPU", seconds)
    if not sys.platform.startswith("linux"):
        return
    if platform.machine() in _ARCHITECTURES:  # version 3 of the interface; effective, permitted, inheritable: none
        _syscall(_ARCHITECTURES[platform.machine()][3], struct.pack("=Ii", 0x20080522, 0), bytes(24))
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    if "Landlock" not in lacking:
        _syscall(_LANDLOCK_RESTRICT, files, 0)
        os.close(files)
    if "seccomp" not in lacking:
        install(_program(threads))
