"""Runs of train-task as a table and a picture."""

import json
import math
import re
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import pytest

from hf_sparse_attention import cli
from hf_sparse_attention.tasks import pictures
from hf_sparse_attention.train import TableArguments, TrainArguments, TrainTaskArguments, table_of_runs, train_task
from hf_sparse_attention.train.task_arguments import MAPS
from hf_sparse_attention.train.task_record import identity_of
from hf_sparse_attention.train.task_table import covered


def record(folder, rate, seed, validation, *, test=(), task="copy", **changes):
    """Writes what train-task would of a run with these numbers; validation is one share, test {length: share}."""
    fields = {key: changes.pop(key) for key in ("failed", "finished", "spans", "device", "seconds") if key in changes}
    place = folder / f"rate-{rate!r}-seed-{seed}"
    place.mkdir(parents=True)
    samples = changes.pop("validation_samples", 200)
    line = {"length": 64, "exact_match": validation, "standard_error": 0.0, "token_accuracy": 0.5, "loss": 1.0}
    run = {
        "name": place.name, "learning_rate": rate, "seed": seed, "steps": 100, "seconds": 30.0, "failed": None,
        "identity": identity_of(TrainTaskArguments(task=task, output="", **changes)),
        "validation": [] if fields.get("failed") else [line], "validation_of": [[64], samples], "finished": True,
    }  # fmt: skip
    (place / "run.json").write_text(json.dumps({**run, **fields}))
    rows = [
        {"length": length, "wanted": 100, "samples": 100, "exact_match": value, "standard_error": 0.012}
        for length, value in dict(test).items()
    ]
    if rows:
        (place / "test.json").write_text(json.dumps(rows))


def made(folder, **options):
    """table.md of the runs below a folder, and its tables as lists of rows of cells."""
    options = {"runs": [str(folder)], "output_dir": str(folder / "table"), "figure": False, **options}
    table_of_runs(TableArguments(**options))
    text = (folder / "table" / "table.md").read_text()
    blocks = [block for block in text.split("\n\n") if block.startswith("|")]
    return text, [[[cell.strip() for cell in row[1:-1].split("|")] for row in block.splitlines()] for block in blocks]


def test_runs_become_a_table_and_a_picture(tmp_path, capsys):
    """From runs as they are trained, by the command line, with every number of their files."""
    summaries = {}
    for name in ("softmax", "entmax"):
        summaries[name] = train_task(TrainTaskArguments(
            task="copy", task_settings=["symbols=6"], lengths=[4, 6], layers=1, hidden_size=32, heads=4, ffn_size=32,
            batch_size=8, learning_rates=[1e-2, 1e-3], device="cpu", steps=4, map=name, output=str(tmp_path / name),
            warmup_steps=1, validation_lengths=[6], validation_samples=20, test_lengths=[6, 12], test_samples=20,
            tested="all",
        ))  # fmt: skip
    words = ["table", "--runs", str(tmp_path / "softmax"), str(tmp_path / "entmax")]
    assert cli.main([*words, "--output", str(tmp_path / "table")]) == 0
    text = (tmp_path / "table" / "table.md").read_text()
    assert "best run of" in capsys.readouterr().out and "![exact match by length](table.png)" in text
    assert (tmp_path / "table" / "table.png").read_bytes().startswith(b"\x89PNG")
    assert "6 (1x) | 12 (2x)" in text and "Runs: 4; failed: 0; not finished: 0" in text and "(cpu)" in text
    assert "of 20 test samples a length" in text and "20 other samples of each of the lengths 6." in text
    for name, summary in summaries.items():
        assert set(summary["tests"]) == {run["name"] for run in summary["runs"]}
        for run in summary["runs"]:
            shares = [f"{100 * line['exact_match']:.1f}" for line in summary["tests"][run["name"]]]
            bold = re.escape("**" if run["name"] == summary["best"] else "")
            numbers = f"{bold} \\| ".join(bold + re.escape(share) + "[ ±.0-9]*" for share in shares)
            assert re.search(f"^\\| {bold}{name}{bold} \\| {bold}{run['learning_rate']:g}.*{numbers}", text, re.M)


