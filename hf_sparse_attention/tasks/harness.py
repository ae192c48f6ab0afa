"""Tasks of lm-eval (EleutherAI's evaluation harness, an optional extra) on a model that is already loaded, and our
needles as data for its YAML files in data/lm_eval."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from .haystack import Haystack
from .inputs import Inputs, tokenizer_identity
from .needles import NEEDLES, make_prompt

# Where YAML files of our own are, for `lm_eval --include_path`.
FOLDER = Path(__file__).parent.parent / "data" / "lm_eval"
# Their names.
OWN = tuple(f"hsa_{name}" for name in NEEDLES)
# Bytes from which on a file is told by its size and time, not by its content.
_LARGE = 2**26


@dataclass(frozen=True)
class HarnessTask:
    """A single task of lm-eval.

    Args:
        name: `lm_eval:` and what lm-eval calls it.
        path: its YAML file.
        by_length: whether it makes its data for a length in tokens, as RULER's do.
        lengths: the lengths it reports, or None for any.
        version: of lm-eval, the YAML file, and of a user's task all files that it may read.
    """

    name: str
    path: Path
    by_length: bool
    lengths: list[int] | None
    version: str

    def check_lengths(self, lengths: list[int]) -> None:
        """Raises ValueError for lengths that the task does not report."""
        others = [] if self.lengths is None else [length for length in lengths if length not in self.lengths]
        if others:
            raise ValueError(
                f"{self.name} reports lengths {', '.join(map(str, self.lengths))} alone, not "
                f"{', '.join(map(str, others))}: choose --lengths of these, or needles of this package, which have "
                f"any: --lm_eval {','.join(OWN)}"
            )


def harness_tasks(names: list[str], folder: str | None = None) -> list[HarnessTask]:
    """Tasks by name, of a folder, of our own, or of lm-eval.

    Raises:
        ImportError: without lm-eval.
        ValueError: for a name that lm-eval does not know, or a group of tasks.
    """
    if not names:
        return []
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ImportError('lm_eval needs lm-eval: pip install "hf-sparse-attention[lm-eval]"') from error
    if folder is not None and not Path(folder).is_dir():
        raise ValueError(f"lm_eval_folder is {folder}, which is not a folder")
    own = [str(FOLDER), *([folder] if folder is not None else [])]
    index = TaskManager(include_path=own, include_defaults=False).task_index
    if any(name not in index for name in names):
        # Reading all of lm-eval's own files takes a while.
        index = TaskManager(include_path=own).task_index
    return [_harness_task(name, index.get(name)) for name in names]


def _harness_task(name: str, entry) -> HarnessTask:
    if entry is None:
        raise ValueError(
            f"lm_eval names {name!r}, which lm-eval does not know; needles of this package are {', '.join(OWN)}, and "
            "--lm_eval_folder adds your own"
        )
    if (
        entry.yaml_path is None
        or entry.cfg is None
        or "task" not in entry.cfg
        or not isinstance(entry.cfg["task"], str)
    ):
        raise ValueError(f"lm_eval names {name!r}, which is not a single task but a group: name its tasks")
    metrics = [str(row.get("metric")) for row in entry.cfg.get("metric_list") or []]
    by_length = "custom_dataset" in entry.cfg
    lengths = [int(metric) for metric in metrics] if metrics and all(map(str.isdigit, metrics)) else None
    digest = hashlib.sha256(metadata.version("lm_eval").encode() + Path(entry.yaml_path).read_bytes())
    # lm-eval's own files are those of its version.
    if Path(find_spec("lm_eval").origin).parent not in Path(entry.yaml_path).resolve().parents:
        digest.update(json.dumps(entry.cfg, default=str).encode())
        for file in _files_of(entry):
            digest.update(f"{file.name} {file.stat().st_size} ".encode())
            is_large = file.stat().st_size > _LARGE
            digest.update(str(file.stat().st_mtime_ns).encode() if is_large else file.read_bytes())
    return HarnessTask(f"lm_eval:{name}", Path(entry.yaml_path), by_length, lengths, digest.hexdigest())


def _files_of(entry) -> list[Path]:
    """What a user's task may read: the files beside it, and those that its configuration names."""

    def names(value) -> list[str]:
        if isinstance(value, dict | list):
            return [name for item in (value.values() if isinstance(value, dict) else value) for name in names(item)]
        return [value] if isinstance(value, str) and value else []

    named = map(Path, names([entry.cfg.get("dataset_path"), entry.cfg.get("dataset_kwargs")]))
    found = [*Path(entry.yaml_path).parent.iterdir()]
    for place in named:
        found += place.rglob("*") if place.is_dir() else [place]
    return sorted({file.resolve() for file in found if file.is_file()})


