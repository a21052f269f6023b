"""`python -m benchmarks NAME`: one module a benchmark, each with add_arguments(parser) and run(args) -> exit code."""

import argparse
import sys

from benchmarks import ops_benchmark

BENCHMARKS = {"ops": ops_benchmark}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    names = parser.add_subparsers(dest="name", required=True)
    for name, module in BENCHMARKS.items():
        module.add_arguments(names.add_parser(name, help=module.__doc__.splitlines()[0]))
    args = parser.parse_args(argv)
    return BENCHMARKS[args.name].run(args)


if __name__ == "__main__":
    sys.exit(main())
