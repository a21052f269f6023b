"""Starts the vLLM server that a recipe with `rollout.vllm.mode: server` samples from.

    python -m entcov.rl.vllm.server RECIPE [key=value ...] [--host HOST] [--port PORT] [--transfer nccl|ipc]

It is vLLM's own server, with arguments from the recipe, behind a token (entcov/rl/vllm/token.py) and a
list of routes (entcov/rl/vllm/guard.py); it replaces this process. It listens on 127.0.0.1 unless --host is given.
"""

import argparse
import json
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from entcov.rl.config import Config
from entcov.rl.hf.model import build_model
from entcov.rl.load_config import load_config
from entcov.rl.recipe import ConfigError
from entcov.rl.vllm.engine import engine_arguments, save_configuration
from entcov.rl.vllm.guard import ARGUMENTS
from entcov.rl.vllm.token import VARIABLE, server_token

_FOLDER = "vllm_model"  # in the run's folder: the configuration of a model that the recipe spells out


def server_arguments(
    config: Config, *, host: str, port: int, transfer: str, cpu: bool
) -> tuple[list[str], dict[str, str]]:
    """The arguments of a vLLM server for the recipe's model, and the environment variables that it needs.

    Args:
        transfer: how weights come, "nccl" or "ipc"; on CPU they come by file.
    """
    meta = torch.device("meta")
    if config.model.path is not None:
        model, source = AutoConfig.from_pretrained(config.model.path), config.model.path
    else:
        with meta:
            model = build_model(config.model, seed=0, device=meta)[0].config
        folder = Path(config.run_dir) / _FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        save_configuration(model, folder)
        source = str(folder.resolve())
    longest = config.data.max_prompt_length + config.rollout.max_response_length
    dtype = getattr(torch, config.model.compute_dtype)
    arguments = {
        "model": source,
        "host": host,
        "port": port,
        **engine_arguments(model, config.rollout.vllm, max_model_len=longest, dtype=dtype, cpu=cpu),
        "weight_transfer_config": {"backend": "entcov" if cpu else transfer},
        "middleware": "entcov.rl.vllm.guard.Guard",
        "disable_fastapi_docs": True,
        "enable_scale_out": True,  # the route that takes token ids
        "disable_uvicorn_access_log": True,
    }
    environment = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_NO_USAGE_STATS": "1"}
    if cpu:
        arguments["worker_extension_cls"] = "entcov.rl.vllm.transfer.WorkerExtension"
        environment |= {"TORCHDYNAMO_DISABLE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    elif transfer == "ipc":
        environment["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # handles of the trainer's memory come pickled
    return _flags(arguments), environment


def _flags(arguments: dict[str, Any]) -> list[str]:
    flags = []
    for name, value in arguments.items():
        flag = "--" + name.replace("_", "-")
        if value is True:
            flags.append(flag)
        elif value is not None and value is not False:
            flags += [flag, json.dumps(value) if isinstance(value, dict | list) else str(value)]
    return flags


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m entcov.rl.vllm.server", description=__doc__.partition("\n")[0])
    parser.add_argument("recipe", help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as for train")
    parser.add_argument("--host", default="127.0.0.1", help="interface to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="default: %(default)s")
    parser.add_argument(
        "--transfer", choices=("nccl", "ipc"), default="nccl",
        help="how weights come: nccl from other GPUs (default), ipc from a trainer on the same GPU",
    )  # fmt: skip
    options = parser.parse_args(argv)
    try:
        config = load_config(options.recipe, options.overrides)
        arguments, environment = server_arguments(
            config, host=options.host, port=options.port, transfer=options.transfer, cpu=not torch.cuda.is_available()
        )
        _check_free(options.host, options.port)  # before a new token replaces that of a running server
        token = server_token(options.port)
    except (ConfigError, ValueError, OSError) as error:
        print(f"vllm.server: {error}", file=sys.stderr)
        return 2
    print(f"vllm.server: the token is in {token.source}", file=sys.stderr, flush=True)
    environment = os.environ | environment | {VARIABLE: token.value, ARGUMENTS: json.dumps(arguments)}
    environment.pop("VLLM_API_KEY", None)  # vLLM would ask for a second token
    os.execve(sys.executable, [sys.executable, "-m", "entcov.rl.vllm.guard"], environment)
    raise AssertionError("unreachable")


def _check_free(host: str, port: int) -> None:
    if not 0 < port < 65536:
        raise ValueError(f"--port: must be in [1, 65535], got {port}")
    try:
        socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except OSError as error:
        raise ValueError(f"--host, --port: cannot listen on {host}, port {port}: {error.strerror or error}") from None


if __name__ == "__main__":
    sys.exit(main())
