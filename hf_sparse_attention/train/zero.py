"""DeepSpeed's ZeRO-2 and ZeRO-3 as accelerate configured them: what of that train runs, the steps of an engine, and
which elements of which parameter a process holds, so that checkpoints are those of every other way of spreading."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from .arguments import TrainArguments
from .flat_parts import FlatPart

if TYPE_CHECKING:
    from accelerate import Accelerator

# Older ones round the rotary frequencies to bf16 with the parameters.
OLDEST = "0.19.8"
# Keys of DeepSpeed's own configuration that would change what is computed, and what to do instead.
_REFUSED = {
    "optimizer": "an optimizer of its own: train has AdamW, leave it out",
    "scheduler": "a scheduler of its own: train has --schedule, leave it out",
    "activation_checkpointing": "activation checkpointing of its own: use --gradient_checkpointing",
    "amp.enabled": "amp: use mixed_precision: bf16",
    "torch_autocast.enabled": "torch_autocast: use mixed_precision: bf16",
    "bf16.bf16_master_weights_and_grads": "bf16 master weights: leave it out, they are kept in float32",
    "bf16.bf16_optimizer_states": "bf16 optimizer states: leave it out, they are kept in float32",
    "zero_optimization.zero_quantized_weights": "quantised weights: leave it out",
    "zero_optimization.zero_quantized_gradients": "quantised gradients: leave it out",
    "zero_optimization.zenflow": "ZenFlow: leave it out",
    "tensor_parallel": "tensor parallelism: the map's parameters are per head and would be split wrongly",
    "compression_training": "compression: leave it out",
    "curriculum_learning": "a curriculum of its own: use --block_size 1024:0.8,4096:0.2",
    "data_efficiency": "data efficiency: leave it out",
    "progressive_layer_drop": "progressive layer drop: leave it out",
}
# Numbers of DeepSpeed's configuration by which parameters would be shared out among some processes only.
_SHARED_AMONG_FEW = ("zero_hpz_partition_size", "mics_shard_size")

# DeepSpeed's name of what train has an option for.
_SHARED = {
    "gradient_accumulation_steps": "gradient_accumulation",
    "gradient_clipping": "clip",
    "train_micro_batch_size_per_gpu": "batch_size",
}


def wants_zero() -> bool:
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() in ("true", "1")


def check_zero(arguments: TrainArguments) -> None:
    """Raises for what accelerate was told of DeepSpeed and train does not run, before anything is written.

    Raises:
        ImportError: without DeepSpeed, or with one that is too old.
        ValueError: naming the setting and the way out.
    """
    if arguments.cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        import deepspeed
    except ImportError as error:
        raise ImportError(
            'accelerate was configured for DeepSpeed, which is not installed: pip install "hf-sparse-attention'
            '[deepspeed]"'
        ) from error
    from packaging.version import Version

    if Version(Version(deepspeed.__version__).base_version) < Version(OLDEST):
        raise ImportError(
            f"deepspeed is {deepspeed.__version__}, train needs {OLDEST} or newer: pip install -U deepspeed"
        )
    from accelerate import DeepSpeedPlugin

    device = deepspeed.get_accelerator().device_name()
    if device == "cpu" and not arguments.cpu:
        # Accelerate would not know of the other processes.
        raise ValueError("accelerate was configured for DeepSpeed, which found no GPU: use --cpu")
    if device != "cpu" and (arguments.cpu or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("true", "1")):
        raise ValueError(f"DeepSpeed runs on {device}: leave out --cpu and use_cpu, or set DS_ACCELERATOR=cpu")
    if os.environ.get("ACCELERATE_DEEPSPEED_ZERO3_INIT", "false").lower() in ("true", "1"):
        raise ValueError(
            "accelerate was configured for zero3_init_flag, under which the new parameters of a conversion begin "
            "empty: set it to false"
        )
    plugin = DeepSpeedPlugin()
    for key, reason in _REFUSED.items():
        if plugin.get_value(key):
            raise ValueError(f"DeepSpeed was configured for {reason}")
    stage = plugin.get_value("zero_optimization.stage")
    if stage not in (2, 3):
        raise ValueError(
            f"DeepSpeed's zero_stage is {stage}; choose 2 or 3, or use DDP (examples/accelerate/ddp.yaml)"
        )
    for name in ("offload_optimizer", "offload_param"):
        device = plugin.get_value(f"zero_optimization.{name}.device") or "none"
        if device != "none":
            raise ValueError(
                f"DeepSpeed's {name}_device is {device}; it must be none: its own Adam would compute the steps. Use "
                "FSDP2 with fsdp_offload_params"
            )
    for name in _SHARED_AMONG_FEW:
        if (plugin.get_value(f"zero_optimization.{name}") or 1) > 1:
            raise ValueError(f"DeepSpeed was configured for {name}: leave it out")
    precision = arguments.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision not in ("no", "bf16") or plugin.get_value("fp16.enabled") is True:
        raise ValueError(
            f"mixed_precision is {precision if precision != 'no' else 'fp16'}; with DeepSpeed use bf16 or no"
        )
    if arguments.dtype != "float32":
        raise ValueError(
            f"dtype is {arguments.dtype!r}; with DeepSpeed use float32, beside which mixed_precision: bf16 keeps what "
            "computes in bf16"
        )
    if arguments.compile:
        # With ZeRO-2 the map's parameters of compiled layers went elsewhere, and nothing warned.
        raise ValueError("compile does not go with DeepSpeed, which takes over gradients: leave it out, or use FSDP2")
    for key, option in _SHARED.items():
        asked, own = plugin.get_value(key, "auto"), getattr(arguments, option)
        if asked not in ("auto", own):
            raise ValueError(
                f"DeepSpeed's {key} is {asked}, train's {option} is {own}: leave {key} out, or set it to auto"
            )


def configure(accelerator: Accelerator, arguments: TrainArguments) -> None:
    """Tells DeepSpeed what train's options are."""
    from accelerate import DeepSpeedPlugin, PartialState
    from accelerate.utils import DistributedType
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        # Accelerate forgets DeepSpeed on CPUs and would run DDP instead, in silence.
        plugin = DeepSpeedPlugin()
        plugin.set_mixed_precision(accelerator.mixed_precision)
        accelerator.state.deepspeed_plugins = plugin
        accelerator.state.distributed_type = PartialState().distributed_type = DistributedType.DEEPSPEED
    # Transformers would load models in pieces. They are loaded whole and spread afterwards.
    unset_hf_deepspeed_config()
    config = accelerator.deepspeed_plugin.deepspeed_config
    config |= {key: getattr(arguments, option) for key, option in _SHARED.items()}
    config["train_batch_size"] = arguments.batch_size * arguments.gradient_accumulation * accelerator.num_processes
    if accelerator.mixed_precision == "bf16":
        # A step with a gradient that is not finite is dropped, as it is in float32.
        config["bf16"]["check_grad_overflow"] = True


