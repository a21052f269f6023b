"""Exact, fast entropy control for reinforcement learning of large language models.

Statistics of the policy at every token, exact on vocabulary shards (`token_stats`, `linear_token_stats`,
`logit_covariance`), and the policy loss with its entropy controls (`policy_loss`, entcov.controls). The trainer is
entcov.rl; `python -m entcov` runs it.
"""

from entcov.linear import linear_token_stats
from entcov.losses import PolicyLossConfig, Tokens, Totals, policy_loss
from entcov.vocab_parallel import LogitCovariance, TokenStats, logit_covariance, token_stats

__all__ = [
    "LogitCovariance",
    "PolicyLossConfig",
    "TokenStats",
    "Tokens",
    "Totals",
    "linear_token_stats",
    "logit_covariance",
    "policy_loss",
    "token_stats",
]
