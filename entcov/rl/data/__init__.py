"""Data sets, the order of their prompts in a run, and their tokens."""
