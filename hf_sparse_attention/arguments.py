"""A command's dataclass and the words of a command line enter, the filled dataclass leaves; `--config file.yaml` gives
values that the words after it override. A leaf."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TypeVar

from transformers import HfArgumentParser

Arguments = TypeVar("Arguments")


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Says a default where there is one; what None stands for is in the option's own help."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


def parse_arguments(kind: type[Arguments], words: Sequence[str], *, program: str) -> Arguments:
    """Fills a dataclass.

    Raises:
        ValueError: for a config file that cannot be read as names and values, or has an unknown name.
        SystemExit: with argparse's own message, for words it does not know, or `--help`.
    """
    description = (kind.__doc__ or "").partition("\n")[0]
    parser = HfArgumentParser(kind, prog=program, description=description, formatter_class=_Help, allow_abbrev=False)
    parser.add_argument("--config", metavar="FILE", help="YAML file with values of these options")
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--config")
    path = early.parse_known_args(list(words))[0].config
    from_file = [] if path is None else _words_of(Path(path), [field.name for field in fields(kind)])
    parsed = vars(parser.parse_args([*from_file, *words]))
    parsed.pop("config")
    return kind(**parsed)


def _words_of(path: Path, known: list[str]) -> list[str]:
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds {type(values).__name__}, not names and values such as `model: path`")
    values = {str(name).replace("-", "_"): value for name, value in values.items()}
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ValueError(f"{path} has unknown names {', '.join(unknown)}; known: {', '.join(known)}")
    words = []
    for name, value in values.items():
        if isinstance(value, dict):
            raise ValueError(f"{path}: {name} is a mapping, not a value")
        if value is not None and value != []:
            # A mapping in a list, such as a stage of training, stays YAML, of which JSON is a part.
            items = [json.dumps(item) if isinstance(item, dict) else str(item) for item in _listed(value)]
            words += [f"--{name}", *items]
    return words


def _listed(value) -> list:
    return value if isinstance(value, list) else [value]
