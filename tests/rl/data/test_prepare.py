"""Preparation of public sets: small files in each source's schema, answers by hand, repeats, what errors say."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pa = pytest.importorskip("pyarrow")
import pyarrow.parquet as pq  # noqa: E402

from entcov.cli import main  # noqa: E402
from entcov.rl.data.prepare import EVAL_SETS, SOURCES, STYLES, TEMPLATES, plain_answer, prepare  # noqa: E402
from entcov.rl.data.stream import load_rows  # noqa: E402
from entcov.rl.load_config import load_config  # noqa: E402
from entcov.rl.rewards.rules import score  # noqa: E402

BEFORE, AFTER = TEMPLATES["dapo"]
EXAMPLES = Path(__file__).resolve().parents[3] / "examples"


def dapo(question, answer):
    return {
        "data_source": "math_dapo",
        "prompt": [{"content": f"{BEFORE}{question}{AFTER}", "role": "user"}],
        "ability": "MATH",
        "reward_model": {"ground_truth": answer, "style": "rule-lighteval/MATH_v2"},
        "extra_info": {"index": "9a9b6eb4-a1cb-49d1-8c1e-62eaf2f74079"},
    }


# name -> (suffix, rows in the source's schema, [(question, ground truth)])
SAMPLES = {
    "dapo_math_17k": (
        "parquet",
        [dapo("What is 2+2?", "4"), dapo("What is  2+2?", "4"), dapo("Find $x$.", "-3"), dapo("Odd one.", "1"),
         dapo("Odd one.", "2"), dapo("What is 2+2?", "4")],
        [("What is 2+2?", "4"), ("Find $x$.", "-3")],
    ),
    "math": (
        "parquet",
        [{"problem": "A?", "level": "Level 1", "type": "Algebra", "solution": r" $\boxed{1} $ or \boxed{\frac{1}{2}}."},
         {"problem": "B?", "level": "Level 5", "type": "Geometry", "solution": r"We get $\boxed 7$."},
         {"problem": "C?", "level": "Level 5", "type": "Geometry", "solution": r"Thus \fbox{x^{2}}."},
         {"problem": "D?", "level": "Level 5", "type": "Geometry", "solution": "By symmetry, it is 3."}],
        [("A?", r"\frac{1}{2}"), ("B?", "7"), ("C?", "x^{2}")],
    ),
    "gsm8k": (
        "parquet",
        [{"question": "How many?", "answer": "He has 3*400=<<3*400=1200>>1200.\n#### 1,200"},
         {"question": "How few?", "answer": "None.\n#### -2"}],
        [("How many?", "1200"), ("How few?", "-2")],
    ),
    "math500": (
        "jsonl",
        [{"problem": "P", "solution": "...", "answer": r"\left( 3, \frac{\pi}{2} \right)", "subject": "Precalculus",
          "level": 2, "unique_id": "test/precalculus/807.json"}],
        [("P", r"\left( 3, \frac{\pi}{2} \right)")],
    ),
    "aime24": (
        "parquet",
        [{"id": 60, "problem": "P", "solution": "...", "answer": "033", "url": "https://...", "year": "2024"}],
        [("P", "33")],
    ),
    "aime25": ("jsonl", [{"problem": "P", "answer": "70", "id": "0"}], [("P", "70")]),
    "amc": ("parquet", [{"id": 0, "problem": "P", "answer": 142.0, "url": "https://..."}], [("P", "142")]),
    "olympiadbench": (
        "parquet",
        [{"id": 1606, "question": "P", "solution": ["..."], "final_answer": ["$\\frac{1}{4}$"], "context": None,
          "is_multiple_answer": False, "unit": None, "answer_type": "Numerical", "subfield": "Algebra"},
         {"id": 1607, "question": "Q", "solution": ["..."], "final_answer": ["$1$", "$2$"], "context": None,
          "is_multiple_answer": True, "unit": None, "answer_type": "Numerical", "subfield": "Algebra"}],
        [("P", r"\frac{1}{4}"), ("Q", "1, 2")],
    ),
    "math_hard": (
        "jsonl",
        [{"problem": "P", "level": "Level 5", "type": "Algebra", "solution": r"Hence $\boxed{\sqrt{2}}$."}],
        [("P", r"\sqrt{2}")],
    ),
    "amc23": ("parquet", [{"id": 0, "question": "P", "answer": "27.0", "url": "https://..."}], [("P", "27.0")]),
    "minerva": ("jsonl", [{"question": "P", "answer": "1.6e-7"}], [("P", "1.6e-7")]),
    "omni_math": (
        "jsonl",
        [{"domain": ["Algebra"], "difficulty": 8, "problem": "P", "solution": "", "answer": "2^{n-1}", "source": "x"},
         {"domain": ["Algebra"], "difficulty": 8, "problem": "Prove Q", "solution": "", "answer": "", "source": ""}],
        [("P", "2^{n-1}")],
    ),
}  # fmt: skip


def write(path, rows):
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.fixture
def source(tmp_path):
    def make(name):
        suffix, rows, expected = SAMPLES[name]
        return write(tmp_path / f"{name}.{suffix}", rows), expected

    return make


@pytest.mark.parametrize("name", SAMPLES)
def test_every_set_becomes_rows_that_the_trainer_reads_and_pays_for(name, source, tmp_path):
    path, expected = source(name)
    split = next(iter(SOURCES[name].files))
    (result,) = prepare(name, tmp_path / "out", source=path, split=split)
    examples = load_rows(result.path)
    assert result.path == tmp_path / "out" / name / f"{split}.parquet" and result.written == len(examples)
    before, after = TEMPLATES[SOURCES[name].template]
    assert [e.prompt[0]["content"] for e in examples] == [f"{before}{question}{after}" for question, _ in expected]
    assert [e.ground_truth for e in examples] == [answer for _, answer in expected]
    assert [e.solution is not None for e in examples] == {"math": [True, False, False], "gsm8k": [True, True]}.get(
        name, [False] * len(examples)
    )
    for example in examples:
        mark = "#### {}" if name == "gsm8k" else "\\boxed{{{}}}"
        assert score(example, "so " + mark.format(example.ground_truth)) == 1.0
        assert score(example, "so " + mark.format("123456789")) == 0.0
        if example.solution is not None:
            assert score(example, example.solution) == 1.0
        assert score(example, f"...\nAnswer: {example.ground_truth}") == 0.0  # not what the prompt asks for


def test_samples_cover_every_set():
    assert set(EVAL_SETS) < set(SAMPLES) == {name for name, source in SOURCES.items() if source.template != "code"}
    assert set(TEMPLATES) == set(STYLES)


@pytest.mark.parametrize("recipe", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_recipe_evaluates_with_the_prompt_that_it_trains_with(recipe):
    """The rule of docs/tasks.md, for the files that the recipe's `entcov data` command writes."""
    data = load_config(recipe).data
    sets = {Path(file).parts[1] for file in (*data.train_files, *data.val_files)} - {"openr1"}  # a file of the user's
    assert len({SOURCES[name].template for name in sets}) <= 1
    (told,) = re.findall(r"-m entcov data ([a-z0-9_ ]+)", recipe.read_text()) or [""]
    assert sets == {name for word in told.split() for name in (EVAL_SETS if word == "eval" else [word])} & sets


