"""Records of train-task's runs -> groups of those that differ in rate and seed alone, by task, each with a label (its
map and what it does unlike most of the task's runs) and the run that validation prefers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from ..tasks.synthetic import SYNTHETIC
from .run_record import is_training
from .task_arguments import MAPS, TrainTaskArguments
from .task_options import UNKNOWN, has_option, usual_value
from .task_record import best_of, read_record, read_tests


@dataclass(frozen=True)
class Group:
    """Runs of one task that differ in rate and seed alone.

    Args:
        label: its map, and what else is not as in most of the task's runs.
        runs: each as in its run.json, with `tests`, its lines of test.json by length; in order of rate and seed.
        best: the one of them that validation prefers, or None.
    """

    label: str
    identity: dict
    runs: list[dict]
    best: dict | None

    def place(self) -> tuple:
        """What it is sorted by."""
        return place_of(self.label, self.identity["map"])

    def arguments(self) -> TrainTaskArguments:
        """What its runs were called with, as far as the task goes."""
        names = ("task", "task_settings", "lengths")
        return TrainTaskArguments(output="", **{name: self.identity[name] for name in names})

    def longest(self) -> int:
        """Longest training length."""
        return self.arguments().training_lengths()[1]


def place_of(label: str, name: str) -> tuple:
    """Labels of a map alone come first, in the order of the maps."""
    return label != name, MAPS.index(name)


def common_values(identities: list[dict]) -> dict:
    """The usual value of each option."""
    keys = dict.fromkeys(key for identity in identities for key in identity)
    return {key: usual_value(identities, key) for key in keys}


def label_of(identity: dict, common: dict) -> str:
    """The map, and the options that are not as usual."""
    # An option that is newer than a run is not in what was written of it.
    values = {key: identity.get(key, UNKNOWN) for key in common if has_option(identity, key)}
    unusual = [f"{key} {value}" for key, value in values.items() if key != "map" and value != common[key]]
    return ", ".join([identity["map"], *unusual])


def read_task_runs(folders: list[str]) -> tuple[list[dict], list[Path]]:
    """Records of train-task's runs, and run.json files of those of `train`."""
    found, trainings = {}, []
    for name in folders:
        folder = Path(name).expanduser()
        files = sorted(folder.rglob("run.json"))
        if not files:
            raise ValueError(f"{folder} holds no run of train or train-task (no run.json)")
        own = [file for file in files if is_training(file)]
        trainings += own
        for file in (file for file in files if file not in own):
            tests = {line["length"]: line for line in read_tests(file.parent)}
            run = {**read_record(file.parent), "folder": file.parent, "tests": tests}
            run["identity"] = {
                key: value for key, value in run["identity"].items() if has_option(run["identity"], key)
            }
            same = json.dumps([run["identity"], run["learning_rate"], run["seed"]], sort_keys=True)
            other = found.setdefault(same, run)
            if other["folder"].resolve() == file.parent.resolve():
                continue
            if run["finished"] and other["finished"]:
                raise ValueError(
                    f"{other['folder']} and {file.parent} are the same run, trained twice: leave one of them out"
                )
            # One that was cut off says nothing that the whole one does not.
            found[same] = run if run["finished"] else other
    return list(found.values()), trainings


def grouped(runs: list[dict]) -> dict[str, list[Group]]:
    """Groups by task, in the order in which tasks and maps are listed elsewhere."""
    found: dict[str, dict[str, list[dict]]] = {}
    for run in runs:
        same = json.dumps(run["identity"], sort_keys=True)
        found.setdefault(run["identity"]["task"], {}).setdefault(same, []).append(run)
    by_task = {}
    for task in sorted(found, key=list(SYNTHETIC).index):
        identities = [own[0]["identity"] for own in found[task].values()]
        common = common_values(identities)
        groups = [_group(own, common) for own in found[task].values()]
        by_task[task] = sorted(groups, key=Group.place)
    return by_task


def _group(runs: list[dict], common: dict) -> Group:
    runs = sorted(runs, key=lambda run: (run["learning_rate"], run["seed"]))
    identity = runs[0]["identity"]
    done = [run for run in runs if run["finished"]]
    sound = [run for run in done if not run["failed"]]
    for run in sound:
        if run.get("validation_of") != sound[0].get("validation_of"):
            raise ValueError(
                f"{sound[0]['folder']} and {run['folder']} were not validated on the same lengths and number of "
                "samples: call train-task for both again with --resume auto and the same ones"
            )
    return Group(label_of(identity, common), identity, runs, best_of(done) if done else None)
