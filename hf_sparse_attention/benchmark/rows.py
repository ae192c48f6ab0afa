"""Rows of measurements -> a table for the terminal, and a JSON file that says what they were measured on."""

from __future__ import annotations

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


def write_rows(arguments, device: str, name: str, **rows) -> Path:
    """Writes `name` into the output folder, which it gives back."""
    folder = Path(arguments.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    card = torch.cuda.get_device_name() if device == "cuda" else device
    about = {"device": card, "torch": torch.__version__, "version": VERSION, "arguments": asdict(arguments)}
    write_json(folder / name, about | rows)
    return folder
