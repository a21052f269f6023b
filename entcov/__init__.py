"""Exact, fast entropy control for reinforcement learning of large language models."""
