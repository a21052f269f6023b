"""Public sets of mathematics and code into verl's row format: read rows, apply the prompt, drop repeats, write.

`SOURCES` has the sets. The reward reads what the prompt asks for: `style: math_boxed` the box, `math` DAPO's answer
line too, `gsm8k` what stands after "####", `code` a program, which tests judge; `code_rows` reads the sets of those.
"""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from entcov.rl.data import code_rows
from entcov.rl.data.stream import raw_rows, write_rows
from entcov.rl.rewards.rules import last_boxed
from entcov.rl.types import Example

# A policy is evaluated with the prompt that it was trained with, so all sets but GSM8K have one default: boxed, which
# Cui et al. and Shen ask for. Its words are those of verl's and Shen's preparation scripts; Cui et al. publish none.
# DAPO-Math-17k carries DAPO's.
TEMPLATES = {
    "dapo": (
        "Solve the following math problem step by step. The last line of your response should be of the form Answer: "
        "$Answer (without quotes) where $Answer is the answer to the problem.\n\n",
        '\n\nRemember to put your answer on its own line after "Answer:".',
    ),
    "boxed": ("", " Let's think step by step and output the final answer within \\boxed{}."),
    "gsm8k": ("", ' Let\'s think step by step and output the final answer after "####".'),
    "code": ("", code_rows.INSTRUCTION),
}
STYLES = {
    "dapo": "math",
    "boxed": "math_boxed",
    "gsm8k": "gsm8k",
    "code": "code",
}  # template -> reward_model.style that reads its answer
_BARE_BOX = re.compile(r"\\f?box(?:ed)?\s+([^\s$]+)")  # some of MATH's solutions: \boxed 2$
_LEADING_ZEROS = re.compile(r"0+[0-9]+")  # AIME's answer sheets: 033


def _column(row: dict, *names: str) -> Any:
    for name in names:
        if name in row:
            return row[name]
    raise ValueError(f"a row must have the column {' or '.join(names)}, this one has {', '.join(row)}")


def _text(*names: str) -> Callable[[dict], str]:
    def read(row: dict) -> str:
        value = _column(row, *names)
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"{names[0]} must be a non-empty string, got {value!r}")
        return value.strip()

    return read


def _answer(*names: str) -> Callable[[dict], str | None]:
    return lambda row: plain_answer(_column(row, *names))


def plain_answer(value: Any) -> str | None:
    """An answer as text: 142.0 and "142" and ["$142$"] and "0142" are "142"; several are joined; None where empty."""
    if isinstance(value, list):
        parts = [plain_answer(part) for part in value]
        return ", ".join(part for part in parts if part) or None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = "" if value is None else str(value).strip()
    if len(text) > 2 and text[0] == text[-1] == "$" and "$" not in text[1:-1]:
        text = text[1:-1].strip()
    return str(int(text)) if _LEADING_ZEROS.fullmatch(text) else text or None


def _boxed(row: dict) -> str | None:
    """The last boxed expression of MATH's solution, with braces or without."""
    solution = _text("solution")(row)
    found = last_boxed(solution) or last_boxed(solution.replace("\\fbox{", "\\boxed{"))
    if found is None:
        bare = _BARE_BOX.findall(solution)
        found = bare[-1] if bare else None
    return found and found.strip()


def _boxed_solution(row: dict) -> str | None:
    """MATH's solution where it ends as the reward wants it: a box without braces earns nothing."""
    solution = _text("solution")(row)
    return solution if last_boxed(solution) is not None else None


def _after_hashes(row: dict) -> str | None:
    _, mark, tail = _text("answer")(row).rpartition("####")
    return tail.strip().replace(",", "") or None if mark else None


def _dapo_question(row: dict) -> str:
    """The question of a row whose prompt has DAPO's wording round it; a text without the wording is the question."""
    messages = _column(row, "prompt")
    if not (isinstance(messages, list) and len(messages) == 1):
        raise ValueError(f"prompt must be a list of one message, got {str(messages)[:80]!r}")
    before, after = TEMPLATES["dapo"]
    return _text("content")(messages[0]).removeprefix(before.strip()).removesuffix(after.strip()).strip()


@dataclass(frozen=True)
class Source:
    """Where a set is and how its rows are read."""

    repo: str | None  # on the Hugging Face hub; None: part of this package
    files: dict[str, str]  # split -> pattern of file names in the repository, or in this folder
    data_source: str  # what metrics and `eval.sources` call the set
    question: Callable[[dict], str] = _text("problem")
    answer: Callable[[dict], str | None] = _answer("answer")  # None: the row has none
    template: str = "boxed"
    solution: Callable[[dict], str | None] | None = None  # a worked one that earns the reward
    keep: Callable[[dict], bool] = lambda row: True  # other rows are not of the set


