"""The report's page: one file that loads nothing and shows what came with the text as text. What it draws is looked at
in Chromium, where there is one; what it holds always."""

import base64
import hashlib
import json
import re
import runpy
import sys
from html.parser import HTMLParser

import browser as chromium
import numpy as np
import pytest
import torch
from report_cases import TEXT, sparse_folder
from training_cases import dense_folder
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_sparse_attention import cli
from hf_sparse_attention.report import look_at, page
from hf_sparse_attention.report.encoding import PRECISION, SMALLEST

EVIL = (
    "</script><img src=x onerror=\"window.hacked=1\"><!-- <script>window.hacked=2</script> &amp; 'quoted' "
    "\u2028 \u202e"
)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    dense_folder(folder / "dense", initializer_range=0.3, max_position_embeddings=512)
    sparse_folder(folder)
    return folder


@pytest.fixture(scope="module")
def model(home):
    # In float64: what is exactly 0 is the same whatever computes it.
    return AutoModelForCausalLM.from_pretrained(home / "sparse").double()


@pytest.fixture(scope="module")
def tokenizer(home):
    return AutoTokenizer.from_pretrained(home / "sparse")


@pytest.fixture(scope="module")
def look(model, tokenizer, home):
    return look_at(model, tokenizer, TEXT, dense=str(home / "dense"), page_tokens=80)


