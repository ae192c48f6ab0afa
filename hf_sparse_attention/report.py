"""A model and text -> what its attention does, per layer and head: keys that carry weight, exact zeros, empty tiles,
factor and alpha; as a table, report.json, report.md, and pictures in which an exact zero is no colour of the scale."""

from __future__ import annotations

import math
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import transformers
from tqdm import tqdm

from . import reference
from .attention import record
from .checkpoint import DEVICES, Checkpoint, check_dtype, choose_device, examine, load, load_tokenizer
from .config import VERSION
from .files import write_bytes, write_json, write_text
from .loading import DTYPES
from .tables import markdown, number, plain
from .tasks import TokenizedText
from .text import read_documents

FORMAT = 1
# Side of the tiles whose emptiness is counted, that of the kernels.
TILE = 64
NUMBERS = {
    "support": "keys that carry weight, mean over queries",
    "zeros": "share of the visible keys whose weight is exactly 0",
    "block_sparsity": f"share of the visible {TILE} x {TILE} tiles without any weight",
    "scale": "factor on the query, mean over queries",
    "alpha": "alpha of entmax; 1 is softmax",
}


@dataclass
class ReportArguments:
    """What to look at, on what."""

    model: str = field(metadata={"help": "folder or Hub id of a sparse model"})
    data: list[str] = field(
        default_factory=list,
        metadata={"help": "text: .txt, .jsonl or .parquet files (also .gz, .xz, .zst), or names of Hub datasets"},
    )
    output_dir: str = field(default="report", metadata={"help": "folder for report.json, report.md and the pictures"})
    length: int = field(default=512, metadata={"help": "tokens in a window of text"})
    windows: int = field(default=8, metadata={"help": "windows that are looked at, drawn with the seed"})
    concatenate: bool = field(default=False, metadata={"help": "join all documents before windows are cut"})
    seed: int = field(default=0, metadata={"help": "seed of the draw"})
    prompt: str | None = field(
        default=None, metadata={"help": "text whose attention is drawn token by token (default: the data's beginning)"}
    )
    prompt_tokens: int = field(default=40, metadata={"help": "tokens of the prompt that are drawn"})
    heads: list[str] = field(
        default_factory=list,
        metadata={
            "help": "heads that are drawn, as layer:head (default: a median one of the first, middle and last layer)"
        },
    )
    text_column: str = field(
        default="text", metadata={"help": "column of jsonl and parquet files that holds the text"}
    )
    dtype: str = field(default="auto", metadata={"help": f"auto (as the checkpoint is stored), {', '.join(DTYPES)}"})
    device: str = field(default="auto", metadata={"help": f"one of {', '.join(DEVICES)}"})
    figure: bool = field(default=True, metadata={"help": "draw heads.png and attention.png (needs matplotlib)"})

    def __post_init__(self):
        if not self.data:
            raise ValueError("data is empty; name at least one text file or Hub dataset")
        for name, least in (("length", 2), ("windows", 1), ("prompt_tokens", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it is at least {least}")
        check_dtype(self.dtype)


class Measures:
    """Sums over queries of one sparse layer, filled by `attention.record`."""

    def __init__(self):
        self.layers: dict[int, dict] = {}

    def __call__(self, module, query, key, tau, *, alpha, query_scale, **structure) -> None:
        if not module.is_sparse:
            return
        heads = query.shape[1]
        sums = self.layers.setdefault(
            module.layer_idx,
            {name: torch.zeros(heads, dtype=torch.float64) for name in ("support", "occupied", "scale", "alpha")}
            | {"visible": 0.0, "tiles": 0.0, "queries": 0, "calls": 0},
        )
        # Zero queries weigh all keys alike: what has weight then is what is visible, whatever the mask.
        blank, one_key = torch.zeros_like(query[:, :1]), key[:, :1]
        everything = {**structure, "slopes": None, "alpha": 1.0}
        _, blank_tau = reference.attention(blank, one_key, one_key, **everything)
        visible = reference.support_size(blank, one_key, blank_tau, **everything)
        tiles = reference.block_occupancy(blank, one_key, blank_tau, block=TILE, **everything)
        # Softmax gives weight to every key it sees, even where a float rounds it to 0.
        if tau is None or (isinstance(alpha, float) and alpha == 1.0):
            support, occupied = visible.expand(-1, heads, -1), tiles.expand(-1, heads, -1, -1)
        else:
            support = reference.support_size(query, key, tau, alpha=alpha, **structure)
            occupied = reference.block_occupancy(query, key, tau, block=TILE, alpha=alpha, **structure)
        batch, _, queries = support.shape
        sums["support"] += support.double().sum((0, 2)).cpu()
        sums["occupied"] += occupied.double().sum((0, 2, 3)).cpu()
        sums["visible"] += visible.double().sum().item()
        sums["tiles"] += tiles.double().sum().item()
        if query_scale is not None:
            sums["scale"] += query_scale[..., 0].double().mean((0, 2)).cpu()
        else:
            sums["scale"] += 1
        sums["alpha"] += torch.as_tensor(alpha, dtype=torch.float64).detach().cpu().expand(heads)
        sums["queries"] += batch * queries
        sums["calls"] += 1

    def rows(self) -> list[dict]:
        """Per layer the numbers of `NUMBERS` as one list over heads each, and the mean number of visible keys."""
        return [
            {
                "layer": layer,
                "visible": sums["visible"] / sums["queries"],
                "support": (sums["support"] / sums["queries"]).tolist(),
                "zeros": (1 - sums["support"] / sums["visible"]).tolist(),
                "block_sparsity": (1 - sums["occupied"] / sums["tiles"]).tolist(),
                "scale": (sums["scale"] / sums["calls"]).tolist(),
                "alpha": (sums["alpha"] / sums["calls"]).tolist(),
            }
            for layer, sums in sorted(self.layers.items())
        ]


def report_model(arguments: ReportArguments) -> dict:
    """Measures, prints the table, writes report.json, report.md and the pictures, and returns what is in report.json.

    Raises:
        ValueError, OSError: for what is wrong with arguments, model or data; for a dense model, whose attention has no
            exact zeros to report.
    """
    folder = Path(arguments.output_dir)
    if folder.exists() and not folder.is_dir():
        raise OSError(f"output_dir is {folder}, which is a file")
    device = choose_device(arguments.device)
    if arguments.figure:
        from . import figures
    checkpoint = examine(arguments.model)
    if checkpoint.sparse is None:
        raise ValueError(f"{arguments.model} is dense: every visible key carries weight. Report on a sparse model")
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
    measures = Measures()
    with record(measures), torch.no_grad():
        for window in tqdm(windows.tokens, desc="looking", unit="window", mininterval=0.2 if _terminal() else 30):
            model(window[None].to(device), use_cache=False, logits_to_keep=1)
    rows = measures.rows()
    report = {
        "format": FORMAT,
        "versions": {
            "hf_sparse_attention": VERSION, "transformers": transformers.__version__, "torch": torch.__version__,
        },
        "model": arguments.model,
        "fingerprint": checkpoint.fingerprint,
        "sparse_attention": checkpoint.sparse.to_dict(),
        "arguments": {key: value for key, value in asdict(arguments).items() if key not in ("output_dir", "figure")},
        "windows": len(windows),
        "length": arguments.length,
        "mean": {name: _mean(rows, name) for name in NUMBERS}
        | {"visible": sum(row["visible"] for row in rows) / len(rows)},
        "layers": rows,
    }  # fmt: skip
    write_json(folder / "report.json", report)
    write_text(folder / "report.md", _page(report, checkpoint))
    if arguments.figure:
        write_bytes(folder / "heads.png", figures.picture(_head_figure(figures, report)))
        prompt = arguments.prompt or documents[0]
        drawing = _prompt_figure(figures, model, tokenizer, prompt, drawn or _typical_heads(rows), arguments)
        write_bytes(folder / "attention.png", figures.picture(drawing))
    print(plain(*_table(rows)))
    print(f"written to {folder}")
    return report


def _terminal() -> bool:
    return sys.stderr.isatty()


def _mean(rows: list[dict], name: str) -> float:
    values = [value for row in rows for value in row[name]]
    return sum(values) / len(values)


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


def _page(report: dict, checkpoint: Checkpoint) -> str:
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
        "Per head: report.json and heads.png.",
        "",
    ]
    return "\n".join(lines)


def _head_figure(figures, report: dict):
    import numpy as np

    layers = [row["layer"] for row in report["layers"]]
    panels = [("support, keys", "support", "{:.0f}", True), ("exact zeros", "zeros", "{:.2f}", False),
              (f"empty {TILE} x {TILE} tiles", "block_sparsity", "{:.2f}", False)]  # fmt: skip
    for name, shown in (("scale", "factor on the query"), ("alpha", "alpha")):
        values = [value for row in report["layers"] for value in row[name]]
        if max(values) - min(values) > 1e-6:
            panels.append((shown, name, "{:.2f}", False))
    content = [
        (shown, np.array([row[name] for row in report["layers"]]), pattern, logarithmic)
        for shown, name, pattern, logarithmic in panels
    ]
    settings = report["sparse_attention"]
    return figures.heads(content, layers, title=f"{settings['map']}, alpha {settings['alpha']:g}")


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


def _typical_heads(rows: list[dict]) -> list[tuple[int, int]]:
    """Of the first, middle and last layer the head whose support is the median."""
    picked = [rows[index] for index in sorted({0, len(rows) // 2, len(rows) - 1})]
    return [
        (row["layer"], sorted(range(len(row["support"])), key=row["support"].__getitem__)[len(row["support"]) // 2])
        for row in picked
    ]


def _prompt_figure(figures, model, tokenizer, prompt: str, drawn: list[tuple[int, int]], arguments: ReportArguments):
    ids = tokenizer(prompt, truncation=True, max_length=arguments.prompt_tokens, return_tensors="pt")["input_ids"]
    ids = ids.to(model.device)
    with torch.no_grad():
        attentions = model(ids, use_cache=False, output_attentions=True).attentions
    visible = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
    maps = []
    for layer, head in drawn:
        weights = attentions[layer][0, head].float().cpu()
        # A window shows as unseen what a causal mask alone would call visible.
        window = getattr(attention_module(model, layer), "sliding_window", None) or math.inf
        distance = torch.arange(ids.shape[1])[:, None] - torch.arange(ids.shape[1])
        maps.append((f"layer {layer}, head {head}", weights.numpy(), (visible & (distance < window)).numpy()))
    tokens = [tokenizer.decode([token]) for token in ids[0].tolist()]
    settings = model.config.sparse_attention
    return figures.attention(maps, tokens, title=f"attention of {settings['map']}, alpha {settings['alpha']:g}")


def attention_module(model, layer: int):
    """The attention module of a layer."""
    return next(module for module in model.modules() if getattr(module, "layer_idx", None) == layer)
