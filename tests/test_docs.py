"""The documentation tells the truth: links lead somewhere, blocks run and print what they say, commands and recipes
are understood, the reference is whole."""

import contextlib
import importlib
import importlib.util
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import hf_sparse_attention as hsa
from hf_sparse_attention.arguments import parse_arguments
from hf_sparse_attention.cli import COMMANDS
from hf_sparse_attention.tasks import TASK, TASKS
from hf_sparse_attention.tasks.harness import OWN
from hf_sparse_attention.tasks.needles import NAMES, NEEDLES
from hf_sparse_attention.tasks.random_bits import RandomBits
from hf_sparse_attention.tasks.synthetic import SYNTHETIC
from hf_sparse_attention.train import TrainArguments
from hf_sparse_attention.train.stages import stages_of

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
DENSE = Path(hsa.__file__).parent / "data" / "stories260K"
# A python block, what it is not run for, and the output it is said to have.
BLOCK = re.compile(r"(?:<!-- not run: (.+?) -->\n)?```python\n(.*?)```\n(?:\n```text\n(.*?)```)?", re.DOTALL)

by_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


def prose(page: Path) -> str:
    return re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)


def anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower()) for title in titles}


@by_page
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(file), f"{page.name}: {target}"


@by_page
def test_python_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = page.read_text()
    blocks = BLOCK.findall(text)
    assert len(blocks) == text.count("```python")
    scope = {}
    for reason, code, expected in blocks:
        if reason:
            continue
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(code.replace("path/or/hub-id-of-a-dense-llama", str(DENSE)), scope)
        # train_model prints a summary of its own, above what the block prints.
        if expected:
            assert printed.getvalue().endswith(expected), f"{code}\nprinted {printed.getvalue()!r}"


@by_page
def test_commands_parse(page, monkeypatch):
    # Files that a command names are those of the repository.
    monkeypatch.chdir(ROOT)
    blocks = "".join(re.findall(r"```bash\n(.*?)```", page.read_text(), flags=re.DOTALL))
    for line in re.findall(r"^(?:hf-sparse-attention|accelerate launch) .*$", blocks, flags=re.MULTILINE):
        words = shlex.split(line, comments=True)
        if words[0] == "accelerate":
            at = words.index("-m") + 1
            for option, value in zip(words[:at], words[1:at], strict=False):
                assert option != "--config_file" or (ROOT / value).is_file(), line
            name, words = words[at].rpartition(".")[2], words[at + 1 :]
        else:
            name, words = words[1], words[2:]
        command = COMMANDS[name]
        kind = getattr(importlib.import_module(f"hf_sparse_attention.{command.module}"), command.arguments)
        parse_arguments(kind, words, program=name)


@by_page
def test_recipes_are_understood(page, tmp_path):
    """The yaml blocks are recipes of train, whole, with stages that may follow each other."""
    for block in re.findall(r"```yaml\n(.*?)```", page.read_text(), flags=re.DOTALL):
        (tmp_path / "recipe.yaml").write_text(block)
        stages = stages_of(
            parse_arguments(TrainArguments, ["--config", str(tmp_path / "recipe.yaml")], program="train")
        )
        assert [stage.stage for stage in stages] == ["match", "pretrain"]


def test_the_reference_names_every_entry_point():
    text = (DOCS / "reference.md").read_text()
    paths = re.findall(r"^::: (\S+)$", text, flags=re.MULTILINE)
    assert len(set(paths)) == len(paths)
    for path in paths:
        module, _, name = path.rpartition(".")
        entry = getattr(importlib.import_module(module), name)
        # Where it is defined, since mkdocstrings reads the source.
        assert entry.__module__ == module, f"{path} is defined in {entry.__module__}"
        assert entry.__doc__ and not entry.__doc__.startswith(f"{name}("), f"{path} has no docstring"
    named = {path.rpartition(".")[2] for path in paths} | set(re.findall(r"`(?:[\w.]+\.)?(\w+)`", text))
    wanted = {name for name in hsa.__all__ if name not in hsa.models.CLASSES}
    wanted |= {row.function for row in COMMANDS.values()} | set(hsa.reference.__all__) | {"look_at"}
    wanted |= {kind.__name__ for kind in SYNTHETIC.values()} | {"entmax_attention"}
    assert wanted - named == set()


