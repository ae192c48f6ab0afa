"""Groups of train-task's runs -> exact match by length, a panel a task: of each model, however it was trained, the run
that validation prefers, and pale all other runs."""

from __future__ import annotations

from ..tasks import pictures
from .task_groups import Group, common_values, label_of, place_of
from .task_record import rank

# Options of how a model is trained: models that differ in these alone are one line.
_TRAINED_WITH = {
    "steps", "warmup_steps", "schedule", "final_share", "optimizer", "softmax_share", "weight_decay", "beta1", "beta2",
    "clip", "precision", "batch_size", "scale_start", "new_learning_rate_share", "factor_while_softmax",
}  # fmt: skip
# What the picture shows, in words.
SHOWN = (
    "A line is the run that validation prefers of all of a model, whatever its steps and optimizer; of runs that were "
    "validated at different lengths, those that were validated furthest. Pale: its other tested runs."
)


def drawn(by_task: dict[str, list[Group]]) -> tuple[bytes | None, str]:
    """The PNG file of the groups of each task, None if no run was tested; and what is to be said of it."""
    cells, others, maps, untested = [], [], {}, []
    for task, groups in by_task.items():
        for label, own in _lines(groups).items():
            best = _preferred([group.best for group in own if group.best])
            maps[label] = own[0].identity["map"]
            cells += [{"model": label, "task": task, **line} for line in _tested(best)]
            if best and not _tested(best):
                untested.append(f"{label} on {task}")
            others += [
                {"model": label, "task": task, "run": str(run["folder"]), **line}
                for group in own for run in group.runs if run is not best for line in _tested(run)
            ]  # fmt: skip
    if not cells and not others:
        return None, ""
    shown = {cell["model"] for cell in (*cells, *others)}
    # Those of a map alone first, in the order of the maps.
    models = [{"label": label, "map": name} for label, name in maps.items() if label in shown]
    models.sort(key=lambda model: (*place_of(model["label"], model["map"]), model["label"]))
    figure = pictures.by_length({"models": models}, cells, others=others, marks=_training_lengths(by_task))
    remark = f" Without a line, as that run was not tested: {', '.join(untested)}." if untested else ""
    return pictures.picture(figure), SHOWN + remark


def _lines(groups: list[Group]) -> dict[str, list[Group]]:
    """Groups by what their models are, named by the map and what else is unlike most of them."""
    kept = [{key: value for key, value in group.identity.items() if key not in _TRAINED_WITH} for group in groups]
    common, found = common_values(kept), {}
    for group, identity in zip(groups, kept, strict=True):
        found.setdefault(label_of(identity, common), []).append(group)
    return found


def _preferred(runs: list[dict]) -> dict | None:
    """The best of those that were validated furthest, at the lengths that all of these were validated at: at short
    lengths many runs are perfect."""
    reach = {id(run): {line["length"] for line in run["validation"]} for run in runs}
    furthest = max((max(lengths) for lengths in reach.values()), default=0)
    runs = [run for run in runs if furthest in reach[id(run)]]
    common = set.intersection(*(reach[id(run)] for run in runs)) if runs else set()
    return max(
        runs, key=lambda run: rank([line for line in run["validation"] if line["length"] in common]), default=None
    )  # fmt: skip


def _tested(run: dict | None) -> list[dict]:
    """The tests of a run that have a number."""
    return [] if run is None else [line for line in run["tests"].values() if "exact_match" in line]


def _training_lengths(by_task: dict[str, list[Group]]) -> dict[str, list[tuple[int, str]]]:
    """The longest training lengths of a task's runs."""
    return {
        task: [(length, "training length") for length in sorted({group.longest() for group in groups})]
        for task, groups in by_task.items()
    }
