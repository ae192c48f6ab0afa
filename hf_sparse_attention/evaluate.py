"""Models and text -> the models' numbers side by side: as a table, results.json, results.md and results.png.

Every number of a model, task and length is a cell; finished cells are kept in results.json and not computed again.
"""

from __future__ import annotations

import gc
import hashlib
import json
import logging
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import transformers
from tqdm import tqdm

from .checkpoint import DEVICES, Checkpoint, check_dtype, choose_device, examine, load, load_tokenizer
from .config import VERSION
from .files import write_bytes, write_json, write_text
from .loading import DTYPES
from .results import markdown, terminal
from .tasks import TASKS, Task, TokenizedText, Windows
from .text import read_documents

logger = logging.getLogger(__name__)

# Layout of results.json.
FORMAT = 1


@dataclass
class EvaluateArguments:
    """What to measure, on what."""

    models: list[str] = field(
        default_factory=list,
        metadata={"help": "folders or Hub ids of the models, dense or sparse, each as `path` or `label=path`"},
    )
    data: list[str] = field(
        default_factory=list,
        metadata={"help": "text: .txt, .jsonl or .parquet files (also .gz, .xz, .zst), or names of Hub datasets"},
    )
    output_dir: str = field(default="evaluation", metadata={"help": "folder for results.json, .md and .png"})
    lengths: list[int] = field(
        default_factory=lambda: [256, 512, 1024, 2048], metadata={"help": "context lengths in tokens"}
    )
    tasks: list[str] = field(
        default_factory=lambda: ["perplexity"], metadata={"help": f"what is measured: {', '.join(TASKS)}"}
    )
    text_column: str = field(default="text", metadata={"help": "column of jsonl and parquet files with the text"})
    max_documents: int | None = field(default=None, metadata={"help": "read only so many documents (default: all)"})
    concatenate: bool = field(
        default=False,
        metadata={"help": "join all documents to one before windows are cut; a window may then hold several, which "
                          "see each other. Without it a document shorter than a length gives no window"},
    )  # fmt: skip
    limit: int | None = field(
        default=None, metadata={"help": "at most so many windows per length, drawn with the seed (default: all)"}
    )
    seed: int = field(default=0, metadata={"help": "seed of the draw under --limit"})
    batch_tokens: int = field(default=8192, metadata={"help": "tokens per batch; a longer window is a batch alone"})
    dtype: str = field(
        default="auto", metadata={"help": f"auto (what the checkpoint is stored in), {', '.join(DTYPES)}"}
    )
    device: str = field(default="auto", metadata={"help": f"one of {', '.join(DEVICES)}"})
    figure: bool = field(default=True, metadata={"help": "draw results.png (needs matplotlib)"})
    overwrite: bool = field(default=False, metadata={"help": "compute all cells anew, even finished ones"})

    def __post_init__(self):
        if not self.models:
            raise ValueError("models is empty; name at least one folder or Hub id")
        if not self.data:
            raise ValueError("data is empty; name at least one text file or Hub dataset")
        self.lengths = sorted(set(self.lengths))
        if not self.lengths or self.lengths[0] < 2:
            raise ValueError(f"lengths is {self.lengths}; each is at least 2 tokens")
        unknown = [name for name in self.tasks if name not in TASKS]
        if unknown or not self.tasks:
            raise ValueError(f"tasks is {self.tasks}; choose from {', '.join(TASKS)}")
        for name in ("limit", "max_documents", "batch_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it is at least 1")
        check_dtype(self.dtype)


@dataclass(frozen=True)
class Cell:
    """A number to be found: what determines it, and where it is to stand."""

    label: str
    task: Task
    length: int
    windows: Windows
    fingerprint: str


def evaluate_models(arguments: EvaluateArguments) -> dict:
    """Measures, prints the table, writes the three files, and returns what is in results.json.

    Raises:
        ValueError, OSError: for what is wrong with arguments, models or data, before the first model is loaded.
    """
    folder = Path(arguments.output_dir)
    kept = _kept_cells(folder, arguments.overwrite)
    device = choose_device(arguments.device)
    if arguments.figure:
        from . import figures
    checkpoints = {label: examine(path) for label, path in _labelled(arguments.models).items()}
    documents, data = _read(arguments)
    cells = _plan(arguments, checkpoints, documents)
    results = {
        "format": FORMAT,
        "versions": {
            "hf_sparse_attention": VERSION, "transformers": transformers.__version__, "torch": torch.__version__,
        },
        "arguments": {
            key: value for key, value in asdict(arguments).items() if key not in ("output_dir", "overwrite", "figure")
        },
        "data": data,
        "models": [_describe(label, checkpoint) for label, checkpoint in checkpoints.items()],
        "lengths": arguments.lengths,
        "cells": [],
        "other_cells": [],
    }  # fmt: skip
    _compute(arguments, device, checkpoints, cells, kept, results, folder)
    if arguments.figure:
        write_bytes(folder / "results.png", figures.picture(figures.losses(results)))
    write_text(folder / "results.md", markdown(results))
    print(terminal(results))
    return results


