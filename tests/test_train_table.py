"""Runs of train, and what evaluate measured of their models, as tables."""

import importlib.util
import json
import math
import shutil
import sys
from pathlib import Path
from statistics import mean, stdev

import pytest
from training_cases import dense_folder, options, write_text

from hf_sparse_attention import cli
from hf_sparse_attention.convert import ConvertArguments, convert_model
from hf_sparse_attention.evaluate import EvaluateArguments, evaluate_models
from hf_sparse_attention.hub import PushArguments, push_model
from hf_sparse_attention.report import ReportArguments, report_model
from hf_sparse_attention.train import TableArguments, TrainArguments, table_of_runs, train_model
from hf_sparse_attention.train.run_record import Run

pytest.importorskip("accelerate")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """runs/: a control at two rates, asentmax with two seeds, a run of two stages; lm/: an evaluation of three."""
    folder = tmp_path_factory.mktemp("home")
    dense_folder(folder / "dense")
    write_text(folder / "train.txt")
    write_text(folder / "eval.txt", 20, seed=1)
    short = {"steps": 2, "checkpoint_every": 0, "eval_blocks": 2, "statistics_blocks": 1}
    match = ["{stage: match, steps: 1, learning_rate: 1e-2}", "{steps: 1, distill: %s, learning_rate: 1e-3}"]
    made = {
        "control-lr1e-2-s0": {"map": "none"}, "control-lr1e-4-s0": {"map": "none", "learning_rate": 1e-4},
        "asentmax-s0": {}, "asentmax-s1": {"seed": 1},
        "staged-s0": {"stages": [match[0], match[1] % (folder / "dense")]},
    }  # fmt: skip
    for name, changes in made.items():
        train_model(TrainArguments(**options(folder, **{"output": str(folder / "runs" / name), **short, **changes})))
    evaluate_models(
        EvaluateArguments(
            models=[f"base={folder / 'dense'}"]
            + [f"{label}={folder / 'runs' / name / 'model'}" for label, name in
               (("a", "control-lr1e-4-s0"), ("b", "asentmax-s0"), ("c", "asentmax-s1"))],
            data=[str(folder / "eval.txt")], lengths=[16, 64], tasks=["perplexity", "passkey"], limit=2, depths=[0.5],
            concatenate=True, output_dir=str(folder / "lm"), figure=False, device="cpu",
        )
    )  # fmt: skip
    return folder


def made(folder, *runs, **changes):
    """What table_of_runs returns, table.md, and its tables as dicts of columns, row by row."""
    options = {"runs": [str(run) for run in runs], "output_dir": str(folder / "table"), "figure": False, **changes}
    found = table_of_runs(TableArguments(**options))
    text = (folder / "table" / "table.md").read_text()
    shown = []
    for block in text.split("\n\n"):
        if block.startswith("|"):
            header, _, *rows = ([cell.strip() for cell in row[1:-1].split("|")] for row in block.splitlines())
            shown.append([dict(zip(header, row, strict=True)) for row in rows])
    return found, text, shown


def summary_of(home, name):
    return json.loads((home / "runs" / name / "summary.json").read_text())


def loss_of(home, name):
    return summary_of(home, name)["eval_loss"][-1][1]


