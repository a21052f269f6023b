"""The trainer: from a recipe to a trained policy."""
