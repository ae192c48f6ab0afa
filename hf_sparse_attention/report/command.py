"""A model and text -> what its attention does, per layer and head: a table, report.json, report.md, report.html to
look around in, and pictures in which an exact zero is no colour of the scale."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from ..checkpoint import Checkpoint, choose_device, examine, load, load_tokenizer
from ..files import write_bytes, write_json, write_text
from ..tables import markdown, number, plain
from ..tasks import TokenizedText
from ..text import read_documents
from .arguments import ReportArguments
from .look import described, look_at
from .measures import NUMBERS, measure_attention, typical_heads

# Arguments that say where the results go, not what they are of.
_PLACES = ("output_dir", "figure", "formats", "html")


def report_model(arguments: ReportArguments) -> dict:
    """Measures, prints the table, writes report.json, report.md, report.html and the pictures, and returns what is in
    report.json.

    Raises:
        ValueError, OSError: for what is wrong with arguments, model or data; for a dense model, whose attention has no
            exact zeros to report.
    """
    folder = Path(arguments.output_dir)
    if folder.exists() and not folder.is_dir():
        raise OSError(f"output_dir is {folder}, which is a file")
    device = choose_device(arguments.device)
    if arguments.figure:
        from .. import figures
    checkpoint = examine(arguments.model)
    if checkpoint.sparse is None:
        raise ValueError(f"{arguments.model} is dense: every visible key carries weight. Report on a sparse model")
    if arguments.dense is not None and not (arguments.html or arguments.figure):
        raise ValueError(f"dense is {arguments.dense}, but neither page nor pictures, which show it, are wanted")
    tokenizer = load_tokenizer(checkpoint.source.folder)
    documents = list(read_documents(arguments.data, text_column=arguments.text_column))
    text = TokenizedText.of(documents, tokenizer)
    text = text.joined() if arguments.concatenate else text
    windows = text.windows(arguments.length, limit=arguments.windows, seed=arguments.seed)
    if not len(windows):
        raise ValueError(
            f"no document has {arguments.length} tokens, the longest has {text.longest}: choose a shorter length"
            + ("" if arguments.concatenate else ", or join the documents with --concatenate")
        )
    drawn = _named_heads(arguments.heads, checkpoint.config)
    model = load(checkpoint, dtype=arguments.dtype, device=device)
    look = None
    if arguments.html or arguments.figure:
        look = look_at(
            model, tokenizer, arguments.prompt or _beginning(documents, tokenizer, arguments),
            windows=windows.tokens, dense=arguments.dense, name=arguments.model, page_tokens=arguments.page_tokens,
            page_weights=arguments.page_weights, prompt_tokens=arguments.prompt_tokens,
        )  # fmt: skip
        found = look.report
    else:
        found = described(
            model, measure_attention(model, windows.tokens), windows.tokens, name=arguments.model, dense=None
        )
    report = {
        **found,
        "fingerprint": checkpoint.fingerprint,
        "arguments": {key: value for key, value in asdict(arguments).items() if key not in _PLACES},
    }
    write_json(folder / "report.json", report)
    written = ["report.json"]
    if arguments.html:
        look.save_page(folder / "report.html")
        written.append("report.html")
    if arguments.figure:
        for title, figure in look.figures(drawn or typical_heads(report["layers"])).items():
            for kind in arguments.formats:
                write_bytes(folder / f"{title}.{kind}", figures.picture(figure, kind))
                written.append(f"{title}.{kind}")
    write_text(folder / "report.md", _page(report, checkpoint, written))
    print(plain(*_table(report["layers"])))
    print(f"written to {folder}" + (f"; open {folder / 'report.html'} in a browser" if arguments.html else ""))
    return report


def _beginning(documents: list[str], tokenizer, arguments: ReportArguments) -> str:
    """The first document that is long enough to look at, up to the tokens that are looked at."""
    tokens = max(arguments.page_tokens, arguments.prompt_tokens)
    for document in documents:
        # More characters than so many tokens have: of a whole book most would be encoded for nothing.
        text = document[: 16 * tokens]
        encoded = tokenizer(text, return_offsets_mapping=tokenizer.is_fast)
        if len(encoded["input_ids"]) > 1:
            ends = [end for _, end in encoded.get("offset_mapping", [])[:tokens]]
            return text[: max(ends, default=None)]
    raise ValueError("no document has two tokens, which attention needs: name a --prompt")


def _table(rows: list[dict]) -> tuple[list[str], list[list[str]]]:
    """One line a layer: the mean over heads, and the least and most sparse head."""
    header = ["layer", "visible keys", "support", "zeros", "zeros, min-max head", "empty tiles", "scale", "alpha"]
    body = []
    for row in rows:
        mean = {name: sum(row[name]) / len(row[name]) for name in NUMBERS}
        body.append(
            [
                str(row["layer"]), number(row["visible"], 1), number(mean["support"], 1), f"{mean['zeros']:.1%}",
                f"{min(row['zeros']):.1%}-{max(row['zeros']):.1%}", f"{mean['block_sparsity']:.1%}",
                number(mean["scale"], 3), number(mean["alpha"], 3),
            ]
        )  # fmt: skip
    return header, body


def _page(report: dict, checkpoint: Checkpoint, written: list[str]) -> str:
    settings = checkpoint.sparse
    lines = [
        f"# What the attention of {Path(report['model']).name} does",
        "",
        f"Map {settings.map}, alpha {settings.alpha:g}, position {settings.position}; {report['windows']} windows of "
        f"{report['length']} tokens.",
        "",
        markdown(*_table(report["layers"])),
        "",
        *(f"- {name}: {meaning}" for name, meaning in NUMBERS.items()),
        "",
        f"Per head: {', '.join(written)}.",
        "",
    ]
    return "\n".join(lines)


def _named_heads(words: list[str], config) -> list[tuple[int, int]]:
    """`layer:head` words -> numbers."""
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    found = []
    for word in words:
        layer, _, head = word.partition(":")
        if not (layer.isdecimal() and head.isdecimal() and int(layer) < layers and int(head) < heads):
            raise ValueError(
                f"heads has {word!r}; write layer:head with layers 0 to {layers - 1} and heads 0 to {heads - 1}"
            )
        found.append((int(layer), int(head)))
    return found
