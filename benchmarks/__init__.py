"""Benchmarks of entcov: `python -m benchmarks NAME --help`. Nothing here is imported by the package."""