SOURCES = {
    "dapo_math_17k": Source(
        "BytedTsinghua-SIA/DAPO-Math-17k", {"train": "data/dapo-math-17k.parquet"}, "math_dapo",
        question=_dapo_question, answer=lambda row: plain_answer(_column(_column(row, "reward_model"), "ground_truth")),
    ),
    "math": Source(
        "DigitalLearningGmbH/MATH-lighteval", {"train": "data/train-*.parquet", "test": "data/test-*.parquet"},
        "DigitalLearningGmbH/MATH-lighteval", answer=_boxed, solution=_boxed_solution,
    ),
    "gsm8k": Source(
        "openai/gsm8k", {"train": "main/train-*.parquet", "test": "main/test-*.parquet"}, "openai/gsm8k",
        question=_text("question"), answer=_after_hashes, template="gsm8k", solution=_text("answer"),
    ),
    "math500": Source("HuggingFaceH4/MATH-500", {"test": "test.jsonl"}, "math500"),
    "math_hard": Source(  # level 5 of MATH, a file a subject
        "lighteval/MATH-Hard", {"test": "test/*.jsonl"}, "math_hard", answer=_boxed,
    ),
    "aime24": Source(
        "HuggingFaceH4/aime_2024", {"test": "data/train-*.parquet"}, "aime24",
        question=_text("problem", "Problem"), answer=_answer("answer", "Answer"),
    ),
    "aime25": Source("math-ai/aime25", {"test": "test.jsonl"}, "aime25", question=_text("problem", "question")),
    "amc": Source(
        "AI-MO/aimo-validation-amc", {"test": "data/train-*.parquet"}, "amc", question=_text("problem", "question"),
    ),
    "amc23": Source("math-ai/amc23", {"test": "test-*.parquet"}, "amc23", question=_text("question", "problem")),
    "olympiadbench": Source(  # in English, text only, of competitions
        "Hothan/OlympiadBench", {"test": "OlympiadBench/OE_TO_maths_en_COMP/*.parquet"}, "olympiadbench",
        question=_text("question"), answer=_answer("final_answer"),
    ),
    "minerva": Source(
        "math-ai/minervamath", {"test": "test.jsonl"}, "minerva", question=_text("question", "problem"),
    ),
    "omni_math": Source("KbsdJames/Omni-MATH", {"test": "test.jsonl"}, "omni_math"),
    "classic_programs": Source(
        None, {"train": "classic_programs/train.jsonl", "test": "classic_programs/test.jsonl"}, "classic_programs",
        question=code_rows.user_question, answer=code_rows.own_tests, template="code", solution=_text("solution"),
    ),
    "eurus2_code": Source(
        "PRIME-RL/Eurus-2-RL-Data", {"train": "train.parquet", "test": "validation.parquet"}, "eurus2_code",
        question=code_rows.user_question, answer=code_rows.own_tests, template="code",
        keep=lambda row: _column(row, "ability") == "code",
    ),
    "acecode": Source(
        "TIGER-Lab/AceCode-87K", {"train": "data/train-*.parquet"}, "acecode",
        question=_text("question"), answer=code_rows.acecode_tests, template="code",
    ),
    "kodcode": Source(
        "KodCode/KodCode-V1", {"train": "data/train-*.parquet"}, "kodcode",
        question=code_rows.kodcode_question, answer=code_rows.kodcode_tests, template="code",
        solution=code_rows.kodcode_solution, keep=lambda row: _column(row, "style") in ("instruct", "complete"),
    ),
}  # fmt: skip
EVAL_SETS = ("math500", "aime24", "aime25", "amc", "olympiadbench", "minerva", "omni_math")  # of Cui et al.


@dataclass(frozen=True)
class Prepared:
    """What became of one split. read = written + repeats + contradictory + unanswered."""

    path: Path
    origin: str  # file, or repository@commit
    read: int
    written: int
    repeats: int  # rows whose question was there already, with the same answer
    contradictory: int  # rows of questions that occur with different answers: none of them is kept
    unanswered: int  # rows without an answer, or with tests that the reward cannot judge

    def __str__(self) -> str:
        left_out = {"repeats": self.repeats, "contradictory": self.contradictory, "unanswered": self.unanswered}
        out = ", ".join(f"{count} {name}" for name, count in left_out.items() if count)
        shown = f" (left out: {out})" if out else ""
        return f"{self.path}: {self.written} rows of {self.read} from {self.origin}{shown}"


