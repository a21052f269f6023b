"""Short runs of TRL's GRPOTrainer and of EntcovGRPOTrainer: a Qwen2 of 10,000 parameters, four optimizer steps.

Completions are made of a hash of (generation batch, row), so they are the same for every division over processes.
"""

import random
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from trl import GRPOConfig, GRPOTrainer

from entcov.integrations.trl import EntcovGRPOTrainer

ROWS, GROUP, LENGTH = 16, 4, 8  # of a generation batch; responses to a prompt; longest response
EOS, FIRST_CHARACTER = 1, 3
DIGITS = "0123456789"


def tokenizer():
    vocab = {"<pad>": 0, "<eos>": EOS, "<unk>": 2, **{chr(c): c - 32 + FIRST_CHARACTER for c in range(32, 127)}}
    words = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    words.pre_tokenizer, words.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )


def tiny_model():
    torch.manual_seed(0)
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=98, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=False, eos_token_id=EOS,
            pad_token_id=0, bos_token_id=None, initializer_range=0.3,
        )
    )  # fmt: skip


def reward(prompts, completions, **_):
    """The share of digits, in [0, 1]."""
    return [sum(c in DIGITS for c in text) / LENGTH for text in completions]


def with_tools(prompts, trainer):
    """Every third token of a completion is what a tool returned."""
    found = hashed_completions(prompts, trainer)
    return {**found, "env_mask": [[int(i % 3 != 1) for i in range(len(ids))] for ids in found["completion_ids"]]}


def hashed_completions(prompts, trainer):
    """TRL's rollout_func: the completions of (generation batch, row of all processes)."""
    batch, first = trainer.state.global_step, trainer.accelerator.process_index * len(prompts)
    completions = []
    for row in range(first, first + len(prompts)):
        draw = random.Random(1000 * batch + row)
        length = draw.randint(1, LENGTH)
        ids = [draw.randrange(FIRST_CHARACTER, 60) for _ in range(length)]
        completions.append(ids if length == LENGTH else [*ids[:-1], EOS])
    ids = [trainer.processing_class(prompt)["input_ids"] for prompt in prompts]
    return {"prompt_ids": ids, "completion_ids": completions, "logprobs": None}


@dataclass
class Run:
    trainer: GRPOTrainer
    parameters: torch.Tensor
    logs: list[dict]

    def logged(self, name: str) -> list[float]:
        return [log[name] for log in self.logs if name in log]


def settings(folder: Path, rows: int = 8, **changed) -> GRPOConfig:
    """`rows`: of a micro-batch. One window is a whole generation batch unless steps_per_generation is given."""
    values = {
        "output_dir": str(folder), "per_device_train_batch_size": rows, "num_generations": GROUP,
        "max_completion_length": LENGTH, "gradient_accumulation_steps": ROWS // rows, "num_iterations": 2,
        "max_steps": 4, "logging_steps": 1, "report_to": [], "save_strategy": "no", "use_cpu": True, "bf16": False,
        "learning_rate": 0.02, "optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 1e9,
        "disable_tqdm": True, "seed": 0, "logging_first_step": False,
    }  # fmt: skip
    return GRPOConfig(**(values | changed))


def made(
    folder: Path, controls=None, *, cls=None, rollout=hashed_completions, model=None, rewards=reward, **changed
) -> GRPOTrainer:
    """controls=None: TRL's trainer. rollout=None: the model's own samples, not the hashed ones."""
    cls = cls or (GRPOTrainer if controls is None else EntcovGRPOTrainer)
    others = {} if controls is None else {"controls": controls}
    return cls(
        model=model or tiny_model(),
        reward_funcs=rewards,
        args=settings(folder, **changed),
        train_dataset=Dataset.from_dict({"prompt": [f"{a}+{b}=" for a in range(4) for b in range(4)]}),
        processing_class=tokenizer(),
        rollout_func=rollout,
        **others,
    )


def finished(trainer: GRPOTrainer, resume: str | None = None) -> Run:
    trainer.train(resume_from_checkpoint=resume)
    parameters = torch.cat([p.detach().flatten() for p in trainer.accelerator.unwrap_model(trainer.model).parameters()])
    return Run(trainer, parameters, trainer.state.log_history)


def run(folder: Path, controls=None, **changed) -> Run:
    return finished(made(folder, controls, **changed))


class Recorded(EntcovGRPOTrainer):
    """Keeps the numbers of the tokens that every optimizer step selected on this process: `chosen` [step][control]."""

    def _open_window(self):
        super()._open_window()
        step = []
        for column in zip(*self._update.selections, strict=True):
            ids = []
            for numbers, one in zip(self._update._token_ids, column, strict=True):
                if one is not None and (one.mask is not None or one.drop is not None):
                    ids += numbers[one.mask if one.mask is not None else one.drop].tolist()
            step.append(sorted(ids))
        self.chosen = [*getattr(self, "chosen", []), step]
