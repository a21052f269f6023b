"""Statistics and gradients from hidden states, without storing all logits: python examples/ops_linear.py"""

import torch

from entcov import linear_token_stats, token_stats

torch.manual_seed(0)
tokens, width, vocab = 512, 64, 32000
hidden = torch.randn(tokens, width).bfloat16().requires_grad_()  # what the last layer returns
weight = (0.3 * torch.randn(vocab, width)).bfloat16().requires_grad_()  # the LM head
target = torch.randint(0, vocab, (tokens,))
advantage = torch.randn(tokens)


def gradients(stats):
    loss = -(advantage * stats.logprob + 0.001 * stats.entropy).mean()
    return torch.autograd.grad(loss, (hidden, weight))


# All logits would take 32 MB. A budget of 8 MB gives four chunks of 128 tokens, computed forward and again in backward.
stats = linear_token_stats(hidden, weight, target, temperature=0.9, memory_budget=2**23)
found = gradients(stats)
expected = token_stats(hidden @ weight.T, target, temperature=0.9)
wanted = gradients(expected)

print("entropy of the first tokens:", stats.entropy[:4].tolist())
print(f"largest difference of an entropy: {(stats.entropy - expected.entropy).abs().max():.1e}")
for name, a, b in zip(("hidden", "weight"), found, wanted, strict=True):
    print(f"gradient of {name} {tuple(a.shape)}: relative difference {(a - b).norm() / b.norm():.1e}")
