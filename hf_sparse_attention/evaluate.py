"""Models, tasks and lengths -> the models' numbers side by side: as a table, results.json, results.md and pictures.

Every number of a model, task, length and depth is a cell; finished cells are kept in results.json and not computed
again.
"""

from __future__ import annotations

import gc
import hashlib
import json
import logging
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
from .tasks import NEEDLE, TASK, TASKS, TEXT, Task
from .tasks.harness import HarnessTask, harness_inputs, harness_tasks
from .tasks.inputs import ANSWERS, DEPTHS, HAYSTACKS, Inputs, Sources, pace, reach
from .text import read_documents

logger = logging.getLogger(__name__)

# Layout of results.json.
FORMAT = 1


@dataclass
class EvaluateArguments:
    """What to measure, on what."""

    models: list[str] = field(
        metadata={"help": "folders or Hub ids of the models, dense or sparse, each as `path` or `label=path`"},
    )
    data: list[str] = field(
        default_factory=list,
        metadata={
            "help": "text for perplexity, or for haystacks: .txt, .jsonl or .parquet files (also .gz, .xz, "
            ".zst), or names of Hub datasets"
        },
    )
    output_dir: str = field(default="evaluation", metadata={"help": "folder for results.json, .md and pictures"})
    lengths: list[int] = field(
        default_factory=lambda: [256, 512, 1024, 2048],
        metadata={"help": "context lengths in tokens; for synthetic tasks the task's own length"},
    )
    tasks: list[str] = field(
        default_factory=list,
        metadata={"help": f"what is measured: {', '.join(TASKS)} (default: perplexity, or nothing beside --lm_eval)"},
    )
    text_column: str = field(default="text", metadata={"help": "column of jsonl and parquet files with the text"})
    max_documents: int | None = field(default=None, metadata={"help": "read only so many documents (default: all)"})
    concatenate: bool = field(
        default=False,
        metadata={"help": "join all documents to one before windows are cut; a window may then hold several, which "
                          "see each other. Without it a document shorter than a length gives no window"},
    )  # fmt: skip
    limit: int | None = field(
        default=None,
        metadata={"help": "at most so many samples per cell, or windows of the longest length, drawn with the seed; "
                          "shorter and overlapping windows are cut from the text of these (default: all windows, 20 "
                          "needles per length and depth, 1,000 of synthetic tasks, all of lm-eval)"},
    )  # fmt: skip
    seed: int = field(default=0, metadata={"help": "seed of the draw under --limit, and of needles"})
    depths: list[float] = field(
        default_factory=list,
        metadata={"help": "where needles stand, from 0 (first) to 1 (last) (default: 0 0.25 0.5 0.75 1)"},
    )
    haystack: str | None = field(
        default=None, metadata={"help": "needles are hidden in `sentences` of the package (default) or in the --data"}
    )
    answers: str | None = field(
        default=None,
        metadata={"help": "how needles and synthetic tasks are answered: `forced` (one pass, right where greedy "
                          "decoding would be; default) or `generated` (token by token with the cache)"},
    )  # fmt: skip
    lm_eval: list[str] = field(
        default_factory=list,
        metadata={
            "help": "tasks of lm-eval, such as niah_single_1; RULER's are asked at every length from 4096 on, and "
            "hsa_passkey and the package's other needles at any (needs lm-eval)"
        },
    )
    lm_eval_folder: str | None = field(default=None, metadata={"help": "folder with further YAML tasks of lm-eval"})
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
        self.lm_eval = [name for item in self.lm_eval for name in item.split(",") if name]
        self.lengths = sorted(set(self.lengths))
        if not self.lengths or self.lengths[0] < 2:
            raise ValueError(f"lengths is {self.lengths}; each is at least 2 tokens")
        if not self.tasks and not self.lm_eval:
            self.tasks = ["perplexity"]
        unknown = [name for name in self.tasks if name not in TASKS]
        if unknown:
            raise ValueError(f"tasks is {self.tasks}; choose from {', '.join(TASKS)}")
        if len(set(self.tasks)) < len(self.tasks) or len(set(self.lm_eval)) < len(self.lm_eval):
            raise ValueError(f"a task is named twice in {[*self.tasks, *self.lm_eval]}")
        self._check_used()
        for name in ("limit", "max_documents", "batch_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it is at least 1")
        if any(not 0 <= depth <= 1 for depth in self.depths):
            raise ValueError(f"depths is {self.depths}; each is from 0 to 1")
        for name, choices in (("haystack", HAYSTACKS), ("answers", ANSWERS)):
            if getattr(self, name) not in (*choices, None):
                raise ValueError(f"{name} is {getattr(self, name)!r}; choose one of {', '.join(choices)}")
        check_dtype(self.dtype)

    def _check_used(self) -> None:
        """Raises ValueError for what is needed and not given, or given and not used by any task."""
        kinds = {TASKS[name].kind for name in self.tasks}
        reads = kinds & {TEXT} or self.haystack == "data"
        if reads and not self.data:
            raise ValueError("data is empty; name at least one text file or Hub dataset")
        unused = {
            "data": self.data and not reads,
            "concatenate": self.concatenate and TEXT not in kinds,
            "depths": self.depths and not any(TASKS[name].by_depth for name in self.tasks),
            "haystack": self.haystack and NEEDLE not in kinds,
            "answers": self.answers and not kinds & {NEEDLE, TASK},
            "lm_eval_folder": self.lm_eval_folder and not self.lm_eval,
        }
        if found := [name for name, is_unused in unused.items() if is_unused]:
            raise ValueError(
                f"{', '.join(found)} is given, but none of the tasks {[*self.tasks, *self.lm_eval]} uses it"
            )


