"""Sampling with vLLM, in the trainer's processes or on a server, and the way of weights to it."""
