"""Rows, files and the prompt stream: exact round trips, errors that name file, row, key and rule, pure positions."""

from __future__ import annotations

import collections
import dataclasses
import errno
import json
import os

import pytest

from entcov.rl.data.stream import PromptStream, from_row, load_rows, raw_rows, to_row, write_rows
from entcov.rl.tasks import make_task
from entcov.rl.types import Example

pytest.importorskip("pyarrow")
pytest.importorskip("transformers")

SUFFIXES = ["parquet", "jsonl"]


def row(**changes):
    base = {
        "data_source": "openai/gsm8k",
        "prompt": [{"role": "user", "content": "2+2?"}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": "4"},
        "extra_info": {"index": 0},
    }
    return {key: value for key, value in {**base, **changes}.items() if value is not ...}


def examples(n=20, name="carry_arithmetic"):
    task = make_task(name, seed=1)
    return [task.example("train", index) for index in range(n)]


# ---- rows and files ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_round_trip_of_generated_examples(tmp_path, suffix):
    rows = [e for name in ("carry_arithmetic", "countdown", "word_problems") for e in examples(name=name)]
    path = tmp_path / f"rows.{suffix}"
    assert write_rows(rows, path) == len(rows)
    assert load_rows(path) == rows
    assert load_rows(path, path) == rows + rows
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_round_trip_of_uneven_rows(tmp_path, suffix):
    """Keys that the first row lacks, nested and missing extra_info, several messages, any characters."""
    rows = [
        Example("a", ({"role": "user", "content": "x"},), "1"),
        Example(
            "b", ({"role": "system", "content": "é\u2028\n"}, {"role": "user", "content": "{}"}), "2", solution="#2"
        ),
        Example(
            "c", ({"role": "user", "content": "x"},), "3", "math", "exact", {"deep": {"n": [1, 2]}, "index": 2**40}
        ),
        Example("c", ({"role": "user", "content": "x"},), "3", "math", "exact", {"index": 5}, solution=""),
    ]
    write_rows(rows, tmp_path / f"rows.{suffix}")
    assert load_rows(tmp_path / f"rows.{suffix}") == rows


def test_parquet_columns_are_verls(tmp_path):
    import pyarrow.parquet as parquet

    write_rows(examples(), tmp_path / "rows.parquet")
    table = parquet.read_table(tmp_path / "rows.parquet")
    assert table.column_names == ["data_source", "prompt", "ability", "reward_model", "extra_info", "solution"]
    assert str(table.schema.field("reward_model").type) == "struct<style: string, ground_truth: string>"
    first = table.slice(0, 1).to_pylist()[0]
    assert first["prompt"] == [{"role": "user", "content": examples(1)[0].prompt[0]["content"]}]


def test_a_row_of_verls_own_making():
    example = from_row(row(extra_info={"split": "train", "index": 7, "answer": None}, unknown_column=3))
    assert example == Example(
        "openai/gsm8k", ({"role": "user", "content": "2+2?"},), "4", "math", "rule", {"split": "train", "index": 7}
    )
    assert from_row(to_row(example)) == example
    assert from_row(row(reward_model={"ground_truth": 72})).ground_truth == "72"
    assert from_row(row(ability=..., extra_info=...)).ability == ""


BAD_ROWS = [
    (row(data_source=...), "data_source is missing"),
    (row(data_source=3), "data_source must be a non-empty string, got int 3"),
    (row(prompt=...), "prompt is missing"),
    (row(prompt="2+2?"), "prompt must be a list of messages {role, content}, got str '2+2?'"),
    (row(prompt=[]), "prompt must have at least one message"),
    (row(prompt=["hi"]), "prompt[0] must be an object {role, content}, got str 'hi'"),
    (row(prompt=[{"role": "user"}]), "prompt[0].content is missing"),
    (
        row(prompt=[{"role": "user", "content": "a"}, {"role": None, "content": "b"}]),
        "prompt[1].role must be a non-empty",
    ),
    (row(reward_model=...), "reward_model is missing"),
    (row(reward_model="4"), "reward_model must be an object, got str '4'"),
    (row(reward_model={"style": "rule"}), "reward_model.ground_truth is missing"),
    (row(reward_model={"ground_truth": None}), "reward_model.ground_truth must be a non-empty string or a number"),
    (row(reward_model={"ground_truth": ""}), "reward_model.ground_truth must be a non-empty string or a number"),
    (row(reward_model={"ground_truth": True}), "reward_model.ground_truth must be a non-empty string or a number"),
    (row(reward_model={"ground_truth": "4", "style": 1}), "reward_model.style must be a non-empty string, got int 1"),
    (row(extra_info=[1]), "extra_info must be an object, got list [1]"),
    (row(solution=4), "solution must be a string, got int 4"),
    ([1, 2], "the row must be an object, got list [1, 2]"),
]


@pytest.mark.parametrize(("bad", "message"), BAD_ROWS, ids=[message[:40] for _, message in BAD_ROWS])
def test_malformed_rows_are_named_with_line_key_and_rule(tmp_path, bad, message):
    path = tmp_path / "bad.jsonl"
    path.write_text("\n".join(json.dumps(r) for r in (row(), bad)) + "\n\n")
    with pytest.raises(ValueError) as caught:
        load_rows(path)
    assert str(caught.value).startswith(f"{path}: 1 malformed rows:\n  line 2: ") and message in str(caught.value)


def test_all_offenders_are_counted_and_the_first_five_shown(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as parquet

    rows = [row(), *[row(data_source="") for _ in range(7)], row()]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "bad.parquet")
    with pytest.raises(ValueError) as caught:
        load_rows(tmp_path / "bad.parquet")
    lines = str(caught.value).splitlines()
    assert lines[0].endswith("bad.parquet: 7 malformed rows:")
    assert [line.split(":")[0].strip() for line in lines[1:6]] == [f"row {i}" for i in (1, 2, 3, 4, 5)]
    assert lines[6:] == ["  ... and 2 more"]


def test_unusable_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such dataset file: .*missing.jsonl"):
        load_rows(tmp_path / "missing.jsonl")
    with pytest.raises(ValueError, match="must end in .parquet or .jsonl, got '.*rows.csv'"):
        load_rows(tmp_path / "rows.csv")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="the file has no rows"):
        load_rows(tmp_path / "empty.jsonl")
    (tmp_path / "cut.jsonl").write_text(json.dumps(row()) + "\n" + json.dumps(row())[:30])
    with pytest.raises(ValueError, match="line 2: not JSON"):
        load_rows(tmp_path / "cut.jsonl")
    (tmp_path / "bytes.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="not UTF-8"):
        load_rows(tmp_path / "bytes.jsonl")
    write_rows(examples(), tmp_path / "whole.parquet")
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "whole.parquet").read_bytes()[:-20])
    with pytest.raises(ValueError, match="cut.parquet: not a readable parquet file"):
        load_rows(tmp_path / "cut.parquet")


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch, suffix, failing):
    path = tmp_path / f"rows.{suffix}"
    write_rows(examples(3), path)

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, failing, full)
    with pytest.raises(OSError, match="disk full: cannot write"):
        write_rows(examples(5), path)
    monkeypatch.undo()
    assert load_rows(path) == examples(3) and os.listdir(tmp_path) == [path.name]