def test_every_number_is_that_of_the_files(home, tmp_path, capsys):
    found, text, shown = made(tmp_path, home / "runs")
    rows = {(row["run"], row["rate"], row["seed"]): row for row in shown[0]}
    # The rate that is best for the control.
    rates = {name: loss_of(home, f"control-lr{name}-s0") for name in ("1e-2", "1e-4")}
    best = min(rates, key=rates.get)
    control = rates[best]
    assert f"(control at {float(best):g})" in text and rates["1e-2"] != rates["1e-4"]
    assert rows["control", f"{float(best):g}", "0"]["to the control"] == "-"
    losses = [loss_of(home, f"asentmax-s{seed}") for seed in (0, 1)]
    excess = [100 * (math.exp(loss - control) - 1) for loss in losses]
    for seed in (0, 1):
        row, summary = rows["asentmax", "0.01", str(seed)], summary_of(home, f"asentmax-s{seed}")
        assert row["held-out loss"] == f"{losses[seed]:.4f}" and row["to the control"] == f"{excess[seed]:+.2f} %"
        assert row["zeros"] == f"{100 * summary['attention']['zeros']:.1f}" and row["map"] == "asentmax"
        assert row["minutes"] == f"{summary['seconds'] / 60:.1f}" and row["remark"] == ""
    several = rows["**asentmax**", "**0.01**", "**mean of 2**"]
    assert several["held-out loss"] == f"**{mean(losses):.4f} ±{stdev(losses):.4f}**"
    assert several["to the control"] == f"**{mean(excess):+.2f} ±{stdev(excess):.2f} %**"
    # Stages are no runs of their own, and say each of their rates.
    staged = rows["staged", "0.01, 0.001", "0"]
    assert len(rows) == 6 and staged["held-out loss"] == f"{loss_of(home, 'staged-s0'):.4f}"
    assert [run["run"] for run in found["train"]] == ["control", "control", "asentmax", "asentmax", "staged"]
    assert found["train"][2]["to_control"] == pytest.approx(excess[0])
    assert "mean of 2" in capsys.readouterr().out


def test_what_was_measured_is_found_by_the_weights(home, tmp_path):
    _, text, shown = made(tmp_path, home / "runs", results=[str(home / "lm")])
    content = json.loads((home / "lm" / "results.json").read_text())
    cells = {(cell["model"], cell["task"], cell["length"]): cell for cell in content["cells"]}
    perplexity, positions, *needles = shown[1:]
    rows = {(row["run"], row["seed"]): row for row in perplexity}
    assert list(rows) == [
        ("base", "-"), ("control", "0"), ("asentmax", "0"), ("asentmax", "1"), ("**asentmax**", "**mean of 2**")
    ]  # fmt: skip
    for place, label in ((("base", "-"), "base"), (("control", "0"), "a"), (("asentmax", "1"), "c")):
        assert rows[place]["16"] == f"{cells[label, 'perplexity', 16]['perplexity']:.2f}"
    first = [cells[label, "perplexity", 16]["perplexity"] for label in "abc"]
    excess = [100 * (value / first[0] - 1) for value in first[1:]]
    assert rows["asentmax", "0"]["16 to the control"] == f"{excess[0]:+.2f} %"
    assert (
        rows["**asentmax**", "**mean of 2**"]["16 to the control"] == f"**{mean(excess):+.2f} ±{stdev(excess):.2f} %**"
    )
    assert "that is lowest here (control at 0.0001). Text: eval.txt" in text
    assert rows["control", "0"]["16 to the control"] == rows["base", "-"]["16 to the control"] == "-"
    assert "2 windows of 64 tokens, drawn with seed 0" in text and "Mean over 1 depths" in text
    assert [row["run"] for row in needles[0]] == [row["run"] for row in perplexity]
    # The mean loss of the longest windows, taken apart at the shorter length: positions 1 to 15, then 16 to 63.
    rows = {(row["run"], row["seed"]): row for row in positions}
    for place, label in ((("base", "-"), "base"), (("asentmax", "1"), "c")):
        near, far = (float(rows[place][column].rstrip("*")) for column in ("16", "64"))
        ranges = cells[label, "perplexity", 64]["positions"]
        own = [(item["loss"], item["end"] - item["start"]) for item in ranges if item["start"] >= 16]
        assert far == pytest.approx(sum(loss * count for loss, count in own) / 48, abs=6e-4) and near != far
        assert (15 * near + 48 * far) / 63 == pytest.approx(cells[label, "perplexity", 64]["loss"], abs=2e-3)
    assert "Loss by position in windows of 64 tokens" in text
    # Named as a file, or lying in a run's folder, it is the same.
    assert made(tmp_path, home / "runs", results=[str(home / "lm" / "results.json")])[1] == text
    shutil.copytree(home / "runs", tmp_path / "runs")
    shutil.copytree(home / "lm", tmp_path / "runs" / "asentmax-s0" / "evaluation")
    assert made(tmp_path, tmp_path / "runs")[1] == text
    # What was measured otherwise stands in a table of its own.
    content["arguments"]["seed"] = 1
    (tmp_path / "runs" / "asentmax-s1" / "evaluation").mkdir()
    (tmp_path / "runs" / "asentmax-s1" / "evaluation" / "results.json").write_text(json.dumps(content))
    assert len(made(tmp_path, tmp_path / "runs")[2]) == 2 * len(shown) - 1
    # Of weights that were called as a run is.
    other = json.loads((home / "lm" / "results.json").read_text().replace('"base"', '"asentmax-s1"'))
    (tmp_path / "renamed.json").write_text(json.dumps(other))
    _, _, shown = made(tmp_path, home / "runs", results=[str(tmp_path / "renamed.json")])
    assert shown[1][0]["run"] == "asentmax-s1 (other weights)" and shown[1][0]["seed"] == "-"
    # Other weights are another model.
    summary = summary_of(home, "asentmax-s0")
    (tmp_path / "runs" / "asentmax-s0" / "summary.json").write_text(json.dumps({**summary, "fingerprint": "0"}))
    _, _, shown = made(tmp_path, tmp_path / "runs")
    assert ("b", "-") in {(row["run"], row["seed"]) for row in shown[1]}


