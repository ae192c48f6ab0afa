"""What evaluate found, the content of results.json -> tables for the terminal and for Markdown."""

from __future__ import annotations

from . import tables

# What the tables show of a perplexity cell: title and text.
_LOSSES = (
    ("Perplexity", lambda cell: _marked(cell, "perplexity", None, 2)),
    ("Loss, nats per token ± standard error over windows",
     lambda cell: _marked(cell, "loss", "standard_error", 3)),
    ("Loss of the last quarter of the window",
     lambda cell: _marked(cell, "last_quarter", "last_quarter_standard_error", 3)),
    ("Bits per byte of text (comparable between tokenizers)",
     lambda cell: _marked(cell, "bits_per_byte", None, 3)),
    ("Windows / tokens scored", lambda cell: f"{cell['windows']:,} / {cell['tokens']:,}"),
)  # fmt: skip
_SLIDING = (
    ("Perplexity in overlapping windows",
     lambda cell: _marked(cell, "perplexity", None, 2)),
    ("Loss in overlapping windows, nats per token ± standard error over windows",
     lambda cell: _marked(cell, "loss", "standard_error", 3)),
)  # fmt: skip
_BY_TASK = {"perplexity": _LOSSES, "sliding_perplexity": _SLIDING}


def _marked(cell: dict, name: str, error: str | None, digits: int) -> str:
    """A cell's number; a star if the length is beyond the model's positions."""
    value = cell.get(name)
    text = tables.with_error(value, cell.get(error) if error else None, digits)
    return text + ("*" if cell["note"] and value is not None else "")


def reach_of(model: dict) -> tuple[int | None, str]:
    """The length beyond which a model's numbers are marked, or None, and what it is."""
    # Older files have max_position_embeddings alone.
    if "reach" not in model:
        return model.get("max_position_embeddings"), "max_position_embeddings"
    return (model["reach"]["length"], model["reach"]["what"]) if model["reach"] else (None, "")


def tasks_of(results: dict) -> list[str]:
    """Names of the tasks in the order they were asked for."""
    return results.get("tasks") or list(dict.fromkeys(cell["task"] for cell in results["cells"]))


def lacking(results: dict) -> list[str]:
    """Cells that were asked for and are not computed, in words: none in a run that came to its end."""
    found = {(cell["model"], cell["task"], cell["length"], cell.get("depth")) for cell in results["cells"]}
    return [
        f"{task} of {model['label']}" + (f" at {length}" if length is not None else "")
        for model in results["models"]
        for task in tasks_of(results)
        for length in _lengths(results, task)
        if any((model["label"], task, length, depth) not in found for depth in _depths(results, task))
    ]


def _depths(results: dict, task: str) -> list[float | None]:
    """Depths of a task; None alone for one that has none."""
    found = {cell["depth"] for cell in results["cells"] if cell["task"] == task and cell.get("depth") is not None}
    # Older files do not say which were asked for.
    return results.get("depths", sorted(found)) if found else [None]


def _lengths(results: dict, task: str) -> list[int | None]:
    """Lengths of a task; None alone for one of lm-eval that has none."""
    found = {cell["length"] for cell in results["cells"] if cell["task"] == task}
    return [None] if found == {None} else results["lengths"]


def sections(results: dict) -> list[tuple[str, list[str], list[list[str]]]]:
    """(title, header, rows) of the tables by length: a row per model, a column per length."""
    cells: dict[tuple, list[dict]] = {}
    for cell in results["cells"]:
        cells.setdefault((cell["model"], cell["task"], cell["length"]), []).append(cell)
    found = []
    for task in tasks_of(results):
        lengths = _lengths(results, task)
        header = ["model"] + [f"{length:,}" if length is not None else "all" for length in lengths]
        shown = _BY_TASK.get(task) or _accuracy(task, cells)
        for title, show in shown:
            rows = [
                [label, *(_shown(cells.get((label, task, length)), show) for length in lengths)]
                for label in (model["label"] for model in results["models"])
            ]
            found.append((title, header, rows))
    return found


def _shown(cells: list[dict] | None, show) -> str:
    if not cells:
        return tables.MISSING
    return show(cells[0] if "exact_match" not in cells[0] and len(cells) == 1 else mean_over_depths(cells))


