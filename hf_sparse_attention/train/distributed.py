"""What accelerate launched enters (one process, DDP, FSDP2 or DeepSpeed), leaves the accelerator of a run, a model and
optimizer spread over the processes, and what of them one process needs whole: the gradient's norm, the parameters to
save."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from . import zero
from .arguments import TrainArguments

if TYPE_CHECKING:
    from accelerate import Accelerator, PartialState

# What accelerate may be told to run that train does not, and what to use instead.
_REFUSED = {
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM; use DDP or FSDP2",
    "PARALLELISM_CONFIG_TP_SIZE": (
        "tensor parallelism: the map's parameters are per head and would be split wrongly; use FSDP2"
    ),
    "PARALLELISM_CONFIG_CP_SIZE": "context parallelism, which is a softmax of its own; use FSDP2",
    "PARALLELISM_CONFIG_SP_SIZE": "sequence parallelism, which is a softmax of its own; use FSDP2",
}


def check_launch(arguments: TrainArguments) -> None:
    """Raises ValueError for a way of running that accelerate was told and train does not know."""
    for name, reason in _REFUSED.items():
        value = os.environ.get(name, "").lower()
        if value not in ("", "false", "0") and not (name.endswith("_SIZE") and value == "1"):
            raise ValueError(f"accelerate was configured for {reason}")
    if _wants_fsdp():
        if os.environ.get("FSDP_VERSION", "1") != "2":
            raise ValueError(
                f"accelerate was configured for FSDP {os.environ.get('FSDP_VERSION', '1')}: set fsdp_version: 2, as "
                "in examples/accelerate/fsdp2.yaml"
            )
        if os.environ.get("FSDP_CPU_RAM_EFFICIENT_LOADING", "false").lower() in ("true", "1"):
            raise ValueError(
                "accelerate was configured for fsdp_cpu_ram_efficient_loading, under which all processes but the "
                "first load nothing: set it to false"
            )
    precision = arguments.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "").lower() or "no"
    if precision not in ("no", "bf16", "fp16"):
        raise ValueError(f"accelerate was configured for mixed_precision {precision}; use no, bf16 or fp16")
    if zero.wants_zero():
        zero.check_zero(arguments)


def join_processes(arguments: TrainArguments) -> PartialState:
    """Joins the processes of the run, once; what this one knows of the others.

    Raises:
        ValueError: if it is one of several and would train alone, into the same folder as the others.
        ImportError: without accelerate.
    """
    try:
        from accelerate import PartialState
    except ImportError as error:
        raise ImportError('training needs accelerate: pip install "hf-sparse-attention[train]"') from error

    # Accelerate itself reads the variable only later, when without a GPU no process would know of the others.
    asked = os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("true", "1")
    state = PartialState(cpu=arguments.cpu or asked)
    launched = int(os.environ.get("WORLD_SIZE", "1")) if "LOCAL_RANK" in os.environ else 1
    if launched > 1 and state.num_processes == 1:
        raise ValueError(f"{launched} processes were launched, see no GPU and would each train alone: use --cpu")
    return state


def _wants_fsdp() -> bool:
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def make_accelerator(arguments: TrainArguments, output: Path, *, idles: bool) -> Accelerator:
    """The accelerator of a run.

    Args:
        idles: whether some trainable parameters take no part in some steps, which DDP has to be told.

    Raises:
        ValueError: if DeepSpeed would step parameters that take no part, or this process has computed in another
            precision before.
    """
    if idles and zero.wants_zero():
        raise ValueError(
            "DeepSpeed steps all parameters together, but a head learns its alpha only while alpha is above 1, and it "
            "begins at 1: use --alpha_start 1.01, DDP or FSDP2"
        )
    from accelerate import Accelerator, DistributedDataParallelKwargs
    from accelerate.utils import DistributedType, GradientAccumulationPlugin, ProjectConfiguration
    from torch.distributed.fsdp import MixedPrecisionPolicy

    _check_precision(arguments)
    accelerator = Accelerator(
        cpu=arguments.cpu,
        mixed_precision=arguments.mixed_precision,
        # As a number it would give way to the environment, where DeepSpeed's may be auto.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=arguments.gradient_accumulation),
        log_with=arguments.report_to or None,
        project_config=ProjectConfiguration(project_dir=str(output), logging_dir=str(output / "logs")),
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=idles)],
    )
    if accelerator.distributed_type == DistributedType.MULTI_CPU and _wants_fsdp():
        # Accelerate forgets FSDP on CPUs and would run DDP instead, in silence.
        _shard_on_cpus(accelerator)
    if zero.wants_zero():
        zero.configure(accelerator, arguments)
    if accelerator.distributed_type == DistributedType.FSDP:
        # Its own wrappers rename parameters; the layers' own checkpointing recomputes the same.
        accelerator.state.fsdp_plugin.activation_checkpointing = False
        if accelerator.mixed_precision != "no":
            # Accelerate's own rounds what a model returns, its loss too, and sums gradients in half precision.
            dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[accelerator.mixed_precision]
            policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
            accelerator.state.fsdp_plugin.mixed_precision_policy = policy
    return accelerator


def _check_precision(arguments: TrainArguments) -> None:
    """Accelerate keeps the precision of a process's first accelerator, and would give it to the next in silence."""
    from accelerate.state import AcceleratorState

    wanted = arguments.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "").lower() or "no"
    known = AcceleratorState._shared_state.get("_mixed_precision", wanted)
    if known != wanted and not zero.wants_zero():
        raise ValueError(
            f"mixed_precision is {wanted}, but this process has already trained with {known}, which accelerate does "
            "not change: use a new process"
        )


