"""Checkpoints of a training run, from which it goes on exactly, on any number of processes: parameters and optimizer,
each process writing its part; random numbers, the place in the data, the numbers gathered so far. A checkpoint has its
name only when it is whole."""

from __future__ import annotations

import json
import logging
import random
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed.checkpoint as sharded
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException

from ..files import PARTIAL, explained_write, flush_folder, write_json
from . import zero
from .distributed import all_agree, let_go

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)

STATE = "state.json"
TENSORS = "tensors"


def save_state(
    folder: Path, accelerator: Accelerator, model: nn.Module, optimizer, data: dict, run: dict, *, step: int, keep: int
) -> Path:
    """Writes `folder/step-00000123` from all processes and keeps the newest `keep` of them.

    Args:
        model: the plain model; its trainable parameters are saved, frozen ones come from where the run began.
        optimizer: AdamW over them.
        data: state of the walk through the data, JSON values and numpy arrays.
        run: whatever else the run needs to go on, JSON values.

    Raises:
        OSError: if a process cannot write its part, in every process; nothing half-written is left, earlier
            checkpoints stay.
    """
    path = folder / f"step-{step:08d}"
    partial = folder / f"{PARTIAL}{path.name}"

    let_go(model)
    tensors = _tensors(model, optimizer)

    def begin():
        if accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)

    def write_tensors():
        writer = sharded.FileSystemWriter(partial / TENSORS)
        with _alone_or_not(accelerator) as options:
            sharded.save(tensors, storage_writer=writer, **options)

    def write_rest():
        torch.save(_random_state(), partial / f"random-{accelerator.process_index}.pt")
        if accelerator.is_main_process:
            if accelerator.scaler is not None:
                torch.save(accelerator.scaler.state_dict(), partial / "scaler.pt")
            arrays = {name: value for name, value in data.items() if isinstance(value, np.ndarray)}
            np.savez(partial / "data.npz", **arrays)

    def finish():
        if accelerator.is_main_process:
            files = sorted(file for file in partial.rglob("*") if file.is_file())
            sizes = {str(file.relative_to(partial).as_posix()): file.stat().st_size for file in files}
            values = {name: value for name, value in data.items() if not isinstance(value, np.ndarray)}
            content = {"step": step, "data": values, "run": run, "files": sizes}
            content["stepped"] = [name for name in _trainable(model) if f"optimizer/{name}/step" in tensors]
            write_json(partial / STATE, content)
            flush_folder(partial)
            if path.exists():
                shutil.rmtree(path)
            partial.rename(path)
            for old in whole_states(folder)[:-keep]:
                shutil.rmtree(old)

    try:
        for part in (begin, write_tensors, write_rest, finish):
            _together(accelerator, path, part)
    except BaseException:
        if accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    return path


def _together(accelerator: Accelerator, path: Path, part: Callable[[], None]) -> None:
    """Does a part of the work in every process; if it fails in one, all of them stop."""
    failed = None
    try:
        with explained_write(path):
            try:
                part()
            except CheckpointException as error:
                raise next(iter(error.failures.values()))[0] from error
    except Exception as error:
        failed = error
    all_agree(accelerator, failed)


