"""`python -m benchmarks NAME`: one module a benchmark, each with add_arguments(parser) and run(args) -> exit code."""

import argparse
import sys

from benchmarks import fetch_rivals, gpu, ops_benchmark, static_evidence

BENCHMARKS = {"ops": ops_benchmark, "static": static_evidence, "gpu": gpu, "rivals": fetch_rivals}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    names = parser.add_subparsers(dest="name")
    for name, module in BENCHMARKS.items():
        module.add_arguments(names.add_parser(name, help=module.__doc__.splitlines()[0]))
    args = parser.parse_args(argv)
    if args.name is None:
        parser.print_help()
        return 2
    return BENCHMARKS[args.name].run(args)


if __name__ == "__main__":
    sys.exit(main())