def test_what_is_filled_in_has_a_page():
    """Every command's options stand on a page, and every comment of a page is one that docs/render.py knows."""
    specification = importlib.util.spec_from_file_location("render", DOCS / "render.py")
    render = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(render)
    text = "\n".join(page.read_text() for page in PAGES)
    assert set(re.findall(r"<!-- options: (\S+) -->", text)) == set(COMMANDS)
    filled = render.on_page_markdown(text)
    assert set(re.findall(r"<!-- (.*?) -->", filled)) == {"not run: the file comes from a GPU"}
    for name in (*hsa.FAMILIES, *TASKS, "TrainTaskArguments", "--cache_lengths"):
        assert f"`{name}`" in filled or f".{name}`" in filled, name


def test_the_table_of_tasks_says_what_they_ask():
    rows = re.findall(r"^\| (`.+`) \| (.+) \| (.*)\|$", (DOCS / "evaluate.md").read_text(), flags=re.MULTILINE)
    rows = {name: (text, question.strip()) for name, text, question in rows}
    for name, task in TASKS.items():
        if task.kind == TASK:
            assert f"`{name}`" in ", ".join(rows), name
            continue
        text, question = rows[f"`{name}`"]
        assert text == task.description
        if name in NEEDLES:
            asked = NEEDLES[name].draw(RandomBits("docs", 0)).question.strip()
            assert question == re.sub("|".join(NAMES), "NAME", asked)
    for name in OWN:
        assert f"`{name}`" in (DOCS / "evaluate.md").read_text(), name


def test_the_table_of_maps_is_computed():
    rows = re.findall(r"^\| `(\w+)` \| (.+) \| (.+) \|$", (DOCS / "convert.md").read_text(), flags=re.MULTILINE)
    ranges = {name: (row.lowest, row.highest) for name, row in hsa.config.SPECIFICATIONS.items()}
    shown = {name: f"{low:g} to {high:g}" if high > low else f"{low:g}" for name, (low, high) in ranges.items()}
    assert rows == [(name, row.formula, shown[name]) for name, row in hsa.MAPS.items()]


def test_the_measurements_are_those_of_the_notes():
    notes = (Path(hsa.__file__).parent / "kernels" / "NOTES.md").read_text()
    rows = re.findall(r"^\| \d+ % \|.*$", (DOCS / "kernels.md").read_text(), flags=re.MULTILINE)
    assert len(rows) == 4 and all(row in notes for row in rows)


def test_the_figures_are_drawn_by_the_script(tmp_path):
    pytest.importorskip("matplotlib")
    specification = importlib.util.spec_from_file_location("draw_figures", DOCS / "draw_figures.py")
    script = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(script)
    drawn = {file.name for file in script.draw(tmp_path)}
    used = set(re.findall(r"\(figures/(\w+\.svg)\)", (DOCS / "mathematics.md").read_text()))
    assert drawn == used == {file.name for file in (DOCS / "figures").iterdir()}


def apply_differences(root: Path) -> None:
    """Applies the diff blocks of extend.md: what a block has without its + lines stands in the file exactly once."""
    for path, body in re.findall(r"```diff\n--- (\S+)\n(.*?)```", (DOCS / "extend.md").read_text(), flags=re.DOTALL):
        lines = body.splitlines(keepends=True)
        before = "".join(line[1:] for line in lines if not line.startswith("+"))
        after = "".join(line[1:] for line in lines if not line.startswith("-"))
        text = (root / path).read_text()
        assert text.count(before) == 1, f"{path} does not have\n{before}"
        (root / path).write_text(text.replace(before, after))


