"""Downloads the archives of the implementations that `python -m benchmarks gpu --rivals FOLDER` compares with (17 MB).

Run it on a machine with a network and take the folder to the one with the GPU. Nothing is installed.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path)


def run(args: argparse.Namespace) -> int:
    from benchmarks.gpu.rivals import RIVALS, find

    args.folder.mkdir(parents=True, exist_ok=True)
    wanted = dict.fromkeys(requirement for rival in RIVALS.values() for requirement in rival.requirements)
    failed = []
    for requirement in wanted:
        if find(requirement, args.folder) is None:
            print(requirement, flush=True)
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
                       "--no-build-isolation", "-d", str(args.folder), requirement]  # fmt: skip
            # pip builds an sdist's metadata; flash-attention's would need a CUDA toolkit for that.
            environment = {**os.environ, "FLASH_ATTENTION_SKIP_CUDA_BUILD": "TRUE"}
            if subprocess.run(command, env=environment).returncode or find(requirement, args.folder) is None:
                failed.append(requirement)
    size = sum(p.stat().st_size for p in args.folder.iterdir()) / 1e6
    print(f"{args.folder}: {len(wanted) - len(failed)} of {len(wanted)} archives, {size:.1f} MB")
    if failed:
        print(f"not downloaded: {', '.join(failed)}")
    return 1 if failed else 0
