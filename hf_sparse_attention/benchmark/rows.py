"""Rows of measurements -> a table for the terminal, and a JSON file that says what they were measured on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from ..config import VERSION
from ..files import write_json


def table(rows: list[dict], columns: Sequence[tuple[str, str, str]]) -> str:
    """Aligned cells; columns are (field of the rows, title, format). What a row lacks is left empty."""
    text = [[title for _, title, _ in columns]]
    for row in rows:
        text.append([shape.format(row[name]) if row.get(name) is not None else "" for name, _, shape in columns])
    widths = [max(map(len, column)) for column in zip(*text, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in text)


def about(arguments, device: str) -> dict:
    """What rows were measured on and with."""
    card = torch.cuda.get_device_name() if device == "cuda" else device
    return {"device": card, "torch": torch.__version__, "version": VERSION, "arguments": asdict(arguments)}


def write_rows(arguments, device: str, name: str, **rows) -> Path:
    """Writes `name` into the output folder, which it gives back."""
    folder = Path(arguments.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / name, about(arguments, device) | rows)
    return folder


def unfinished_rows(arguments, device: str, name: str) -> dict:
    """What a run that did not come to its end left in `name`, if it measured the same on the same card; else {}."""
    file = Path(arguments.output_dir) / name
    if not file.is_file():
        return {}
    try:
        left = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        raise ValueError(f"{file} is no JSON file: move it away, or name another output_dir") from None
    same = json.loads(json.dumps(about(arguments, device)))
    return left if left.get("unfinished") and {key: left.get(key) for key in same} == same else {}
