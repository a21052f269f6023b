"""The secret that the trainer sends to a vLLM server: whoever has it may send weights and take samples.

`entcov.rl.vllm.server` makes a new token at every start and keeps it in a file that only its user can read:

    $XDG_STATE_HOME/entcov/vllm/HOST_PORT.token        (XDG_STATE_HOME is ~/.local/state by default)

The trainer takes the token of the host and port in `rollout.vllm.url`; 127.0.0.1 and localhost mean the machine it runs
on. So the token in a file is sent to no machine but the one that made it, and a recipe that names another server gets
none. Where trainer and server share no home directory, both get the same token in ENTCOV_VLLM_TOKEN.
"""

import errno
import ipaddress
import os
import re
import secrets
import socket
import stat
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from entcov.rl.record.durable import atomic_write

VARIABLE = "ENTCOV_VLLM_TOKEN"
_VALID = re.compile(r"[A-Za-z0-9._~+/=-]{16,512}")  # what may follow "Bearer" in a header
_RULE = "must be 16 to 512 of the characters A-Z a-z 0-9 . _ ~ + / = -"


@dataclass(frozen=True)
class Token:
    """A secret that is not printed, and where it came from."""

    value: str = field(repr=False)
    source: str

    def __post_init__(self) -> None:
        if not _VALID.fullmatch(self.value):  # the message must not hold the value
            raise ValueError(f"{self.source}: the token {_RULE}, and this one is not ({len(self.value)} characters)")


def server_token(port: int) -> Token:
    """The token for a server on this machine: that of ENTCOV_VLLM_TOKEN, or a new one, written to its file.

    Raises:
        ValueError: the variable holds no token.
        OSError: the file could not be written.
    """
    if VARIABLE in os.environ:
        return _from_environment()
    path = token_file(socket.gethostname(), port)
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    token = Token(secrets.token_urlsafe(32), str(path))
    atomic_write(path, f"{token.value}\n".encode(), mode=0o600)
    return token


def client_token(url: str) -> Token:
    """The token for the server at `url`: that of ENTCOV_VLLM_TOKEN, or of the file that the server has written.

    Raises:
        ValueError: `url` is no http address with a host, there is no token, or others can read its file. The message
            names the variable or the file, and never the token.
    """
    try:
        parts = urlsplit(url)
        default = {"http": 80, "https": 443}[parts.scheme]
        host, port = parts.hostname, parts.port or default
        if not host or parts.username is not None or parts.query or parts.fragment:
            raise ValueError
    except (KeyError, ValueError):
        raise ValueError(f"rollout.vllm.url: must be http://HOST:PORT, or https, got {url!r}") from None
    if VARIABLE in os.environ:
        return _from_environment()
    path = token_file(socket.gethostname() if _is_this_machine(host) else host, port)
    try:
        return Token(_read_private(path), str(path))
    except FileNotFoundError:
        raise ValueError(
            f"rollout.vllm.url: there is no token for {url}: neither {VARIABLE} is set, nor is there {path}, which "
            "python -m entcov.rl.vllm.server makes when it starts"
        ) from None


def token_file(host: str, port: int) -> Path:
    """Where the token of the server on that host and port is."""
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "entcov" / "vllm" / f"{host.lower()}_{port}.token"


def _from_environment() -> Token:
    return Token(os.environ[VARIABLE], f"environment variable {VARIABLE}")


def _is_this_machine(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _read_private(path: Path) -> str:
    """The line in `path`, if it is a file that nobody but this process's user can read."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise ValueError(f"{path}: must be a file, and is a symbolic link") from None
        raise
    with open(fd, encoding="utf-8", errors="replace") as file:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise ValueError(f"{path}: must be a regular file")
        if found.st_uid != os.geteuid() or found.st_mode & 0o077:
            raise ValueError(
                f"{path}: must belong to user {os.geteuid()} and be closed to others (mode 600), belongs to "
                f"{found.st_uid} with mode {stat.S_IMODE(found.st_mode):o}; remove it and start the server anew"
            )
        return file.read(1024).removesuffix("\n")
