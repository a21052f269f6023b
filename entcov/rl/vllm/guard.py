"""Protects the HTTP routes of a vLLM server: a token, and a list of the routes that the trainer uses.

vLLM's own --api-key guards /v1, /v2, /inference and /cohere alone: /collective_rpc, /update_weights, /server_info,
/invocations, /metrics and the documentation stay open to everybody who reaches the port (vLLM 0.32). `Guard` is
the outermost ASGI middleware instead. It answers 401 to every request without the token, and 404 to every route that
is not in `ROUTES`, so that routes which a later vLLM adds are closed too.

`python -m entcov.rl.vllm.guard` is vLLM's server. It takes its arguments from an environment variable that
`entcov.rl.vllm.server` sets, because every user of the machine can read a command line.
"""

import hmac
import json
import os
import sys
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from entcov.rl.vllm.token import VARIABLE, Token

ARGUMENTS = "ENTCOV_VLLM_ARGUMENTS"  # the server's command line, in JSON
ROUTES = frozenset(
    {
        ("GET", "/health"),
        ("GET", "/server_info"),
        ("GET", "/get_world_size"),
        ("POST", "/inference/v1/generate"),
        ("POST", "/abort_requests"),
        ("POST", "/init_weight_transfer_engine"),
        ("POST", "/start_weight_update"),
        ("POST", "/update_weights"),
        ("POST", "/finish_weight_update"),
        ("POST", "/reset_prefix_cache"),
    }
)

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Message, Receive, Send], Awaitable[None]]


class Guard:
    """ASGI middleware in front of `app`, with the token of ENTCOV_VLLM_TOKEN.

    Raises:
        RuntimeError: the variable is not set.
        ValueError: it holds no token.
    """

    def __init__(self, app: Application) -> None:
        if VARIABLE not in os.environ:
            raise RuntimeError(f"{VARIABLE}: must be set; start the server with python -m entcov.rl.vllm.server")
        self.app = app
        self._expected = f"Bearer {Token(os.environ[VARIABLE], VARIABLE).value}".encode()

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif not self._has_token(scope):
            await _refuse(scope, send, 401, "the Authorization header does not hold the server's token")
        elif scope["type"] != "http" or (scope["method"], scope["path"]) not in ROUTES:
            await _refuse(scope, send, 404, "this server has the routes of entcov's trainer alone")
        else:
            await self.app(scope, receive, send)

    def _has_token(self, scope: Message) -> bool:
        given = [value for name, value in scope.get("headers", ()) if name == b"authorization"]
        return len(given) == 1 and hmac.compare_digest(given[0], self._expected)


async def _refuse(scope: Message, send: Send, status: int, reason: str) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008, "reason": reason})  # before it is accepted: status 403
        return
    body = json.dumps({"error": reason}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def main() -> None:
    """Runs vLLM's server. `vllm serve` looks for a distribution named vllm, which the CPU build is not; this is it."""
    sys.argv = ["vllm", *json.loads(os.environ.pop(ARGUMENTS))]
    from vllm.entrypoints.launchers.api_server.entry import main as serve

    serve()


if __name__ == "__main__":
    main()
