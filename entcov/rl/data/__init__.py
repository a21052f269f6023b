"""Prompts: data sets, their order over a run, and their tokens."""
