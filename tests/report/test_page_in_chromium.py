"""The report opened and clicked through in a headless Chromium: by mouse and by keyboard, light, dark and narrow.

Without a Chromium these tests are skipped. On Debian: apt-get install chromium-headless-shell.
"""

from __future__ import annotations

import itertools
import json

import pytest

from entcov.report.page import write_report
from tests.support.chromium import EXECUTABLE, Chromium
from tests.support.recorded_run import HOSTILE, made_up_run

pytestmark = pytest.mark.skipif(EXECUTABLE is None, reason="no Chromium here: apt-get install chromium-headless-shell")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Chromium(tmp_path_factory.mktemp("chromium")) as found:
        yield found


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    root = tmp_path_factory.mktemp("report")
    runs = [made_up_run(root / name, seed=seed, control=name) for seed, name in enumerate(("clip_cov", "sent"))]
    return write_report(runs, root / "report.html")


def data_of(page) -> dict:
    return json.loads(page.read_text().split('id="data">')[1].split("</script>")[0])


def text(browser, selector: str) -> str:
    return browser.run(f"document.querySelector({json.dumps(selector)}).textContent")


def focus(browser) -> str:
    return browser.run(
        "document.activeElement.id || document.activeElement.className || document.activeElement.tagName"
    )


def test_clicked_through_with_the_mouse(browser, page):
    browser.open(page)
    train, held_out = data_of(page)["runs"][0]["splits"]
    last = train["steps"][-1]["prompts"][0]
    assert text(browser, "#shown") == "40 (record 5 of 5)"
    assert text(browser, "#responses .text") == "".join(last["responses"][0]["pieces"])
    assert browser.run("document.querySelectorAll('#responses .token').length") == 48
    marked = browser.run("[...document.querySelectorAll('#responses .text')[0].children].map(e => e.matches('.mark0'))")
    assert [i for i, one in enumerate(marked) if one] == last["responses"][0]["chosen"]["clip_cov"]
    marks = browser.run("[...document.querySelector('#marks').children].map(e => e.textContent)")
    assert marks == ["token chosen by clip_cov", "token left out of the loss"]
    browser.click("#responses .token:nth-child(3)")
    said = text(browser, "#token")
    assert said.startswith("token 3 of 24: ") and " nats · probability " in said and " → " in said
    assert "advantage +0.9" in said and "covariance" in said
    browser.choose("#prompt", "2")
    assert text(browser, "#task .text") == train["steps"][-1]["prompts"][2]["prompt"]
    browser.click("#history li:nth-child(2) button")  # the same prompt, two steps before
    assert text(browser, "#shown") == "10 (record 2 of 5)"
    assert text(browser, "#task .text") == train["steps"][1]["prompts"][2]["prompt"]
    assert browser.run("document.querySelector('#history [aria-current]').title") == "step 10: 4 of 8 right"
    before = browser.run("document.querySelector('#responses .text').innerHTML")
    browser.choose("#quantity", "advantage")
    assert text(browser, "#legend .name") == "Advantage" and text(browser, "#legend li:nth-child(2)") == "≤ −1.1"
    first = browser.run("document.querySelector('#responses .token').className")
    assert "d7" in first.split() and browser.run("document.querySelector('#responses .text').innerHTML") != before
    browser.choose("#split", "1")
    assert text(browser, "#shown") == "40 (record 5 of 5)"
    shown = browser.run("[...document.querySelectorAll('#quantity option')].map(e => e.value)")
    assert shown == ["entropy", "probability"] and text(browser, "#marks") == ""
    browser.choose("#run", "1")
    wanted = data_of(page)["runs"][1]["splits"][1]["steps"][-1]["prompts"]
    assert text(browser, "#responses .text") in ["".join(p["responses"][0]["pieces"]) for p in wanted]
    assert browser.complaints() == []


def test_the_same_prompt_stays_where_it_was_recorded(browser, tmp_path):
    run = made_up_run(tmp_path / "run")
    for name, first in (("step_10", 1), ("step_20", 2)):  # prompt 0 is counted, and has no response
        path = run / "tokens" / "train" / f"{name}.json"
        record = json.loads(path.read_text())
        path.write_text(json.dumps(record | {"prompts": record["prompts"][first:]}))
    browser.open(write_report([run], tmp_path / "report.html"))
    buttons = "[...document.querySelectorAll('#history button')]"
    assert browser.run(f"{buttons}.map(e => e.disabled)") == [False, True, True, False, False]
    browser.click("#history li:nth-child(2) button")
    assert text(browser, "#shown") == "40 (record 5 of 5)"
    browser.choose("#prompt", "1")
    wanted = text(browser, "#task .text")
    assert browser.run(f"{buttons}.map(e => e.disabled)") == [False, False, True, False, False]
    browser.click("#history li:nth-child(2) button")  # there it is the first one
    assert text(browser, "#shown") == "10 (record 2 of 5)" and text(browser, "#task .text") == wanted
    assert browser.run("document.querySelector('#prompt').value") == "0" and browser.complaints() == []


