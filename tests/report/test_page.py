"""The report's file: its structure and policy, text of models as text, seeds and comparisons, its bound, its errors.

What the page's script does is tested in a browser, by test_page_in_chromium.py.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

from entcov.cli import main
from entcov.report.compare import markdown, summarize
from entcov.report.page import build_page, read_runs, write_report
from entcov.report.plots import panel_figures
from entcov.report.token_lens import lens, read_records, to_json, visible
from tests.support.recorded_run import HOSTILE, made_up_run


class Structure(HTMLParser):
    """The elements of a page with their attributes, and the content of scripts and styles."""

    def __init__(self, page: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.content: dict[str, list[str]] = {"script": [], "style": [], "title": [], "h1": [], "caption": [], "td": []}
        self._open: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag in self.content:
            self.content[tag].append("")
            self._open.append(tag)

    def handle_endtag(self, tag):
        if self._open and self._open[-1] == tag:
            self._open.pop()

    def handle_data(self, data):
        if self._open:
            self.content[self._open[-1]][-1] += data

    def data(self):
        return json.loads(self.content["script"][0])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    for i in range(3):
        made_up_run(root / "clip_cov" / f"seed_{i}", seed=i, floor=0.4)
        made_up_run(root / "none" / f"seed_{i}", seed=10 + i, control="none")
    return root


@pytest.fixture(scope="module")
def page(folders):
    return build_page(read_runs(sorted(folders.glob("*/seed_*"))))


def test_nothing_is_loaded_and_the_policy_names_what_runs(page):
    found = Structure(page)
    (policy,) = [a["content"] for tag, a in found.elements if a.get("http-equiv") == "Content-Security-Policy"]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    data, script = found.content["script"]
    (style,) = found.content["style"]
    for name, content in (("script-src", script), ("style-src", style)):
        assert rules.pop(name) == f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
    none = "'none'"
    assert rules == {"default-src": none, "img-src": "data:", "base-uri": none, "form-action": none}
    assert "unsafe" not in policy
    links = [a[name] for _, a in found.elements for name in ("src", "href", "srcset", "action", "data") if name in a]
    assert links and all(link.startswith(("data:image/svg+xml;base64,", "#")) for link in links)
    names = {name for _, attributes in found.elements for name in attributes}
    assert not [name for name in names if name.startswith("on") or name in ("style", "ping", "background")]
    for picture in (link for link in links if link.startswith("data:")):
        drawn = base64.b64decode(picture.partition(",")[2]).decode()
        assert drawn.lstrip().startswith("<?xml") and "<script" not in drawn and 'xlink:href="http' not in drawn
    assert json.loads(data)["runs"] and "<" not in data


def test_text_of_models_is_text(tmp_path):
    name = "<img src=x onerror=alert(1)>"
    run = made_up_run(tmp_path / name, pieces=HOSTILE, control='"><script>alert(2)</script>')
    record = run / "tokens" / "train" / "step_40.json"
    stored = json.loads(record.read_text())
    stored["prompts"][0] |= {"prompt": "".join(HOSTILE), "answer": "\ud800</script>", "source": "\u202e<b>"}
    record.write_text(json.dumps(stored))
    page = build_page(read_runs([run]))
    assert page.isprintable() or not re.search("[\x00-\x09\x0b-\x1f\x7f\u2028\u2029\u202a-\u202e\ud800-\udfff]", page)
    found = Structure(page)
    assert [tag for tag, _ in found.elements].count("script") == 2
    assert not [a for tag, a in found.elements if tag in ("img", "b") and a.get("class") != "curve"]
    assert found.content["h1"] == found.content["title"][:1] == [name] or name in found.content["title"][0]
    assert "<" not in found.content["script"][0]  # a browser ends an element sooner than this parser
    (shown,) = found.data()["runs"]
    prompt = shown["splits"][0]["steps"][-1]["prompts"][0]
    assert prompt["answer"] == "⟨U+D800⟩</script>" and prompt["source"] == "⟨U+202E⟩<b>"
    assert prompt["prompt"] == "".join(map(visible, HOSTILE))
    pieces = {piece for response in prompt["responses"] for piece in response["pieces"]}
    assert pieces <= set(map(visible, HOSTILE)) and len(pieces) > 5


def test_what_cannot_be_seen_is_named():
    assert visible("a b\n\t\x00\x7f\u2028\u2029\u202e\u200b\ufeff\ud800\U000e0041") == (
        "a b⏎\n⟨U+0009⟩⟨U+0000⟩⟨U+007F⟩⟨U+2028⟩⟨U+2029⟩⟨U+202E⟩⟨U+200B⟩⟨U+FEFF⟩⟨U+D800⟩⟨U+E0041⟩"
    )
    assert visible("héllo 数学 🎲 שלום <&>\"'") == "héllo 数学 🎲 שלום <&>\"'"
    assert to_json({"a": "</script><!--&\u2028"}) == '{"a":"\\u003c/script\\u003e\\u003c!--\\u0026\\u2028"}'


def test_seeds_are_one_label_and_the_lens_has_every_run(page, folders):
    found = Structure(page)
    assert found.content["h1"] == ["clip_cov, none"]
    assert [run["label"] for run in found.data()["runs"]] == [
        f"{label}, seed {seed}" for label in ("clip_cov", "none") for seed in range(3)
    ]
    assert found.content["td"][:2] == ["clip_cov", "3"] and "±" in found.content["td"][2]
    pictures = [a["alt"] for tag, a in found.elements if tag == "img"]
    assert pictures == [
        title for title in (
            "Reward", "Policy entropy", "Token covariance, mean", "Token covariance, 99.9th percentile",
            "Token covariance, largest", "Mismatch of sampler and trainer", "Response length",
            "Held-out accuracy, mean@2", "Reward over entropy, with the fitted law",
            "Reward, and forecast from the first 15%",
        )
    ]  # fmt: skip
    train, held_out = found.data()["runs"][0]["splits"]
    assert [one["step"] for one in train["steps"]] == [1, 10, 20, 30, 40]
    assert [one["step"] for one in held_out["steps"]] == [0, 10, 20, 30, 40]
    prompt = train["steps"][2]["prompts"][1]
    assert prompt["history"] == [[1, 1, 8], [10, 3, 8], [20, 5, 8], [30, 7, 8], [40, 8, 8]]
    stored = read_records(folders / "clip_cov" / "seed_0")["train"][2]["prompts"][1]["responses"][0]
    response = prompt["responses"][0]
    assert response["values"].keys() == {"entropy", "covariance", "advantage", "change", "probability"}
    assert response["values"]["entropy"] == stored["entropy"]
    before, after = (2.718281828459045 ** stored[name][3] for name in ("logprob", "logprob_after"))
    assert response["values"]["change"][3] == pytest.approx(after - before, rel=1e-2, abs=1e-6)
    assert response["chosen"]["clip_cov"] == stored["chosen"]["clip_cov"]
    assert held_out["steps"][0]["prompts"][0]["responses"][0]["values"].keys() == {"entropy", "probability"}


def test_a_panel_has_seeds_and_their_mean_and_held_out_accuracy_over_sources():
    def row(step, k):
        return {"step": step, "actor/entropy": 1.0 + k, "val-core/a/acc/mean@4": 0.2 * k, "val-core/b/acc/mean@4": 0.6}

    rows = [[row(step, k) for step in (1, 2)] for k in range(3)]
    figures = panel_figures({"x": rows})
    assert list(figures) == ["Policy entropy", "Held-out accuracy, mean@4"]
    drawn = {line.get_gid(): line.get_ydata().tolist() for line in figures["Held-out accuracy, mean@4"].axes[0].lines}
    assert drawn["x"] == pytest.approx([0.4, 0.4]) and drawn["seed 2:x"] == pytest.approx([0.5, 0.5])
    with pytest.raises(ValueError, match="finite values of at least one of"):
        panel_figures({"x": [{"step": 1, "loss": 1.0}]})


def test_a_folder_of_compare_brings_its_differences(folders, tmp_path):
    for name in ("clip_cov", "none"):
        shutil.copytree(folders / name, tmp_path / name)
    rows = {name: dict(enumerate([[{"step": 1, "actor/entropy": 1.0}]])) for name in ("clip_cov", "none")}
    comparison = summarize(rows, {"clip_cov": "none"}, command="entcov compare <recipe>")
    assert "clip_cov" in markdown(comparison, plots=False)
    stored = {"command": comparison.command, "baselines": {"clip_cov": "none", "gone": "gone@0"},
              "estimates": {"clip_cov": {}, "none": {}, "gone": {}}}  # fmt: skip
    (tmp_path / "comparison.json").write_text(json.dumps(stored))
    page = build_page(read_runs([tmp_path]))
    found = Structure(page)
    assert found.content["caption"][1] == "Difference to the baseline, paired by seed"
    assert "entcov compare &lt;recipe&gt;" in page and found.content["td"].count("clip_cov") == 2
    (tmp_path / "comparison.json").write_text("{")
    with pytest.raises(ValueError, match="comparison.json is damaged"):
        read_runs([tmp_path])


def test_names_tell_runs_apart(folders, tmp_path):
    other = tmp_path / "clip_cov" / "seed_0"
    made_up_run(other)
    runs = read_runs([folders / "clip_cov" / "seed_0", other, folders / "clip_cov" / "seed_0"])
    assert list(runs.rows) == [str((folders / "clip_cov").resolve()), str((tmp_path / "clip_cov").resolve())]
    assert list(read_runs([other]).records) == ["clip_cov"]


def test_the_lens_is_cut_to_what_is_left_of_the_page(folders):
    runs = read_runs([folders / "none" / "seed_0"])
    whole = lens(runs.records, 10**7)
    some = lens(runs.records, len(to_json(whole)) * 7 // 10)
    assert whole["left_out"] == 0 and some["left_out"] == 4 and len(to_json(some)) <= len(to_json(whole)) * 7 // 10
    assert [one["step"] for one in some["runs"][0]["splits"][0]["steps"]] == [1, 20, 40]
    most = len(build_page(runs)) - 40_000
    page = build_page(runs, max_bytes=most)
    assert "records are left out to keep the page small" in page and len(page.encode()) < most
    assert lens({"x": {}}, 10**7) == {"scales": [], "left_out": 0, "runs": []}


def test_scales_end_at_a_quantile_of_all_runs(tmp_path):
    run = made_up_run(tmp_path / "run", tokens=10)
    for path in (run / "tokens" / "train").iterdir():
        record = json.loads(path.read_text())
        for prompt in record["prompts"]:
            for response in prompt["responses"]:
                response["entropy"], response["advantage"] = [float(i) for i in range(10)], [-3.0] + 9 * [None]
        path.write_text(json.dumps(record))
    shutil.rmtree(run / "tokens" / "held_out")
    scales = {one["name"]: one for one in lens({"run": read_records(run)}, 10**7)["scales"]}
    assert scales["entropy"]["end"] == 9.0 and not scales["entropy"]["signed"]
    assert scales["advantage"]["end"] == 3.0 and scales["advantage"]["signed"]
    assert scales["probability"]["end"] == 1.0 and list(scales)[0] == "entropy"


def test_bad_folders_are_named(tmp_path, capsys):
    run = made_up_run(tmp_path / "run", steps=2)
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "metrics.jsonl").write_text("")
    for arguments, message in (
        ([str(tmp_path / "no_run")], "metrics.jsonl does not exist"),
        ([str(empty)], "holds no step yet"),
        ([str(run), "--out", str(tmp_path)], "--out: must be a file, got the folder"),
        ([str(run), "--out", str(run / "metrics.jsonl" / "page.html")], "--out: must be in a folder"),
    ):
        assert main(["report", *arguments]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and message in error and "Traceback" not in error
    record = run / "tokens" / "train" / "step_1.json"
    good = record.read_text()
    for damaged in (
        "",
        "{",
        "[]",
        good.replace('"entropy"', '"entropi"'),
        good.replace('"pieces": ["', '"pieces": ["x", "', 1),
    ):
        record.write_text(damaged)
        assert main(["report", str(run)]) == 2
        assert "step_1.json is damaged" in capsys.readouterr().err
    with pytest.raises(ValueError, match="at least one folder"):
        read_runs([])
    (record.parent / "notes.txt").write_text("not a record")
    shutil.rmtree(run / "tokens")
    assert main(["report", str(run)]) == 0  # a run without a record has no lens
    assert "no record of responses" in (run / "report.html").read_text()
    assert capsys.readouterr().out == f"{run / 'report.html'}\n"


def test_the_file_is_replaced_in_one_step(tmp_path, monkeypatch):
    run = made_up_run(tmp_path / "run", steps=2)
    out = tmp_path / "new" / "folder" / "page.html"
    assert write_report([run], out) == out
    first = out.read_bytes()

    def refuse(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", refuse)
    with pytest.raises(OSError, match="disk full"):
        write_report([run], out)
    assert out.read_bytes() == first and [path.name for path in out.parent.iterdir()] == ["page.html"]


def test_the_page_s_files_are_in_the_package():
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert '"entcov.report" = ["page.css", "page.js", "lens.html"]' in project
