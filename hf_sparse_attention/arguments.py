"""A command's dataclass and the words of a command line enter, the filled dataclass leaves; `--config file.yaml` gives
values that the words after it override. A leaf."""

from __future__ import annotations

import argparse
import json
from collections.abc import Collection, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TypeVar

from transformers import HfArgumentParser

Arguments = TypeVar("Arguments")

# Commands that write one folder say `output`, those that write several files into one say `output_dir`: either word is
# taken for the other, and one model for a list of them.
ALSO = {"output": "output_dir", "output_dir": "output", "model": "models", "models": "model"}


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
    types = {field.name: str(field.type) for field in fields(kind)}
    from_file = [] if path is None else _words_of(Path(path), types)
    words = [_option(word, types) for word in words]
    parsed = vars(parser.parse_args([*from_file, *words]))
    parsed.pop("config")
    return kind(**parsed)


def _name(name: str, known: Collection[str]) -> str:
    """The field that a name on the command line or in a file stands for."""
    name = name.replace("-", "_")
    return ALSO[name] if name not in known and ALSO.get(name) in known else name


def _option(word: str, known: Collection[str]) -> str:
    if not word.startswith("--"):
        return word
    option, equals, value = word[2:].partition("=")
    return f"--{_name(option, known)}{equals}{value}" if _name(option, known) in known else word


def _words_of(path: Path, known: dict[str, str]) -> list[str]:
    """The words that say the same as a file; `known` holds the type of each name."""
    import yaml

    class Loader(yaml.SafeLoader):
        """As YAML 1.2 reads it: `no` and `off` are words, not False."""

    Loader.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in rows if tag != "tag:yaml.org,2002:bool" or first in "tTfF"]
        for first, rows in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=Loader)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"there is no config file {path}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds {type(values).__name__}, not names and values such as `model: path`")
    unknown = sorted(str(name) for name in values if _name(str(name), known) not in known)
    if unknown:
        raise ValueError(f"{path} has unknown names {', '.join(unknown)}; known: {', '.join(known)}")
    words = []
    for name, value in ((_name(str(name), known), value) for name, value in values.items()):
        if value is None or value == []:
            continue
        if "list" in known[name]:
            # A mapping in a list, such as a stage of training, stays YAML, of which JSON is a part.
            items = value if isinstance(value, list) else [value]
            words += [f"--{name}", *(json.dumps(item) if isinstance(item, dict) else str(item) for item in items)]
        elif isinstance(value, list):
            words += [f"--{name}", ",".join(map(str, value))]
        elif isinstance(value, dict):
            words += [f"--{name}", _mapping(value)]
        else:
            # Switches that YAML 1.1 knows and the command line does not.
            switches = {"on": "yes", "off": "no"} if "bool" in known[name] else {}
            words += [f"--{name}", switches.get(str(value).lower(), str(value))]
    return words


def _mapping(value: dict) -> str:
    """As on a command line: {0: [0, 1], 3: 2} is `0:0,1 3:2`, and {1024: 0.8, 4096: 0.2} is `1024:0.8,4096:0.2`."""
    lists = any(isinstance(item, list) for item in value.values())
    pairs = [f"{key}:{','.join(map(str, item)) if isinstance(item, list) else item}" for key, item in value.items()]
    return (" " if lists else ",").join(pairs)