def test_a_new_map_and_family_work_as_described(tmp_path):
    shutil.copytree(Path(hsa.__file__).parent, tmp_path / "hf_sparse_attention")
    apply_differences(tmp_path)
    code = f"""
import torch, hf_sparse_attention as hsa
from transformers import AutoConfig, AutoModelForCausalLM
from hf_sparse_attention.convert import ConvertArguments, convert_model
assert hsa.__file__.startswith({str(tmp_path)!r}) and "helium" in hsa.FAMILIES
sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=64, head_dim=8,
             bos_token_id=1, eos_token_id=2, pad_token_id=0)
torch.manual_seed(0)
dense = AutoModelForCausalLM.from_config(AutoConfig.for_model("helium", **sizes)).eval()
dense.save_pretrained("dense")
convert_model(ConvertArguments(model="dense", output="sparse", map="temperature_entmax"))
model = AutoModelForCausalLM.from_pretrained("sparse").eval()
assert type(model).__name__ == "SparseHeliumForCausalLM"
ids = torch.arange(3, 20)[None]
hsa.set_alpha(model, 1.0)
assert torch.allclose(model(ids).logits, dense(ids).logits, atol=1e-5)
hsa.set_alpha(model, 1.5)
model(ids, labels=ids).loss.backward()
assert all(p.grad.abs().max() > 0 for name, p in model.named_parameters() if "temperature_bias" in name)
"""
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.mark.slow
def test_the_site_builds_and_fetches_nothing(tmp_path):
    for module in ("mkdocs", "material", "mkdocstrings_handlers", "latex2mathml"):
        pytest.importorskip(module, reason="the docs extra is not installed")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr[-3000:]
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) >= len(PAGES)
    fetched = re.compile(
        r"""<(?:script|img|iframe|source)\b[^>]*\bsrc=["']?(?:https?:)?//[^>]*"""
        r"""|<link\b(?=[^>]*\brel=["']?(?:stylesheet|preconnect|preload|icon))[^>]*\bhref=["']?(?:https?:)?//[^>]*"""
    )
    for page in pages:
        text = page.read_text()
        assert not fetched.search(text), f"{page.name}: {fetched.search(text)[0]}"
        assert 'class="arithmatex"' not in text and "<!-- options:" not in text
    assert "<math" in (tmp_path / "site" / "mathematics.html").read_text()
    for style in (tmp_path / "site").rglob("*.css"):
        assert not re.search(r"url\([\"']?(?:https?:)?//", style.read_text()), style.name


SMALL = {
    "train": "--steps 2 --block_size 64 --batch_size 1 --eval_blocks 1 --checkpoint_every 0 --cpu true",
    "evaluate": "--lengths 32 64 --limit 2 --device cpu",
    "report": "--length 64 --windows 1 --device cpu",
}


@pytest.mark.slow
def test_the_whole_way_of_the_quickstart_runs(tmp_path, monkeypatch):
    """The commands of the last block of index.md, one after the other, with numbers small enough for a test."""
    from hf_sparse_attention import cli

    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").mkdir()
    text = "Once upon a time there was a little fox who lived in the wood. " * 40
    (tmp_path / "text" / "a.jsonl").write_text(json.dumps({"text": text}) + "\n")
    (tmp_path / "held-out.txt").write_text(text)
    block = re.findall(r"```bash\n(.*?)```", (DOCS / "index.md").read_text(), flags=re.DOTALL)[-1]
    assert block.count("\n") == 5
    for line in block.splitlines():
        words = shlex.split(line.replace("path/or/hub-id", str(DENSE)))[1:]
        assert cli.main([*words, *SMALL.get(words[0], "").split()]) == 0, line
    assert (tmp_path / "upload" / "README.md").is_file()