def _labelled(models: list[str]) -> dict[str, str]:
    """`label=path` or `path`, whose last part is then the label."""
    labelled = {}
    for item in models:
        label, separator, path = item.partition("=")
        if not separator or Path(item).exists():
            label, path = Path(item).expanduser().resolve().name if Path(item).exists() else item.split("/")[-1], item
        if not label or not path:
            raise ValueError(f"model is {item!r}; write `path` or `label=path`")
        if label in labelled:
            raise ValueError(f"two models are called {label!r}; write `label=path` to tell them apart")
        labelled[label] = path
    return labelled


def _kept_cells(folder: Path, overwrite: bool) -> dict[str, dict]:
    """Finished cells of an earlier run in this folder, by fingerprint."""
    if folder.exists() and not folder.is_dir():
        raise OSError(f"output_dir is {folder}, which is a file")
    file = folder / "results.json"
    if overwrite or not folder.exists():
        return {}
    if not file.exists():
        if any(not path.name.startswith(".") for path in folder.iterdir()):
            raise ValueError(f"{folder} is not empty and has no results.json; choose another folder, or --overwrite")
        return {}
    try:
        saved = json.loads(file.read_text(encoding="utf-8"))
        if saved["format"] != FORMAT:
            raise ValueError(f"its format is {saved['format']}, this version writes {FORMAT}")
        cells = saved["cells"] + saved["other_cells"]
        return {cell["fingerprint"]: cell for cell in cells if cell.get("fingerprint") and cell["finished"]}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is not a results.json of this version ({error}); --overwrite starts anew") from error


def _read(arguments: EvaluateArguments) -> tuple[list[str], dict]:
    documents, digest = [], hashlib.sha256()
    for document in read_documents(arguments.data, text_column=arguments.text_column):
        documents.append(document)
        digest.update(hashlib.sha256(document.encode("utf-8", "surrogatepass")).digest())
        if len(documents) == arguments.max_documents:
            break
    if not any(document.strip() for document in documents):
        raise ValueError(f"{', '.join(arguments.data)}: there is no text in it")
    return documents, {
        "names": [Path(name).name if Path(name).exists() else name for name in arguments.data],
        "documents": len(documents),
        "characters": sum(map(len, documents)),
        "sha256": digest.hexdigest(),
    }


def _plan(arguments: EvaluateArguments, checkpoints: dict[str, Checkpoint], documents: list[str]) -> list[Cell]:
    """All cells, in the order of the table. Models with the same tokenizer get the same windows."""
    texts: dict[str, TokenizedText] = {}
    cut: dict[tuple[str, int], Windows] = {}
    cells = []
    for label, checkpoint in checkpoints.items():
        tokenizer = load_tokenizer(checkpoint.source.folder)
        same = _identity(tokenizer)
        if same not in texts:
            text = TokenizedText.of(tqdm(documents, desc="tokenizing", unit="document", **_pace()), tokenizer)
            texts[same] = text.joined() if arguments.concatenate else text
        text = texts[same]
        vocabulary = checkpoint.config.get_text_config().vocab_size
        highest = max((int(document.max()) for document in text.documents), default=0)
        if highest >= vocabulary:
            raise ValueError(
                f"{checkpoint.path}: its tokenizer gives token {highest}, the model has {vocabulary}: they do "
                "not belong together"
            )
        for task in (TASKS[name] for name in arguments.tasks):
            for length in arguments.lengths:
                if (same, length) not in cut:
                    cut[same, length] = text.windows(length, limit=arguments.limit, seed=arguments.seed)
                windows = cut[same, length]
                dtype = arguments.dtype if arguments.dtype != "auto" else str(checkpoint.config.dtype)
                parts = [FORMAT, task.name, task.version, checkpoint.fingerprint, dtype, windows.sha256]
                fingerprint = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
                cells.append(Cell(label, task, length, windows, fingerprint))
    if not any(len(cell.windows) for cell in cells):
        longest = max(text.longest for text in texts.values())
        whose = "the joined documents have" if arguments.concatenate else "the longest document has"
        advice = "" if arguments.concatenate else ", or join the documents with --concatenate"
        raise ValueError(
            f"{whose} {longest:,} tokens, the shortest length is {arguments.lengths[0]:,}: choose shorter ones{advice}"
        )
    return cells