def whole_states(folder: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first; one with a file missing or cut off is left out with a warning."""
    found = []
    for path in sorted(folder.glob("step-*")):
        try:
            state = read_state(path)
        except OSError as error:
            logger.warning("checkpoint ignored: %s", error)
            continue
        found.append((state["step"], path))
    return [path for _, path in sorted(found)]


def read_state(path: Path) -> dict:
    """What a checkpoint says of itself.

    Raises:
        OSError: if it is not a whole checkpoint.
    """
    try:
        state = json.loads((path / STATE).read_text(encoding="utf-8"))
        sizes = state["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise OSError(f"{path} is not a whole checkpoint: {error}") from error
    for name, size in sizes.items():
        file = path / name
        if not file.is_file() or file.stat().st_size != size:
            raise OSError(f"{path} is not a whole checkpoint: {name} is missing or cut off")
    return state


def load_state(path: Path, accelerator: Accelerator, model: nn.Module, optimizer) -> tuple[dict, dict]:
    """Puts everything back in place and returns (data, run) as they were given to `save_state`.

    It does not matter how many processes wrote it, nor whether each held all parameters or a part.

    Raises:
        OSError: if a file cannot be read.
        ValueError: if the model has other trainable parameters than the checkpoint.
    """
    state = read_state(path)
    let_go(model)
    trainable = _trainable(model)
    reader = sharded.FileSystemReader(path / TENSORS)
    try:
        saved = reader.read_metadata().state_dict_metadata
    except Exception as error:
        raise OSError(f"{path} cannot be read: {error}") from error
    names = {name.removeprefix("model/") for name in saved if name.startswith("model/")}
    if different := sorted(names ^ set(trainable)):
        raise ValueError(f"{path} has other trainable parameters than the model, first {different[0]}")
    for name in sorted(names):
        if tuple(saved[f"model/{name}"].size) != (shape := tuple(zero.shape_of(trainable[name]))):
            raise ValueError(f"{path} has {name} of shape {tuple(saved[f'model/{name}'].size)}, the model of {shape}")
    if zero.is_zero(model):
        zero.begin_moments(model, _plain(optimizer), state["stepped"])
    else:
        for name in state["stepped"]:
            _begin_moments(optimizer, trainable[name])
    tensors = _tensors(model, optimizer)
    try:
        with _alone_or_not(accelerator) as options:
            sharded.load(tensors, storage_reader=reader, **options)
    except (CheckpointException, RuntimeError, OSError, EOFError) as error:
        raise OSError(f"{path} cannot be read: {error}") from error
    if zero.is_zero(model):
        zero.put_tensors(model, _plain(optimizer), tensors)
    if accelerator.scaler is not None:
        accelerator.scaler.load_state_dict(torch.load(path / "scaler.pt", weights_only=True))
    numbers = path / f"random-{accelerator.process_index}.pt"
    if numbers.is_file():
        _set_random_state(torch.load(numbers, map_location="cpu", weights_only=True))
    else:
        logger.warning("%s was written by fewer processes: this one draws new random numbers", path)
    with np.load(path / "data.npz") as arrays:
        return {**state["data"], **arrays}, state["run"]


@contextmanager
def _alone_or_not(accelerator: Accelerator) -> Iterator[dict]:
    """What tells torch whether it writes with other processes; it warns of being alone even when it was told so."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
        yield {"no_dist": accelerator.num_processes == 1}


def _trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _plain(optimizer) -> torch.optim.Optimizer:
    """The optimizer inside accelerate's."""
    return getattr(optimizer, "optimizer", optimizer)


def _moments(optimizer, parameter: nn.Parameter) -> dict[str, torch.Tensor]:
    """What AdamW knows of a parameter; nothing before its first gradient."""
    return _plain(optimizer).state.get(parameter, {})


def _begin_moments(optimizer, parameter: nn.Parameter) -> None:
    """What AdamW makes at a parameter's first gradient."""
    device = parameter.device if _plain(optimizer).defaults["fused"] else "cpu"
    _plain(optimizer).state[parameter] = {
        "step": torch.zeros((), dtype=torch.float32, device=device),
        "exp_avg": torch.zeros_like(parameter.detach()),
        "exp_avg_sq": torch.zeros_like(parameter.detach()),
    }


def _tensors(model: nn.Module, optimizer) -> dict[str, torch.Tensor]:
    """Everything that torch saves and loads in place, by a name that no way of sharding changes."""
    if zero.is_zero(model):
        return zero.tensors_of(model, _plain(optimizer))
    tensors = {}
    for name, parameter in _trainable(model).items():
        tensors[f"model/{name}"] = parameter.detach()
        tensors |= {f"optimizer/{name}/{key}": value for key, value in _moments(optimizer, parameter).items()}
    return tensors


def _random_state() -> dict:
    kind, numbers, *rest = np.random.get_state()
    state = {"python": random.getstate(), "numpy": [kind, numbers.tolist(), *rest], "torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_random_state(state: dict) -> None:
    random.setstate(state["python"])
    kind, numbers, *rest = state["numpy"]
    np.random.set_state((kind, np.array(numbers, dtype=np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
