"""The registered ops: one file per op, and core.py, which registers and launches them. docs/ops.md documents them."""