def prepare(
    name: str,
    out: str | Path = "data",
    *,
    source: str | Path | None = None,
    split: str | None = None,
    template: str | None = None,
    revision: str | None = None,
) -> list[Prepared]:
    """Writes OUT/NAME/SPLIT.parquet for every split of a set, atomically, and says what was read and left out.

    Args:
        source: a .parquet or .jsonl file in the set's own schema; default: its repository on the hub.
        split: one split alone; must be given with `source` where the set has several.
        template: key of `TEMPLATES`; default: the set's own.
        revision: commit or tag of the repository.

    Raises:
        ValueError: an unknown name, split or template, or a row in another schema (names the row).
        FileNotFoundError: no such file, or the repository has none of that name any more.
        RuntimeError: the hub cannot be reached or refuses.
    """
    for what, value, known in (("data set", name, SOURCES), ("template", template or "dapo", TEMPLATES)):
        if value not in known:
            raise ValueError(f"{what}: must be one of {', '.join(known)}, got {value!r}")
    spec = SOURCES[name]
    if template is not None and (template == "code") != (spec.template == "code"):
        raise ValueError(f"template: code is for sets of programs and they take no other, got {template!r} for {name}")
    if spec.repo is None and (source is not None or revision is not None):
        raise ValueError(f"source, revision: {name} is part of entcov and takes neither, got {source} and {revision}")
    template = template or spec.template
    if template == "gsm8k" and spec.template != "gsm8k":
        raise ValueError(f"template: gsm8k is for GSM8K, its reward compares numbers alone; got it for {name}")
    if split is not None and split not in spec.files:
        raise ValueError(f"split: {name} has {', '.join(spec.files)}, got {split!r}")
    if source is not None and revision is not None:
        raise ValueError(f"revision: belongs to the hub and cannot go with source={source}, got {revision!r}")
    if source is not None and split is None and len(spec.files) > 1:
        raise ValueError(f"split: must be given with source, {name} has {', '.join(spec.files)}")
    results = []
    for one in spec.files if split is None else [split]:
        if source is None and spec.repo is None:
            files, origin = [Path(__file__).parent / spec.files[one]], "entcov"
        elif source is None:
            files, origin = _download(spec.repo, spec.files[one], revision)
        else:
            files, origin = [Path(source)], str(source)
        path = Path(out) / name / f"{one}.parquet"
        results.append(_prepare_split(spec, one, files, origin, path, template))
    return results


def _download(repo: str, pattern: str, revision: str | None) -> tuple[list[Path], str]:
    from huggingface_hub import snapshot_download

    advice = "Download the file where there is a network and pass --source FILE"
    try:
        folder = Path(snapshot_download(repo, repo_type="dataset", revision=revision, allow_patterns=[pattern]))
    except OSError as error:  # all of the hub's errors are, those of the network too
        raise RuntimeError(f"{repo} could not be fetched from the hub: {error}\n{advice}") from error
    files = sorted(folder.glob(pattern))
    if not files:
        raise FileNotFoundError(f"{repo} at {folder.name} has no file {pattern}. {advice}, or name a --revision")
    return files, f"{repo}@{folder.name[:12]}"


def _prepare_split(spec: Source, split: str, files: list[Path], origin: str, path: Path, template: str) -> Prepared:
    found: dict[str, tuple[Example, int]] = {}  # by question -> first row, number of rows
    contradicted: set[str] = set()
    read = unanswered = 0
    for place, row in _rows(files):
        try:
            if not spec.keep(row):
                continue
            read += 1
            question, answer = spec.question(row), spec.answer(row)
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from None
        if answer is None:
            unanswered += 1
            continue
        key = " ".join(question.split())
        if key in found:
            example, count = found[key]
            found[key] = example, count + 1
            if example.ground_truth != answer:
                contradicted.add(key)
            continue
        before, after = TEMPLATES[template]
        example = Example(
            data_source=spec.data_source,
            prompt=({"role": "user", "content": f"{before}{question}{after}"},),
            ground_truth=answer,
            ability="code" if template == "code" else "math",
            style=STYLES[template],
            extra_info={"split": split, "index": read - 1},
            solution=spec.solution(row) if spec.solution else None,
        )
        found[key] = example, 1
    kept = [example for key, (example, _) in found.items() if key not in contradicted]
    if not kept:
        raise ValueError(f"{origin}: none of {read} rows has a usable question and answer")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_rows(kept, path)
    dropped = sum(found[key][1] for key in contradicted)
    repeats = read - unanswered - dropped - len(kept)
    return Prepared(path, origin, read, len(kept), repeats, dropped, unanswered)


def _rows(files: list[Path]) -> Iterator[tuple[str, dict]]:
    for file in files:
        for place, row in raw_rows(file):
            try:
                row = json.loads(row) if isinstance(row, str) else row
            except json.JSONDecodeError as error:
                raise ValueError(f"{file}, {place}: not JSON ({error})") from None
            if not isinstance(row, dict):
                raise ValueError(f"{file}, {place}: must be an object, got {type(row).__name__}")
            yield f"{file}, {place}", row
