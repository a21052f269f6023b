"""What the responses to each prompt answer: how many answers differ, and whether the most common one is right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from entcov.diagnostics import Calibration, calibration, group_answers
from entcov.rl.rewards.rules import final_answer
from entcov.rl.types import RIGHT, Rollout


@dataclass(frozen=True)
class Answers:
    """Of scored responses to some prompts, several to each."""

    distinct: float  # different answers to a prompt, mean over prompts; different texts where there is no rule
    calibration: Calibration | None  # of the most common answers, one a prompt; None: no prompt's source has a rule

    @classmethod
    def of(cls, rollouts: Sequence[Rollout]) -> Answers:
        """Answers are compared by `final_answer` where it has a rule for the data source, else responses by text."""
        given, has_rule = zip(*map(_answer, rollouts), strict=True)
        right = torch.tensor([rollout.reward >= RIGHT for rollout in rollouts])
        group = torch.tensor([rollout.prompt.uid for rollout in rollouts])
        ruled = torch.tensor(has_rule)
        sure = None
        if any(has_rule):
            own = [answer for answer, rule in zip(given, has_rule, strict=True) if rule]
            found = group_answers(own, right[ruled], group[ruled])
            sure = calibration(found.confidence, found.accuracy)
        return cls(float(group_answers(given, right, group).distinct.double().mean()), sure)


def _answer(rollout: Rollout) -> tuple[str | None, bool]:
    """(what it answers, whether the data source has a rule for that)"""
    try:
        return final_answer(rollout.prompt.example, rollout.text), True
    except ValueError:
        return rollout.text, False