def test_rows_that_fit_no_schema_are_refused_and_leave_nothing(tmp_path):
    mixed = [
        Example("a", ({"role": "user", "content": "x"},), "1", extra_info={"index": value}) for value in (1, "one")
    ]
    with pytest.raises(ValueError, match="do not fit one parquet schema"):
        write_rows(mixed, tmp_path / "rows.parquet")
    with pytest.raises(ValueError, match="no examples to write"):
        write_rows([], tmp_path / "rows.parquet")
    assert os.listdir(tmp_path) == []
    write_rows(mixed, tmp_path / "rows.jsonl")
    assert load_rows(tmp_path / "rows.jsonl") == mixed


# ---- the stream ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    from entcov.rl.data.tokenizer import char_tokenizer

    return char_tokenizer()


def stream(source, tokenizer, **changes):
    return PromptStream(source, tokenizer, **{"seed": 0, "max_prompt_length": 64, **changes})


@pytest.mark.parametrize("kind", ["task", "list"])
def test_take_is_a_function_of_the_position(tokenizer, kind):
    source = make_task("countdown") if kind == "task" else examples(7)
    whole = stream(source, tokenizer).take(0, 40)
    assert [p.uid for p in whole] == list(range(40))
    again = stream(source, tokenizer)
    pieces = [again.take(p, n) for p, n in ((33, 7), (0, 1), (1, 0), (1, 20), (21, 12))]
    assert pieces[1] + pieces[2] + pieces[3] + pieces[4] + pieces[0] == whole
    for prompt in whole:
        assert tokenizer.decode(list(prompt.tokens)) == prompt.example.prompt[0]["content"]