def test_the_best_is_of_its_map_whatever_folder_it_lies_in(tmp_path):
    record(tmp_path / "first", 1e-3, 0, 0.8, test={64: 1.0, 4096: 0.7}, map="entmax")
    record(tmp_path / "second", 1e-3, 1, 0.9, test={64: 0.9, 4096: 0.1}, map="entmax")
    record(tmp_path / "other", 2e-3, 0, 0.2, test={64: 0.5, 4096: 0.3}, map="softmax")
    _, (best, every) = made(tmp_path)
    assert best[0] == ["best run of", "rate", "seed", "validation", "64 (1x)", "4,096 (64x)"]
    assert best[2:] == [
        ["softmax", "0.002", "0", "20.00", "50.0 ±1.2", "**30.0 ±1.2**"],
        ["entmax", "0.001", "1", "90.00", "**90.0 ±1.2**", "10.0 ±1.2"],
    ]
    assert [row[0].startswith("**") for row in every[2:]] == [True, False, True]


def test_failures_and_unfinished_runs_are_listed(tmp_path):
    record(tmp_path / "a", 1e-3, 0, 0.5, test={64: 0.5})
    record(tmp_path / "a", 1e30, 0, 0.0, failed="loss nan")
    record(tmp_path / "a", 2e-3, 0, 0.0, finished=False)
    record(tmp_path / "b", 1e30, 0, 0.0, failed="loss inf", map="entmax")
    record(tmp_path / "c", 1e-3, 0, 0.0, finished=False, map="ssmax")
    text, (best, every) = made(tmp_path)
    assert "Runs: 5; failed: 2; not finished: 2." in text
    assert {row[0]: row[4] for row in best[2:]} == {"asentmax": "50.0 ±1.2", "entmax": "-", "ssmax": "-"}
    remarks = {(row[0].strip("*"), row[1].strip("*")): row[-1] for row in every[2:]}
    assert remarks["asentmax", "1e+30"] == "loss nan" and remarks["asentmax", "0.002"] == "not finished"
    assert remarks["entmax", "1e+30"] == "loss inf" and remarks["asentmax", "0.001"] == ""


def test_a_run_that_was_cut_off_and_repeated_counts_once(tmp_path):
    for order in ("ab", "ba"):
        record(tmp_path / order / order[0], 1e-3, 0, 0.0, finished=False)
        record(tmp_path / order / order[1], 1e-3, 0, 0.5, test={64: 0.5})
        text, (best, every) = made(tmp_path / order)
        assert len(every) == 3 and best[2][-1] == "50.0 ±1.2" and "Runs: 1; failed: 0; not finished: 0" in text


def test_what_is_best_stands_out_and_nothing_else(tmp_path):
    for name, shares in (("softmax", (0.0, 0.5, 0.2)), ("entmax", (0.0, 0.5, 0.1)), ("ssmax", (0.0, 0.5))):
        record(tmp_path / name, 1e-3, 0, 0.5, test=dict(zip((64, 128, 256), shares, strict=False)), map=name)
    text, (best, _) = made(tmp_path)
    assert [[cell.startswith("**") for cell in row[4:]] for row in best[2:]] == [
        [False, False, True], [False, False, False], [False, False, False],
    ]  # fmt: skip
    assert "Of runs that are equal in it the one with the most right tokens is the best, then" in text


