"""Groups of train-task's runs -> exact match by length, a panel a task: of each model, however it was trained, the run
that validation prefers, and pale all other runs."""

from __future__ import annotations

from ..tasks import pictures
from .task_groups import Group, common_values, label_of, place_of

# Options of how a model is trained: models that differ in these alone are one line.
_TRAINED_WITH = {
    "steps", "warmup_steps", "schedule", "final_share", "optimizer", "softmax_share", "weight_decay", "beta1", "beta2",
    "clip", "precision", "batch_size", "scale_start",
}  # fmt: skip


def drawn(by_task: dict[str, list[Group]]) -> bytes | None:
    """The PNG file of the groups of each task; None if no run was tested."""
    by_line = {task: _lines(groups) for task, groups in by_task.items()}
    best = {
        (task, label): max((group for group in groups if _tested(group.best)), key=_preference).best
        for task, lines in by_line.items() for label, groups in lines.items()
        if any(_tested(group.best) for group in groups)
    }  # fmt: skip
    if not best:
        return None
    cells = [{"model": label, "task": task, **line} for (task, label), run in best.items() for line in _tested(run)]
    others = [
        {"model": label, "task": task, "run": str(run["folder"]), **line}
        for (task, label), chosen in best.items() for group in by_line[task][label] for run in group.runs
        if run is not chosen for line in _tested(run)
    ]  # fmt: skip
    maps = {label: own[0].identity["map"] for lines in by_line.values() for label, own in lines.items()}
    models = [{"label": label, "map": maps[label]} for label in {label for _, label in best}]
    models.sort(key=lambda model: (*place_of(model["label"], model["map"]), model["label"]))
    figure = pictures.by_length({"models": models}, cells, others=others, marks=_training_lengths(by_task))
    return pictures.picture(figure)


def _lines(groups: list[Group]) -> dict[str, list[Group]]:
    """Groups by what their models are, named by the map and what else is unlike most of them."""
    kept = [{key: value for key, value in group.identity.items() if key not in _TRAINED_WITH} for group in groups]
    common, found = common_values(kept), {}
    for group, identity in zip(groups, kept, strict=True):
        found.setdefault(label_of(identity, common), []).append(group)
    return found


def _preference(group: Group) -> tuple:
    """Groups that were validated further come first: at short lengths many runs are perfect. Then as `best_of`."""
    lines = group.best["validation"]
    means = [sum(line[name] for line in lines) / len(lines) for name in ("exact_match", "token_accuracy")]
    return max(line["length"] for line in lines), *means


def _tested(run: dict | None) -> list[dict]:
    """The tests of a run that have a number."""
    return [] if run is None else [line for line in run["tests"].values() if "exact_match" in line]


def _training_lengths(by_task: dict[str, list[Group]]) -> dict[str, list[tuple[int, str]]]:
    """The longest training lengths of a task's runs."""
    return {
        task: [(length, "training length") for length in sorted({group.longest() for group in groups})]
        for task, groups in by_task.items()
    }
