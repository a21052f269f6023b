"""Faults planted in the Python code, and the tests that must fail by each: `python -m tests.planted_faults`."""
