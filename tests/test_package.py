"""The package as a whole: the import direction of the design, a light import, a README that tells the truth."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import hf_sparse_attention as hsa
from hf_sparse_attention import cli

PACKAGE = Path(hsa.__file__).parent
ROOT = PACKAGE.parent
README = (ROOT / "README.md").read_text() if (ROOT / "README.md").exists() else ""

# What each room may import of the package; a room not named here is a leaf.
LEAVES = {"config", "visible", "heads", "text", "files", "tables", "figures", "arguments", "kernels"}
ALLOWED = {
    "maps": {"config"},
    "reference": {"visible"},
    "softmax": {"visible", "heads"},
    "attention": {"maps", "reference", "kernels", "softmax", "visible", "heads"},
    "cache": {"kernels"},
    "models": {"attention", "cache", "maps", "config", "visible", "heads"},
}
# Commands whose parts another one uses: a run is pushed when it is done, the benchmark times a step of training.
USES = {"train": {"hub"}, "benchmark": {"train"}}
COMMANDS = {"convert", "train", "evaluate", "report", "hub", "demo", "benchmark"}


def rooms_imported(file: Path) -> set[str]:
    """The rooms of this package that a file imports, also inside functions."""
    relative = file.relative_to(PACKAGE)
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = list(relative.parent.parts)
            base = base[: len(base) - (node.level - 1)]
            if base:
                found.add(base[0])
            elif node.module:
                found.add(node.module.split(".")[0])
            else:
                found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("hf_sparse_attention."):
            found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {name.name.split(".")[1] for name in node.names if name.name.startswith("hf_sparse_attention.")}
    own = relative.parts[0].removesuffix(".py")
    return found - {own}


def room(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_go_down_only(file):
    name, found = room(file), rooms_imported(file)
    if file.name == "__main__.py" or name in ("__init__", "cli", "demo"):
        return
    if name in LEAVES:
        assert found == set(), f"{name} is a leaf"
    elif name in ALLOWED:
        assert found <= ALLOWED[name]
    else:
        others = COMMANDS - {name} - USES.get(name, set())
        assert not found & ({"cli", "demo"} | others), f"{name} imports a command"


def test_kernels_import_torch_and_triton_alone():
    for file in (PACKAGE / "kernels").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                modules = [node.module]
            for module in modules:
                top = module.split(".")[0]
                assert top in ("torch", "triton") or top in sys.stdlib_module_names, f"{file.name} imports {module}"


def python(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_importing_needs_nothing_optional():
    found = python(
        "import sys, hf_sparse_attention\n"
        "optional = 'triton peft datasets matplotlib accelerate yaml zstandard lm_eval deepspeed'.split()\n"
        "print([name for name in optional if name in sys.modules])"
    )
    # Transformers itself imports some of them where they are installed: only what we add counts.
    alone = python(
        "import sys\n"
        "from transformers import AutoModelForCausalLM, LlamaForCausalLM\n"
        "optional = 'triton peft datasets matplotlib accelerate yaml zstandard lm_eval deepspeed'.split()\n"
        "print([name for name in optional if name in sys.modules])"
    )
    assert set(ast.literal_eval(found)) <= set(ast.literal_eval(alone))


def test_importing_adds_little():
    """At most 0.3 s over Transformers' Auto classes and the config any model needs (processor time, the best of three
    runs), and none of Transformers' models: they come with the first one that is used."""
    code = (
        "import sys, time\n"
        "from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, LlamaConfig\n"
        "start = time.process_time()\n"
        "import hf_sparse_attention\n"
        "print(time.process_time() - start)\n"
        "late = ('transformers.modeling_utils', 'transformers.models.llama.modeling_llama')\n"
        "assert not [name for name in late if name in sys.modules]"
    )
    assert min(float(python(code)) for _ in range(3)) <= 0.3


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_help(name, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([name, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "--config" in text
    assert "default: None" not in " ".join(text.split())


def test_the_overview_names_every_command(capsys):
    assert cli.main([]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in cli.COMMANDS)
    assert cli.main(["--version"]) == 0
    assert hsa.__version__ in capsys.readouterr().out
    assert cli.main(["nonsense"]) == 2
    assert "unknown command 'nonsense'" in capsys.readouterr().err


def test_errors_are_one_line_and_exit_code_two(tmp_path, capsys):
    assert cli.main(["convert", "--model", str(tmp_path / "missing"), "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "missing" in error
    assert not (tmp_path / "out").exists()


def test_a_config_file_says_what_a_command_line_says(tmp_path):
    """Words YAML 1.1 takes for truth values, lists and mappings for options that take text."""
    from hf_sparse_attention.arguments import parse_arguments
    from hf_sparse_attention.convert import ConvertArguments
    from hf_sparse_attention.train import TrainArguments

    file = tmp_path / "recipe.yaml"
    file.write_text("model: m\noutput: o\nlayers: [0, 2]\nheads: {0: [0, 1], 2: 3}\noverwrite: yes\ndtype: null\n")
    words = ["--model", "m", "--output", "o", "--layers", "0,2", "--overwrite"] + ["--heads", "0:0,1 2:3"]
    expected = parse_arguments(ConvertArguments, words, program="convert")
    assert parse_arguments(ConvertArguments, ["--config", str(file)], program="convert") == expected
    assert expected.overwrite and expected.layers == "0,2"
    file.write_text("model: m\noutput: o\ntrain_data: [a, b]\nmixed_precision: no\ncompile: off\n")
    found = parse_arguments(TrainArguments, ["--config", str(file)], program="train")
    assert (found.mixed_precision, found.compile, found.train_data) == ("no", False, ["a", "b"])


def test_one_folder_has_two_names(tmp_path):
    from hf_sparse_attention.arguments import parse_arguments
    from hf_sparse_attention.convert import ConvertArguments
    from hf_sparse_attention.evaluate import EvaluateArguments

    for words in (["--model", "m", "--output-dir", "o"], ["--model=m", "--output_dir=o"]):
        assert parse_arguments(ConvertArguments, words, program="convert").output == "o"
    found = parse_arguments(
        EvaluateArguments, ["--model", "a", "b", "--output", "o", "--data", "d"], program="evaluate"
    )
    assert (found.models, found.output_dir) == (["a", "b"], "o")
    file = tmp_path / "a.yaml"
    file.write_text("model: m\noutput-dir: o\n")
    assert parse_arguments(ConvertArguments, ["--config", str(file)], program="convert").output == "o"
    file.write_text("model: m\nout-put: o\n")
    with pytest.raises(ValueError, match="unknown names out-put"):
        parse_arguments(ConvertArguments, ["--config", str(file)], program="convert")
    with pytest.raises(FileNotFoundError, match="no config file nowhere"):
        parse_arguments(ConvertArguments, ["--config", "nowhere.yaml"], program="convert")


def test_training_on_a_task_is_training(capsys):
    for words in (["train", "--task", "copy", "--help"], ["train", "--task=copy", "--help"]):
        with pytest.raises(SystemExit):
            cli.main(words)
        assert "usage: hf-sparse-attention train-task" in capsys.readouterr().out


def test_an_interrupted_command_says_how_to_go_on(monkeypatch, capsys):
    def interrupted(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_sparse_attention.train.train_model", interrupted)
    assert cli.main(["train", "--model", "m", "--output", "o", "--train_data", "t"]) == 130
    assert "--resume auto" in capsys.readouterr().err


def test_readme_table_of_maps_is_computed():
    for row in hsa.MAPS.values():
        line = next((line for line in README.splitlines() if line.startswith(f"| `{row.name}`")), None)
        assert line is not None, f"README has no row for {row.name}"
        assert row.formula in line and row.paper in line


def test_readme_names_every_family():
    (line,) = re.findall(r"^Families: (.*)$", README, flags=re.MULTILINE)
    assert {name.strip("`") for name in re.findall(r"`[a-z0-9_]+`", line)} >= set(hsa.FAMILIES)


def test_readme_names_every_room():
    for file in PACKAGE.iterdir():
        if file.name.startswith("__pycache__") or file.name == "__init__.py":
            continue
        assert f" {file.name}" in README or f" {file.name}/" in README, f"{file.name} is not in README's tree"


def test_readme_commands_parse():
    """Every `hf-sparse-attention` line of the README has options that the command knows."""
    programs = r"hf-sparse-attention|accelerate launch -m hf_sparse_attention\.\w+"
    lines = re.findall(rf"^(?:{programs}) .*$", README, re.MULTILINE)
    assert lines
    for line in lines:
        words = line.split("#")[0].split()
        name = words[3].split(".")[1] if words[0] == "accelerate" else words[1]
        options = [word for word in words if word.startswith("--")]
        try:
            from contextlib import redirect_stdout
            from io import StringIO

            with redirect_stdout(StringIO()) as text:
                cli.main([name, "--help"])
        except SystemExit:
            pass
        for option in options:
            assert option in text.getvalue(), f"{line}: {name} has no {option}"


def test_readme_snippets_run(tmp_path, monkeypatch):
    """The python blocks of the README, one after the other, on the embedded checkpoint."""
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert blocks
    scope = {}
    for block in blocks:
        exec(block.replace("path/or/hub-id-of-a-dense-llama", str(PACKAGE / "data" / "stories260K")), scope)
    assert type(scope["model"]).__name__ == "SparseLlamaForCausalLM"


def test_no_absolute_path_of_a_machine():
    for file in [*FILES, *(ROOT / "tests").glob("*.py"), ROOT / "README.md"]:
        text = file.read_text()
        assert not re.search(r"(?<![\w.])/(?:work|root|home)/", text), file


def test_versions_agree():
    assert f"## {hsa.__version__}" in (ROOT / "CHANGELOG.md").read_text()
