"""A model folder -> what is known about the model, each number with the file it comes from: training summary,
conversion, evaluation, report, base model and licence. A file about another model is refused."""

from __future__ import annotations

import json
import logging
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from ..checkpoint import Checkpoint
from ..files import fingerprint
from ..results import lacking, remarks, sections

logger = logging.getLogger(__name__)

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_LICENCE_FILES = ("LICENSE*", "LICENCE*")
_LICENCE_NAME = re.compile(r"[a-z0-9][a-z0-9.+-]*")
# What begins like this says where something lies on the machine that wrote it.
_LOCAL = re.compile(r"(/|~|\.\.?/|file:|[A-Za-z]:[\\/])")
# The same inside a mapping, such as a stage of a run: {distill: /folder/base, steps: 2}.
_INSIDE = re.compile(r"""(?<=[\s"':,{\[])(?:/|~|\.\.?/|file:|[A-Za-z]:[\\/])[^\s"',}\]]*""")


@dataclass(frozen=True)
class Base:
    """The model that was converted.

    Args:
        name: Hub id, or the last part of a local folder's name.
        commit: the commit of a model on the Hub, None for a local folder.
        folder: the local folder, where it still exists.
    """

    name: str
    commit: str | None
    folder: Path | None

    @property
    def hub_id(self) -> str | None:
        return self.name if self.commit is not None else None


@dataclass(frozen=True)
class Licence:
    """A licence.

    Args:
        name: identifier as the Hub has it, "other" for a text it has no identifier for, None if unknown.
        origin: where it was found, in words.
        file: its text.
    """

    name: str | None
    origin: str
    file: Path | None = None


@dataclass(frozen=True)
class Evidence:
    """What is known about a model.

    Args:
        checkpoint: the model.
        parameters: number of parameters in its weight files.
        base: the dense model, None if unknown.
        licence: see `Licence`.
        summary: what `train` wrote, or None.
        conversion: what `convert` wrote, or None.
        results: what `evaluate` wrote, or None.
        label: the model's name in the results.
        report: what `report` wrote, or None.
    """

    checkpoint: Checkpoint
    parameters: int
    base: Base | None
    licence: Licence
    summary: dict | None = None
    conversion: dict | None = None
    results: dict | None = None
    label: str | None = None
    report: dict | None = None


def gather(
    checkpoint: Checkpoint,
    parameters: int,
    *,
    summary: str | None,
    results: str | None,
    report: str | None,
    licence: str | None,
) -> Evidence:
    """Reads the named files, or those beside the model.

    Raises:
        OSError: if a named file is missing.
        ValueError: if a named file is not JSON of its kind, or about another model. One that was only found is left
            out with a warning.
    """
    folder = Path(checkpoint.path)
    conversion = _found(
        [folder / "conversion.json"], "conversion", lambda content: _check_conversion(content, checkpoint)
    )
    run = [folder / "summary.json"] + ([] if conversion else [folder.absolute().parent / "summary.json"])
    beside = folder.absolute().parent
    training = _read(summary, run, "summary", lambda content: _check_summary(content, checkpoint))
    measured = _read(
        results,
        [beside / "evaluation" / "results.json"],
        "results",
        lambda content: _check_results(content, checkpoint),
    )
    looked = _read(
        report, [beside / "report" / "report.json"], "report", lambda content: _check_report(content, checkpoint)
    )
    for found, flag, place, command in (
        (measured, "results", beside / "evaluation", "evaluate --models"),
        (looked, "report", beside / "report", "report --model"),
    ):
        if found is None:
            logger.warning(
                "the card will say that its %s are missing: write them with `hf-sparse-attention %s %s --data TEXT "
                "--output_dir %s`, or name them with --%s",
                "results" if flag == "results" else "figures of the attention", command, folder, place, flag,
            )  # fmt: skip
    base = _base(training, conversion)
    return Evidence(
        checkpoint=checkpoint,
        parameters=parameters,
        base=base,
        licence=_licence(licence, folder, base),
        summary=training,
        conversion=conversion,
        results=measured,
        label=None if measured is None else _label(measured, checkpoint),
        report=looked,
    )


def local_name(name: str) -> str:
    """The last part of a path of this machine; names of the Hub and relative paths stay. In a mapping, of each."""
    if name.startswith("{"):
        return _INSIDE.sub(lambda found: local_name(found[0]), name)
    label, separator, path = name.partition("=")
    if separator and _LOCAL.match(path):
        return f"{label}={local_name(path)}"
    if not _LOCAL.match(name):
        return name
    return re.split(r"[\\/]", name.rstrip("\\/"))[-1]


def without_folders(command: str) -> str:
    """A command line whose paths of this machine are cut to their last part."""
    return shlex.join(local_name(word) for word in shlex.split(command))


def _read(named: str | None, places: list[Path], option: str, check) -> dict | None:
    if named is None:
        return _found(places, option, check)
    path = Path(named).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"{option} is {named}, which is not a file")
    return _checked(path, option, check)


def _found(places: list[Path], option: str, check) -> dict | None:
    for path in places:
        if path.is_file():
            try:
                return _checked(path, option, check)
            except ValueError as error:
                logger.warning("%s; the card goes without it", error)
    return None