def test_published_numbers_stand_where_they_can_be_compared(tmp_path, capsys):
    """At the multiple of the training length; beside another task's sizes nowhere."""
    file = tmp_path / "published.yaml"
    file.write_text("copy:\n  theirs: {64: 100, 72: 55, 4096: 85.5}\n")
    record(tmp_path / "same", 1e-3, 0, 0.5, test={64: 0.5})
    assert "of the same longest training length, 64." in made(tmp_path / "same", published=str(file))[0]
    record(tmp_path / "short", 1e-3, 0, 0.5, test={8: 0.5}, lengths=[4, 8])
    text, (best, _) = made(tmp_path / "short", published=str(file))
    assert best[0][4:] == ["8 (1x)", "9 (1.125x)", "512 (64x)"] and best[-1][4:] == ["100.0", "55.0", "85.5"]
    assert "at the same multiple of it, not at the same length" in text and "same multiple" in capsys.readouterr().out
    record(tmp_path / "shorter", 1e-3, 0, 0.5, test={4: 0.5}, lengths=[2, 4])
    text, (best, _) = made(tmp_path / "shorter", published=str(file))
    assert best[0][4:] == ["4 (1x)", "256 (64x)"]
    record(tmp_path / "small" / "a", 1e-3, 0, 0.5, test={64: 0.5}, task_settings=["symbols=6"])
    text, (best, _) = made(tmp_path / "small", published=str(file))
    assert "left out: they are of copy with its own sizes" in text and len(best) == 3
    record(tmp_path / "small" / "b", 1e-3, 0, 0.5, test={64: 0.5})
    assert "which some runs do not have" in made(tmp_path / "small", published=str(file))[0]
    record(tmp_path / "small" / "c", 1e-3, 0, 0.5, test={64: 0.5}, lengths=[4, 8])
    assert "several training lengths" in made(tmp_path / "small", published=str(file))[0]


def test_what_differs_is_part_of_the_name(tmp_path):
    record(tmp_path / "a", 1e-3, 0, 0.5)
    record(tmp_path / "b", 1e-3, 0, 0.5, map="softmax")
    record(tmp_path / "c", 1e-3, 0, 0.5, map="softmax", position="rope")
    record(tmp_path / "d", 1e-3, 0, 0.5, scale_start="normal", warmup_steps=7)
    text, (best, _) = made(tmp_path)
    assert [row[0] for row in best[2:]] == [
        "softmax", "asentmax", "softmax, position rope", "asentmax, scale_start normal, warmup_steps 7",
    ]  # fmt: skip
    settings = re.search("Trained with: (.*)", text)[1]
    common, usual = settings.split("; where a row says nothing else: ")
    assert "steps 10000" in common and "position" not in common and "warmup_steps" not in common
    # What has no name in a row must be read somewhere.
    assert usual.startswith("position nape, warmup_steps 500. Exact match")


def test_an_option_that_a_map_does_not_have_never_names_its_row(tmp_path):
    record(tmp_path / "a", 1e-3, 0, 0.5, scale_start="logarithm")
    record(tmp_path / "b", 1e-3, 0, 0.5, map="softmax")
    text, (best, _) = made(tmp_path)
    assert [row[0] for row in best[2:]] == ["softmax", "asentmax, scale_start logarithm"]
    assert "scale_start" not in re.search("Trained with: (.*)", text)[1]
    # Neither where most have it, and the neutral start need not be told.
    record(tmp_path / "c", 1e-3, 0, 0.5, scale_start="logarithm", alpha=1.25)
    record(tmp_path / "d", 1e-3, 0, 0.5, map="entmax", alpha=1.25)
    record(tmp_path / "e", 1e-3, 0, 0.5)
    _, (best, _) = made(tmp_path)
    assert sorted(row[0] for row in best[2:]) == [
        "asentmax", "asentmax, alpha 1.25, scale_start logarithm", "asentmax, scale_start logarithm",
        "entmax, alpha 1.25", "softmax",
    ]  # fmt: skip


def test_a_start_that_all_runs_have_is_told_once(tmp_path):
    record(tmp_path / "a", 1e-3, 0, 0.5, scale_start="logarithm")
    record(tmp_path / "b", 1e-3, 0, 0.5, scale_start="logarithm", position="rope")
    text, (best, _) = made(tmp_path)
    assert [row[0] for row in best[2:]] == ["asentmax", "asentmax, position rope"]
    assert "scale_start logarithm" in re.search("Trained with: (.*)", text)[1]


