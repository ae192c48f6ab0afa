"""What evaluate found, the content of results.json -> tables for the terminal and for Markdown."""

from __future__ import annotations

from . import tables

# What the tables show of a perplexity cell: title and text.
_SECTIONS = (
    ("Perplexity", lambda cell: _marked(cell, "perplexity", None, 2)),
    ("Loss, nats per token ± standard error over windows",
     lambda cell: _marked(cell, "loss", "standard_error", 3)),
    ("Loss of the last quarter of the window",
     lambda cell: _marked(cell, "last_quarter", "last_quarter_standard_error", 3)),
    ("Bits per byte of text (comparable between tokenizers)",
     lambda cell: _marked(cell, "bits_per_byte", None, 3)),
    ("Windows / tokens scored", lambda cell: f"{cell['windows']:,} / {cell['tokens']:,}"),
)  # fmt: skip


def _marked(cell: dict, name: str, error: str | None, digits: int) -> str:
    """A cell's number; a star if the length is beyond the model's positions."""
    value = cell.get(name)
    text = tables.with_error(value, cell.get(error) if error else None, digits)
    return text + ("*" if cell["note"] and value is not None else "")


def sections(results: dict) -> list[tuple[str, list[str], list[list[str]]]]:
    """(title, header, rows) of the tables by length: a row per model, a column per length."""
    by_place = {(cell["model"], cell["length"]): cell for cell in results["cells"] if cell["task"] == "perplexity"}
    labels = [model["label"] for model in results["models"]]
    lengths = results["lengths"]
    header = ["model"] + [f"{length:,}" for length in lengths]
    return [
        (title, header, [[label, *(show(by_place[label, length]) for length in lengths)] for label in labels])
        for title, show in _SECTIONS
    ]


def remarks(results: dict) -> list[str]:
    """What a reader of the tables must know."""
    data, arguments = results["data"], results["arguments"]
    count = data["documents"]
    lines = [
        f"Text: {', '.join(data['names'])}, {count:,} document{'s' if count != 1 else ''}"
        + (", joined" if arguments["concatenate"] else "")
        + (f"; at most {arguments['limit']} windows a length, seed {arguments['seed']}" if arguments["limit"] else "")
        + ". Windows do not overlap."
    ]
    limits: dict[int, list[str]] = {}
    for model in results["models"]:
        own = [cell for cell in results["cells"] if cell["model"] == model["label"] and not cell.get("missing")]
        if any(cell["note"] for cell in own):
            limits.setdefault(model["max_position_embeddings"], []).append(model["label"])
    lines += [f"* beyond the max_position_embeddings of {', '.join(names)}: {end:,}." for end, names in limits.items()]
    missing: dict[tuple[int, str], list[str]] = {}
    for cell in results["cells"]:
        if cell.get("missing"):
            missing.setdefault((cell["length"], cell["missing"]), []).append(cell["model"])
    lines += [f"{length:,} tokens, {', '.join(names)}: {reason}." for (length, reason), names in missing.items()]
    seen = {}
    for cell in results["cells"]:
        seen.setdefault((cell["task"], cell["length"]), set()).add(cell["tokens_sha256"])
    if any(len(tokens) > 1 for tokens in seen.values()):
        lines.append("Tokenizers differ, so windows do: compare bits per byte, not perplexity.")
    elif len(results["models"]) > 1:
        lines.append("All models saw the same tokens.")
    return lines


def terminal(results: dict) -> str:
    """The tables as aligned text."""
    blocks = [f"{title}\n{tables.plain(header, rows)}" for title, header, rows in sections(results)]
    return "\n\n".join(["", *blocks, "\n".join(remarks(results))])


def markdown(results: dict) -> str:
    """The tables by length and by position as Markdown."""
    blocks = ["# Evaluation", "\n".join(f"- {line}" for line in remarks(results)).replace("- *", "- \\*")]
    blocks += [f"## {title}\n\n{tables.markdown(header, rows)}" for title, header, rows in sections(results)]
    for length in results["lengths"]:
        cells = [cell for cell in results["cells"] if cell["length"] == length and cell.get("positions")]
        if cells:
            header = ["tokens before"] + [cell["model"] for cell in cells]
            rows = [
                [_range(bucket)] + [
                    tables.with_error(cell["positions"][index]["loss"], cell["positions"][index]["standard_error"], 3)
                    for cell in cells
                ]
                for index, bucket in enumerate(cells[0]["positions"])
            ]  # fmt: skip
            blocks.append(f"## Loss by position, windows of {length:,} tokens\n\n{tables.markdown(header, rows)}")
    return "\n\n".join(blocks) + "\n"


def _range(bucket: dict) -> str:
    first, last = bucket["start"], bucket["end"] - 1
    return f"{first:,}" if first == last else f"{first:,} to {last:,}"
