"""Exact, fast entropy control for reinforcement learning of large language models.

Statistics of the policy at every token, exact on vocabulary shards (`token_stats`, `linear_token_stats`,
`logit_covariance`), the policy loss with its entropy controls (`policy_loss`, entcov.controls), and the law of entropy
and reward (`fit_law`). The trainer is entcov.rl; `python -m entcov` runs it.
"""

from entcov.law import Law, fit_law
from entcov.objective.policy_loss import policy_loss
from entcov.objective.tokens import PolicyLossConfig, Tokens, Totals
from entcov.stats.linear_token_stats import linear_token_stats
from entcov.stats.logit_covariance import LogitCovariance, logit_covariance
from entcov.stats.token_stats import TokenStats, token_stats

__all__ = [
    "Law",
    "LogitCovariance",
    "PolicyLossConfig",
    "TokenStats",
    "Tokens",
    "Totals",
    "fit_law",
    "linear_token_stats",
    "logit_covariance",
    "policy_loss",
    "token_stats",
]
