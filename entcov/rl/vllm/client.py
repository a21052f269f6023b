"""The client of a vLLM server: requests and weight updates over vLLM's HTTP routes.

The routes are those of a vLLM server with VLLM_SERVER_DEV_MODE=1 and --enable-scale-out, which `entcov.rl.vllm.server`
starts: /inference/v1/generate (token ids in and out), the weight-transfer routes, /reset_prefix_cache, /server_info.
The weights themselves go by NCCL or CUDA IPC between GPUs, by a file on CPU. Every request carries the server's
token (entcov/rl/vllm/token.py); a route that is called here must be among the guard's (entcov/rl/vllm/guard.py).
"""

import base64
import contextlib
import json
import pickle
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

import torch
from transformers import AutoConfig

from entcov.rl.config import VllmConfig
from entcov.rl.threads import submit
from entcov.rl.vllm.engine import Completion, Request, sampling_arguments
from entcov.rl.vllm.token import client_token
from entcov.rl.vllm.weight_sync import ByFile, ExpectedWeights, Transport

_LIMIT = 3600.0  # seconds without an answer after which a server counts as dead; a long response is one answer


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirection is an error: followed, it would take the token to another server."""

    def redirect_request(self, *_: object) -> None:
        return None


_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirect)


class ServerEngine:
    """A running server as an engine. Of several processes of the trainer that share it, rank 0 sends the commands.

    Args:
        settings: `rollout.vllm`; `max_num_seqs` is the number of concurrent requests.
        expected: the weights that the trainer sends.
        max_model_len: tokens of the longest prompt and response together.
        dtype: of weights and computation.

    Raises:
        RuntimeError: nothing answers, or it is no vLLM server with the routes above.
        ValueError: there is no token for it. Or it serves another model, or was started with settings that would sample
            another policy.
    """

    def __init__(
        self, settings: VllmConfig, expected: ExpectedWeights, *, max_model_len: int, dtype: torch.dtype
    ) -> None:
        self.url = settings.url.rstrip("/")
        self._token = client_token(self.url)
        self.leads = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
        self._at_once = settings.max_num_seqs
        try:
            config = self._call("GET", "/server_info?config_format=json")["vllm_config"]
        except RuntimeError as error:
            raise RuntimeError(f"rollout.vllm.url: {error} (python -m entcov.rl.vllm.server starts one)") from error
        _check(config, expected, max_model_len, dtype)
        self.backend: str = config["weight_transfer_config"]["backend"]

    def transport(self) -> Transport:
        """How weights are sent to the server, as it was started."""
        if self.backend == "entcov":
            if self.leads:
                self.init_weight_transfer_engine({})
            return ByFile()
        from entcov.rl.vllm.engine import import_vllm

        import_vllm()
        from entcov.rl.vllm.transfer import Native

        return Native(self.backend, workers=self._call("GET", "/get_world_size")["world_size"])

    def generate(self, requests: Sequence[Request]) -> Iterator[tuple[int, Completion]]:
        """(number of the request, its response), each as soon as it is complete."""
        pool = ThreadPoolExecutor(min(self._at_once, max(1, len(requests))), thread_name_prefix="entcov-vllm")
        waiting = {submit(pool, self._complete, request): number for number, request in enumerate(requests)}
        try:
            for done in as_completed(waiting):
                yield waiting[done], done.result()
        except BaseException:
            for future in waiting:
                future.cancel()
            with contextlib.suppress(RuntimeError):  # the server may be what has failed
                self._call("POST", "/abort_requests", {})  # each running request then gets an answer
            raise
        finally:
            pool.shutdown()

    def _complete(self, request: Request) -> Completion:
        body = {"token_ids": list(request.prompt), "sampling_params": sampling_arguments(request)}
        answer, prompt = self._call("POST", "/inference/v1/generate", body), None
        choice = answer["choices"][0]
        logprob = [position["logprob"] for position in choice["logprobs"]["content"]]
        if request.prompt_logprob:
            pairs = list(zip(answer["prompt_logprobs"], request.prompt, strict=True))[1:]  # the first token has none
            prompt = [chosen[str(token)]["logprob"] for chosen, token in pairs]
        versions = tuple(span["version"] for span in choice["weight_versions"])
        return Completion(choice["token_ids"], logprob, versions, prompt)

    def sleep(self, *, sync_follows: bool) -> bool:
        return False  # its memory is its own

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self._call("POST", "/init_weight_transfer_engine", {"init_info": init_info})

    def start_weight_update(self) -> None:
        self._call("POST", "/start_weight_update")

    def update_weights(self, update_info: dict[str, Any]) -> None:
        if "ipc_handles" in update_info:  # no JSON; vLLM's worker takes them pickled where the server allows it
            handles = base64.b64encode(pickle.dumps(update_info["ipc_handles"])).decode()
            update_info = {k: v for k, v in update_info.items() if k != "ipc_handles"}
            update_info["ipc_handles_pickled"] = handles
        self._call("POST", "/update_weights", {"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._call("POST", "/finish_weight_update", {"weight_version": weight_version})

    def reset_prefix_cache(self) -> bool:
        empty = self._call("POST", "/reset_prefix_cache")["success"] if self.leads else True
        if torch.distributed.is_initialized():
            torch.distributed.barrier()  # no process may send a request before the weights have arrived
        return empty

    def _call(self, method: str, route: str, body: dict[str, Any] | None = None) -> Any:
        """The answer to one request.

        Raises:
            RuntimeError: no answer, or an error; the message has the server's own words.
        """
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self._token.value}"}
        request = urllib.request.Request(self.url + route, data=data, method=method, headers=headers)
        try:
            with _DIRECT.open(request, timeout=_LIMIT) as answer:
                return json.loads(answer.read())
        except urllib.error.HTTPError as error:
            if error.code == 401:
                raise RuntimeError(
                    f"{method} {self.url}{route}: the server refused the token of {self._token.source}; it must be the "
                    "one that the server was started with"
                ) from None
            words = error.read().decode(errors="replace")[:2000]
            raise RuntimeError(f"{method} {self.url}{route}: vLLM answered {error.code}: {words}") from error
        except (OSError, ValueError) as error:
            raise RuntimeError(f"{method} {self.url}{route}: no answer of a vLLM server ({error})") from error


def _check(config: dict[str, Any], expected: ExpectedWeights, max_model_len: int, dtype: torch.dtype) -> None:
    """Raises ValueError where the server was started with settings that do not fit."""
    model, transfer = config["model_config"], config["weight_transfer_config"]
    faults = []
    if transfer is None or transfer["backend"] not in ("entcov", "nccl", "ipc"):
        backend = None if transfer is None else transfer["backend"]
        faults.append(f"--weight-transfer-config: its backend must be entcov, nccl or ipc, is {backend}")
    if model["logprobs_mode"] != "processed_logprobs":
        faults.append(f"--logprobs-mode: must be processed_logprobs, is {model['logprobs_mode']}")
    if model["dtype"] != str(dtype):
        faults.append(f"--dtype: must be {dtype}, as model.compute_dtype, is {model['dtype']}")
    if model["max_model_len"] < max_model_len:
        faults.append(
            f"--max-model-len: must be at least {max_model_len} (data.max_prompt_length + "
            f"rollout.max_response_length), is {model['max_model_len']}"
        )
    try:
        served = ExpectedWeights(AutoConfig.from_pretrained(model["model"]))
    except (OSError, ValueError) as error:
        faults.append(f"model {model['model']}: its configuration cannot be read here, to compare the weights: {error}")
    else:
        if not served.same_as(expected):
            faults.append(f"model {model['model']}: its weights are not those of the recipe's model")
    if faults:
        raise ValueError(
            "rollout.vllm.url: the server does not fit the recipe; start one with python -m entcov.rl.vllm.server "
            "RECIPE\n" + "\n".join(f"  {fault}" for fault in faults)
        )
