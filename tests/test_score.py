"""``python -m dflows.score`` from a checkpoint alone, and the page in a browser."""

import io
import json
import math
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

import dflows
from datamodules.vocabulary import CharacterVocabulary
from dflows.cli.page import render_page
from dflows.cli.scoring import Likelier, Scored
from tests.commands import ODD, finished_run, run_here, small_config, write_text

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-sync", "--disable-background-networking", "--disable-component-update"),
    *("--virtual-time-budget=5000", "--window-size=900,700"),
)
HOSTILE = "<script>alert(1)</script>&amp;\u2028 \"'`{{title}}</title>\0\x1b[31m"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a finished run."""
    return finished_run(tmp_path_factory.mktemp("score"))


@pytest.fixture
def text(tmp_path):
    return write_text(tmp_path, 100)


def content_of(text):
    return text.read_bytes().decode()


def test_a_table_has_the_whole_the_lines_and_the_places(run, text, capsys):
    assert run_here("score", "--checkpoint", run, text) == 0
    out = capsys.readouterr().out
    model = dflows.load(run)
    assert f"{model.bits_per_character(content_of(text)):.4f}" in out
    for part in ("odd.txt", "the most surprising lines", "the most surprising places", "likelier"):
        assert part in out
    assert "what the transforms leave at its place" in out
    assert "\0" not in out


def test_a_table_goes_into_a_file(run, text, tmp_path, capsys):
    assert run_here("score", "--checkpoint", run, text, "-o", tmp_path / "table.txt") == 0
    assert capsys.readouterr().out == ""
    table = (tmp_path / "table.txt").read_text(encoding="utf-8")
    assert "the most surprising places" in table
    assert f"{dflows.load(run).bits_per_character(content_of(text)):.4f}" in table


def test_what_a_text_says_is_no_markup(run, tmp_path, capsys):
    file = tmp_path / "[red]a.txt"
    file.write_text(ODD[:4] + "[bold]:smile:\\\n", encoding="utf-8")
    assert run_here("score", "--checkpoint", run, file) == 0
    out = capsys.readouterr().out
    assert "[red]a.txt" in out
    assert "[bold]:smile:\\ " in out


def test_objects_of_lines_add_up(run, text, tmp_path, capsys):
    target = tmp_path / "scores.jsonl"
    arguments = ("--checkpoint", run, text, "--format", "jsonl")
    assert run_here("score", *arguments, "-o", target) == 0
    *lines, whole = map(json.loads, target.read_text(encoding="utf-8").splitlines())
    worst = max(bit for line in lines for bit in line["character_bits"])
    assert whole["places"][0]["bits"] == worst
    assert "".join(line["text"] for line in lines) == content_of(text)
    assert whole["characters"] == 100
    assert whole["unknown"] == 0
    assert whole["bits"] == pytest.approx(sum(line["bits"] for line in lines))
    assert whole["perplexity"] == pytest.approx(2 ** whole["bits_per_character"])
    for line in lines:
        assert line["bits"] == pytest.approx(sum(line["character_bits"]))
        assert len(line["character_bits"]) == len(line["text"]) == line["characters"]
    capsys.readouterr()
    assert run_here("score", *arguments) == 0
    assert capsys.readouterr().out == target.read_text(encoding="utf-8")


def test_the_standard_input_and_what_has_no_class(run, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO("Ça% va\xff".encode())))
    assert run_here("score", "--checkpoint", run, "-", "--format", "jsonl") == 0
    line, whole = map(json.loads, capsys.readouterr().out.splitlines())
    assert (whole["characters"], whole["unknown"]) == (5, 2)
    assert line["character_bits"][2] is None


def test_characters_that_one_model_has_no_class_for_are_compared_by_none(
    run, text, tmp_path, tmp_path_factory, capsys
):
    folder = tmp_path_factory.mktemp("ascii")
    (folder / "plain.txt").write_text("va! \n" * 600, encoding="utf-8")
    assert run_here("fit", "--config", small_config(folder, folder / "plain.txt")) == 0
    capsys.readouterr()
    other = folder / "runs" / "small" / "version_0" / "last.ckpt"
    arguments = ("--checkpoint", run, "--compare", other, text, "--format", "jsonl")
    assert run_here("score", *arguments) == 0
    objects = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    wholes = [one for one in objects if "unknown" in one]
    known = sum(sign in "va! \n" for sign in content_of(text))
    assert [one["characters"] for one in wholes] == [known, known]


def test_two_checkpoints_are_compared(run, text, tmp_path, capsys):
    other = tmp_path / "other.ckpt"
    shutil.copy(run / "last.ckpt", other)
    arguments = ("--checkpoint", run / "best.ckpt", "--compare", other, text)
    assert run_here("score", *arguments) == 0
    out = capsys.readouterr().out
    assert "the lines that other.ckpt finds likelier than best.ckpt" in out
    assert run_here("score", *arguments, "--format", "html", "-o", tmp_path / "page.html") == 0
    names = [model["name"] for model in data_of(tmp_path / "page.html")["models"]]
    assert names == ["best.ckpt", "other.ckpt"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--overlap", 4), "first characters of a window depend on later ones"),
        (("--passes", 0), "passes is 0: give at least 1"),
        (("--window", 8), "8 dimensions were asked for"),
        (("--device", "meta"), "device meta is not available"),
        (("--device", "gpu"), "device gpu is not available"),
        (("-o", "missing/page.html"), "missing/page.html lies in no folder: give a file"),
    ],
)
def test_what_cannot_be_is_one_line(run, text, arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run_here("score", "--checkpoint", run, text, *arguments) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err.splitlines()[-1]


def data_of(page):
    (found,) = re.findall(
        r'<script type="application/json" id="data">(.*?)</script>',
        page.read_text(encoding="utf-8"),
        flags=re.DOTALL,
    )
    return json.loads(found)


def scored(text, *, seed=0, vocabulary=None):
    """A score of random bits, in which every other character has two likelier ones."""
    generator = np.random.default_rng(seed)
    vocabulary = vocabulary or CharacterVocabulary("abc<\n")
    counts = np.arange(len(text)) % 2 * 2
    entries = int(counts.sum())
    likelier = Likelier(
        counts,
        generator.integers(vocabulary.num_classes, size=entries),
        generator.uniform(0.01, 0.5, entries),
    )
    bits = generator.exponential(2, len(text))
    bits[::7] = math.nan
    drawn = np.arange(len(text)) % 17
    return Scored(text, bits, vocabulary, 16, drawn, likelier)


def shown(page, folder, script=""):
    """The document as a browser has it, when scripts have run."""
    file = folder / "page.html"
    file.write_text(page.replace("</body>", f"<script>{script}</script></body>"), encoding="utf-8")
    done = subprocess.run(
        [BROWSER, *FLAGS, f"--user-data-dir={folder / 'profile'}", "--dump-dom", file.as_uri()],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    return done.stdout


def test_no_text_is_markup():
    page = render_page([scored(HOSTILE)], [HOSTILE], HOSTILE)
    assert page.count("<script") == 2
    assert page.count("</script>") == 2
    assert page.count("</title>") == 1
    assert "\u2028" not in page
    assert "\0" not in page


def test_a_page_asks_for_nothing_from_elsewhere():
    page = render_page([scored("abc\n" * 9)], ["model"], "text")
    assert "default-src 'none'" in page
    assert not re.search(r"https?:|src=|@import|url\(", page)


needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")


@needs_browser
def test_a_browser_shows_bits_and_what_was_likelier(tmp_path):
    one = scored(f"abc<\ncab{HOSTILE}\n" * 3)
    page = render_page([one], ["model"], "a text")
    (main,) = re.findall(r"<main.*?</main>", shown(page, tmp_path), flags=re.DOTALL)
    assert main.count("<span") == len(one.text) + main.count("chunk")
    assert len(re.findall(r'class="u\b', main)) == np.isnan(one.bits).sum()
    script = """
    setTimeout(() => {
      const span = [...document.querySelectorAll(".chunk span")].find((each) => each.index === 3);
      span.dispatchEvent(new PointerEvent("pointermove", {bubbles: true, clientX: 9, clientY: 9}));
      document.querySelectorAll("#views input")[1].click();
      document.querySelector("button.go").click();
    }, 500);
    """
    found = shown(page, tmp_path, script)
    (main,) = re.findall(r"<main.*?</main>", found, flags=re.DOTALL)
    assert "<script" not in main
    (tip,) = re.findall(r'<div id="tip".*?</table>', found, flags=re.DOTALL)
    assert f"{one.bits[3]:.1f} bits" in tip
    assert "U+003C" in tip
    for sign, prob in one.likelier_at(3):
        assert f">{ {' ': '␣', chr(10): '↵', '<': '&lt;'}.get(sign, sign) }<" in tip
        assert f"{100 * prob:.2g}"[:3] in tip
    assert "drawn in pass 3 of 16" in found
    assert re.search(r'class="o\d+', main)  # the order of generation was chosen
    line = one.surprising_lines(1)[0]
    assert len(re.findall(r'class="[^"]*\bat\b', main)) == line.end - line.begin


@pytest.mark.slow
@needs_browser
def test_a_megabyte_is_drawn_where_it_is_looked_at(tmp_path):
    text = "abc<abcabc abcacb\n" * 60_000
    script = """
    setTimeout(() => document.body.append(
      `spans: ${document.querySelectorAll(".chunk span").length}`,
      ` of ${signs.length}; height: ${document.body.scrollHeight}`), 1000);
    """
    page = render_page([scored(text, vocabulary=CharacterVocabulary("abc< \n"))], ["model"], "big")
    found = shown(page, tmp_path, script)
    spans, signs, height = map(int, re.findall(r"(?:spans:|of|height:) (\d+)", found)[-3:])
    assert signs == len(text) == 1_080_000
    assert 1000 < spans < 30_000
    assert height > 1_000_000


@needs_browser
def test_a_line_without_an_end_is_one_line_and_outlined_as_a_whole(tmp_path):
    one = scored("abc" * 3000)
    script = 'setTimeout(() => document.querySelector("button.go").click(), 500);'
    (main,) = re.findall(
        r"<main.*?</main>",
        shown(render_page([one], ["m"], "long"), tmp_path, script),
        flags=re.DOTALL,
    )
    assert len(re.findall(r'class="[^"]*\bat\b', main)) == 9000
    assert "<div" not in main


@needs_browser
def test_bits_that_are_too_many_have_no_probability(tmp_path):
    one = scored("abcabc")
    one.bits[1:3] = 70.0, 30.0
    script = """
    setTimeout(() => [1, 2].forEach((index) => {
      const span = [...document.querySelectorAll(".chunk span")].find((one) => one.index === index);
      span.dispatchEvent(new PointerEvent("pointermove", {bubbles: true}));
      document.body.append(tip.cloneNode(true));
    }), 500);
    """
    found = shown(render_page([one], ["m"], "rare"), tmp_path, script)
    assert "more than 65 bits<" in found
    assert "30.0 bits, 9.3e-10<" in found


@needs_browser
def test_two_models_have_a_view_of_their_difference(tmp_path):
    pair = [scored("abc\n" * 20), scored("abc\n" * 20, seed=1)]
    found = shown(render_page(pair, ["one", "other"], "text"), tmp_path)
    views = re.findall(r'type="radio".*?>\s*([\w ]+)<', found)
    assert views == ["bits of one", "bits of other", "difference", "order of generation"]
