"""What is said of a step that failed: a loss or gradient that is not finite, or no memory left. Enters the failure,
leaves the step, the first layer it is seen in and the documents of the batch, the same in every process."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from .state import whole_states


def name_blocks(blocks: list[int], data) -> str:
    """`block 12 (documents 3 to 5)`, of the first eight."""
    named = []
    for block in blocks[:8]:
        documents = data.documents(block)
        named.append(f"{block} (documents {documents.start} to {documents.stop - 1})")
    return ", ".join(named) + (", ..." if len(blocks) > 8 else "")


def explain_not_finite(
    accelerator, model: nn.Module, again: Callable[[], None], blocks: list[int], data, *, values: str
) -> str:
    """Where a loss or gradient that is not finite comes from.

    Args:
        model: after a backward pass, its gradients still there.
        again: computes this process's share of the step's forward passes once more, without a graph.
        values: what is known already, such as `step 7: loss nan`.

    Every process has to ask; all get the same answer.
    """
    from accelerate.utils import gather_object

    layer = _first_output(model, again)
    where = f"first in the output of {layer}" if layer else None
    found = gather_object([(accelerator.process_index, where, name_blocks(blocks, data))])
    if not any(where for _, where, _ in found):
        # The outputs are finite everywhere: it came up on the way back, where the last layer is the first.
        parameter = _last_gradient(model)
        where = f"outputs are finite, first in the gradient of {parameter}" if parameter else "outputs are finite"
        return f"{values}; {where}; blocks " + "; ".join(text for _, _, text in found)
    guilty = [item for item in found if item[1]]
    parts = [f"process {rank}: {where}; blocks {text}" for rank, where, text in guilty]
    if len(found) == 1:
        parts = [parts[0].partition(": ")[2]]
    return f"{values}; " + "; ".join(parts)


def _first_output(model: nn.Module, again: Callable[[], None]) -> str | None:
    """The module whose output is the first that is not finite; of nested ones the innermost, which ends first."""
    names = {module: name for name, module in model.named_modules()}
    found: list[str] = []

    def look(module, _, output):
        for value in output if isinstance(output, (tuple, list)) else (output,):
            is_number = isinstance(value, torch.Tensor) and value.is_floating_point()
            if not found and is_number and not bool(value.isfinite().all()):
                found.append(names[module] or type(module).__name__)

    handles = [module.register_forward_hook(look) for module in names]
    try:
        # The inside of a compiled layer calls no hooks.
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            again()
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def _last_gradient(model: nn.Module) -> str | None:
    last = None
    for name, parameter in model.named_parameters():
        gradient = getattr(parameter.grad, "_local_tensor", parameter.grad)
        if gradient is not None and not bool(gradient.isfinite().all()):
            last = name
    return last


def spoiled_parameters(accelerator, model: nn.Module) -> list[str]:
    """The trainable parameters that are not finite; every process has to ask, and all get the same answer."""
    from accelerate.utils import gather_object

    own = []
    for name, parameter in model.named_parameters():
        value = getattr(parameter, "_local_tensor", parameter)
        if parameter.requires_grad and not bool(value.isfinite().all()):
            own.append(name)
    return list(dict.fromkeys(gather_object(own)))


def explain_no_memory(error: BaseException, model: nn.Module, blocks: list[int], data, *, step: int) -> str:
    """Where memory ran out, read off the error's own frames."""
    names = {id(module): name for name, module in model.named_modules()}
    layer, backward = "", False
    for frame, _ in traceback.walk_tb(error.__traceback__):
        name = names.get(id(frame.f_locals.get("self")))
        layer = name if name else layer
        backward = backward or frame.f_code.co_name == "backward"
    where = f" in {layer}" if layer else ""
    direction = " on the way back" if backward else ""
    return f"step {step}: out of memory{where}{direction}; blocks {name_blocks(blocks, data)}; {error}"


def last_whole(output: Path) -> str:
    last = next(reversed(whole_states(output / "checkpoints")), None)
    return "There is no checkpoint to go on from" if last is None else f"The last whole checkpoint is {last}"