def test_every_quantity_s_colours_are_those_of_its_values(browser, page):
    browser.open(page)
    data = data_of(page)
    response = data["runs"][0]["splits"][0]["steps"][-1]["prompts"][0]["responses"][1]
    for scale in data["scales"]:
        browser.choose("#quantity", scale["name"])
        classes = browser.run(
            "[...document.querySelectorAll('#responses .text')[1].querySelectorAll('.token')].map(e => e.classList[1])"
        )
        for value, name in zip(response["values"][scale["name"]], classes, strict=True):
            if scale["signed"]:
                assert name[0] == "d" and abs(int(name[1:]) - 4 - 4 * max(-1, min(1, value / scale["end"]))) <= 0.5001
            else:
                assert name == f"q{min(6, int(value / scale['end'] * 7 + 1e-9))}"
        swatches = browser.run("[...document.querySelectorAll('#legend .swatch')].map(e => e.classList[1])")
        assert swatches == [f"{'d' if scale['signed'] else 'q'}{i}" for i in range(9 if scale["signed"] else 7)]
        numbers = browser.run("[...document.querySelectorAll('#legend li')].slice(1).map(e => e.textContent)")
        assert all(any(c.isdigit() for c in number) for number in numbers)


def test_the_keyboard_reaches_everything_and_is_seen(browser, page):
    browser.open(page)
    order: list[str] = []
    while order[-2:] != ["text", "text"] and len(order) < 40:
        browser.press("Tab")
        order.append(focus(browser))
        assert browser.run("document.activeElement.matches(':focus-visible')")
        assert browser.run("getComputedStyle(document.activeElement).outlineStyle") in ("solid", "auto")
    assert order.count("wide") == browser.run("document.querySelectorAll('table').length")  # they scroll
    controls = ["skip", "run", "split", "quantity", "prompt", "step"]
    assert [one for one in order if one != "wide"] == [*controls, *["BUTTON"] * 5, "text", "text"]
    browser.run("document.querySelector('#step').focus()")
    browser.press("ArrowLeft", 2)
    assert text(browser, "#shown") == "20 (record 3 of 5)"
    assert browser.run("document.querySelector('#step').getAttribute('aria-valuetext')") == "step 20"
    browser.press("Home")
    assert text(browser, "#shown") == "1 (record 1 of 5)"
    browser.press("End")
    assert text(browser, "#shown") == "40 (record 5 of 5)"
    browser.press("Tab")
    browser.press("Enter")  # the first button of the history
    assert text(browser, "#shown") == "1 (record 1 of 5)" and "step 1:" in browser.run("document.activeElement.title")
    browser.run("document.querySelector('#responses .text').focus()")
    browser.press("ArrowRight", 3)
    assert text(browser, "#token").startswith("token 3 of 24: ")
    assert browser.run(
        "[...document.querySelectorAll('.token.current')].map(e => [...e.parentNode.children].indexOf(e))"
    ) == [2]
    browser.press("End")
    assert text(browser, "#token").startswith("token 24 of 24: ")
    browser.press("ArrowRight")
    browser.press("ArrowLeft")
    assert text(browser, "#token").startswith("token 23 of 24: ")
    assert browser.complaints() == []


