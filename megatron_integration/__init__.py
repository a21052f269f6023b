"""entcov on Megatron-Core: statistics and losses for its models, and the trainer's actor. See README.md."""
