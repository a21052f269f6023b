"""The character tokenizer: exact round trips, offline loading, and refusal of what it cannot spell."""

from __future__ import annotations

import random

import pytest

from entcov.rl.data.tokenizer import char_tokenizer, encode, load_tokenizer
from entcov.rl.tasks import ALPHABET, make_task

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def tokenizer():
    return char_tokenizer()


@pytest.fixture(scope="module")
def loaded(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(folder)
    return load_tokenizer(str(folder))


def texts():
    rng = random.Random(0)
    yield from ("", " ", "\n", "  \n\n  ", " a", "a ", "a  b", ". , ?", "x = 3 .", ALPHABET, ALPHABET[::-1])
    for _ in range(200):
        yield "".join(rng.choices(ALPHABET, k=rng.randint(1, 60)))
    example = make_task("carry_arithmetic").example("train", 0)
    yield example.prompt[0]["content"] + example.solution


@pytest.mark.parametrize("which", ["tokenizer", "loaded"])
def test_one_id_a_character_and_exact_round_trip(which, request):
    tok = request.getfixturevalue(which)
    for text in texts():
        ids = encode(tok, text)
        assert ids == [3 + ALPHABET.index(char) for char in text]
        assert tok.decode(ids) == text
        assert tok.decode([*ids, tok.eos_token_id], skip_special_tokens=True) == text


@pytest.mark.parametrize("which", ["tokenizer", "loaded"])
def test_special_tokens(which, request):
    tok = request.getfixturevalue(which)
    assert (tok.pad_token_id, tok.eos_token_id, tok.unk_token_id, len(tok)) == (0, 1, 2, 3 + len(ALPHABET))
    assert tok("47+85=").input_ids == encode(tok, "47+85=") == encode(tok, "47+85=", add_special_tokens=True)
    assert tok.eos_token_id not in tok.encode("<eos>")  # a text cannot spell a special token


@pytest.mark.parametrize("which", ["tokenizer", "loaded"])
def test_unknown_characters_are_named(which, request):
    with pytest.raises(ValueError, match="does not know 'A', 'é' in 'café A'"):
        encode(request.getfixturevalue(which), "café A")


def test_an_alphabet_of_ones_own():
    tok = char_tokenizer("ab\t<>")
    assert encode(tok, "a\tb<a>") == [3, 5, 4, 6, 3, 7]
    assert tok.decode([3, 5, 4]) == "a\tb"
    with pytest.raises(ValueError, match="does not know 'c'"):
        encode(tok, "abc")


@pytest.mark.parametrize(("alphabet", "message"), [("", "non-empty"), ("abca", r"repeated: \['a'\]")])
def test_bad_alphabets(alphabet, message):
    with pytest.raises(ValueError, match=message):
        char_tokenizer(alphabet)


def test_load_tokenizer(tmp_path):
    assert load_tokenizer("char").get_vocab() == char_tokenizer().get_vocab()
    with pytest.raises(ValueError, match="there is no directory"):
        load_tokenizer(str(tmp_path / "missing"))
    with pytest.raises(ValueError, match="cannot load"):
        load_tokenizer(str(tmp_path))


def test_a_tokenizer_without_padding_gets_the_end_token_and_one_without_an_end_is_refused(tmp_path):
    tok = char_tokenizer()
    tok.pad_token = None
    tok.save_pretrained(tmp_path / "no_pad")
    assert load_tokenizer(str(tmp_path / "no_pad")).pad_token_id == 1
    tok.eos_token = None
    tok.save_pretrained(tmp_path / "no_eos")
    with pytest.raises(ValueError, match="no end-of-sequence token"):
        load_tokenizer(str(tmp_path / "no_eos"))