def test_a_seed_that_was_not_measured_leaves_the_mean_of_the_others(home, tmp_path):
    """Also of the control, which would be one seed of it otherwise, beside which the others stand."""
    shutil.copytree(home / "runs", tmp_path / "runs")
    for name, copies in (("control-lr1e-4", (1, 2)), ("asentmax", (2,))):
        for seed in copies:
            folder = tmp_path / "runs" / f"{name}-s{seed}"
            shutil.copytree(home / "runs" / f"{name}-s0", folder)
            for file in (folder / "run.json", folder / "summary.json"):
                content = json.loads(file.read_text())
                content |= {"seed": seed} if "seed" in content else {}
                content |= {"fingerprint": str(seed)} if "fingerprint" in content else {}
                file.write_text(json.dumps(content))
    results = json.loads((home / "lm" / "results.json").read_text())
    # The control's seed 1 was measured as the dense model, its seed 2 and asentmax's were not.
    (base,) = [model for model in results["models"] if model["label"] == "base"]
    base["fingerprint"] = "1"
    (tmp_path / "results.json").write_text(json.dumps(results))
    _, _, shown = made(tmp_path, tmp_path / "runs", results=[str(tmp_path / "results.json")])
    assert {"mean of 3"} == {row["seed"].strip("*") for row in shown[0] if "mean" in row["seed"]}
    rows = {(row["run"].strip("*"), row["seed"].strip("*")): row for row in shown[1]}
    assert {seed for _, seed in rows} == {"0", "1", "mean of 2"}
    values = [float(rows["control", seed]["16"]) for seed in "01"]
    assert float(rows["control", "mean of 2"]["16"].strip("*").split(" ")[0]) == pytest.approx(mean(values), abs=0.01)
    assert all(rows["control", seed]["16 to the control"] == "-" for seed in ("0", "1"))
    excess = 100 * (float(rows["asentmax", "0"]["16"]) / mean(values) - 1)
    assert float(rows["asentmax", "0"]["16 to the control"].split(" ")[0]) == pytest.approx(excess, abs=0.02)


