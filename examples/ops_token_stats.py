"""Log-probabilities and entropies of a batch, and a loss that uses them: python examples/ops_token_stats.py"""

import torch

from entcov import token_stats

torch.manual_seed(0)
vocab, tokens = 32000, 6
logits = (3 * torch.randn(2, tokens, vocab)).bfloat16().requires_grad_()  # as a model's head returns them
target = torch.randint(0, vocab, (2, tokens))
target[1, 4:] = -100  # padding: logprob 0, entropy 0, no gradient

# The logits are read once; nothing of their size is allocated. clamp_p leaves out the lowest 30 % of the vocabulary.
stats = token_stats(logits, target, temperature=0.9, clamp_p=0.3, moments=True)
print("logprob        ", stats.logprob[0].tolist())
print("entropy        ", stats.entropy[0].tolist())
print("clamped entropy", stats.clamped_entropy[0].tolist())
# The entropy change that a policy-gradient step on each sampled token alone would cause, per unit of step size.
print("entropy drift  ", stats.entropy_drift[0].tolist())

advantage = torch.randn(2, tokens)
mask = target != -100
loss = -(advantage * stats.logprob + 0.001 * stats.clamped_entropy)[mask].mean()
loss.backward()
print("loss", loss.item(), "| gradient", tuple(logits.grad.shape), logits.grad.dtype)
