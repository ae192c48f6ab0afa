"""Rows of strings -> a table for the terminal or for Markdown. The first column is text, the others are numbers."""

from __future__ import annotations

from collections.abc import Sequence

# Stands where there is no number.
MISSING = "-"


def plain(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns, two spaces apart."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    lines = [_aligned(header, widths), "  ".join("-" * width for width in widths)]
    return "\n".join(lines + [_aligned(row, widths) for row in rows])


def _aligned(row: Sequence[str], widths: Sequence[int]) -> str:
    cells = [row[0].ljust(widths[0])] + [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
    return "  ".join(cells).rstrip()


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A pipe table."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(map(_escaped, cells)) + " |" for cells in lines)


def _escaped(cell: str) -> str:
    return cell.replace("|", "\\|").replace("\n", " ")


def number(value: float | None, digits: int = 2) -> str:
    """A number with so many decimals; three significant digits where it is large; `MISSING` for None."""
    if value is None:
        return MISSING
    return f"{value:.{digits}f}" if abs(value) < 10_000 else f"{value:.2e}"


def with_error(value: float | None, error: float | None, digits: int = 2) -> str:
    """`value ±error`, or the value alone."""
    return number(value, digits) + ("" if value is None or error is None else f" ±{number(error, digits)}")
