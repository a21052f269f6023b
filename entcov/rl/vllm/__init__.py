"""Sampling with vLLM, in the trainer's processes or on a server, and the transfer of weights to it."""