def test_every_epoch_shows_each_row_once_in_an_order_of_its_own(tokenizer):
    source = examples(30)
    prompts = stream(source, tokenizer, seed=3).take(0, 120)
    epochs = [[p.example for p in prompts[i : i + 30]] for i in range(0, 120, 30)]
    for epoch in epochs:
        assert collections.Counter(map(repr, epoch)) == collections.Counter(map(repr, source))
    assert len({repr(epoch) for epoch in epochs}) == 4
    other = [p.example for p in stream(source, tokenizer, seed=4).take(0, 30)]
    assert other != epochs[0]
    assert stream(source, tokenizer).num_rows == 30 and stream(make_task("countdown"), tokenizer).num_rows is None


def test_the_order_of_epochs_is_pinned(tokenizer):
    """A run that is resumed under another version of Python or of this package must see the same order."""
    source = examples(6)
    order = [source.index(p.example) for p in stream(source, tokenizer, seed=0).take(0, 12)]
    assert order == [3, 2, 4, 0, 1, 5, 0, 1, 5, 4, 2, 3]


def test_a_curriculum_is_read_in_the_order_of_its_files(tokenizer):
    source = examples(6)
    ordered = stream(source, tokenizer, order="file")
    prompts = ordered.take(4, 6)
    assert [p.example for p in prompts] == source[4:] + source[:4]
    assert [p.row for p in prompts] == [4, 5, 0, 1, 2, 3] and [p.uid for p in prompts] == [4, 5, 6, 7, 8, 9]
    assert [(p.uid, p.row, p.example) for p in ordered.rows()] == [(i, i, e) for i, e in enumerate(source)]
    shuffled = stream(source, tokenizer).take(0, 12)
    assert all(p.example == source[p.row] for p in shuffled) and shuffled[6].row != shuffled[0].row
    of_task = stream(make_task("countdown"), tokenizer)
    assert of_task.take(3, 1)[0].row is None
    with pytest.raises(ValueError, match="rows: a generated task has none, got task 'countdown'"):
        of_task.rows()


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_further_columns_are_written_and_ignored_when_read(tmp_path, suffix):
    path = tmp_path / f"rows.{suffix}"
    write_rows(examples(3), path, {"score": [0.5, 1.5, 2.5]})
    assert load_rows(path) == examples(3)
    stored = [json.loads(row) if isinstance(row, str) else row for _, row in raw_rows(path)]
    assert [row["score"] for row in stored] == [0.5, 1.5, 2.5]


def test_held_out(tokenizer):
    task = make_task("carry_arithmetic")
    from_task = stream(task, tokenizer).held_out(5)
    assert [p.example for p in from_task] == [task.example("held_out", i) for i in range(5)]
    assert from_task == stream(task, tokenizer).held_out(9)[:5]
    with pytest.raises(ValueError, match="n must be given for a task"):
        stream(task, tokenizer).held_out()

    from_list = stream(examples(3), tokenizer, held_out=examples(8)[3:])
    assert [p.example for p in from_list.held_out()] == examples(8)[3:]
    assert [p.uid for p in from_list.held_out(2)] == [0, 1]
    assert len(from_list.held_out(100)) == 5
    mixed = [dataclasses.replace(e, data_source=source) for e, source in zip(examples(6), "aabbba", strict=True)]
    first_two_of_each = stream(examples(3), tokenizer, held_out=mixed).held_out(2)
    assert [(p.uid, p.example) for p in first_two_of_each] == list(enumerate(mixed[:4]))
    with pytest.raises(ValueError, match="without held-out ones"):
        stream(examples(3), tokenizer).held_out(1)