@dataclass(frozen=True)
class Cell:
    """A number to be found: what determines it, and where it is to stand."""

    label: str
    task: Task | HarnessTask
    length: int | None
    inputs: Inputs
    fingerprint: str

    @property
    def place(self) -> tuple:
        return self.label, self.task.name, self.length, self.inputs.depth


def evaluate_models(arguments: EvaluateArguments) -> dict:
    """Measures, prints the table, writes the three files, and returns what is in results.json.

    Raises:
        ValueError, OSError: for what is wrong with arguments, models or data, before the first model is loaded.
    """
    folder = Path(arguments.output_dir)
    kept = _kept_cells(folder, arguments.overwrite)
    device = choose_device(arguments.device)
    if arguments.figure:
        from .tasks import pictures
    checkpoints = {label: examine(path) for label, path in _labelled(arguments.models).items()}
    harness = harness_tasks(arguments.lm_eval, arguments.lm_eval_folder)
    for task in harness:
        task.check_lengths(arguments.lengths)
    documents, data = _read(arguments)
    cells = _plan(arguments, checkpoints, documents, harness)
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
        "depths": arguments.depths or list(DEPTHS),
        "tasks": list(dict.fromkeys(cell.task.name for cell in cells)),
        "cells": [],
        "other_cells": [],
    }  # fmt: skip
    _compute(arguments, device, checkpoints, cells, kept, results, folder)
    if arguments.figure:
        drawn = pictures.draw(results)
        for name, content in drawn.items():
            write_bytes(folder / name, content)
        if old := [name for name in pictures.NAMES if name not in drawn and (folder / name).exists()]:
            logger.info("%s in %s: of an earlier call, not of these numbers", ", ".join(old), folder)
    write_text(folder / "results.md", markdown(results))
    print(terminal(results))
    return results


def _labelled(models: list[str]) -> dict[str, str]:
    """`label=path` or `path`, whose last part is then the label; of `run/model`, where `train` puts it, `run`."""
    labelled = {}
    for item in models:
        label, separator, path = item.partition("=")
        if not separator or Path(item).exists():
            parts = Path(item).expanduser().resolve().parts if Path(item).exists() else item.split("/")
            label, path = parts[-2] if parts[-1] == "model" and len(parts) > 2 else parts[-1], item
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
    found = read_documents(arguments.data, text_column=arguments.text_column) if arguments.data else ()
    for document in found:
        documents.append(document)
        digest.update(hashlib.sha256(document.encode("utf-8", "surrogatepass")).digest())
        if len(documents) == arguments.max_documents:
            break
    if arguments.data and not any(document.strip() for document in documents):
        raise ValueError(f"{', '.join(arguments.data)}: there is no text in it")
    return documents, {
        "names": [Path(name).name if Path(name).exists() else name for name in arguments.data],
        "documents": len(documents),
        "characters": sum(map(len, documents)),
        "sha256": digest.hexdigest(),
    }


def _plan(
    arguments: EvaluateArguments, checkpoints: dict[str, Checkpoint], documents: list[str], harness: list[HarnessTask]
) -> list[Cell]:
    """All cells, in the order of the table."""
    sources = Sources(
        documents, arguments.concatenate, arguments.limit, tuple(arguments.lengths), arguments.seed,
        tuple(arguments.depths) or DEPTHS, arguments.haystack or "sentences", arguments.answers or "forced",
    )  # fmt: skip
    tasks = [TASKS[name] for name in arguments.tasks]
    cells = []
    for label, checkpoint in checkpoints.items():
        needed = harness or any(task.kind != TASK for task in tasks)
        tokenizer = load_tokenizer(checkpoint.source.folder) if needed else None
        of_model = {
            "folder": checkpoint.source.folder,
            "name": checkpoint.path,
            "vocabulary": checkpoint.config.get_text_config().vocab_size,
            "tokenizer": tokenizer,
        }
        for task in tasks:
            for length in arguments.lengths:
                for inputs in sources.of(task, length, **of_model):
                    cells.append(_cell(arguments, label, checkpoint, task, length, inputs))
        for task in harness:
            for length in arguments.lengths if task.by_length else (None,):
                inputs = harness_inputs(
                    task, length, arguments.limit, arguments.seed, checkpoint.source.folder, tokenizer
                )
                cells.append(_cell(arguments, label, checkpoint, task, length, inputs))
    if not any(cell.inputs.missing is None for cell in cells):
        whose = "the joined documents have" if arguments.concatenate else "the longest document has"
        advice = "" if arguments.concatenate else ", or join the documents with --concatenate"
        raise ValueError(
            f"{whose} {sources.longest():,} tokens, the shortest length is {arguments.lengths[0]:,}: choose shorter "
            f"ones{advice}"
        )
    return cells


