"""`python -m benchmarks NAME`: one module a benchmark, each with add_arguments(parser) and run(args) -> exit code."""

import argparse
import sys
from importlib import import_module

# Only the module of the chosen benchmark is imported: `gpu` has to start before entcov is built.
BENCHMARKS = {
    "ops": ("benchmarks.ops_benchmark", "token_stats against eager and compiled torch on this CPU; the ops' host time"),
    "linear": ("benchmarks.linear_benchmark", "linear_token_stats against materialised logits and chunked heads, CPU"),
    "head": ("benchmarks.head_benchmark", "the transformers actor's statistics from logits or from hidden states, CPU"),
    "selection": ("benchmarks.selection_benchmark", "the selections of Clip-Cov and KL-Cov against topk and randperm"),
    "batch": ("benchmarks.batch_benchmark", "packing and dividing a rollout batch on the host: time, memory, growth"),
    "splits": ("benchmarks.splits", "selections of verl, of TRL and ours over micro-batches; in .venv-verl, .venv-trl"),
    "static": ("benchmarks.static_evidence", "registers, spills and cost of the CUDA kernels' machine code; no GPU"),
    "events": ("benchmarks.event_model", "a model of the share of the bandwidth that a kernel reaches; no GPU"),
    "gpu": ("benchmarks.gpu", "on a machine with a GPU: build, tests, sanitizer, benchmarks with rivals, trainings"),
    "rivals": ("benchmarks.fetch_rivals", "download what `gpu --rivals FOLDER` compares with"),
}


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = _parser(argv)
    args = parser.parse_args(argv)
    if args.name is None:
        parser.print_help()
        return 2
    return import_module(BENCHMARKS[args.name][0]).run(args)


def _parser(argv: list[str]) -> argparse.ArgumentParser:
    """For these arguments: it knows the options of the benchmark that they name alone."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    names = parser.add_subparsers(dest="name", metavar="NAME")
    for name, (module, summary) in BENCHMARKS.items():
        chosen = names.add_parser(name, help=summary)
        if argv[:1] == [name]:
            chosen.description = import_module(module).__doc__
            chosen.formatter_class = argparse.RawDescriptionHelpFormatter
            import_module(module).add_arguments(chosen)
    return parser


if __name__ == "__main__":
    sys.exit(main())
