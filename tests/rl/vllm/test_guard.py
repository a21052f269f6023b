"""What stands before a vLLM server's routes, and the token that opens it: without vLLM."""

from __future__ import annotations

import ast
import asyncio
import contextlib
import http.server
import inspect
import json
import os
import socket
import stat
import sys
import threading

import pytest
import yaml

from entcov.rl.config import VllmConfig
from entcov.rl.vllm import client
from entcov.rl.vllm import server as vllm_server
from entcov.rl.vllm.guard import ARGUMENTS, ROUTES, Guard
from entcov.rl.vllm.token import VARIABLE, client_token, server_token, token_file
from entcov.rl.vllm.weight_sync import ByFile, check_weights_file
from tests.support.tiny_run import recipe
from tests.support.unused_routes import UNUSED

TOKEN = "right-" + "0123456789abcdef" * 2


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.delenv(VARIABLE, raising=False)


# ---- the middleware ------------------------------------------------------------------------------------------------


def answer(guard, method="GET", path="/health", headers=(), kind="http"):
    """(status, whether the application behind the guard was reached, body) of one request."""
    sent = []

    async def receive():
        raise AssertionError("a refused request's body is not read")

    async def send(message):
        sent.append(message)

    reached = len(guard.app.reached)
    scope = {"type": kind, "path": path, "headers": list(headers), "root_path": ""}
    asyncio.run(guard(scope | ({"method": method} if kind == "http" else {}), receive, send))
    status = sent[0].get("status", sent[0]["type"])
    return status, len(guard.app.reached) > reached, b"".join(m.get("body", b"") for m in sent)


@pytest.fixture
def guard(monkeypatch):
    monkeypatch.setenv(VARIABLE, TOKEN)

    async def app(scope, receive, send):
        app.reached.append(scope)
        await send({"type": "http.response.start", "status": 200, "headers": []})

    app.reached = []
    return Guard(app)


def bearer(token: str, scheme: str = "Bearer") -> tuple[bytes, bytes]:
    return b"authorization", f"{scheme} {token}".encode()


def test_the_right_token_opens_the_trainer_s_routes_and_no_others(guard):
    for method, path in sorted(ROUTES):
        assert answer(guard, method, path, [bearer(TOKEN)])[:2] == (200, True), path
    for method, path in UNUSED:
        assert answer(guard, method, path, [bearer(TOKEN)])[:2] == (404, False), path
    assert answer(guard, path="/v1/realtime", headers=[bearer(TOKEN)], kind="websocket")[:2] == (
        "websocket.close",
        False,
    )


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [bearer("wrong-" + TOKEN[6:])],
        [bearer(TOKEN[:-1])],
        [bearer(TOKEN + "0")],
        [bearer("")],
        [bearer(TOKEN, scheme="Basic")],
        [(b"authorization", TOKEN.encode())],
        [(b"x-api-key", TOKEN.encode())],
        [bearer(TOKEN), bearer(TOKEN)],  # which of two a server takes is anybody's guess
        [(b"authorization", b"Bearer \xff\xfe")],
    ],
)
def test_without_the_right_token_every_route_is_closed(guard, headers):
    for method, path in [*sorted(ROUTES), *UNUSED]:
        status, reached, body = answer(guard, method, path, headers)
        assert (status, reached) == (401, False), path
        assert TOKEN.encode() not in body
    assert answer(guard, path="/v1/realtime", headers=headers, kind="websocket")[0] == "websocket.close"


def test_the_server_s_own_start_and_end_pass(guard):
    assert answer(guard, kind="lifespan")[1]


def test_no_guard_without_a_token(monkeypatch):
    with pytest.raises(RuntimeError, match=f"{VARIABLE}: must be set"):
        Guard(None)
    monkeypatch.setenv(VARIABLE, "")
    with pytest.raises(ValueError, match=f"{VARIABLE}: the token must be 16 to 512 of .*0 characters"):
        Guard(None)


def test_the_routes_are_those_that_the_client_calls():
    called = set()
    for node in ast.walk(ast.parse(inspect.getsource(client))):
        if isinstance(node, ast.Call) and getattr(node.func, "attr", None) == "_call":
            method, route = (argument.value for argument in node.args[:2])
            called.add((method, route.partition("?")[0]))
    assert len(called) == 9 and ROUTES - called == {("GET", "/health")} and called <= ROUTES