def _shard_on_cpus(accelerator) -> None:
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=2)


def wants_checkpointing(arguments: TrainArguments) -> bool:
    """Whether layers are recomputed backward: asked of train, or of accelerate for FSDP."""
    asked = os.environ.get("FSDP_ACTIVATION_CHECKPOINTING", "false").lower() in ("true", "1")
    return arguments.gradient_checkpointing or (_wants_fsdp() and asked)


def checkpoint_activations(model: nn.Module) -> None:
    """Makes the decoder layers compute their activations again on the way back."""
    # The second is its name in older Transformers, of which 5.23 warns; both leave out reentrant checkpoints.
    (getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable)()


def spread(accelerator: Accelerator, model: nn.Module, optimizer, own_units: tuple[type, ...] = ()) -> tuple:
    """The model as it is called and the optimizer, on their devices.

    Args:
        own_units: classes whose modules FSDP2 gathers on their own, beside the decoder layers.
    """
    if accelerator.is_fsdp2:
        names = list(getattr(model, "_no_split_modules", None) or [])
        accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap = [*names, *(kind.__name__ for kind in own_units)]
    return accelerator.prepare(model, optimizer)


def is_sharded(model: nn.Module) -> bool:
    """Whether no process has the model whole, as it is to be saved: asked of the model, as accelerate forgets it once
    its state is read."""
    from torch.distributed.fsdp import FSDPModule

    return zero.is_zero(model) or any(isinstance(module, FSDPModule) for module in model.modules())


def let_go(model: nn.Module) -> None:
    """Leaves each process its part of the parameters. FSDP2 keeps its root gathered after a forward pass without a
    backward one: its parameters are then others than those the optimizer steps."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def way_of(model: nn.Module, processes: int) -> str | None:
    """What the model is spread by; None for one process alone."""
    if zero.is_zero(model):
        return f"DeepSpeed ZeRO-{zero.stage_of(model)}"
    return ("FSDP2" if is_sharded(model) else "DDP") if processes > 1 else None


def backward(accelerator: Accelerator, wrapped: nn.Module, share: torch.Tensor, *, passes: int, last: bool) -> None:
    """Adds one of a step's `passes` to the gradients; `share` is this process's share of the step's mean loss."""
    # What is already a share is divided by the processes, and by accelerate also by the passes.
    if zero.is_zero(wrapped):
        zero.backward(wrapped, share * accelerator.num_processes, last=last)
    else:
        accelerator.backward(share * (passes * accelerator.num_processes))


def clip_gradients(
    accelerator: Accelerator, model: nn.Module, wrapped: nn.Module, most: float, loss: torch.Tensor
) -> torch.Tensor:
    """Clips to the norm `most` (0 does not clip) and returns the norm that was, of all processes' parts.

    Gradients with a norm that is not finite stay as they are: clipped, every one would be NaN and none told from which
    layer it comes. DeepSpeed clips in its step: it is taken here, and not if norm or `loss` is not finite.
    """
    if zero.is_zero(model):
        return zero.take_step(wrapped, loss)
    accelerator.unscale_gradients()
    parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters])
    total = whole(norm).float()
    if most and bool(total.isfinite()):
        torch.nn.utils.clip_grads_with_norm_(parameters, most, norm)
    return total


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor of which this process may hold a part; every process has to ask."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def whole_parameters(accelerator: Accelerator, model: nn.Module) -> dict[str, torch.Tensor]:
    """Trainable parameters by name, whole, on the main process's CPU; empty elsewhere. Every process has to ask."""
    gathered, spread_by_zero = {}, zero.is_zero(model)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            value = zero.whole_parameter(parameter) if spread_by_zero else whole(parameter.detach())
            if accelerator.is_main_process:
                gathered[name] = value.cpu()
    return gathered


def put_parameters(model: nn.Module, values: dict[str, torch.Tensor]) -> None:
    """Copies `values`, which must name trainable parameters of the model."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in values.items():
            parameters[name].copy_(value)


def all_agree(state: Accelerator | PartialState, error: BaseException | None) -> None:
    """Raises where a process failed, in every process: none waits for one that is gone.

    Raises:
        error: in a process that had one.
        OSError: in the others, saying which process failed and why.
    """
    if state.num_processes > 1:
        from accelerate.utils import gather_object

        messages = gather_object([None if error is None else f"process {state.process_index}: {error}"])
        if error is None and any(messages):
            raise OSError("; ".join(message for message in messages if message))
    if error is not None:
        raise error
