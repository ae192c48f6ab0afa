"""Runs of train-task -> a table of them all, one of those that validation prefers, and a picture of these by length.
Runs that differ in nothing but rate and seed belong together, whatever folders they lie in; runs of `train` have
tables of their own.

hf-sparse-attention table --runs runs --published examples/reproduction/published.yaml --output_dir table"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from .. import tables
from ..files import write_bytes, write_text
from ..tasks.synthetic import SYNTHETIC, make_task
from .run_record import read_runs
from .run_table import blocks_of
from .task_groups import Group, grouped, read_task_runs
from .task_options import UNKNOWN, is_of_every_map, usual_value, values_of
from .task_record import TIES, share


@dataclass(frozen=True)
class TableArguments:
    """Options of `table`: runs of train and of train-task, side by side."""

    runs: list[str] = field(metadata={"help": "folders that hold outputs of train or train-task, at any depth"})
    output_dir: str = field(default="table", metadata={"help": "folder for table.md and table.png"})
    published: str | None = field(
        default=None,
        metadata={
            "help": "YAML file of numbers to stand beside the runs': percent of exact matches by task, name and "
            "length, of the task's own sizes and training lengths"
        },
    )
    results: list[str] = field(
        default_factory=list,
        metadata={
            "help": "results.json files of evaluate, or their folders, with models of runs of train, which are known "
            "by their weights (default: evaluation/ in each run)"
        },
    )
    figure: bool = field(default=True, metadata={"help": "draw table.png of train-task's runs (needs matplotlib)"})


def table_of_runs(arguments: TableArguments) -> dict[str, list[dict]]:
    """Writes table.md and table.png, prints the best runs, and returns them by task: label, run.json and tests.

    Runs of `train` are all printed, and under "train": run, folder, map, rates, seed, loss, to_control and zeros in %.

    Raises:
        ValueError: if there is no run, the same one twice, runs of one map were validated on different samples, or
            results are named and no run of `train`.
        OSError: if a file of a run is damaged.
    """
    published = {} if arguments.published is None else _published(Path(arguments.published))
    tasks, trainings = read_task_runs(arguments.runs)
    by_task = grouped(tasks)
    if arguments.figure and by_task:
        from . import task_picture
    if arguments.results and not trainings:
        raise ValueError(f"results is {arguments.results}, but there is no run of `train`: leave it out")
    output = Path(arguments.output_dir).expanduser()
    blocks, shown = ["# Runs of train-task" if by_task else "# Runs"], []
    for task, groups in by_task.items():
        lengths = sorted({length for group in groups for run in group.runs for length in run["tests"]})
        beside, remark = _beside(task, groups, published.get(task, {}))
        best = _best_table(groups, lengths, beside)
        blocks += [
            f"## {task}",
            _settings(groups),
            tables.markdown(*best),
            *([remark] if remark else []),
            f"{_time(groups)} {_time_by_row(groups)}",
        ]
        blocks += [tables.markdown(*_every_run(groups, lengths))]
        header, rows = best
        # Bold is Markdown's.
        shown += [task, tables.plain(header, [[cell.strip("*") for cell in row] for row in rows])]
        shown += [*([remark] if remark else []), ""]
    if len(by_task) > 1:
        blocks += ["## All tasks", _time([group for groups in by_task.values() for group in groups])]
    found = {task: [{"label": group.label, **group.best} for group in groups if group.best] for task, groups in
             by_task.items()}  # fmt: skip
    trained: tuple[list[str], list[str], list[dict]] = ([], [], [])
    if trainings:
        trained = blocks_of(read_runs(trainings), arguments.results)
    picture, said = task_picture.drawn(by_task) if arguments.figure and by_task else (None, "")
    if picture:
        write_bytes(output / "table.png", picture)
        blocks[1:1] = ["![exact match by length](table.png)", said]
    write_text(output / "table.md", "\n\n".join([*blocks, *trained[0]]) + "\n")
    print("\n".join([*shown, *trained[1]]))
    return found | ({"train": trained[2]} if trainings else {})


def _settings(groups: list[Group]) -> str:
    """What is the same for all groups of a task, and how their numbers are to be read."""
    identities = [group.identity for group in groups]
    common = {
        key: usual_value(identities, key)
        for key in dict.fromkeys(key for identity in identities for key in identity) if key not in ("task", "map")
    }  # fmt: skip
    shared = [
        f"{key} {value}" for key, value in common.items()
        if value not in (None, []) and all(other == value for other in values_of(identities, key))
    ]  # fmt: skip
    usual = [
        f"{key} {value}" for key, value in common.items()
        if is_of_every_map(key) and value not in (None, [])
        and any(identity.get(key) != value for identity in identities)
    ]  # fmt: skip
    runs = [run for group in groups for run in group.runs]
    validated = dict.fromkeys(
        f"{samples:,} other samples of each of the lengths {', '.join(f'{length:,}' for length in lengths)}"
        for lengths, samples in (
            run["validation_of"] for run in runs if run.get("validation") and "validation_of" in run
        )
    )
    counts = sorted({line["samples"] for run in runs for line in run["tests"].values() if "samples" in line})
    precisions = _precisions(groups)
    computed = f", computed in {precisions[0]}" if len(precisions) == 1 else ", computed as each row says"
    tested = " to ".join(f"{count:,}" for count in dict.fromkeys(counts[:1] + counts[-1:]))
    return (
        f"Trained with: {', '.join(shared)}"
        + (f"; where a row says nothing else: {', '.join(usual)}" if usual else "")
        + ". Exact match in %"
        + (f" of {tested} test samples a length, ± standard error unless it is 0.0" if counts else "")
        + (computed if precisions else "")
        + f"; validation, which chooses the best: its mean over {' or '.join(validated)}. {TIES}"
    )


def _tested(run: dict) -> list[str]:
    """The precisions its tests were computed in."""
    # Earlier versions tested in the precision of training.
    trained = run["identity"].get("precision", UNKNOWN)
    return sorted({line.get("precision", trained) for line in run["tests"].values() if "missing" not in line})


def _precisions(groups: list[Group]) -> list[str]:
    """The precisions of all tests; none if every test was computed in that of its training."""
    runs = [run for group in groups for run in group.runs]
    if all(_tested(run) in ([], [run["identity"].get("precision", UNKNOWN)]) for run in runs):
        return []
    return sorted({precision for run in runs for precision in _tested(run)})


def _computed_in(groups: list[Group], run: dict | None) -> list[str]:
    """The cell that says so, where tests differ in it; None makes its heading."""
    if len(_precisions(groups)) < 2:
        return []
    return ["computed in" if run is None else " and ".join(_tested(run)) or tables.MISSING]


def _validated_at(groups: list[Group], run: dict | None) -> list[str]:
    """The cell with lengths and samples of a run's validation, where these differ; None makes its heading. Means over
    other lengths, or fewer samples, are not to be compared."""
    told = [one["validation_of"] for group in groups for one in group.runs if "validation_of" in one]
    if all(way == told[0] for way in told):
        return []
    if run is None:
        return ["validated at"]
    if "validation_of" not in run:
        return [tables.MISSING]
    lengths, samples = run["validation_of"]
    several = len({number for _, number in told}) > 1
    return [", ".join(f"{length:,}" for length in lengths) + (f" ({samples:,} each)" if several else "")]


def _beside(task: str, groups: list[Group], published: dict) -> tuple[dict, str]:
    """Published numbers at the lengths where they can stand beside the runs', and what to say of that.

    They are of the task's own sizes and training lengths; beside runs of other lengths they stand at the same multiple
    of the training length, beside runs of other sizes nowhere.
    """
    if not published:
        return {}, ""
    usual = make_task(task, {})
    comparable = [group for group in groups if group.arguments().chosen_task() == usual]
    if not comparable:
        return {}, f"Published numbers are left out: they are of {task} with its own sizes, which no run here has."
    theirs, ours = usual.default_lengths[1], {group.longest() for group in comparable}
    if len(ours) > 1:
        return {}, "Published numbers are left out: the runs have several training lengths."
    (longest,) = ours
    others = (
        "" if len(comparable) == len(groups) else " They are of the task's own sizes, which some runs do not have."
    )
    if longest == theirs:
        return published, f"Published numbers are of the same longest training length, {theirs:,}.{others}"
    moved = {
        name: {
            length * longest // theirs: value for length, value in numbers.items() if length * longest % theirs == 0
        }
        for name, numbers in published.items()
    }
    return moved, (
        f"Published numbers are of longest training length {theirs:,} and stand at the same multiple of it, not at "
        f"the same length.{others}"
    )


def _length_header(groups: list[Group], lengths: list[int]) -> list[str]:
    longest = {group.longest() for group in groups}
    if len(longest) > 1:
        return [f"{length:,}" for length in lengths]
    return [f"{length:,} ({length / min(longest):g}x)" for length in lengths]


def _best_table(groups: list[Group], lengths: list[int], published: dict) -> tuple[list[str], list[list[str]]]:
    """A row per group, its best run, and the published ones; the highest of a length in bold, if it is not that of
    all."""
    lengths = sorted({*lengths, *(length for numbers in published.values() for length in numbers)})
    before = ["best run of", "rate", "seed", "validation", *_validated_at(groups, None)]
    rows = []
    for group in groups:
        if group.best is None:
            missing = len(before) - 1 + len(lengths) + len(_computed_in(groups, None))
            rows.append([group.label, *[tables.MISSING] * missing])
            continue
        tests = [share(group.best["tests"].get(length)) for length in lengths]
        first = [group.label, f"{group.best['learning_rate']:g}", str(group.best["seed"]), _mean(group.best)]
        first += _validated_at(groups, group.best)
        rows.append([*first, *tests, *_computed_in(groups, group.best)])
    for column, length in enumerate(lengths, len(before)):
        shares = [(group.best or {"tests": {}})["tests"].get(length, {}).get("exact_match", -1.0) for group in groups]
        measured = [value for value in shares if value >= 0]
        for row, value in zip(rows, shares, strict=True):
            # Where all are alike none is the best.
            if measured and value == max(measured) > min(measured):
                row[column] = f"**{row[column]}**"
    for name, numbers in published.items():
        found = [tables.number(numbers[length], 1) if length in numbers else tables.MISSING for length in lengths]
        rows.append([name, *[tables.MISSING] * (len(before) - 1), *found])
        rows[-1] += [tables.MISSING] * len(_computed_in(groups, None))
    return [*before, *_length_header(groups, lengths), *_computed_in(groups, None)], rows


def _every_run(groups: list[Group], lengths: list[int]) -> tuple[list[str], list[list[str]]]:
    """A row per run, failures too; the best of each group in bold."""
    rows = []
    for group in groups:
        for run in group.runs:
            remark = "" if run["finished"] else "not finished"
            row = [group.label, f"{run['learning_rate']:g}", str(run["seed"])]
            row += [f"{run['steps']:,}", f"{run['seconds']:.0f}"] if run["finished"] else [tables.MISSING] * 2
            row += [_mean(run), *_validated_at(groups, run)]
            row += [*(share(run["tests"].get(length)) for length in lengths), *_computed_in(groups, run)]
            if run is group.best:
                row = [f"**{cell}**" for cell in row]
            rows.append([*row, run.get("failed") or remark])
    header = ["run", "rate", "seed", "steps", "seconds", "validation", *_validated_at(groups, None)]
    return [*header, *_length_header(groups, lengths), *_computed_in(groups, None), "remark"], rows


def _mean(run: dict) -> str:
    """Mean exact match over the validation lengths."""
    shares = [line.get("exact_match") for line in run.get("validation", [])]
    return tables.MISSING if not shares or None in shares else f"{100 * sum(shares) / len(shares):.2f}"


def _time(groups: list[Group]) -> str:
    runs = [run for group in groups for run in group.runs]
    failed = sum(bool(run.get("failed")) for run in runs)
    unfinished = sum(not run["finished"] for run in runs)
    devices = sorted({run["device"] for run in runs if "device" in run})
    return (
        f"Runs: {len(runs)}; failed: {failed}; not finished: {unfinished}. Time in which at least one was trained or "
        f"tested: {_minutes(_wall_seconds(runs))}; sum of the runs' own: "
        f"{_minutes(sum(run.get('seconds', 0.0) for run in runs))}" + (f" ({', '.join(devices)})." if devices else ".")
    )


def _time_by_row(groups: list[Group]) -> str:
    """Of each row the same, whatever else the device did meanwhile."""
    times = [f"{group.label} {_minutes(_wall_seconds(group.runs))}" for group in groups]
    return f"The same by row: {'; '.join(times)}."


def _wall_seconds(runs: list[dict]) -> float:
    """Seconds in which at least one was trained or tested."""
    spans = [span for run in runs for span in run.get("spans", [])]
    spans += [line["span"] for run in runs for line in run["tests"].values() if "span" in line]
    # Runs that an earlier version recorded have no times, only how long they took.
    return covered(spans) + sum(run.get("seconds", 0.0) for run in runs if "spans" not in run)


def covered(spans: list[list[float]]) -> float:
    """Seconds that lie in at least one of the spans [begin, end]."""
    total, reached = 0.0, float("-inf")
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _published(file: Path) -> dict[str, dict[str, dict[int, float]]]:
    """Exact match in % by task, name and length.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it holds something else.
    """
    import yaml

    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
        found = {
            task: {
                str(name): {int(at): float(value) for at, value in numbers.items()} for name, numbers in rows.items()
            }
            for task, rows in content.items()
        }
    except (yaml.YAMLError, UnicodeDecodeError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{file} does not hold numbers by task, name and length: {error}") from error
    if unknown := sorted(set(found) - set(SYNTHETIC)):
        raise ValueError(f"{file} has numbers of {', '.join(unknown)}; tasks are {', '.join(SYNTHETIC)}")
    return found
