"""GRPO by TRL with entcov's entropy controls: a model of the hub on GSM8K, or a tiny one without a network (--tiny).

    accelerate launch examples/trl_grpo.py --model_name_or_path Qwen/Qwen2.5-1.5B-Instruct --controls clip_cov \
        --output_dir run --per_device_train_batch_size 8 --gradient_accumulation_steps 8 --num_generations 8 \
        --max_completion_length 1024 --learning_rate 1e-6 --bf16 --use_vllm

    accelerate launch --cpu examples/trl_grpo.py --tiny --output_dir run          # half a minute
    torchrun --nproc_per_node 2 examples/trl_grpo.py --tiny --output_dir run      # two processes on the CPU: accelerate
                                                                                  # --cpu starts several by MPI alone

All options of TRL's GRPOConfig, ModelConfig (--use_peft ...) and ScriptArguments (--dataset_name ...) are there.
"""

import re
import sys
from dataclasses import dataclass, field

from datasets import Dataset, load_dataset
from trl import GRPOConfig, ModelConfig, ScriptArguments, TrlParser, get_peft_config

from entcov.controls import make_control
from entcov.integrations.trl import EntcovGRPOTrainer

TINY = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "num_generations": 4, "max_steps": 6,
        "max_completion_length": 8, "learning_rate": 1e-2, "logging_steps": 1, "num_iterations": 2, "report_to": [],
        "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "save_strategy": "no",
        "disable_tqdm": True}  # fmt: skip

# The published shares are of hundreds of thousands of tokens; a tiny step has about a hundred.
TINY_KNOBS = {"clip_cov": {"clip_cov_ratio": 0.05, "clip_cov_lb": 0.1}, "kl_cov": {"kl_cov_ratio": 0.05}}


@dataclass
class ExampleArguments(ScriptArguments):
    dataset_name: str = "openai/gsm8k"
    dataset_config: str = "main"
    controls: list[str] = field(
        default_factory=lambda: ["clip_cov"], metadata={"help": "names of entcov.controls.CONTROLS; none: TRL's loss"}
    )
    tiny: bool = field(default=False, metadata={"help": "a tiny model and generated prompts; no network"})


def last_number(text: str) -> str | None:
    numbers = re.findall(r"-?[\d,]*\.?\d+", text)
    return numbers[-1].replace(",", "") if numbers else None


def correct(completions, answer, **_):
    """1 where the last number of the completion is that of the answer."""
    texts = [one if isinstance(one, str) else one[0]["content"] for one in completions]
    return [float(last_number(text) == last_number(own)) for text, own in zip(texts, answer, strict=True)]


def gsm8k(arguments: ExampleArguments) -> Dataset:
    rows = load_dataset(arguments.dataset_name, arguments.dataset_config, split=arguments.dataset_train_split)
    return rows.map(
        lambda row: {"prompt": [{"role": "user", "content": row["question"] + "\nEnd with the number alone."}]},
        remove_columns=["question"],
    )


def tiny():
    """(model, tokenizer, data): a Qwen2 of 30,000 parameters on characters; rewards are for digits."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, set_seed

    vocab = {"<pad>": 0, "<eos>": 1, "<unk>": 2, **{c: i + 3 for i, c in enumerate("0123456789+=-*abcdefgh")}}
    words = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    words.pre_tokenizer, words.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )
    set_seed(0)
    config = Qwen2Config(
        vocab_size=len(vocab), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    return Qwen2ForCausalLM(config), tokenizer, Dataset.from_dict({"prompt": [f"{n}=" for n in range(64)]})


def digits(completions, **_):
    return [sum(c.isdigit() for c in text) / TINY["max_completion_length"] for text in completions]


if __name__ == "__main__":
    parser = TrlParser((ExampleArguments, GRPOConfig, ModelConfig))
    if "--tiny" in sys.argv:
        parser.set_defaults(**TINY)
    arguments, args, model_arguments = parser.parse_args_and_config()
    names = arguments.controls
    if arguments.tiny:
        model, tokenizer, data = tiny()
        rewards = digits
    else:
        model, tokenizer, data, rewards = model_arguments.model_name_or_path, None, gsm8k(arguments), correct
        args.model_init_kwargs = {"dtype": model_arguments.dtype, "revision": model_arguments.model_revision}
    trainer = EntcovGRPOTrainer(
        model=model,
        reward_funcs=rewards,
        args=args,
        train_dataset=data,
        processing_class=tokenizer,
        peft_config=None if arguments.tiny else get_peft_config(model_arguments),
        controls=[make_control(name, **(TINY_KNOBS.get(name, {}) if arguments.tiny else {})) for name in names],
    )
    trainer.train()
    if args.save_strategy != "no":
        trainer.save_model()
