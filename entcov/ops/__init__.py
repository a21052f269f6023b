"""The registered ops: one file each, and core, which registers and launches them. docs/ops.md says what they compute."""
