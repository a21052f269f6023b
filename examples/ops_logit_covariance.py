"""Compares the entropy change of an update with the covariance's prediction: python examples/ops_logit_covariance.py"""

import torch

from entcov import logit_covariance, token_stats

torch.manual_seed(0)
logits = 2 * torch.randn(4, 1000)
target = logits.softmax(-1).multinomial(1)[:, 0]
advantage = torch.tensor([1.0, 1.0, -1.0, -1.0])

print(" step   predicted dH     true dH   relative error      KL")
for step in (0.4, 0.2, 0.1, 0.05):
    # One policy-gradient step on the logits. Each step size is half of the last one, and so is the relative error.
    leaf = logits.clone().requires_grad_()
    (gradient,) = torch.autograd.grad((advantage * token_stats(leaf, target).logprob).sum(), leaf)
    change = logit_covariance(logits, logits + step * gradient)
    predicted, true = change.predicted_entropy_change.mean(), change.entropy_change.mean()
    error = (change.predicted_entropy_change - change.entropy_change).abs().sum() / change.entropy_change.abs().sum()
    print(f"{step:5.2f}  {predicted: .6f}  {true: .6f}        {error:.4f}      {change.kl.mean():.2e}")
