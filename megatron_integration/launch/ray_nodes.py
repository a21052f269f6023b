"""Runs a launch script on every node of a Ray cluster: `python ray_nodes.py --nodes N SCRIPT PRESET key=value ...`.

Ray chooses the nodes and reserves their GPUs; torchrun starts the processes, as without Ray. `ray_job.sh` submits this.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path


def free_port() -> tuple[str, int]:
    """(address, free port) of the node that this runs on."""
    import ray

    with socket.socket() as probe:
        probe.bind(("", 0))
        return ray.util.get_node_ip_address(), probe.getsockname()[1]


def run_node(rank: int, nodes: int, gpus: int, address: str, port: int, repository: str, command: list[str]) -> int:
    """The script on this node, as rank `rank`; its exit code. Its processes end with this one."""
    environment = os.environ | {
        "NUM_NODES": str(nodes), "NODE_RANK": str(rank), "GPUS_PER_NODE": str(gpus), "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
    }  # fmt: skip
    script = str(Path(repository) / "megatron_integration" / "launch" / command[0])
    process = subprocess.Popen([script, *command[1:]], cwd=repository, env=environment, start_new_session=True)
    try:
        return process.wait()
    finally:
        if process.poll() is None:  # Ray cancels the task: torchrun and its workers must not outlive it
            os.killpg(process.pid, signal.SIGTERM)


def main(argv: list[str] | None = None) -> int:
    """Starts the script on all nodes and waits; the first node that fails ends the others. Returns an exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--gpus-per-node", type=int, default=8)
    parser.add_argument("--repository", default=str(Path(__file__).resolve().parents[2]))
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="SCRIPT PRESET key=value ...")
    args = parser.parse_args(argv)
    if not args.command:
        parser.error("SCRIPT: must be given")

    import ray
    from ray.util.placement_group import placement_group, remove_placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    ray.init()
    group = placement_group([{"GPU": args.gpus_per_node, "CPU": 1}] * args.nodes, strategy="STRICT_SPREAD")
    ray.get(group.ready())

    def on_node(function, rank: int, gpus: int):
        strategy = PlacementGroupSchedulingStrategy(placement_group=group, placement_group_bundle_index=rank)
        return ray.remote(function).options(num_gpus=gpus, num_cpus=1, scheduling_strategy=strategy, max_retries=0)

    address, port = ray.get(on_node(free_port, 0, 0).remote())
    waiting = {}
    for rank in range(args.nodes):
        arguments = (rank, args.nodes, args.gpus_per_node, address, port, args.repository, args.command)
        waiting[on_node(run_node, rank, args.gpus_per_node).remote(*arguments)] = rank
    try:
        while waiting:
            (done,), _ = ray.wait(list(waiting), num_returns=1)
            rank, code = waiting.pop(done), ray.get(done)
            if code:
                print(f"error: node {rank} ended with exit code {code}; ending the others", file=sys.stderr)
                return code
        return 0
    finally:
        for task in waiting:
            ray.cancel(task)
        remove_placement_group(group)


if __name__ == "__main__":
    sys.exit(main())
