"""Statistics of the policy at every token, exact on vocabulary shards, with gradients to the logits."""