def test_overlong_prompts_are_refused_or_counted(tokenizer):
    source = examples(40)
    lengths = [len(e.prompt[0]["content"]) for e in source]
    limit = sorted(lengths)[20]
    fitting = [e for e, length in zip(source, lengths, strict=True) if length <= limit]
    assert 0 < len(fitting) < 40
    with pytest.raises(ValueError, match=rf"source\[\d+\]: the prompt has \d+ tokens, max_prompt_length is {limit}"):
        stream(source, tokenizer, max_prompt_length=limit)
    kept = stream(source, tokenizer, max_prompt_length=limit, overlong="filter")
    assert (kept.num_rows, kept.num_filtered) == (len(fitting), 40 - len(fitting))
    assert {repr(p.example) for p in kept.take(0, len(fitting))} == set(map(repr, fitting))
    with pytest.raises(ValueError, match="no examples are left of 40"):
        stream(source, tokenizer, max_prompt_length=1, overlong="filter")


def test_a_task_draws_again_for_an_overlong_prompt(tokenizer):
    task = make_task("carry_arithmetic")
    with pytest.raises(ValueError, match=r"train example \d+: the prompt has \d+ tokens, max_prompt_length is 5"):
        stream(task, tokenizer, max_prompt_length=5).take(0, 50)
    short = stream(task, tokenizer, max_prompt_length=5, overlong="filter")
    prompts = short.take(0, 50)
    assert max(len(p.tokens) for p in prompts) == 5 and short.num_filtered > 0
    assert [p.uid for p in prompts] == list(range(50))
    assert short.take(20, 30) == prompts[20:]
    unmoved = [p for p in prompts if p.example == task.example("train", p.uid)]
    assert 0 < len(unmoved) < 50
    with pytest.raises(ValueError, match="100 draws for train example 0 .* are all longer than max_prompt_length = 1"):
        stream(task, tokenizer, max_prompt_length=1, overlong="filter").take(0, 1)


def test_prompts_the_tokenizer_cannot_spell_are_refused(tokenizer):
    odd = Example("a", ({"role": "user", "content": "What?"},), "1")
    with pytest.raises(ValueError, match="does not know 'W' in 'What\\?'"):
        stream([odd], tokenizer)


def test_chat_template_and_joined_contents():
    from entcov.rl.data.tokenizer import char_tokenizer
    from entcov.rl.tasks import ALPHABET

    tok = char_tokenizer(ALPHABET + "<>|")
    messages = ({"role": "system", "content": "be brief."}, {"role": "user", "content": "2+2?"})
    source = [Example("a", messages, "4")]
    assert tok.decode(list(stream(source, tok).take(0, 1)[0].tokens)) == "be brief.\n2+2?"
    tok.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    tokens = stream(source, tok).take(0, 1)[0].tokens
    assert tok.decode(list(tokens)) == "<|system|>be brief.\n<|user|>2+2?\n<|assistant|>"
    assert all(isinstance(token, int) for token in tokens)


def test_a_tokenizer_that_ends_prompts_is_refused(tokenizer):
    from tokenizers.processors import TemplateProcessing

    from entcov.rl.data.tokenizer import char_tokenizer

    ending = char_tokenizer()
    ending.backend_tokenizer.post_processor = TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
    with pytest.raises(ValueError, match="must not be empty or end in the end-of-sequence token"):
        stream(examples(1), ending)


def test_from_config(tokenizer, tmp_path):
    from types import SimpleNamespace

    options = {"max_prompt_length": 32, "overlong": "error", "order": "shuffled"}
    section = SimpleNamespace(task="countdown", settings={"numbers": 4}, train_files=[], val_files=[], **options)
    built = PromptStream.from_config(section, tokenizer, seed=9)
    assert built.take(3, 1)[0].example == make_task("countdown", numbers=4, seed=9).example("train", 3)
    section.settings = {"seed": 2}
    built = PromptStream.from_config(section, tokenizer, seed=9)
    assert built.take(3, 1)[0].example == make_task("countdown", seed=2).example("train", 3)

    for name, part in (("train", examples(6)[:4]), ("val", examples(6)[4:])):
        write_rows(part, tmp_path / f"{name}.parquet")
    section = SimpleNamespace(
        task=None,
        settings={},
        train_files=[tmp_path / "train.parquet"],
        val_files=[tmp_path / "val.parquet"],
        **options,
    )
    built = PromptStream.from_config(section, tokenizer, seed=9)
    assert built.num_rows == 4 and [p.example for p in built.held_out(2)] == examples(6)[4:]