# ---- the token -----------------------------------------------------------------------------------------------------


def test_a_server_leaves_a_new_token_that_only_its_user_can_read():
    before = os.umask(0)
    try:
        token = server_token(8000)
    finally:
        os.umask(before)
    path = token_file(socket.gethostname(), 8000)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert path.read_text() == token.value + "\n" and len(token.value) >= 43
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert token.value not in repr(token)
    for url in ("http://127.0.0.1:8000", "http://localhost:8000/", f"http://{socket.gethostname()}:8000"):
        assert client_token(url) == token
    assert server_token(8000).value != token.value  # every start has its own
    assert client_token("http://[::1]:8000").value != token.value


def test_a_token_file_goes_to_its_own_machine_and_port_alone():
    server_token(8000)
    for url in ("http://127.0.0.1:8001", "http://elsewhere.example:8000", "http://10.1.2.3:8000"):
        with pytest.raises(ValueError, match=f"there is no token for {url}: neither {VARIABLE} is set, nor is there "):
            client_token(url)
    for url in ("file:///etc/passwd", "127.0.0.1:8000", "ftp://127.0.0.1:8000", "http://:8000", "http://u:p@h:8000"):
        with pytest.raises(ValueError, match="rollout.vllm.url: must be http://HOST:PORT"):
            client_token(url)


def test_the_variable_serves_every_machine_and_leaves_no_file(monkeypatch):
    monkeypatch.setenv(VARIABLE, TOKEN)
    assert server_token(8000).value == client_token("http://node4:8000").value == TOKEN
    assert not token_file(socket.gethostname(), 8000).parent.exists()
    for wrong in ("", "short", "two words " * 3, "line\nbreak" * 3, "ü" * 20):
        monkeypatch.setenv(VARIABLE, wrong)
        with pytest.raises(ValueError, match=f"environment variable {VARIABLE}: the token must be 16") as error:
            client_token("http://node4:8000")
        assert not wrong or wrong not in str(error.value)


def test_a_token_file_that_others_could_read_or_replace_is_refused(tmp_path):
    token, path = server_token(8000), token_file(socket.gethostname(), 8000)
    path.chmod(0o640)
    with pytest.raises(ValueError, match=r"closed to others \(mode 600\).*mode 640") as error:
        client_token("http://127.0.0.1:8000")
    assert token.value not in str(error.value)
    path.chmod(0o600)
    path.rename(tmp_path / "other")
    path.symlink_to(tmp_path / "other")
    with pytest.raises(ValueError, match="must be a file, and is a symbolic link"):
        client_token("http://127.0.0.1:8000")
    path.unlink()
    os.mkfifo(path, 0o600)
    with pytest.raises(ValueError, match="must be a regular file"):
        client_token("http://127.0.0.1:8000")


# ---- the client ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def listening(status: int, headers: dict[str, str]):
    """(url, headers of the requests) of a server that gives every request the same answer."""
    seen = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            seen.append(self.headers)
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", seen
    finally:
        server.shutdown()
        server.server_close()


def connect(url: str):
    settings = VllmConfig(mode="server", url=url)
    return client.ServerEngine(settings, None, max_model_len=1, dtype=None)


def test_a_refused_token_is_one_line_that_says_where_it_came_from(monkeypatch):
    with listening(401, {}) as (url, seen):
        path = token_file(socket.gethostname(), int(url.rpartition(":")[2]))
        token = server_token(int(url.rpartition(":")[2]))
        for source in (str(path), f"environment variable {VARIABLE}"):
            with pytest.raises(RuntimeError, match=f"the server refused the token of {source}") as error:
                connect(url)
            assert "\n" not in str(error.value)
            assert token.value not in str(error.value) and TOKEN not in str(error.value)
            monkeypatch.setenv(VARIABLE, TOKEN)
    assert [headers["Authorization"] for headers in seen] == [f"Bearer {token.value}", f"Bearer {TOKEN}"]


def test_a_redirection_does_not_take_the_token_along(monkeypatch):
    monkeypatch.setenv(VARIABLE, TOKEN)
    with listening(200, {}) as (target, reached), listening(302, {"Location": target + "/server_info"}) as (url, seen):
        with pytest.raises(RuntimeError, match="vLLM answered 302"):
            connect(url)
        assert len(seen) == 1 and reached == []


# ---- the server's command ------------------------------------------------------------------------------------------