def test_the_precision_of_a_test_stands_in_its_row(tmp_path):
    record(tmp_path / "a", 1e-3, 0, 0.5, test={64: 0.5}, map="softmax", precision="bfloat16")
    record(tmp_path / "b", 1e-3, 0, 0.5, test={64: 0.5}, precision="bfloat16")
    record(tmp_path / "c", 1e-3, 0, 0.5, map="entmax", precision="bfloat16")
    assert "computed" not in made(tmp_path)[0]
    file = tmp_path / "b" / "rate-0.001-seed-0" / "test.json"
    (line,) = json.loads(file.read_text())
    file.write_text(json.dumps([{**line, "precision": "float32"}]))
    numbers = tmp_path / "published.yaml"
    numbers.write_text("copy: {theirs: {64: 50.0}}")
    text, (best, every) = made(tmp_path, published=str(numbers))
    assert "computed as each row says" in text
    for table, column in ((best, -1), (every, -2)):
        assert {len(row) for row in table} == {len(table[0])} and table[0][column] == "computed in"
        told = {row[0].strip("*"): row[column].strip("*") for row in table[2:]}
        published = {"theirs": "-"} if table is best else {}
        assert told == {"softmax": "bfloat16", "entmax": "-", "asentmax": "float32", **published}
    # Where all are alike one sentence says it.
    other = tmp_path / "a" / "rate-0.001-seed-0" / "test.json"
    other.write_text(file.read_text())
    text, (best, _) = made(tmp_path)
    assert ", computed in float32;" in text and "computed in" not in best[0]


def test_the_lengths_of_validation_stand_in_its_row_where_they_differ(tmp_path):
    """A mean over other lengths or of fewer samples is another number."""
    numbers = tmp_path / "published.yaml"
    numbers.write_text("copy: {theirs: {64: 50.0}}")
    record(tmp_path / "a", 1e-3, 0, 0.5, test={64: 0.25}, map="softmax")
    record(tmp_path / "b", 1e-3, 0, 0.6, map="entmax", failed="loss nan")
    assert "validated" not in made(tmp_path)[0]
    file = tmp_path / "a" / "rate-0.001-seed-0" / "run.json"
    run = json.loads(file.read_text())
    line = run["validation"][0]
    for validation_of, cells in (
        ([[64, 4096], 200], {"softmax": "64, 4,096", "entmax": "64"}),
        ([[64], 50], {"softmax": "64 (50 each)", "entmax": "64 (200 each)"}),
    ):
        lines = [{**line, "length": length} for length in validation_of[0]]
        file.write_text(json.dumps({**run, "validation": lines, "validation_of": validation_of}))
        _, (best, every) = made(tmp_path, published=str(numbers))
        for table in (best, every):
            column = table[0].index("validated at")
            assert table[0][column - 1] == "validation" and {len(row) for row in table} == {len(table[0])}
            told = {row[0].strip("*"): row[column].strip("*") for row in table[2:]}
            # A run that failed has not been validated and is nobody's best.
            assert told == cells | ({"entmax": "-", "theirs": "-"} if table is best else {})
        assert best[2][best[0].index("64 (1x)")] == "25.0 ±1.2" and best[-1][-1] == "50.0"


def test_an_option_newer_than_a_run_is_not_taken_for_the_usual_one(tmp_path):
    """Two different things never have one name."""
    record(tmp_path / "new", 1e-3, 0, 0.5, test={64: 0.5})
    record(tmp_path / "control", 1e-3, 0, 0.5, map="softmax")
    record(tmp_path / "old", 1e-3, 0, 0.9, test={64: 0.9})
    file = tmp_path / "old" / "rate-0.001-seed-0" / "run.json"
    run = json.loads(file.read_text())
    del run["identity"]["scale_start"]
    file.write_text(json.dumps(run))
    _, (best, _) = made(tmp_path)
    assert sorted(row[0] for row in best[2:]) == ["asentmax", "asentmax, scale_start unknown", "softmax"]