def mean_over_depths(cells: list[dict]) -> dict:
    """Cells of one model, task and length -> one with their mean exact match and share of right tokens, or none if one
    of them has none.

    The standard error is that of the share of all their samples, sqrt(p (1 - p) / samples); None where the samples
    give no estimate of it: all right, all wrong, or a single one.
    """
    shares = {}
    for name in ("exact_match", "token_accuracy"):
        values = [cell.get(name) for cell in cells]
        shares[name] = None if None in values else sum(values) / len(values)
    share, error = shares["exact_match"], None
    # Older files may lack the number of samples.
    samples = sum(cell.get("samples") or 0 for cell in cells)
    if share is not None and 0 < share < 1 and samples > 1:
        error = (share * (1 - share) / samples) ** 0.5
    return {**cells[0], **shares, "standard_error": error}


def _accuracy(task: str, cells: dict) -> list:
    own = [cell for (_, name, _), group in cells.items() if name == task for cell in group]
    if not task.startswith("lm_eval:"):
        depths = {cell["depth"] for cell in own if cell.get("depth") is not None}
        of = f"{_samples(own)} a length" + (" and depth" if depths else "")
        of += f", mean over {len(depths)} depths" if len(depths) > 1 else ""
        found = [(f"{task}: exact match in % ± standard error, {of}", _percent)]
        if any(cell.get("token_accuracy") is not None for cell in own):
            found.append((f"{task}: right tokens of the answers in %, {of}", _right_tokens))
        return found
    names = list(dict.fromkeys(name for cell in own for name in cell.get("metrics", ())))
    return [
        (f"{task}, {name}", lambda cell, name=name: tables.number(cell.get("metrics", {}).get(name), 3))
        for name in names or ["no number"]
    ]


def _samples(cells: list[dict]) -> str:
    counts = sorted({cell["samples"] for cell in cells if cell.get("samples")})
    if not counts:
        return "samples"
    return " to ".join(f"{count:,}" for count in dict.fromkeys((counts[0], counts[-1]))) + (
        " sample" if counts[-1] == 1 else " samples"
    )


def _percent(cell: dict) -> str:
    value, error = cell.get("exact_match"), cell.get("standard_error")
    if value is None:
        return tables.MISSING
    return tables.with_error(100 * value, error and 100 * error, 1) + ("*" if cell["note"] else "")


def _right_tokens(cell: dict) -> str:
    value = cell.get("token_accuracy")
    return tables.MISSING if value is None else tables.number(100 * value, 1) + ("*" if cell["note"] else "")


def remarks(results: dict) -> list[str]:
    """What a reader of the tables must know."""
    data, arguments = results["data"], results["arguments"]
    lines = []
    if count := data["documents"]:
        lines.append(
            f"Text: {', '.join(data['names'])}, {count:,} document{'s' if count != 1 else ''}"
            + (", joined" if arguments["concatenate"] else "")
            + (f"; {_sample(results)}" if arguments["limit"] and set(tasks_of(results)) & set(_BY_TASK) else "")
            + (". Windows do not overlap." if set(tasks_of(results)) <= {"perplexity"} else ".")
        )
    if generated := {cell["answers"] for cell in results["cells"] if "answers" in cell}:
        how = {"forced": "read off one pass", "generated": "decoded token by token"}
        lines.append(
            f"Answers are {' and '.join(how[name] for name in sorted(generated))}; right is one without a mistake. "
            "Its ± is the standard error of the share over all samples of the number; none stands where they do not "
            "tell it: at 0 %, at 100 %, and of a single sample."
        )
    limits: dict[tuple, list[str]] = {}
    for model in results["models"]:
        own = [cell for cell in results["cells"] if cell["model"] == model["label"] and not cell.get("missing")]
        if any(cell["note"] for cell in own):
            limits.setdefault(reach_of(model), []).append(model["label"])
    lines += [f"* beyond the {what} of {', '.join(names)}: {end:,}." for (end, what), names in limits.items()]
    missing: dict[tuple, list[str]] = {}
    several = len(tasks_of(results)) > 1
    for cell in results["cells"]:
        if cell.get("missing"):
            place = f"{cell['length']:,} tokens" if cell["length"] is not None else cell["task"]
            place = f"{cell['task']}, {place}" if several and cell["length"] is not None else place
            missing.setdefault((place, cell["missing"]), []).append(cell["model"])
    lines += [f"{place}, {', '.join(dict.fromkeys(names))}: {reason}." for (place, reason), names in missing.items()]
    seen = {}
    for cell in results["cells"]:
        seen.setdefault((cell["task"], cell["length"], cell.get("depth")), set()).add(cell["tokens_sha256"])
    differ = list(dict.fromkeys(task for (task, _, _), tokens in seen.items() if len(tokens) > 1))
    if set(differ) & set(_BY_TASK):
        lines.append("Tokenizers differ, so windows do: compare bits per byte, not perplexity.")
    if others := [task for task in differ if task not in _BY_TASK]:
        lines.append(f"Models did not get the same tokens in {', '.join(others)}: tokenizers or settings differ.")
    if not differ and len(results["models"]) > 1:
        lines.append("All models saw the same tokens.")
    return lines


