"""Checkpoints of a training run, from which it goes on exactly: parameters, optimizer, random numbers of every
process, the place in the data, the numbers gathered so far. A checkpoint has its name only when it is whole."""

from __future__ import annotations

import json
import logging
import random
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from ..files import PARTIAL, explained_write, flush_folder, write_json

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)

STATE = "state.json"


def save_state(
    folder: Path, accelerator: Accelerator, model: nn.Module, optimizer, data: dict, run: dict, *, step: int, keep: int
) -> Path:
    """Writes `folder/step-00000123` from all processes and keeps the newest `keep` of them.

    Args:
        model: the plain model; its trainable parameters are saved, frozen ones come from where the run began.
        data: state of the walk through the data, JSON values and numpy arrays.
        run: whatever else the run needs to go on, JSON values.

    Raises:
        OSError: if it cannot be written; nothing half-written is left, earlier checkpoints stay.
    """
    path = folder / f"step-{step:08d}"
    partial = folder / f"{PARTIAL}{path.name}"
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    accelerator.wait_for_everyone()
    try:
        with explained_write(path):
            torch.save(_random_state(), partial / f"random-{accelerator.process_index}.pt")
            if accelerator.is_main_process:
                save_file(_trainable(model), partial / "model.safetensors")
                torch.save(optimizer.state_dict(), partial / "optimizer.pt")
                if accelerator.scaler is not None:
                    torch.save(accelerator.scaler.state_dict(), partial / "scaler.pt")
                arrays = {name: value for name, value in data.items() if isinstance(value, np.ndarray)}
                np.savez(partial / "data.npz", **arrays)
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                sizes = {file.name: file.stat().st_size for file in sorted(partial.iterdir())}
                values = {name: value for name, value in data.items() if name not in arrays}
                write_json(partial / STATE, {"step": step, "data": values, "run": run, "files": sizes})
                flush_folder(partial)
                if path.exists():
                    shutil.rmtree(path)
                partial.rename(path)
                for old in whole_states(folder)[:-keep]:
                    shutil.rmtree(old)
    except BaseException:
        if accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    accelerator.wait_for_everyone()
    return path


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

    Raises:
        OSError: if a file cannot be read.
        ValueError: if the model has other trainable parameters than the checkpoint.
    """
    state = read_state(path)
    try:
        saved = load_file(path / "model.safetensors")
        optimizer_state = torch.load(path / "optimizer.pt", map_location="cpu", weights_only=True)
    except (SafetensorError, RuntimeError) as error:
        raise OSError(f"{path} cannot be read: {error}") from error
    trainable = _trainable(model)
    different = sorted(set(saved) ^ set(trainable))
    if different:
        raise ValueError(f"{path} has other trainable parameters than the model, first {different[0]}")
    with torch.no_grad():
        for name, parameter in trainable.items():
            parameter.copy_(saved[name])
    optimizer.load_state_dict(optimizer_state)
    if accelerator.scaler is not None:
        accelerator.scaler.load_state_dict(torch.load(path / "scaler.pt", weights_only=True))
    numbers = path / f"random-{accelerator.process_index}.pt"
    if numbers.is_file():
        _set_random_state(torch.load(numbers, map_location="cpu", weights_only=True))
    else:
        logger.warning("%s was written by fewer processes: this one draws new random numbers", path)
    with np.load(path / "data.npz") as arrays:
        return {**state["data"], **arrays}, state["run"]


def _trainable(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        name: parameter.detach().contiguous()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


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