def test_tasks_stand_apart_and_multiples_are_of_the_training_length(tmp_path):
    record(tmp_path / "a", 1e-3, 0, 0.5, test={128: 0.5, 2048: 0.1}, task="local_count")
    record(tmp_path / "b", 1e-3, 0, 0.5, test={64: 0.5, 96: 0.1}, task="reverse")
    text, tables = made(tmp_path)
    assert re.findall("^## (.*)", text, flags=re.M) == ["reverse", "local_count", "All tasks"]
    assert tables[0][0][-2:] == ["64 (1x)", "96 (1.5x)"] and tables[2][0][-2:] == ["128 (1x)", "2,048 (16x)"]


def test_time_that_runs_share_is_counted_once(tmp_path):
    assert covered([]) == 0 and covered([[0, 5], [3, 4], [4, 7], [10, 11]]) == 8
    record(tmp_path / "a", 1e-3, 0, 0.5, spans=[[0, 300], [600, 900]], seconds=600, device="NVIDIA H200")
    record(tmp_path / "a", 2e-3, 0, 0.5, spans=[[0, 450]], seconds=450, device="NVIDIA H200")
    assert "12.5 min; sum of the runs' own: 17.5 min (NVIDIA H200)." in made(tmp_path)[0]


def test_time_is_told_by_row(tmp_path):
    """Of a row's own runs, whether or not another's were trained meanwhile; of old runs what they took."""
    record(tmp_path / "a", 1e-3, 0, 0.5, spans=[[0, 300], [600, 900]], seconds=600, map="entmax")
    record(tmp_path / "b", 1e-3, 0, 0.5, spans=[[0, 60]], seconds=60)
    record(tmp_path / "b", 2e-3, 0, 0.5, seconds=30)
    text, _ = made(tmp_path)
    assert "10.5 min; sum of the runs' own: 11.5 min. The same by row: entmax 10.0 min; asentmax 1.5 min." in text


