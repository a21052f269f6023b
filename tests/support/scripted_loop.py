"""A scripted actor, sampler, stream and reward: every number of a step of the loop can be worked out by hand."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from entcov.rl.types import Example, Prompt, Rollout

# Of each response: its tokens, the sampler's log-probabilities, whether it is complete, its text (the reward). Prompts
# beyond the second have the responses of the first two.
RESPONSES = {
    (0, 0): ([11, 12], [-1.0, -2.0], True, "1"),
    (0, 1): ([13], [-0.5], False, "0"),
    (1, 0): ([14, 15, 16], [-1.0, -1.0, -1.0], True, "1"),
    (1, 1): ([17, 18], [-2.0, -2.0], True, "0"),
}
POLICY = {11: -1.1, 12: -1.8, 13: -0.5, 14: -1.0, 15: -1.3, 16: -1.0, 17: -2.0, 18: -2.4}  # the trainer's own


@dataclass
class Actor:
    """Scores by POLICY; its one weight is the number of its updates."""

    weight_version: int = 0
    weight: float = 0.0
    updates: list = field(default_factory=list)

    def compute_logprobs(self, batch):
        values = {
            "logprob": [POLICY.get(t, 99.0) for t in batch.target.tolist()],
            "entropy": [t / 10 for t in batch.target.tolist()],
            "entropy_drift": [float((t - 10) ** 2) for t in batch.target.tolist()],
        }
        return {name: torch.tensor(value) for name, value in values.items()}

    def update(self, batch, *, step):
        self.updates.append((step, batch))
        self.weight_version += 1
        self.weight += 0.5
        entropy = 10.0 + self.weight_version
        return {"actor/pg_loss": float(self.weight_version), "actor/lr": 0.1, "actor/entropy": entropy}

    def once_a_node(self, make):
        return make()

    def anywhere(self, mask):
        return mask

    def named_weights(self):
        yield "weight", torch.tensor(self.weight)

    def state_dict(self):
        return {"weight_version": self.weight_version, "weight": self.weight}

    def load_state_dict(self, state):
        self.weight_version, self.weight = state["weight_version"], state["weight"]


class Sampler:
    def __init__(self, takes_weights=True):
        self.calls, self.weight, self.weight_version, self.takes_weights = [], None, 0, takes_weights

    def sync(self, weight_version, named_weights):
        if self.takes_weights:
            self.weight_version, self.weight = weight_version, float(dict(named_weights())["weight"])

    def sleep(self, *, sync_follows): ...

    def generate(self, prompts, *, group_size, temperature, max_response_length, seed, progress=None, on_done=None):
        self.calls.append({"uids": [p.uid for p in prompts], "temperature": temperature, "seed": seed})
        out = []
        for prompt in prompts:
            for sample in range(group_size):
                tokens, logprob, finished, text = RESPONSES[prompt.uid % 2, sample % 2]
                out.append(Rollout(prompt, sample, tokens, logprob, finished, self.weight_version, text=text))
        return out


class Stream:
    num_rows = None

    def take(self, position, n):
        return [Prompt(uid, Example("test", (), "1"), (5, 6)[: 1 + uid % 2]) for uid in range(position, position + n)]


def reward(example, text):
    return float(text)
