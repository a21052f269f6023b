"""Entropy controls in trainers of others: one class for any training loop, and a package for each trainer."""