def test_published_numbers_stand_below_the_runs(tmp_path):
    record(tmp_path / "runs", 1e-3, 0, 0.5, test={64: 0.5})
    file = tmp_path / "published.yaml"
    file.write_text("copy:\n  'softmax, someone': {64: 100, 4096: 85.5}\nsort:\n  theirs: {128: 1}\n")
    _, (best, every) = made(tmp_path, published=str(file))
    assert best[0][-2:] == ["64 (1x)", "4,096 (64x)"] and every[0][-2] == "64 (1x)"
    assert [row[-2:] for row in best[2:]] == [["50.0 ±1.2", "-"], ["100.0", "85.5"]]
    for text, message in (
        ("copy: 5", "does not hold numbers"),
        ("count: {a: {1: 2}}", "numbers of count"),
        ("- [", "does not hold numbers"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            made(tmp_path, published=str(file))


def test_the_picture_has_a_panel_a_task_and_a_line_a_map(tmp_path, monkeypatch):
    for number, name in enumerate(("softmax", "asentmax")):
        for task in ("copy", "sort", "reverse", "2back"):
            lines = {64: 1.0, 128: 0.5 - 0.1 * number, 256: 0.2}
            record(tmp_path / f"{task}-{name}", 1e-3, 0, 0.5, test=lines, task=task, map=name)
    drawn = []
    monkeypatch.setattr(pictures, "picture", lambda figure: drawn.append(figure) or b"")
    table_of_runs(TableArguments(runs=[str(tmp_path)], output_dir=str(tmp_path / "out")))
    shown = [axes for axes in drawn[0].axes if axes.get_visible()]
    assert [axes.get_title() for axes in shown] == ["reverse", "copy", "sort", "2back"]
    for axes in shown:
        assert axes.get_xscale() == "log"
        assert [container.lines[0].get_ydata().tolist() for container in axes.containers] == [
            pytest.approx([100, 50, 20]), pytest.approx([100, 40, 20])
        ]  # fmt: skip
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == ["softmax", "asentmax"]


def test_the_picture_shows_all_runs_the_training_length_and_each_map_in_its_colour(tmp_path, monkeypatch):
    record(tmp_path / "a", 1e-3, 0, 0.9, test={64: 1.0, 128: 0.5}, map="asentmax")
    record(tmp_path / "a", 2e-3, 0, 0.1, test={64: 0.2, 128: 0.1}, map="asentmax")
    record(tmp_path / "b", 1e-3, 0, 0.9, test={64: 0.9}, map="asentmax", position="rope")
    drawn = []
    monkeypatch.setattr(pictures, "picture", lambda figure: drawn.append(figure) or b"")
    for others in ("softmax", "ssmax"):
        record(tmp_path / others, 1e-3, 0, 0.9, test={64: 0.9, 128: 0.4}, map=others)
        table_of_runs(TableArguments(runs=[str(tmp_path)], output_dir=str(tmp_path / "out")))
    for figure in drawn:
        (axes,) = figure.axes
        lines = {container.get_label(): container.lines[0] for container in axes.containers}
        best = next(line for line in lines.values() if line.get_ydata().tolist() == [100, 50])
        assert best.get_color() == pictures.COLOURS[3]
        (pale,) = [line for line in axes.lines if line.get_ydata() is not None and list(line.get_ydata()) == [20, 10]]
        assert pale.get_color() == best.get_color() and pale.get_linewidth() < 1 and pale.get_alpha() < 0.5
        assert [text.get_text() for text in axes.texts] == ["training length 64"]
    names = [text.get_text() for text in drawn[-1].legends[0].get_texts()]
    assert names == ["softmax", "asentmax", "ssmax", "asentmax, position rope"]
    models = [{"label": "a", "map": "entmax", "alpha": 1.0}, {"label": "b", "map": "softmax"}, {"label": "c"}]
    found = pictures.styles(models)
    assert len({style["color"] for style in found.values()}) == 3
    assert [style["linestyle"] == "-" for style in found.values()] == [True, False, True]
    many = [{"label": str(number), "map": "asentmax"} for number in range(20)]
    assert len({(style["color"], style["linestyle"]) for style in pictures.styles(many).values()}) == 20
    # Where colours are short a map's models share its own.
    known = [{"label": name, "map": name} for name in MAPS]
    found_of = pictures.styles([*known, *({"label": f"{name} rope", "map": name} for name in MAPS)])
    for name in MAPS:
        own, further = found_of[name], found_of[f"{name} rope"]
        assert own["color"] == further["color"] and (own["linestyle"], further["linestyle"] == "-") == ("-", False)
    # The evaluation's pictures have the table's colours.
    assert found["a"]["color"] == pictures.styles([{"label": "softmax", "map": "softmax"}])["softmax"]["color"]


def test_the_picture_has_one_line_a_model_however_it_was_trained(tmp_path, monkeypatch):
    """The one that validation prefers, among those that were validated furthest; the others are pale."""
    record(tmp_path / "a", 1e-3, 0, 0.9, test={64: 1.0, 128: 0.5}, map="asentmax")
    record(tmp_path / "b", 1e-3, 0, 0.8, test={64: 1.0, 128: 0.9}, map="asentmax", steps=500, optimizer="muon")
    record(tmp_path / "c", 1e-3, 0, 0.7, test={64: 1.0, 128: 0.8}, map="asentmax", scale_start="logarithm")
    record(tmp_path / "d", 1e-3, 0, 0.99, map="asentmax", softmax_share=0.5)
    record(tmp_path / "e", 1e-3, 0, 0.1, test={64: 0.3, 128: 0.2}, map="asentmax", layers=3)
    for name in ("b", "c"):
        file = tmp_path / name / "rate-0.001-seed-0" / "run.json"
        run = json.loads(file.read_text())
        run["validation"].append({**run["validation"][0], "length": 128})
        file.write_text(json.dumps({**run, "validation_of": [[64, 128], 200]}))
    drawn = []
    monkeypatch.setattr(pictures, "picture", lambda figure: drawn.append(figure) or b"")
    table_of_runs(TableArguments(runs=[str(tmp_path)], output_dir=str(tmp_path / "out")))
    (axes,) = drawn[0].axes
    lines = [container.lines[0].get_ydata().tolist() for container in axes.containers]
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == ["asentmax", "asentmax, layers 3"]
    assert lines == [pytest.approx([100, 90]), pytest.approx([30, 20])]
    pale = [list(line.get_ydata()) for line in axes.lines if line.get_alpha() is not None and line.get_alpha() < 0.5]
    assert sorted(pale) == [pytest.approx([100, 50]), pytest.approx([100, 80])]


def test_a_run_that_was_not_tested_is_no_line_of_the_picture_and_hides_no_other(tmp_path, monkeypatch):
    """The one that validation prefers has no test: its model has no line, its tested runs are pale, the text says so.
    And of runs that validation cannot tell apart the one with the lowest loss is shown."""
    record(tmp_path / "a", 1e-3, 0, 0.3, test={64: 0.5, 128: 0.1}, map="asentmax")
    record(tmp_path / "a", 1e-3, 1, 0.9, map="asentmax")
    record(tmp_path / "b", 1e-3, 0, 0.2, test={64: 0.4, 128: 0.3}, map="asentmax", optimizer="muon")
    record(tmp_path / "c", 1e-3, 0, 1.0, test={64: 1.0, 128: 0.2}, map="softmax")
    record(tmp_path / "d", 1e-3, 0, 1.0, test={64: 1.0, 128: 0.9}, map="softmax", optimizer="muon")
    file = tmp_path / "d" / "rate-0.001-seed-0" / "run.json"
    run = json.loads(file.read_text())
    run["validation"][0]["loss"] = 0.01
    file.write_text(json.dumps(run))
    drawn = []
    monkeypatch.setattr(pictures, "picture", lambda figure: drawn.append(figure) or b"png")
    text, _ = made(tmp_path, figure=True)
    (axes,) = drawn[0].axes
    assert [container.lines[0].get_ydata().tolist() for container in axes.containers] == [pytest.approx([100, 90])]
    pale = [list(line.get_ydata()) for line in axes.lines if line.get_alpha() is not None and line.get_alpha() < 0.5]
    assert sorted(pale) == [pytest.approx([40, 30]), pytest.approx([50, 10]), pytest.approx([100, 20])]
    assert "Without a line, as that run was not tested: asentmax on copy." in text
    # Alone, too.
    made(tmp_path, runs=[str(tmp_path / "a")], figure=True)
    (axes,) = drawn[1].axes
    assert not axes.containers
    assert [list(line.get_ydata()) for line in axes.lines if line.get_alpha() == 0.35] == [pytest.approx([50, 10])]


def test_what_cannot_be_compared_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no run of train or train-task"):
        made(tmp_path)
    record(tmp_path / "a", 1e-3, 0, 0.5)
    made(tmp_path, runs=[str(tmp_path), str(tmp_path / "a")])
    record(tmp_path / "b", 2e-3, 0, 0.5, validation_samples=50)
    with pytest.raises(ValueError, match="not validated on the same lengths"):
        made(tmp_path)
    record(tmp_path / "c", 1e-3, 0, 0.6)
    with pytest.raises(ValueError, match="are the same run, trained twice"):
        made(tmp_path)
    (tmp_path / "a" / "rate-0.001-seed-0" / "test.json").write_text("[1]")
    with pytest.raises(OSError, match="test.json is damaged"):
        made(tmp_path, runs=[str(tmp_path / "a")])
    line = {"length": 64, "wanted": 100, "samples": 100, "exact_match": 0.5, "standard_error": 0.05}
    for lines in (
        [{**line, "exact_match": 50.0}], [{**line, "exact_match": math.nan}], [{**line, "length": "64"}],
        [line, {**line, "exact_match": 0.9}], [{"length": 64}], [{"length": 64, "exact_match": 1.0}], {"64": line},
    ):  # fmt: skip
        (tmp_path / "a" / "rate-0.001-seed-0" / "test.json").write_text(json.dumps(lines))
        with pytest.raises(OSError, match="test.json is damaged"):
            made(tmp_path, runs=[str(tmp_path / "a")])
    (tmp_path / "a" / "rate-0.001-seed-0" / "test.json").unlink()
    run = json.loads((tmp_path / "a" / "rate-0.001-seed-0" / "run.json").read_text())
    for key in ("learning_rate", "finished", "failed", "validation"):
        saved = {name: value for name, value in run.items() if name != key}
        (tmp_path / "a" / "rate-0.001-seed-0" / "run.json").write_text(json.dumps(saved))
        with pytest.raises(OSError, match=f"run.json is damaged .*{key}"):
            made(tmp_path, runs=[str(tmp_path / "a")])
    identity, (line,) = run["identity"], run["validation"]
    for changes, reason in (
        ({"identity": {**identity, "map": "linear"}}, "map is 'linear'"),
        ({"validation": []}, "no lines of validation"),
        ({"validation": [{**line, "token_accuracy": math.nan}]}, "token_accuracy at length 64 is nan"),
    ):
        (tmp_path / "a" / "rate-0.001-seed-0" / "run.json").write_text(json.dumps({**run, **changes}))
        with pytest.raises(OSError, match=f"run.json is damaged .*{reason}"):
            made(tmp_path, runs=[str(tmp_path / "a")])
    (tmp_path / "a" / "rate-0.001-seed-0" / "run.json").write_text("{}")
    with pytest.raises(OSError, match="run.json is damaged"):
        made(tmp_path, runs=[str(tmp_path / "a")])


def test_runs_of_train_have_a_table_of_their_own(tmp_path):
    """They are no damaged runs of train-task, which --overwrite would remove."""
    for name, content in (("pretrained", identity_of_train()), ("staged", {"stages": ["match", "pretrain"]})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(json.dumps(content))
    text, (rows,) = made(tmp_path)
    assert [row[0] for row in rows[2:]] == ["pretrained", "staged"] and "not begun" in rows[3]
    with pytest.raises(ValueError, match="there is no run of `train`"):
        record(tmp_path / "tasks", 1e-3, 0, 0.5, test={64: 0.5})
        made(tmp_path / "tasks", results=["lm"])
    text, blocks = made(tmp_path)
    assert "Runs: 1; failed: 0" in text and blocks[-1] == rows


def identity_of_train() -> dict:
    """What `train` writes into run.json."""
    values = asdict(TrainArguments(model="", output="", train_data=["text.txt"]))
    return {**values, "block_size": 64, "blocks_per_step": 8, "data": [], "vocabulary": 512, "weights": "0"}


FOLDER = Path(__file__).parent.parent / "examples" / "reproduction"


def test_the_published_numbers_are_read(tmp_path):
    record(tmp_path / "runs", 1e-3, 0, 0.5, test={4096: 0.5})
    _, (best, _) = made(tmp_path, published=str(FOLDER / "published.yaml"))
    assert {row[0]: row[-1] for row in best}["asentmax, paper"] == "86.6"


def _rows(text: str) -> Counter[tuple]:
    """Task, map, rate, seed, steps, seconds, validation and the tests of every run of a table.md. Of two that were cut
    off at other steps it says the same."""
    found = Counter()
    for block in text.split("\n## ")[1:]:
        task, tables = block.split("\n")[0], [part for part in block.split("\n\n") if part.startswith("| run |")]
        for table in tables:
            header, _, *rows = [
                [cell.strip(" *") for cell in row.strip().strip("|").split("|")] for row in table.splitlines()
            ]
            for row in rows:
                cells = dict(zip(header, row, strict=False))
                tests = tuple(cells[name] for name in header if name.endswith("x)") and cells[name] != "-")
                own = (cells[name] for name in ("rate", "seed", "steps", "seconds", "validation"))
                found[(task, cells["run"].split(",")[0], *own, *tests)] += 1
    return found


def test_the_kept_records_are_the_runs_that_are_listed(tmp_path):
    """Of the reproduction: what can be read again is what its page of all runs says."""
    text, _ = made(tmp_path, runs=[str(FOLDER / "records")], published=str(FOLDER / "published.yaml"))
    kept, listed = _rows(text), _rows((FOLDER / "runs.md").read_text())
    assert kept.total() == len(list((FOLDER / "records").rglob("run.json")))
    assert kept <= listed
