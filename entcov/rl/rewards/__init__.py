"""Rewards of responses: the rules of the data sets, and the threads that apply them."""