def in_working_precision(accelerator: Accelerator, frozen: nn.Module) -> nn.Module:
    """A model that is not spread, such as a teacher, in the precision in which DeepSpeed computes: it knows no
    autocast. Buffers, such as rotary frequencies, stay as they are."""
    if wants_zero() and accelerator.mixed_precision == "bf16":
        for parameter in frozen.parameters():
            parameter.data = parameter.data.bfloat16()
    return frozen


def is_zero(model: nn.Module) -> bool:
    """Whether DeepSpeed spread the model."""
    return any(hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping") for parameter in model.parameters())


def stage_of(model: nn.Module) -> int:
    return 3 if any(hasattr(parameter, "ds_id") for parameter in model.parameters()) else 2


def backward(engine, loss: torch.Tensor, *, last: bool) -> None:
    """Adds a part of the step to the gradients, whose mean over the processes is taken.

    Args:
        last: whether it is the step's last part.
    """
    engine.set_gradient_accumulation_boundary(is_boundary=last)
    engine.backward(loss, scale_wrt_gas=False)


def take_step(engine, loss: torch.Tensor) -> torch.Tensor:
    """Clips and steps, which DeepSpeed does at once; returns the gradient's norm before.

    With a norm or loss that is not finite no parameter changes and the gradients are dropped.
    """
    from deepspeed.utils import safe_get_full_grad, safe_set_full_grad

    if not bool(loss.isfinite().all()):
        # Of losses DeepSpeed knows nothing: it is told through a gradient.
        first = next(parameter for parameter in engine.module.parameters() if parameter.requires_grad)
        safe_set_full_grad(first, torch.full_like(safe_get_full_grad(first), float("nan")))
    engine.step()
    norm = engine.get_global_grad_norm()
    return norm.detach().float() if isinstance(norm, torch.Tensor) else torch.tensor(float(norm))


def whole_parameter(parameter: nn.Parameter) -> torch.Tensor:
    """All of a trainable parameter in float32; every process has to ask."""
    from deepspeed.utils import safe_get_full_fp32_param

    return safe_get_full_fp32_param(parameter)


def shape_of(parameter: nn.Parameter) -> torch.Size:
    """The shape of a parameter, of which this process may hold nothing."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


class GradientWatch:
    """Which trainable parameters get a gradient in a backward pass: DeepSpeed keeps none where one could look."""

    def __init__(self, model: nn.Module):
        self.idle = {name: item for name, item in model.named_parameters() if item.requires_grad}
        self.handles = [item.register_hook(self._seen(name)) for name, item in self.idle.items()]

    def _seen(self, name: str):
        def hook(gradient):
            self.idle.pop(name, None)

        return hook

    def close(self) -> ValueError | None:
        """Ends it; returns an error if a parameter got none: DeepSpeed would let it decay, which nothing else does."""
        for handle in self.handles:
            handle.remove()
        if not self.idle:
            return None
        return ValueError(
            f"{len(self.idle)} trainable parameters get no gradient, first {next(iter(self.idle))}, and DeepSpeed "
            "would step them with the others: train less (--trained map or attention), or use DDP or FSDP2"
        )


@dataclass(frozen=True)
class Piece:
    """A process's elements of a parameter: `count` of them from `first` on, which lie in the flat float32 tensor
    that AdamW steps from `start` on."""

    parameter: nn.Parameter
    flat: torch.Tensor
    start: int
    first: int
    count: int

    def of(self, flat: torch.Tensor) -> FlatPart:
        """These elements of a tensor like `flat`."""
        return FlatPart(shape_of(self.parameter), self.first, flat.detach()[self.start : self.start + self.count])


def pieces(optimizer) -> Iterator[Piece]:
    """The pieces of all trainable parameters in this process; `optimizer` is DeepSpeed's."""
    if hasattr(optimizer, "fp16_groups"):
        rank = torch.distributed.get_rank()
        for group, flat in zip(optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True):
            for parameter in group:
                _, start, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
                # The last process's elements may be filled up.
                count = max(0, min(size, parameter.ds_numel - rank * size))
                yield Piece(parameter, flat, start, rank * size, count)
        return
    for group, flat in zip(optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups, strict=True):
        for parameter in group:
            mapping = parameter._hp_mapping
            if mapping is None:
                yield Piece(parameter, flat, 0, 0, 0)
            else:
                place, own = mapping.get_hp_fragment_address(), mapping.lp_fragment_address
                yield Piece(parameter, flat, place.start, own.start, own.numel)


def tensors_of(model: nn.Module, optimizer) -> dict[str, FlatPart | torch.Tensor]:
    """Parameters and what AdamW knows of them, by the names and shapes they have when they are not spread."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    tensors: dict[str, FlatPart | torch.Tensor] = {}
    for piece in pieces(optimizer):
        name = names[piece.parameter]
        tensors[f"model/{name}"] = piece.of(piece.flat)
        for key, value in optimizer.optimizer.state.get(piece.flat, {}).items():
            # One number of steps for all parameters of a flat tensor; each keeps its own in a checkpoint.
            tensors[f"optimizer/{name}/{key}"] = piece.of(value) if value.ndim else value.clone()
    return tensors


def begin_moments(model: nn.Module, optimizer, stepped: list[str]) -> None:
    """Makes what AdamW has of the parameters `stepped` after their first step.

    Raises:
        ValueError: if DeepSpeed holds a parameter that made a step together with one that made none.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    for piece in pieces(optimizer):
        name = names[piece.parameter]
        known = optimizer.optimizer.state.get(piece.flat)
        if name in stepped and not known:
            optimizer.optimizer.state[piece.flat] = {
                "step": torch.zeros((), dtype=torch.float32, device=piece.flat.device),
                "exp_avg": torch.zeros_like(piece.flat.detach()),
                "exp_avg_sq": torch.zeros_like(piece.flat.detach()),
            }
    for piece in pieces(optimizer):
        name = names[piece.parameter]
        if bool(optimizer.optimizer.state.get(piece.flat)) != (name in stepped):
            raise ValueError(_unequal(name))


def put_tensors(model: nn.Module, optimizer, tensors: dict[str, FlatPart | torch.Tensor]) -> None:
    """After `tensors` were loaded in place: the numbers of steps, and the parameters that compute.

    Raises:
        ValueError: if parameters that DeepSpeed steps together made different numbers of steps.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    steps: dict[torch.Tensor, torch.Tensor] = {}
    for piece in pieces(optimizer):
        name = names[piece.parameter]
        if (step := tensors.get(f"optimizer/{name}/step")) is not None:
            if steps.setdefault(piece.flat, step).item() != step.item():
                raise ValueError(_unequal(name))
            optimizer.optimizer.state[piece.flat]["step"].copy_(step)
    if stage_of(model) == 2:
        optimizer.update_lp_params()
        return
    # As after a step.
    optimizer._partition_all_parameters()
    for index in range(len(optimizer.fp16_groups)):
        optimizer._reassign_or_swap_out_partitioned_parameters(index)
    optimizer._post_step(set())


def _unequal(name: str) -> str:
    return (
        f"{name} made another number of steps than the parameters DeepSpeed steps together with it: go on with DDP or "
        "FSDP2 (examples/accelerate)"
    )