@pytest.fixture
def started(tmp_path, monkeypatch):
    """Starts the server's command with a recipe; (arguments, environment) of the process that it becomes."""
    pytest.importorskip("transformers")

    class Replaced(Exception):
        pass

    def start(*options: str, **overrides):
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe(tmp_path / "run", **overrides)))
        found = {}

        def execve(file, arguments, environment):
            found.update(arguments=arguments, environment=environment)
            raise Replaced

        monkeypatch.setattr(os, "execve", execve)
        with pytest.raises(Replaced):
            vllm_server.main([str(tmp_path / "recipe.yaml"), *options])
        return found["arguments"], found["environment"]

    return start


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_the_process_list_shows_neither_the_token_nor_what_the_recipe_takes_from_the_environment(
    started, monkeypatch, capsys
):
    monkeypatch.setenv("SOME_TOKEN", "hf_secret_of_the_user")
    monkeypatch.setenv("VLLM_API_KEY", "another")
    port = free_port()
    arguments, environment = started(
        "--port", str(port), **{"rollout.vllm": {"engine_args": {"hf_token": "${oc.env:SOME_TOKEN}"}}}
    )
    token = client_token(f"http://127.0.0.1:{port}")
    assert environment[VARIABLE] == token.value and "VLLM_API_KEY" not in environment
    command = json.loads(environment[ARGUMENTS])
    assert command[command.index("--hf-token") + 1] == "hf_secret_of_the_user"
    assert command[command.index("--middleware") + 1] == "entcov.rl.vllm.guard.Guard"
    assert arguments == [sys.executable, "-m", "entcov.rl.vllm.guard"]
    printed = "".join(capsys.readouterr())
    assert token.source in printed and token.value not in printed and "hf_secret" not in printed


def test_a_server_that_is_there_keeps_its_token(started, tmp_path, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        token = server_token(port)
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe(tmp_path / "run")))
        assert vllm_server.main([str(tmp_path / "recipe.yaml"), "--port", str(port)]) == 2
    assert f"cannot listen on 127.0.0.1, port {port}" in capsys.readouterr().err
    assert client_token(f"http://127.0.0.1:{port}") == token
    assert vllm_server.main([str(tmp_path / "recipe.yaml"), "--port", "0"]) == 2
    assert "--port: must be in [1, 65535], got 0" in capsys.readouterr().err


@pytest.mark.parametrize("key", ["middleware", "api_key", "api-key", "root_path", "host", "config"])
def test_a_recipe_cannot_open_the_guarded_server(tmp_path, capsys, key):
    tree = recipe(tmp_path / "run", **{"rollout.vllm": {"engine_args": {key: "x"}}})
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree))
    assert vllm_server.main([str(tmp_path / "recipe.yaml"), "--port", str(free_port())]) == 2
    assert f"rollout.vllm.engine_args: {key} are set by other keys or by entcov" in capsys.readouterr().err


# ---- weights by file -----------------------------------------------------------------------------------------------


def test_a_server_reads_the_trainer_s_file_and_no_other(tmp_path):
    read = []

    class Engine:
        leads = True
        start_weight_update = finish_weight_update = staticmethod(lambda *_: None)

        def update_weights(self, update_info):
            read.append(check_weights_file(update_info["path"]))

    ByFile().send(Engine(), [], iter(()), "1")
    assert len(read) == 1
    folder = tmp_path / "weights"
    folder.mkdir(mode=0o700)
    file = folder / "w.safetensors"
    file.write_bytes(b"")
    assert check_weights_file(str(file)) == str(file)
    (folder / "link.safetensors").symlink_to(file)
    os.mkfifo(folder / "pipe.safetensors")
    (folder / "folder.safetensors").mkdir()
    (folder / "w.bin").write_bytes(b"")
    for path in (
        *(str(folder / name) for name in ("link.safetensors", "pipe.safetensors", "folder.safetensors", "w.bin", "no")),
        "w.safetensors", "/etc/passwd", "/dev/zero", "/nowhere/w.safetensors", "/tmp/\0.safetensors", None, 3,
    ):  # fmt: skip
        with pytest.raises(ValueError, match="update_info.path: must be a regular .safetensors file"):
            check_weights_file(path)
    folder.chmod(0o777)
    with pytest.raises(ValueError, match="in a folder that only this user may write to"):
        check_weights_file(str(file))