def _checked(path: Path, option: str, check) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    try:
        if not isinstance(content, dict):
            raise TypeError("it holds no names and values")
        check(content)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is not what this version calls {option} ({type(error).__name__}: {error})"
        ) from error
    except ValueError as error:
        raise ValueError(f"{path} {error}") from error
    return content


def _check_block(content: dict, checkpoint: Checkpoint) -> None:
    """The file says what the attention computes; so does the model, and both must be the same."""
    own = checkpoint.sparse.to_dict()
    block = content["sparse_attention"] or {}
    different = [name for name in own if name not in ("version", "format") and block.get(name) != own[name]]
    if different:
        raise ValueError(
            "belongs to another model: "
            + ", ".join(f"{name} is {block.get(name)!r} there and {own[name]!r} here" for name in different)
        )


def _check_conversion(content: dict, checkpoint: Checkpoint) -> None:
    _check_block(content, checkpoint)
    # The card would say that nothing was trained.
    if content.get("weights") not in (None, fingerprint(checkpoint.source.weights)):
        raise ValueError("belongs to other weights: they changed since they were converted")


def _check_summary(content: dict, checkpoint: Checkpoint) -> None:
    _check_block(content, checkpoint)
    if not isinstance(content["base_model"], str):
        raise TypeError("base_model is not a name")
    # Two runs of the same recipe differ in nothing else.
    if content["fingerprint"] != checkpoint.fingerprint:
        raise ValueError("belongs to a model with other weights: name the summary.json of its own training")


def _check_results(content: dict, checkpoint: Checkpoint) -> None:
    _label(content, checkpoint)
    if cells := lacking(content):
        raise ValueError(f"is not finished, it lacks {cells[0]}: run the same `evaluate` again")
    # What the card will show of it.
    sections(content), remarks(content)


def _label(results: dict, checkpoint: Checkpoint) -> str:
    for model in results["models"]:
        if model["fingerprint"] == checkpoint.fingerprint:
            return model["label"]
    raise ValueError("has no row with this model's weights and config: evaluate the model again")


def _check_report(content: dict, checkpoint: Checkpoint) -> None:
    _check_block(content, checkpoint)
    if content["fingerprint"] != checkpoint.fingerprint:
        raise ValueError("belongs to a model with other weights: run `report` again")
    if not isinstance(content.get("mean", {}), dict):
        raise TypeError("mean holds no names and values")


def _base(summary: dict | None, conversion: dict | None) -> Base | None:
    """The dense model at the beginning: through a converted folder that was trained, to what was converted."""
    if summary is not None:
        name, commit = summary["base_model"], summary.get("base_commit")
    elif conversion is not None:
        name, commit = conversion["model"], conversion.get("commit")
    else:
        return None
    seen = set()
    while commit is None and (folder := Path(name).expanduser()).is_dir() and folder.resolve() not in seen:
        seen.add(folder.resolve())
        for record, key in (("conversion.json", "model"), ("summary.json", "base_model")):
            try:
                earlier = json.loads((folder / record).read_text(encoding="utf-8"))
                name, commit = earlier[key], earlier.get("commit", earlier.get("base_commit"))
                break
            except (OSError, ValueError, KeyError, TypeError):
                continue
        else:
            return Base(folder.resolve().name, None, folder)
    if commit is not None and HUB_ID.fullmatch(name):
        return Base(name, commit, None)
    return Base(Path(name).name, None, None)


def check_licence(name: str) -> str:
    """An identifier as model cards have it.

    Raises:
        ValueError: for words that are none.
    """
    if not _LICENCE_NAME.fullmatch(name):
        raise ValueError(f"license is {name!r}; write an identifier such as apache-2.0, mit, llama3.1 or other")
    return name


def _licence(given: str | None, folder: Path, base: Base | None) -> Licence:
    places = [folder] + ([base.folder] if base is not None and base.folder is not None else [])
    files = [file for place in places for pattern in _LICENCE_FILES for file in sorted(place.glob(pattern))]
    file = files[0] if files else None
    if given is not None:
        return Licence(check_licence(given), "as given when this card was made", file)
    for place in places:
        if name := _card_licence(place / "README.md"):
            return Licence(name, "as the base model's card says", file)
    if base is not None and base.hub_id is not None and (name := _card_licence(_hub_card(base))):
        return Licence(name, "as the base model's card says", file)
    if file is None:
        return Licence(None, "neither the base model's card nor a licence file was found")
    return Licence(_recognised(file), "carried over from the base model", file)


def _hub_card(base: Base) -> Path | None:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(base.hub_id, "README.md", revision=base.commit))
    # Offline, gated, gone, or without a card: in each case its licence is not known here.
    except Exception:
        return None


def _card_licence(card: Path | None) -> str | None:
    from huggingface_hub import ModelCard

    if card is None or not card.is_file():
        return None
    try:
        name = ModelCard.load(card, ignore_metadata_errors=True).data.license
    except Exception:
        return None
    return name if isinstance(name, str) and _LICENCE_NAME.fullmatch(name) else None


def _recognised(file: Path) -> str:
    text = " ".join(file.read_text(encoding="utf-8", errors="replace").split())[:2000]
    if text.startswith("Apache License Version 2.0"):
        return "apache-2.0"
    return "mit" if text.startswith("MIT License") else "other"
