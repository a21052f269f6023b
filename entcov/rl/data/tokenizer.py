"""The trainer's tokenizers: any Hugging Face one, or a character tokenizer for models of a few 100,000 weights.

`transformers` is imported inside the functions, so that importing this module costs nothing.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from entcov import arguments as check
from entcov.rl.tasks.base import ALPHABET

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

PAD, EOS, UNK = "<pad>", "<eos>", "<unk>"  # ids 0, 1, 2; the characters follow from 3


def char_tokenizer(alphabet: str = ALPHABET) -> PreTrainedTokenizerFast:
    """A fast tokenizer with one id per character of `alphabet`, in its order, after <pad>, <eos> and <unk>.

    `decode(encode(text)) == text` for every text over the alphabet, white space included. It adds no special token by
    itself and splits the special tokens' own spellings into characters, so no text contains them. A character outside
    the alphabet becomes <unk>, which `encode` refuses. Saves and loads like every Hugging Face tokenizer, offline.

    Raises:
        ValueError: empty alphabet, or a repeated character.
    """
    repeated = sorted({char for char in alphabet if alphabet.count(char) > 1})
    if not alphabet or repeated:
        raise ValueError(f"alphabet must be a non-empty string without repeats, repeated: {repeated}")
    import transformers
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    vocab = {token: index for index, token in enumerate([PAD, EOS, UNK, *alphabet])}
    core = Tokenizer(models.WordLevel(vocab, unk_token=UNK))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    core.decoder = decoders.Fuse()  # joins without spaces
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNK,
        clean_up_tokenization_spaces=False,
        split_special_tokens=True,
    )


def load_tokenizer(source: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model directory or hub name, or a fresh character tokenizer for "char".

    A tokenizer without a padding token gets the end-of-sequence token for it: the trainer masks padding by length.

    Raises:
        ValueError: nothing loadable under that name, or a tokenizer without an end-of-sequence token.
    """
    if source == "char":
        return char_tokenizer()
    import transformers

    if os.path.sep in source and source.startswith((os.path.sep, ".")) and not os.path.isdir(source):
        raise ValueError(f"tokenizer: there is no directory {source!r}")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        said = check.one_line(str(error).partition("\n")[0])
        raise ValueError(f"tokenizer: cannot load {source!r} (a directory, a hub name or 'char'): {said}") from error
    if tokenizer.eos_token_id is None:
        raise ValueError(f"tokenizer {source!r} has no end-of-sequence token; responses could not end")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def encode(tokenizer: PreTrainedTokenizerBase, text: str, *, add_special_tokens: bool = False) -> list[int]:
    """Token ids of `text`, none of them the unknown token.

    Raises:
        ValueError: the tokenizer does not know a character of `text`; the message names it.
    """
    ids = tokenizer.encode(text, add_special_tokens=add_special_tokens)
    unk = tokenizer.unk_token_id
    if unk is not None and unk in ids:
        # Some tokenizers reuse their unknown token as padding or end: only a character that maps to it is unknown.
        unknown = sorted(c for c in set(text) if unk in tokenizer.encode(c, add_special_tokens=False))
        if unknown:
            raise ValueError(f"the tokenizer does not know {', '.join(map(repr, unknown))} in {check.shown(text)}")
    return ids
