"""Memory, traffic and time of a large recipe, worked out without a GPU."""