def test_runs_without_an_end_are_shown_as_such(home, tmp_path):
    shutil.copytree(home / "runs", tmp_path / "runs")
    for name in ("asentmax-s1", "staged-s0", "control-lr1e-4-s0"):
        (tmp_path / "runs" / name / "summary.json").unlink()
    last = tmp_path / "runs" / "staged-s0" / "stages" / "2-pretrain"
    shutil.rmtree(last)
    with (tmp_path / "runs" / "control-lr1e-4-s0" / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 2, "kind": "failed", "reason": "step 2: loss nan"}) + '\n{"step": 2, "ki')
    with (tmp_path / "runs" / "asentmax-s1" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "ki')
    (tmp_path / "runs" / "asentmax-s1" / "packed").mkdir(exist_ok=True)
    _, _, shown = made(tmp_path, tmp_path / "runs")
    remarks = {(row["run"], row["rate"], row["seed"]): row["remark"] for row in shown[0]}
    assert remarks == {
        ("control", "0.01", "0"): "", ("control", "0.0001", "0"): "failed: step 2: loss nan",
        ("asentmax", "0.01", "0"): "", ("asentmax", "0.01", "1"): "not finished: step 2 of 2",
        ("staged", "0.01", "0"): "not finished: 1-match, step 1 of 1",
    }  # fmt: skip
    assert all(row["held-out loss"] == "-" for row in shown[0] if row["remark"])
    (tmp_path / "runs" / "asentmax-s0" / "summary.json").write_text("{}")
    with pytest.raises(OSError, match="asentmax-s0 is damaged .*leave it out"):
        made(tmp_path, tmp_path / "runs")


def test_a_stopped_run_says_why(home, tmp_path, monkeypatch):
    from transformers.models.llama.modeling_llama import LlamaMLP

    forward = LlamaMLP.forward
    with monkeypatch.context() as patched:
        patched.setattr(LlamaMLP, "forward", lambda self, x: forward(self, x) * (math.nan if self.training else 1))
        with pytest.raises(RuntimeError):
            train_model(TrainArguments(**options(home, output=str(tmp_path / "nan-s0"), steps=2)))
    (row,) = made(tmp_path, tmp_path / "nan-s0")[2][0]
    assert row["remark"].startswith("failed: step 1: loss nan") and "documents" in row["remark"]
    # It goes on without what is no longer true.
    train_model(TrainArguments(**options(home, output=str(tmp_path / "nan-s0"), steps=2, resume="auto")))
    (row,) = made(tmp_path, tmp_path / "nan-s0")[2][0]
    assert row["remark"] == "" and "failed" not in (tmp_path / "nan-s0" / "metrics.jsonl").read_text()


@pytest.mark.parametrize(
    "place", ["tokens", "weights", "data", "eval_blocks", "block_size", "text_column", "blank_lines", "eval_split"]
)
def test_a_control_of_another_kind_is_none(home, tmp_path, place):
    """Of other dense weights, text, number of tokens or held-out blocks."""
    for name in ("control-lr1e-4-s0", "asentmax-s0"):
        shutil.copytree(home / "runs" / name, tmp_path / "runs" / name)
    lm = str(home / "lm")
    assert [row["to the control"] for row in made(tmp_path, tmp_path / "runs")[2][0]][1].endswith("%")
    file = tmp_path / "runs" / "control-lr1e-4-s0" / ("summary.json" if place == "tokens" else "run.json")
    content = json.loads(file.read_text())
    content[place] = [["other.txt", "0"]] if place == "data" else 7
    file.write_text(json.dumps(content))
    _, _, shown = made(tmp_path, tmp_path / "runs", results=[lm])
    assert [row["to the control"] for row in shown[0]] == ["-", "-"]
    # Windows of text can be compared whatever blocks a run was looked at on while it was trained.
    column = {row["run"]: row["16 to the control"] for row in shown[1]}
    assert column["asentmax"].endswith("%") == (place in ("eval_blocks", "block_size"))


def test_a_run_of_a_converted_folder_has_the_control_of_its_dense_model(home, tmp_path):
    """It computes what the run of the dense folder does, and is compared with the same control."""
    conversion = ConvertArguments(model=str(home / "dense"), output=str(tmp_path / "converted"), train_length=16)
    convert_model(conversion)

    def run(name):
        short = {"steps": 2, "checkpoint_every": 0, "eval_blocks": 2, "statistics_blocks": 1}
        places = {"model": str(tmp_path / "converted"), "output": str(tmp_path / "runs" / name), "map": None}
        return train_model(TrainArguments(**options(home, **places, **short)))

    def rows():
        _, _, (found, *_) = made(tmp_path, tmp_path / "runs")
        return {row["run"]: row for row in found}

    for name in ("control-lr1e-4-s0", "asentmax-s0"):
        shutil.copytree(home / "runs" / name, tmp_path / "runs" / name)
    run("converted-s0")
    shown = rows()
    assert shown["converted"]["held-out loss"] == shown["asentmax"]["held-out loss"]
    assert shown["converted"]["to the control"] == shown["asentmax"]["to the control"] != "-"
    assert shown["converted"]["remark"] == ""
    # A run that an earlier version began goes on.
    file = tmp_path / "runs" / "converted-s0" / "run.json"
    content = json.loads(file.read_text())
    assert content["weights"] != content.pop("dense_weights")
    file.write_text(json.dumps(content))
    short = {"resume": "auto", "steps": 2, "checkpoint_every": 0, "eval_blocks": 2, "statistics_blocks": 1}
    places = {"model": str(tmp_path / "converted"), "output": str(file.parent), "map": None}
    train_model(TrainArguments(**options(home, **places, **short)))
    # What it began with is not known: that is said.
    assert "dense_weights" not in json.loads(file.read_text())
    assert (rows()["converted"]["to the control"], rows()["converted"]["remark"]) == (
        "-", "not compared: no softmax run here records the weights it began with"
    )  # fmt: skip
    # Nor does a folder that an earlier version converted say it, until it is converted again.
    record = tmp_path / "converted" / "conversion.json"
    whole = json.loads(record.read_text())
    record.write_text(json.dumps({key: value for key, value in whole.items() if key != "dense_weights"}))
    shutil.rmtree(tmp_path / "runs" / "converted-s0")
    run("before-s0")
    assert rows()["before"]["remark"] == "not compared: the model it began with does not name its dense weights"
    convert_model(conversion)
    assert json.loads(record.read_text()) == whole


@pytest.mark.parametrize("folder, name", [
    ("anneal-from-1.01-3e-4", "anneal-from-1.01"), ("new-rate-20x-lr1e-3-s12", "new-rate-20x"), ("md-500", "md-500"),
    ("control-lr0.001-s0", "control"), ("-s0", "-s0"), ("layers-odd", "layers-odd"),
])  # fmt: skip
def test_a_folders_name_without_rate_and_seed(folder, name):
    assert Run(Path(folder), [], None, "").name == name


def test_recipes_of_one_name_are_told_apart(home, tmp_path):
    """A name is what a folder is called, a recipe what was computed: other options are never taken together."""
    shutil.copytree(home / "runs" / "asentmax-s0", tmp_path / "a" / "asentmax-s0")
    shutil.copytree(home / "runs" / "asentmax-s1", tmp_path / "b" / "asentmax-s1")
    file = tmp_path / "b" / "asentmax-s1" / "run.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "alpha_share": 0.1}))
    _, _, (rows, *_) = made(tmp_path, tmp_path / "a", tmp_path / "b")
    assert {row["run"] for row in rows} == {"asentmax-s0", "asentmax-s1"}
    # Where the base and the text lie, and how the blocks of a step are shared out, is no part of a recipe.
    content = json.loads((home / "runs" / "asentmax-s1" / "run.json").read_text())
    file.write_text(json.dumps({**content, "model": "/elsewhere", "train_data": ["/elsewhere/*.txt"]}))
    _, _, (rows, *_) = made(tmp_path, tmp_path / "a", tmp_path / "b")
    assert [row["run"] for row in rows] == ["asentmax", "asentmax", "**asentmax**"]
    # What a later stage starts from follows from the ones before; the dense weights do not.
    for seed in (0, 1):
        shutil.copytree(home / "runs" / "staged-s0", tmp_path / "c" / f"staged-s{seed}")
        for stage in (tmp_path / "c" / f"staged-s{seed}" / "stages").iterdir():
            changes = {"seed": seed} | ({"weights": str(seed)} if stage.name.startswith("2") else {})
            content = json.loads((stage / "run.json").read_text())
            (stage / "run.json").write_text(json.dumps({**content, **changes}))
    assert [row["seed"] for row in made(tmp_path, tmp_path / "c")[2][0]] == ["0", "1", "**mean of 2**"]
    first = tmp_path / "c" / "staged-s1" / "stages" / "1-match" / "run.json"
    first.write_text(json.dumps({**json.loads(first.read_text()), "weights": "other"}))
    assert [row["seed"] for row in made(tmp_path, tmp_path / "c")[2][0]] == ["0", "1"]


def test_a_run_is_kept_with_its_card(home, tmp_path):
    """The command of model_cards: the card that push renders, and the numbers it is made of, without places."""
    spec = importlib.util.spec_from_file_location("keep", Path(__file__).parent.parent / "model_cards" / "keep.py")
    keep = importlib.util.module_from_spec(spec)
    sys.modules["keep"] = keep
    spec.loader.exec_module(keep)
    run = shutil.copytree(home / "runs" / "staged-s0", tmp_path / "runs" / "tiny")
    arguments = keep.KeepArguments(run=str(run), license="mit", output_dir=str(tmp_path / "cards"))
    with pytest.raises(FileNotFoundError, match="results is .*results.json, which is not a file"):
        keep.keep_run(arguments)
    text = {"data": [str(home / "eval.txt")], "device": "cpu", "concatenate": True}
    evaluate_models(EvaluateArguments(
        models=[str(run / "model")], lengths=[16], output_dir=str(run / "evaluation"), **text
    ))  # fmt: skip
    report_model(ReportArguments(
        model=str(run / "model"), length=16, windows=2, html=False, output_dir=str(run / "report"), **text
    ))  # fmt: skip
    with pytest.raises(ValueError, match="where the run itself lies"):
        keep.keep_run(keep.KeepArguments(run=str(run), license="mit", output_dir=str(tmp_path / "runs")))
    # Pictures of other numbers.
    (run / "evaluation" / "depth.png").write_bytes(b"earlier")
    (tmp_path / "cards" / "tiny").mkdir(parents=True)
    (tmp_path / "cards" / "tiny" / "exact_match.png").write_bytes(b"earlier")
    card = keep.keep_run(arguments)
    pictures = {file.name for file in (tmp_path / "cards" / "tiny").glob("*.png")}
    assert "results.png" in pictures and not pictures & {"depth.png", "exact_match.png"}
    push_model(PushArguments(model=str(run / "model"), dry_run=str(tmp_path / "up"), license="mit"))
    assert card.read_text() == (tmp_path / "up" / "README.md").read_text()
    kept = sorted((tmp_path / "cards" / "tiny").iterdir())
    assert {"summary.json", "results.json", "results.md", "report.json", "metrics.jsonl"} < {
        file.name for file in kept
    }
    assert any(file.suffix == ".png" for file in kept) and not any(file.suffix == ".safetensors" for file in kept)
    for file in (card, *kept):
        assert str(home).encode() not in (content := file.read_bytes()) and str(tmp_path).encode() not in content
    summary = json.loads((tmp_path / "cards" / "tiny" / "summary.json").read_text())
    assert summary["eval_loss"] == json.loads((run / "summary.json").read_text())["eval_loss"]
    assert '"distill": "dense"' in summary["command"] or "distill: dense" in summary["command"]
    lines = [json.loads(line) for line in (tmp_path / "cards" / "tiny" / "metrics.jsonl").read_text().splitlines()]
    assert {line["stage"] for line in lines} == {"1-match", "2-pretrain"} and len(lines) == sum(
        len(file.read_text().splitlines()) for file in run.rglob("metrics.jsonl")
    )
    # A number that is not there is not kept as if it were.
    shutil.rmtree(tmp_path / "cards")
    content = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps({**content, "seconds": None}))
    with pytest.raises(ValueError, match="the card of tiny lacks something: .* time .* missing"):
        keep.keep_run(arguments)
    assert not (tmp_path / "cards").exists()


def test_what_cannot_be_shown_is_refused(home, tmp_path, capsys):
    shutil.copytree(home / "runs" / "asentmax-s0", tmp_path / "runs" / "again")
    with pytest.raises(ValueError, match="are the same run, trained twice"):
        made(tmp_path, tmp_path / "runs", home / "runs")
    made(tmp_path, home / "runs", home / "runs" / "asentmax-s0")
    with pytest.raises(FileNotFoundError, match="results names .*nowhere"):
        made(tmp_path, home / "runs", results=["nowhere"])
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(OSError, match="is not a results.json of this version"):
        made(tmp_path, home / "runs", results=[str(tmp_path)])
    words = ["table", "--runs", str(home / "runs"), "--results", str(home / "lm"), "--output_dir", str(tmp_path / "t")]
    assert cli.main(words) == 0 and "Perplexity by length" in capsys.readouterr().out