def _identity(tokenizer) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = backend.to_str() if backend is not None else f"{tokenizer.name_or_path} {len(tokenizer)}"
    return hashlib.sha256(f"{content} {tokenizer.eos_token_id}".encode()).hexdigest()


def _describe(label: str, checkpoint: Checkpoint) -> dict:
    sparse = checkpoint.sparse
    return {
        "label": label,
        "path": checkpoint.path,
        "fingerprint": checkpoint.fingerprint,
        "model_type": checkpoint.config.model_type,
        "map": checkpoint.map,
        "alpha": 1.0 if sparse is None else sparse.alpha,
        "position": None if sparse is None else sparse.position,
        "max_position_embeddings": checkpoint.positions,
    }


def _compute(arguments, device, checkpoints, cells: list[Cell], kept: dict, results: dict, folder: Path) -> None:
    """Fills results["cells"], saving after each one that had to be computed."""
    wanted = {cell.fingerprint for cell in cells}
    results["other_cells"] = [cell for fingerprint, cell in kept.items() if fingerprint not in wanted]
    known = {fingerprint: cell for fingerprint, cell in kept.items() if fingerprint in wanted}
    if known:
        done = sum(cell.fingerprint in known for cell in cells)
        logger.info("%d of %d cells are finished and kept", done, len(cells))
    todo = {cell.fingerprint: cell for cell in cells if cell.fingerprint not in known and len(cell.windows)}

    def save() -> None:
        rows = [
            _row(cell, checkpoints[cell.label], known.get(cell.fingerprint), arguments.concatenate) for cell in cells
        ]
        results["cells"] = [row for row in rows if row is not None]
        write_json(folder / "results.json", results)

    total = sum(len(cell.windows) for cell in todo.values())
    with tqdm(total=total, desc="evaluating", unit="window", disable=not todo, **_pace()) as bar:
        for label, checkpoint in checkpoints.items():
            own = [cell for cell in todo.values() if cell.label == label]
            if not own:
                continue
            bar.set_description(f"loading {label}", refresh=False)
            model = load(checkpoint, dtype=arguments.dtype, device=device)
            for cell in own:
                bar.set_description(f"{label} {cell.length}", refresh=False)
                known[cell.fingerprint] = _score(model, cell, arguments.batch_tokens, device, bar)
                save()
            del model
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
    save()


def _score(model, cell: Cell, batch_tokens: int, device: torch.device, bar: tqdm) -> dict:
    """The cell's numbers; `finished` says whether another run would get the same."""
    try:
        numbers = cell.task.score(model, cell.windows, batch_tokens=batch_tokens, progress=bar.update)
    except torch.OutOfMemoryError:
        logger.warning(
            "%s at %d tokens: one window does not fit into the memory of %s", cell.label, cell.length, device
        )
        return {"missing": f"one window does not fit into the memory of {device.type}", "finished": False}
    return {**numbers, "finished": True}


def _row(cell: Cell, checkpoint: Checkpoint, numbers: dict | None, joined: bool) -> dict | None:
    """The cell as it stands in results.json; None while it is not computed."""
    if not len(cell.windows):
        reason = "the joined documents have fewer than" if joined else "no document has"
        numbers = {"missing": f"{reason} {cell.length:,} tokens", "finished": True}
    if numbers is None:
        return None
    positions = checkpoint.positions
    beyond = positions is not None and cell.length > positions
    place = {
        "model": cell.label,
        "task": cell.task.name,
        "length": cell.length,
        "windows": len(cell.windows),
        "tokens": len(cell.windows) * (cell.length - 1),
        "documents": cell.windows.documents,
        "tokens_sha256": cell.windows.sha256,
        "fingerprint": cell.fingerprint,
        "note": f"beyond the model's max_position_embeddings of {positions}" if beyond else None,
    }
    return place | numbers | place


def _pace() -> dict:
    """A bar that moves on a terminal, and a line now and then in a log."""
    return {"mininterval": 0.2 if sys.stderr.isatty() else 30, "dynamic_ncols": True}