class Reader(HTMLParser):
    """Tags with their attributes, and the content of script and style."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.contents, self.inside = [], [], None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.inside = tag

    def handle_data(self, content):
        if self.inside in ("script", "style", "title"):
            self.contents.append((*self.tags[-1], content))

    def handle_endtag(self, tag):
        self.inside = None


def of_kind(reader, tag, **attributes):
    return "".join(
        content for name, found, content in reader.contents if name == tag and attributes.items() <= found.items()
    )


def test_the_page_needs_nothing_but_itself(look):
    text = look.page()
    reader = Reader(text)
    for tag, attributes in reader.tags:
        assert tag not in ("link", "img", "iframe", "object", "base", "form"), tag
        assert not [name for name in attributes if name.startswith("on") or name in ("src", "style", "action")], tag
        assert attributes.get("href", "#").startswith("#")
    assert set(re.findall(r"\w+://[^\"' ]*", text)) == {"http://www.w3.org/2000/svg"}
    assert "url(" not in text and "@import" not in text
    assert len([tag for tag, _ in reader.tags if tag == "script"]) == 2

    (policy,) = [
        found["content"] for tag, found in reader.tags if found.get("http-equiv") == "Content-Security-Policy"
    ]
    rules = {name: values for name, *values in (rule.split() for rule in policy.split(";"))}
    assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == ["'none'"]
    (script,) = [content for tag, found, content in reader.contents if tag == "script" and found.get("type") is None]
    for name, content in (("script-src", script), ("style-src", of_kind(reader, "style"))):
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert rules[name] == [f"'sha256-{digest}'"]


def test_the_script_makes_no_markup_and_asks_for_nothing():
    for name in page.SCRIPT:
        script = (page.PARTS / name).read_text()
        assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|new Function|fetch\(|XMLHttp|"
                             r"WebSocket|import\(|localStorage|cookie", script), name  # fmt: skip
    assert {file.name for file in page.PARTS.iterdir()} == {*page.SCRIPT, *page.STYLE, "page.html"}


def test_whatever_the_text_holds_stays_data(model, tokenizer):
    # Half of a surrogate pair, as a folder's name may hold, is no character and cannot be written.
    text = look_at(model, tokenizer, EVIL, name=EVIL + "\ud800", prompt_tokens=2).page()
    reader = Reader(text)
    assert not [tag for tag, _ in reader.tags if tag == "img"]
    assert len([tag for tag, _ in reader.tags if tag == "script"]) == 2
    data = json.loads(of_kind(reader, "script", type="application/json"))
    assert data["model"] == EVIL + "\ud800" and "onerror" in "".join(data["prompt"]["tokens"])
    assert of_kind(reader, "title") == f"{EVIL}?: what its attention does"
    text.encode()


def test_a_folder_of_the_author_is_not_named(model, tokenizer, home):
    text = look_at(model, tokenizer, TEXT, dense=str(home / "dense"), page_tokens=8, prompt_tokens=8).page()
    assert str(home) not in text and '"model":"sparse"' in text and '"dense":"dense"' in text


def test_a_notebook_gets_the_page_in_a_frame(look):
    shown = look._repr_html_()
    (tag, attributes), *others = Reader(shown).tags
    assert tag == "iframe" and not others
    assert attributes["srcdoc"] == look.page() and attributes["sandbox"] == "allow-scripts"
    assert set(look.figures()) == {"heads", "positions", "attention"}


def test_the_command_writes_page_and_formats(home, tmp_path):
    (home / "text.txt").write_text(TEXT)
    words = ["report", "--model", str(home / "sparse"), "--data", str(home / "text.txt"), "--length", "40"]
    words += ["--windows", "2", "--page_tokens", "30", "--prompt_tokens", "12", "--dense", str(home / "dense")]
    assert cli.main([*words, "--html", "--formats", "svg", "--output_dir", str(tmp_path / "out")]) == 0
    pictures = {f"{name}.svg" for name in ("heads", "positions", "attention")}
    found = {path.name for path in (tmp_path / "out").iterdir()}
    assert found == pictures | {"report.json", "report.md", "report.html"}
    for name in pictures:
        assert (tmp_path / "out" / name).read_bytes().startswith(b"<?xml")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    for row in report["layers"]:
        ranges = row["positions"]
        assert ranges[0]["start"] == 1 and ranges[-1]["end"] == 41
        sizes = np.array([item["end"] - item["start"] for item in ranges])
        assert (sizes > 0).all() and sizes.sum() == 40
        for name in ("support", "scale"):
            mean = (np.array([item[name] for item in ranges]) * sizes[:, None]).sum(0) / 40
            assert mean == pytest.approx(row[name], rel=1e-5)
    assert cli.main([*words, "--formats", "gif"]) == 2
    assert cli.main([*words, "--no_html", "--no_figure"]) == 2


# In Chromium


@pytest.fixture(scope="module")
def browser():
    if chromium.chromium() is None:
        pytest.skip("needs Chromium, which is not installed: apt-get install chromium")
    opened = chromium.Browser()
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def file(look, tmp_path_factory):
    path = tmp_path_factory.mktemp("drawn") / "report.html"
    look.save_page(path)
    return path


def shown(browser):
    return tuple(map(int, browser.evaluate("document.querySelector('main').dataset.shown").split(":")))


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [320, 360, 768, 1440])
def test_it_is_drawn_without_a_complaint_at_any_width(browser, file, width, dark):
    browser.open(file, width=width, dark=dark)
    assert browser.complaints() == []
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    assert browser.evaluate("document.documentElement.dataset.theme") == ("dark" if dark else "light")
    # Every number on a coloured cell can be read: WCAG's contrast of text.
    contrast = browser.evaluate(
        """(() => { const light = (text) => text.match(/\\d+/g).slice(0, 3).map((v) => v / 255)
             .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
             .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0.05);
           return Math.min(...[...document.querySelectorAll('[role=gridcell]:not(.zero)')].map((cell) => {
             const style = getComputedStyle(cell), a = light(style.color), b = light(style.backgroundColor);
             return Math.max(a, b) / Math.min(a, b); })); })()"""
    )
    assert contrast >= 4.5


def test_it_shows_the_weights_of_the_model(browser, file, look):
    for layer, head, query in [(0, 0, 79), (1, 3, 40), (0, 2, 0), (1, 1, 63)]:
        browser.open(file, f"#layer={layer}&head={head}&query={query}")
        assert shown(browser) == (layer, head, query)
        for place, looked in enumerate((look.prompt, look.dense)):
            weights = looked.matrix(layer, head)[0][query]
            carries, rest, own, text = browser.evaluate(
                f"""(() => {{ const strip = document.querySelectorAll('.strip')[{place}];
                  const of = (name) => [...strip.querySelectorAll('.' + name)].map((span) => +span.dataset.index);
                  return [of('carries'), of('rest'), of('own'), strip.textContent]; }})()"""
            )
            assert sorted(carries) == np.flatnonzero(np.nan_to_num(weights) > 0).tolist() and own == [query]
            assert sorted(rest) == (np.flatnonzero(np.isnan(weights)).tolist() if np.isnan(weights).any() else [])
            assert "dogs" in text
        weights = look.prompt.matrix(layer, head)[0][query]
        table = browser.evaluate(
            "[...document.querySelectorAll('#table tbody tr')].map((row) => [...row.cells].map((c) => c.textContent))"
        )
        assert [int(row[0]) for row in table] and len(table) == min(12, (weights > 0).sum())
        for key, _, weight, _ in table:
            wanted = weights[int(key)]
            if weight.startswith("<"):
                assert 0 < wanted <= SMALLEST * (1 + PRECISION)
            else:
                assert float(weight) == pytest.approx(wanted, rel=0.08)


def test_the_picture_leaves_exact_zeros_empty(browser, file, look):
    browser.open(file, "#layer=1&head=2&query=79")
    for place, looked in enumerate((look.prompt, look.dense)):
        largest = next(layer for layer in looked.layers if layer.layer == 1).largest[2]
        colours = browser.evaluate(
            f"""(() => {{ const canvas = document.querySelectorAll('.map canvas')[{place}], side = canvas.width / 80;
              const pen = canvas.getContext('2d'), all = [];
              for (let row = 0; row < 80; row++) for (let column = 0; column < 80; column++)
                all.push(pen.getImageData((column + .5) * side, (row + .5) * side, 1, 1).data.slice(0, 3).join());
              return all; }})()"""
        )
        colours = np.array(colours).reshape(80, 80)
        below = np.tril(np.ones((80, 80), dtype=bool))
        nothing, unseen = "255,255,255", "236,235,230"
        assert set(colours[~below]) == {unseen}
        assert ((colours == nothing) == (below & (largest == 0))).all()
    assert (largest[below] > 0).all()


def test_every_head_and_query_is_reached_with_the_keyboard(browser, file):
    browser.open(file, "#layer=0&head=0&query=79")
    browser.evaluate("document.querySelector('[role=gridcell][aria-selected=true]').focus()")
    assert browser.evaluate("document.activeElement.getAttribute('aria-label')").startswith("layer 0, head 0: ")
    way = {
        "ArrowRight": (0, 1),
        "ArrowDown": (1, 1),
        "End": (1, 3),
        "ArrowLeft": (1, 2),
        "Home": (1, 0),
        "ArrowUp": (0, 0),
    }
    for key, place in way.items():
        browser.press(key)
        browser.wait(f"document.querySelector('main').dataset.shown === '{place[0]}:{place[1]}:79'")
        focus = browser.evaluate("document.activeElement.getAttribute('aria-label')")
        assert focus.startswith(f"layer {place[0]}, head {place[1]}: ")
    assert browser.evaluate("document.querySelectorAll('[role=gridcell][tabindex=\"0\"]').length") == 1
    outline = (
        "(() => { const s = getComputedStyle(document.activeElement); return s.outlineStyle + s.outlineWidth; })()"
    )
    assert browser.evaluate(outline) == "solid3px"
    for selector in (".map", ".strip"):
        browser.evaluate(f"document.querySelector('{selector}').focus()")
        for key, query in [("ArrowUp", 78), ("Home", 0), ("ArrowDown", 1), ("ArrowLeft", 0), ("End", 79)]:
            browser.press(key)
            browser.wait(f"document.querySelector('main').dataset.shown === '0:0:{query}'")
        assert browser.evaluate(outline) == "solid3px"
    assert browser.evaluate("document.querySelector('.map').getAttribute('aria-valuetext')").startswith("token 79, ")
    # What is chosen is in the address.
    assert browser.evaluate("location.hash") == "#measure=zeros&layer=0&head=0&query=79"
    browser.evaluate("document.querySelector('[role=radio][aria-checked=true]').focus()")
    for name in ("support", "block_sparsity", "scale", "alpha", "zeros"):
        browser.press("ArrowRight")
        assert browser.evaluate("document.querySelector('[role=radio][aria-checked=true]').value") == name
        assert browser.evaluate("document.activeElement.value") == name
    # Tab reaches every part, and nothing holds the focus.
    browser.evaluate("document.activeElement.blur()")
    reached = set()
    for _ in range(30):
        browser.press("Tab")
        reached.add(browser.evaluate("document.activeElement.id || document.activeElement.className || "
                                     "document.activeElement.getAttribute('role')"))  # fmt: skip
    assert reached >= {"theme", "layer", "head", "query", "previous", "next", "map", "strip", "gridcell", "link"}
    assert browser.complaints() == []


def test_it_is_moved_with_the_mouse(browser, file):
    browser.open(file, "#layer=0&head=0&query=79")
    browser.click("[aria-label^='layer 1, head 2:']")
    browser.wait("document.querySelector('main').dataset.shown === '1:2:79'")
    assert "Layer 1, head 2" in browser.evaluate("document.getElementById('tip').textContent")
    browser.click(".map", 0.2, 0.507)
    browser.wait("document.querySelector('main').dataset.shown === '1:2:40'")
    assert browser.evaluate("!document.getElementById('tip').hidden")
    browser.click(".strip [data-index='9']")
    browser.wait("document.querySelector('main').dataset.shown === '1:2:9'")
    browser.click("#next")
    browser.wait("document.querySelector('main').dataset.shown === '1:2:10'")
    before = browser.evaluate("getComputedStyle(document.body.parentNode).backgroundColor")
    browser.click("#theme")
    assert browser.evaluate("document.documentElement.dataset.theme") == "dark"
    assert browser.evaluate("getComputedStyle(document.body.parentNode).backgroundColor") != before
    assert browser.evaluate("new URLSearchParams(location.hash.slice(1)).get('theme')") == "dark"
    assert browser.complaints() == []


def test_what_the_text_holds_is_not_run(browser, model, tokenizer, tmp_path):
    look_at(model, tokenizer, EVIL, name=EVIL, prompt_tokens=2).save_page(tmp_path / "evil.html")
    browser.open(tmp_path / "evil.html", f"#measure=constructor&layer={EVIL}&head=99&query=-1")
    assert browser.complaints() == []
    assert browser.evaluate("window.hacked") is None
    assert browser.evaluate("document.querySelectorAll('img, main script').length") == 0
    assert browser.evaluate("document.getElementById('title').textContent").startswith("Where </script><img src=x")
    assert "onerror" in browser.evaluate("document.querySelector('.strip').textContent")


def test_what_is_left_out_is_said(browser, model, tokenizer, home, tmp_path):
    windows = torch.tensor([tokenizer(TEXT)["input_ids"][:64]])
    look = look_at(model, tokenizer, TEXT, dense=str(home / "dense"), page_tokens=300, page_weights=2000,
                   windows=windows)  # fmt: skip
    look.save_page(tmp_path / "long.html")
    browser.open(tmp_path / "long.html")
    text = browser.evaluate("document.getElementById('prompt-text').textContent")
    assert f"The first 300 of the prompt's {look.prompt.total:,} tokens" in text
    assert f"Weights are kept of {len(look.prompt.queries)} of the 300 queries" in text
    assert "3 × 3 tokens" in text
    step = int(look.prompt.queries[1] - look.prompt.queries[0])
    browser.evaluate("document.querySelector('.strip').focus()")
    browser.press("ArrowUp")
    browser.wait(f"document.querySelector('main').dataset.shown.endsWith(':{299 - step}')")
    browser.click("#head")
    dense = browser.evaluate("document.querySelectorAll('.count')[1].textContent")
    layer, head, query = shown(browser)
    place = look.dense.queries.tolist().index(query)
    kept, rest = look.dense.layers[layer].kept[head, place], look.dense.layers[layer].rest[head, place]
    assert f"{query + 1} keys of {query + 1} carry weight, none is exactly zero" in dense
    assert (f"The {kept} heaviest are drawn; the others hold " in dense) == (rest > 0)


@pytest.mark.parametrize("map_name", ["ssmax", "adaptive_entmax"])
def test_a_softmax_map_and_a_learned_alpha(browser, home, tokenizer, tmp_path, map_name):
    folder = sparse_folder(home, f"{map_name}-1", map=map_name, layers=[1])
    model = AutoModelForCausalLM.from_pretrained(folder).double()
    look = look_at(model, tokenizer, TEXT, page_tokens=50, prompt_tokens=4)
    look.save_page(tmp_path / "page.html")
    browser.open(tmp_path / "page.html", "#measure=alpha")
    assert browser.complaints() == []
    # The layer that stayed dense is not among the heads.
    assert browser.evaluate("[...document.querySelectorAll('[role=rowheader]')].map((c) => c.textContent)") == ["1"]
    cells = browser.evaluate("[...document.querySelectorAll('[role=gridcell]')].map((cell) => cell.ariaLabel)")
    alphas = look.report["layers"][0]["alpha"]
    assert cells == [f"layer 1, head {head}: {alpha:.3f}" for head, alpha in enumerate(alphas)]
    summary = browser.evaluate("document.getElementById('summary').textContent")
    browser.click("[role=radio][value=zeros]")
    hatched = browser.evaluate("document.querySelectorAll('[role=gridcell].zero').length")
    if map_name == "ssmax":
        assert summary.startswith("No attention weight is exactly zero") and hatched == 4
        assert "no zeros: softmax" in browser.evaluate("document.getElementById('legend').textContent")
        count = browser.evaluate("document.querySelector('.count').textContent")
        assert count.startswith("50 keys of 50 carry weight, none is exactly zero")
    else:
        assert "of the attention weights are exactly zero" in summary and hatched == 0
        assert min(alphas) < max(alphas)
        facts = browser.evaluate("document.getElementById('facts').textContent")
        assert f"alpha {min(alphas):.3f} to {max(alphas):.3f} by head" in facts


def test_the_example_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    example = page.PARTS.parents[2] / "examples" / "look_at_attention.py"
    monkeypatch.setattr(sys, "argv", [str(example)])
    runpy.run_path(str(example), run_name="__main__")
    assert "layer 4: exact zeros" in capsys.readouterr().out
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "attention-attention.svg", "attention-heads.svg", "attention-positions.svg", "attention.html",
    ]  # fmt: skip
