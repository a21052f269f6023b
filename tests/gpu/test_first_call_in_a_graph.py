"""Every public function may be called for the first time in a process while a CUDA graph is captured: nothing has to be
warmed up. What a first call sets up is that kernels are loaded (csrc/cuda/launch.h); there is no cache, no workspace
that outlives a call, no attribute of a function.
"""

import sys

import pytest

from tests.support.gpu_inputs import gpu_only
from tests.support.on_device import DEVICE
from tests.support.processes import run_command

pytestmark = pytest.mark.skipif(DEVICE is None, reason="ENTCOV_TEST_DEVICE names no device")
SCRIPT = """
import torch
from entcov import PolicyLossConfig, Tokens, Totals, linear_token_stats, logit_covariance, policy_loss, token_stats

torch.manual_seed(0)
T, V, D = 9, 41003, 64
x, w = torch.randn(T, D, device="cuda"), torch.randn(V, D, device="cuda") / 8
target, mask = torch.arange(T, device="cuda"), torch.ones(T, device="cuda") > 0
# What is torch's own: its products, and the thread that runs backward.
warm = x.clone().requires_grad_()
(warm @ w.T).sum().backward()
old = x @ w.T


def statistics(x, **settings):
    logits = (x @ w.T).requires_grad_()
    stats = token_stats(logits, target, **settings)
    outputs = [y for y in (stats.logprob, stats.entropy, stats.clamped_entropy) if y is not None]
    return [*(y.detach() for y in outputs), *torch.autograd.grad(sum(y.sum() for y in outputs), logits)]


def covariance(x):
    logits = (x @ w.T).requires_grad_()
    change = logit_covariance(old, logits, loss_mask=mask)
    return [change.kl.detach(), *torch.autograd.grad(change.covariance.sum() + change.kl.sum(), logits)]


def head(x):
    hidden = x.clone().requires_grad_()
    stats = linear_token_stats(hidden, w, target, chunk_size=4)
    return [stats.entropy.detach(), *torch.autograd.grad(stats.logprob.sum() + stats.entropy.sum(), hidden)]


def loss(x):
    logprob = x[:, 0].clone().requires_grad_()
    tokens = Tokens(logprob, x[:, 1].contiguous(), x[:, 2].contiguous(), mask)
    return list(torch.autograd.grad(policy_loss(tokens, PolicyLossConfig(), totals=Totals(T, 1))[0], logprob))


for call in (
    statistics, lambda x: statistics(x, moments=True), lambda x: statistics(x, clamp_p=0.3), covariance, head, loss
):
    inputs, graph = x.clone(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call(inputs)
    inputs.copy_(1.5 * x + 0.1)
    graph.replay()
    for found, wanted in zip(captured, call(inputs), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)  # the library's products need not agree in bits
print("captured")
"""


@gpu_only
def test_first_calls_of_a_process_are_captured():
    done = run_command([sys.executable, "-c", SCRIPT])
    assert done.returncode == 0 and done.stdout.strip() == "captured", done.stderr[-4000:]