def test_hostile_text_does_nothing_and_is_seen(browser, tmp_path):
    run = made_up_run(tmp_path / "<img src=x onerror=alert(1)>", pieces=HOSTILE, tokens=60, control="<b>clip</b>")
    page = write_report([run], tmp_path / "report.html")
    browser.open(page)
    shown = text(browser, "#responses")
    for seen in (
        "<script>window.pwned = 1</script>",
        "</script>",
        "⟨U+202E⟩",
        "⟨U+D800⟩",
        "⟨U+2028⟩",
        "⟨U+0000⟩",
        "\"'`",
    ):
        assert seen in shown, seen
    assert "<img src=x onerror=alert(1)>" in text(browser, "h1") and "chosen by <b>clip</b>" in text(browser, "#marks")
    assert browser.run("window.pwned === undefined && document.querySelectorAll('script').length === 2")
    assert browser.run("document.querySelectorAll('main b, main iframe, main a, main img:not(.curve)').length") == 0
    assert browser.complaints() == []
    # And if a script did come into the page, the policy would not run it, nor let it reach a network.
    violated = browser.run(
        "new Promise(done => { document.addEventListener('securitypolicyviolation', e => done(e.effectiveDirective)); "
        "const s = document.createElement('script'); s.textContent = 'window.pwned = 1'; document.body.append(s); })"
    )
    assert violated == "script-src-elem" and browser.run("window.pwned === undefined")
    assert browser.run("fetch('http://127.0.0.1:9/').then(() => 'reached', () => 'refused')") == "refused"
    assert any("Content Security Policy" in one and "connect" in one for one in browser.complaints())


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1200])
def test_it_fits_and_can_be_read(browser, page, width, scheme):
    browser.open(page, width=width, scheme=scheme)
    assert browser.run("document.documentElement.scrollWidth") <= width
    outside = (
        "[...document.querySelectorAll('select, input, button, .curve, .text, output, h2')]"
        ".filter(e => e.getBoundingClientRect().right > innerWidth + 0.5).map(e => e.outerHTML.slice(0, 80))"
    )
    assert browser.run(outside) == []
    colours = {}
    for quantity in ("entropy", "advantage"):
        browser.choose("#quantity", quantity)
        found = browser.run(
            "[...document.querySelectorAll('#legend .swatch')]"
            ".map(e => [e.classList[1], getComputedStyle(e).backgroundColor])"
        )
        colours |= {name: rgb(colour) for name, colour in found}
    ink, ground = (rgb(browser.run(f"getComputedStyle(document.body).{name}")) for name in ("color", "backgroundColor"))
    assert (luminance(ground) > 0.5) == (scheme == "light")
    assert all(contrast(ink, colour) > 4.5 for colour in [ground, *colours.values()])
    faint = rgb(browser.run("getComputedStyle(document.querySelector('.note')).color"))
    assert contrast(faint, ground) > 4.5
    # Neighbours can be told apart, and the two ends of the diverging scale also with red-green blindness.
    for names in ([f"q{i}" for i in range(7)], [f"d{i}" for i in range(9)]):
        for a, b in itertools.pairwise(names):
            assert distance(colours[a], colours[b]) > 12, (a, b)
    steps = [luminance(colours[f"q{i}"]) for i in range(7)]
    assert steps == sorted(steps, reverse=scheme == "light")
    for i in range(4):
        for simulated in (DEUTERANOPIA, PROTANOPIA):
            assert distance(seen(colours[f"d{i}"], simulated), seen(colours[f"d{8 - i}"], simulated)) > 20
    assert browser.complaints() == []


def test_a_long_run_opens_quickly(browser, tmp_path):
    """320 steps, 200 responses of 300 tokens on each split: under 10 MB, and under 2 seconds to the second frame."""
    run = made_up_run(tmp_path / "run", steps=320, every=13, tokens=300)
    page = write_report([run], tmp_path / "report.html")
    first = data_of(page)["runs"][0]["splits"][0]
    assert sum(len(p["responses"]) for one in first["steps"] for p in one["prompts"]) >= 200
    assert page.stat().st_size < 10_000_000
    assert min(browser.open(page) for _ in range(4)) < 2.0  # the machine may be doing something else
    assert browser.run("document.querySelectorAll('#responses .token').length") == 600
    slide = (
        "(() => { const e = document.querySelector('#step'), before = performance.now(); e.value = 0; "
        "e.dispatchEvent(new Event('input')); document.body.getBoundingClientRect(); "
        "return performance.now() - before; })()"
    )
    assert browser.run(slide) < 500
    assert text(browser, "#shown") == f"1 (record 1 of {len(first['steps'])})"


# Viénot, Brettel and Mollon 1999, on linear RGB.
DEUTERANOPIA = ((0.29275, 0.70725, 0.0), (0.29275, 0.70725, 0.0), (-0.02234, 0.02234, 1.0))
PROTANOPIA = ((0.11238, 0.88762, 0.0), (0.11238, 0.88762, 0.0), (0.00401, -0.00401, 1.0))


def rgb(colour: str) -> tuple[float, ...]:
    """Linear RGB in [0, 1] of "rgb(r, g, b)"."""
    values = [int(part) / 255 for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]
    return tuple(v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in values)


def luminance(colour) -> float:
    return 0.2126 * colour[0] + 0.7152 * colour[1] + 0.0722 * colour[2]


def contrast(a, b) -> float:
    """WCAG 2.2's contrast ratio."""
    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def seen(colour, matrix) -> tuple[float, ...]:
    return tuple(min(1.0, max(0.0, sum(m * c for m, c in zip(row, colour, strict=True)))) for row in matrix)


def distance(a, b) -> float:
    """Between two linear colours, in 8-bit sRGB."""

    def encoded(v):
        return 255 * (12.92 * v if v <= 0.0031308 else 1.055 * v ** (1 / 2.4) - 0.055)

    return sum((encoded(x) - encoded(y)) ** 2 for x, y in zip(a, b, strict=True)) ** 0.5