def _sample(results: dict) -> str:
    """What text a limit leaves, and whether the lengths share it."""
    arguments = results["arguments"]
    drawn = [cell["drawn"] for cell in results["cells"] if cell.get("drawn") and cell["drawn"]["windows"]]
    if not drawn:
        # Older files, in which every length had windows of its own.
        few = f"at most {arguments['limit']} windows a length, seed {arguments['seed']}"
        return f"{few}: columns are of different text"
    sizes = dict.fromkeys(f"{row['windows']:,} windows of {row['length']:,} tokens" for row in drawn)
    return f"all columns are cut from the text of {' or '.join(sizes)}, drawn with seed {arguments['seed']}"


def terminal(results: dict) -> str:
    """The tables as aligned text."""
    blocks = [f"{title}\n{tables.plain(header, rows)}" for title, header, rows in sections(results)]
    return "\n\n".join(["", *blocks, "\n".join(remarks(results))])


def markdown(results: dict) -> str:
    """The tables by length, by position and by depth as Markdown."""
    blocks = ["# Evaluation", "\n".join(f"- {line}" for line in remarks(results)).replace("- *", "- \\*")]
    blocks += [f"## {title}\n\n{tables.markdown(header, rows)}" for title, header, rows in sections(results)]
    for length in results["lengths"]:
        cells = [cell for cell in results["cells"] if cell["length"] == length and cell.get("positions")]
        if cells:
            header = ["tokens before"] + [cell["model"] for cell in cells]
            # Where a tokenizer puts several tokens before a text, the first ranges are others.
            buckets = [{(bucket["start"], bucket["end"]): bucket for bucket in cell["positions"]} for cell in cells]
            rows = [
                [_range(start, end)] + [
                    tables.with_error(own[start, end]["loss"], own[start, end]["standard_error"], 3)
                    if (start, end) in own else tables.MISSING
                    for own in buckets
                ]
                for start, end in sorted({place for own in buckets for place in own})
            ]  # fmt: skip
            blocks.append(f"## Loss by position, windows of {length:,} tokens\n\n{tables.markdown(header, rows)}")
    blocks += [f"## {title}\n\n{tables.markdown(header, rows)}" for title, header, rows in _by_depth(results)]
    return "\n\n".join(blocks) + "\n"


def _by_depth(results: dict) -> list[tuple[str, list[str], list[list[str]]]]:
    """A table per needle task and model: a row per depth, a column per length."""
    found = []
    for task in tasks_of(results):
        for model in results["models"]:
            own = [
                cell for cell in results["cells"]
                if cell["task"] == task and cell["model"] == model["label"] and cell.get("depth") is not None
            ]  # fmt: skip
            by_place = {(cell["depth"], cell["length"]): cell for cell in own}
            rows = [
                [f"{100 * depth:g} %", *(
                    _shown([by_place[depth, length]] if (depth, length) in by_place else None, _percent)
                    for length in results["lengths"]
                )]
                for depth in sorted({cell["depth"] for cell in own})
            ]  # fmt: skip
            if rows:
                header = ["depth"] + [f"{length:,}" for length in results["lengths"]]
                title = f"{task} by depth, {model['label']}: exact match in %, {_samples(own)} a length and depth"
                found.append((title, header, rows))
    return found


def _range(start: int, end: int) -> str:
    first, last = start, end - 1
    return f"{first:,}" if first == last else f"{first:,} to {last:,}"