def test_the_papers_prompts_ask_for_a_box_and_its_content_alone_is_scored(source, tmp_path):
    for name in ("dapo_math_17k", "math", "math500", "math_hard", "aime24", "amc23", "minerva", "olympiadbench"):
        (result,) = prepare(name, tmp_path, source=source(name)[0], split=next(iter(SOURCES[name].files)))
        example = load_rows(result.path)[0]
        assert example.prompt[0]["content"].endswith("output the final answer within \\boxed{}.")
        assert example.style == "math_boxed" and "Answer:" not in example.prompt[0]["content"]


def test_counts_say_what_was_left_out(source, tmp_path):
    (dapo_result,) = prepare("dapo_math_17k", tmp_path, source=source("dapo_math_17k")[0])
    counts = (dapo_result.read, dapo_result.written, dapo_result.repeats, dapo_result.contradictory)
    assert counts == (6, 2, 2, 2)
    assert str(dapo_result).endswith("dapo_math_17k.parquet (left out: 2 repeats, 2 contradictory)")
    (omni,) = prepare("omni_math", tmp_path, source=source("omni_math")[0])
    assert (omni.read, omni.written, omni.unanswered) == (2, 1, 1)


def test_another_prompt(source, tmp_path):
    (result,) = prepare("gsm8k", tmp_path, source=source("gsm8k")[0], split="test", template="dapo")
    first = load_rows(result.path)[0]
    assert first.prompt[0]["content"] == f"{BEFORE}How many?{AFTER}" and first.style == "math"
    assert score(first, "1200 in all\nAnswer: 1,200") == 1.0
    (result,) = prepare("dapo_math_17k", tmp_path, source=source("dapo_math_17k")[0], template="dapo")
    assert load_rows(result.path)[0].prompt[0]["content"] == f"{BEFORE}What is 2+2?{AFTER}"
    with pytest.raises(ValueError, match="template: gsm8k is for GSM8K, .* got it for amc"):
        prepare("amc", tmp_path, source=source("amc")[0], template="gsm8k")