def harness_inputs(
    task: HarnessTask, length: int | None, limit: int | None, seed: int, folder: Path, tokenizer
) -> Inputs:
    """The cell of a task, at a length if it has one."""
    same = None if tokenizer is None else tokenizer_identity(tokenizer)
    parts = json.dumps([task.name, task.version, length, limit, seed, same])
    return Inputs(
        count=1,
        sha256=hashlib.sha256(parts.encode()).hexdigest(),
        tokens=length or 0,
        place={},
        score=partial(_score, task, length, limit, seed, folder, tokenizer),
    )


def _score(
    task: HarnessTask, length: int | None, limit: int | None, seed: int, folder: Path, tokenizer, model, *,
    batch_tokens: int, progress: Callable[[int], object] = lambda count: None,
) -> dict:  # fmt: skip
    """Every metric of the task with its standard error, and the number of samples."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    options = {"pretrained": str(folder)} | ({} if length is None else {"max_seq_lengths": [length], "seed": seed})
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2048
    # What is longer than this lm-eval cuts off; a model is asked beyond its positions if the user names the length.
    longest = max(positions, 2 * (length or 0))
    batch = max(1, batch_tokens // (length or positions))
    found = simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch, max_length=longest),
        tasks=[str(task.path)],
        task_manager=TaskManager(include_defaults=False, metadata=options),
        limit=limit,
        bootstrap_iters=0,
        log_samples=False,
        random_seed=seed,
        numpy_random_seed=seed,
        torch_random_seed=seed,
        fewshot_random_seed=seed,
    )
    progress(1)
    (name,) = found["results"]
    metrics = {}
    for key, value in found["results"][name].items():
        metric, _, filtered = key.partition(",")
        # RULER gives -1 at the lengths that were not asked.
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not filtered or "_stderr" in metric:
            continue
        if not metric.isdigit() or metric == str(length):
            metrics[metric if filtered == "none" else f"{metric} ({filtered})"] = float(value)
    if not metrics or not all(map(math.isfinite, metrics.values())):
        return {"missing": f"lm-eval gave no finite number: {metrics}"}
    samples = found.get("n-samples", {}).get(name, {}).get("effective")
    return {"metrics": metrics, "samples": samples, "limit": limit}


def needle_documents(
    name: str, *, tokenizer: str, max_seq_lengths: list[int], samples: int = 100, seed: int = 0
) -> dict:
    """The samples of a needle task as lm-eval takes them: {"test": dataset} of input, outputs, length.

    Args:
        name: of `NEEDLES`.
        tokenizer: folder or Hub id whose tokens are counted.
    """
    import datasets

    from ..checkpoint import load_tokenizer

    task, counted = NEEDLES[name], load_tokenizer(tokenizer)
    haystack = Haystack.of(None, counted)
    rows = []
    for length in max_seq_lengths:
        for sample in range(samples):
            # Depths in turn, from the first to the last.
            depth = (sample % 11) / 10 if task.by_depth else None
            made = make_prompt(task, haystack, counted, length=length, depth=depth, sample=sample, seed=seed)
            text = counted.decode(made.prompt[len(haystack.prefix) :], clean_up_tokenization_spaces=False)
            rows.append(
                {"input": text, "outputs": made.text, "length": length, "depth": -1.0 if depth is None else depth}
            )
    with contextlib.suppress(AttributeError):
        datasets.disable_progress_bars()
    return {"test": datasets.Dataset.from_list(rows)}