def _cell(
    arguments, label: str, checkpoint: Checkpoint, task: Task | HarnessTask, length: int | None, inputs: Inputs
) -> Cell:
    dtype = arguments.dtype if arguments.dtype != "auto" else str(checkpoint.config.dtype)
    parts = [FORMAT, task.name, task.version, checkpoint.fingerprint, dtype, inputs.sha256, inputs.measure]
    return Cell(label, task, length, inputs, hashlib.sha256(json.dumps(parts).encode()).hexdigest())


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
        "reach": reach(checkpoint),
    }


def _compute(arguments, device, checkpoints, cells: list[Cell], kept: dict, results: dict, folder: Path) -> None:
    """Fills results["cells"], saving after each one that had to be computed."""
    reaches = {model["label"]: model["reach"] for model in results["models"]}
    wanted = {cell.fingerprint for cell in cells}
    results["other_cells"] = [cell for fingerprint, cell in kept.items() if fingerprint not in wanted]
    known = {fingerprint: cell for fingerprint, cell in kept.items() if fingerprint in wanted}
    if results["other_cells"]:
        logger.info(
            "no longer shown, but kept in results.json: %s. Another --output_dir leaves the earlier tables alone",
            _named(results["other_cells"]),
        )
    if known:
        done = sum(cell.fingerprint in known for cell in cells)
        logger.info("%d of %d cells are finished and kept", done, len(cells))
    todo = {cell.fingerprint: cell for cell in cells if cell.fingerprint not in known and cell.inputs.missing is None}

    def save() -> None:
        rows = [_row(cell, reaches[cell.label], known.get(cell.fingerprint)) for cell in cells]
        results["cells"] = [row for row in rows if row is not None]
        write_json(folder / "results.json", results)

    total = sum(cell.inputs.count for cell in todo.values())
    with tqdm(total=total, desc="evaluating", unit="sample", disable=not todo, **pace()) as bar:
        for label, checkpoint in checkpoints.items():
            own = [cell for cell in todo.values() if cell.label == label]
            if not own:
                continue
            bar.set_description(f"loading {label}", refresh=False)
            model = load(checkpoint, dtype=arguments.dtype, device=device)
            for cell in own:
                bar.set_description(" ".join(str(part) for part in cell.place if part is not None), refresh=False)
                known[cell.fingerprint] = _score(model, cell, arguments.batch_tokens, device, bar)
                save()
            del model
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
    save()


def _named(cells: list[dict]) -> str:
    """What cells are of, in words."""
    lengths: dict[str, dict] = {}
    for cell in cells:
        lengths.setdefault(f"{cell['task']} of {cell['model']}", {}).setdefault(cell["length"])
    return "; ".join(
        name + (f" at {', '.join(map(str, found))}" if any(found) else "") for name, found in lengths.items()
    )


def _score(model, cell: Cell, batch_tokens: int, device: torch.device, bar: tqdm) -> dict:
    """The cell's numbers; `finished` says whether another run would get the same."""
    _take_back_rotary(model)
    try:
        numbers = cell.inputs.score(model, batch_tokens=batch_tokens, progress=bar.update)
    except torch.OutOfMemoryError:
        logger.warning("%s: one window does not fit into the memory of %s", " ".join(map(str, cell.place)), device)
        return {"missing": f"one window does not fit into the memory of {device.type}", "finished": False}
    return {**numbers, "finished": True}


@torch.inference_mode()
def _take_back_rotary(model) -> None:
    """Dynamic rotary positions stretch with the longest text a model has seen, until a short one: without one here a
    number would depend on what was measured before it."""
    if any("dynamic" in str(getattr(module, "rope_type", "")) for module in model.modules()):
        model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=next(model.parameters()).device), use_cache=False)


def _row(cell: Cell, reach: dict | None, numbers: dict | None) -> dict | None:
    """The cell as it stands in results.json; None while it is not computed."""
    inputs = cell.inputs
    if inputs.missing is not None:
        numbers = {"missing": inputs.missing, "finished": True}
    if numbers is None:
        return None
    beyond = reach is not None and inputs.tokens > reach["tokens"]
    place = {
        "model": cell.label,
        "task": cell.task.name,
        "length": cell.length,
        **({} if inputs.depth is None else {"depth": inputs.depth}),
        **inputs.place,
        "tokens_sha256": inputs.sha256,
        "fingerprint": cell.fingerprint,
        "note": f"beyond the model's {reach['what']} of {reach['length']}" if beyond else None,
    }
    return place | numbers | place