def test_the_hub_is_asked_for_the_set_s_own_files(source, tmp_path, monkeypatch):
    asked = []

    def snapshot_download(repo, *, repo_type, revision, allow_patterns):
        asked.append((repo, repo_type, revision, allow_patterns))
        folder = tmp_path / "snapshots" / "0123456789abcdef"
        (folder / "main").mkdir(parents=True, exist_ok=True)
        for split in ("train", "test"):
            rows = [row | {"question": f"{split}: {row['question']}"} for row in SAMPLES["gsm8k"][1]]
            write(folder / "main" / f"{split}-00000-of-00001.parquet", rows)
        return str(folder)

    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    results = prepare("gsm8k", tmp_path / "out", revision="v1")
    assert [call[0:3] for call in asked] == [("openai/gsm8k", "dataset", "v1")] * 2
    assert [call[3] for call in asked] == [["main/train-*.parquet"], ["main/test-*.parquet"]]
    assert [result.origin for result in results] == ["openai/gsm8k@0123456789ab"] * 2
    assert "train: How many?" in load_rows(results[0].path)[0].prompt[0]["content"]
    with pytest.raises(FileNotFoundError, match=r"math-ai/aime25 at 0123456789abcdef has no file test.jsonl"):
        prepare("aime25", tmp_path / "out")

    def unreachable(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(RuntimeError, match="math-ai/aime25 could not be fetched from the hub: no route.*\n.*--source"):
        prepare("aime25", tmp_path / "out")


def test_a_failure_leaves_the_earlier_file(source, tmp_path):
    path, _ = source("aime25")
    (good,) = prepare("aime25", tmp_path / "out", source=path)
    before = good.path.read_bytes()
    write(path, [{"problem": "P", "answer": "1"}, {"text": "Q", "answer": "2"}])
    with pytest.raises(ValueError, match="aime25.jsonl, line 2: a row must have the column problem or question.*text"):
        prepare("aime25", tmp_path / "out", source=path)
    path.write_text('{"problem": "P"\n')
    with pytest.raises(ValueError, match="line 1: not JSON"):
        prepare("aime25", tmp_path / "out", source=path)
    write(path, [{"problem": "P", "answer": None}])
    with pytest.raises(ValueError, match="none of 1 rows has a usable question and answer"):
        prepare("aime25", tmp_path / "out", source=path)
    write(path, [{"problem": 3, "answer": "1"}])
    with pytest.raises(ValueError, match="problem must be a non-empty string, got 3"):
        prepare("aime25", tmp_path / "out", source=path)
    assert [p.name for p in good.path.parent.iterdir()] == ["test.parquet"] and good.path.read_bytes() == before


@pytest.mark.parametrize(
    "value, text",
    [(142.0, "142"), (2.5, "2.5"), ("033", "33"), ("0", "0"), ("000", "0"), (" $-1$ ", "-1"),
     ("$a$ and $b$", "$a$ and $b$"), (["$1$", "$2$"], "1, 2"), ([], None), ("", None), (None, None), (7, "7"),
     ("0.50", "0.50")],
)  # fmt: skip
def test_plain_answers(value, text):
    assert plain_answer(value) == text


def test_the_command(source, tmp_path, capsys):
    path, _ = source("aime24")
    out = ["--out", str(tmp_path / "out")]
    assert main(["data", "aime24", "--source", str(path), *out]) == 0
    assert f"aime24/test.parquet: 1 rows of 1 from {path}" in capsys.readouterr().out
    for arguments, message in (
        (["data", "aime23", *out], "data set: must be one of dapo_math_17k, math, "),
        (["data", "eval", "--source", str(path), *out], "--source: goes with one data set, got math500, aime24"),
        (["data", "gsm8k", "--source", str(path), *out], "split: must be given with source, gsm8k has train, test"),
        (["data", "aime24", "--split", "train", *out], "split: aime24 has test, got 'train'"),
        (["data", "aime24", "--template", "plain", *out], "must be one of dapo, boxed, gsm8k, code, got 'plain'"),
        (["data", "aime24", "--source", str(path), "--revision", "v1", *out], "revision: belongs to the hub"),
        (["data", "aime24", "--source", str(tmp_path / "no.parquet"), *out], "no such dataset file"),
    ):
        assert main(arguments) == 2, arguments
        assert message in capsys.readouterr().err
