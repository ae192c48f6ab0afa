"""The decisions of a training recipe as plain functions: alpha and learning rate by step, which parameters decay and
how fast they learn, where LoRA adapters sit. A leaf above models."""

from __future__ import annotations

import math

import torch
from torch import nn

from ..maps import ASEntmaxScale
from ..models import FAMILIES, attention_layers, new_parameter_names

TRAINED = ("all", "map", "attention")
SCHEDULES = ("cosine", "linear", "constant")
ALPHA_SCHEDULES = ("linear", "cosine", "none")
SCALE_STARTS = ("neutral", "normal", "beta")
# Entmax is sound in float32 from here; below it lies only softmax itself, alpha 1.
LOWEST_ALPHA = 1.01
# Names in an attention layer of the modules that hold a map's parameters.
NEW_MODULES = ("sparse_scale", "sparse_alpha")


def alpha_at(
    step: int, *, target: float, schedule: str, rise: int, start: float = 1.0, plateaus: int | None = None
) -> float:
    """Alpha in a step counted from 0: exactly `start` in step 0 (1 is the dense model), `target` from step `rise` on.

    Between them it is at least 1.01; `none` is `target` from the beginning. With `plateaus` the rise is a staircase of
    so many values, the first of them `start`, each the schedule's at its plateau's beginning.
    """
    if schedule not in ALPHA_SCHEDULES:
        raise ValueError(f"alpha_schedule is {schedule!r}; choose one of {', '.join(ALPHA_SCHEDULES)}")
    if schedule == "none" or step >= rise:
        return target
    share = step / rise
    if plateaus is not None:
        share = math.floor(share * plateaus) / plateaus
    if share == 0:
        return min(start, target)
    if schedule == "cosine":
        share = (1 - math.cos(math.pi * share)) / 2
    return min(target, max(LOWEST_ALPHA, start + (target - start) * share))


def rate_at(step: int, *, steps: int, schedule: str, warmup: int, final: float) -> float:
    """Share of the peak learning rate in a step counted from 0: a linear rise in `warmup` steps, then the schedule.

    cosine and linear end at `final`, which the last step comes near to; constant stays at 1.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule is {schedule!r}; choose one of {', '.join(SCHEDULES)}")
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "constant":
        return 1.0
    share = (step - warmup) / max(1, steps - warmup)
    down = (1 + math.cos(math.pi * share)) / 2 if schedule == "cosine" else 1 - share
    return final + (1 - final) * down


def parameter_groups(
    model: nn.Module, *, learning_rate: float, new_learning_rate: float | None, weight_decay: float
) -> list[dict]:
    """AdamW's groups of the trainable parameters: matrices with decay; norms and biases without; the map's new
    parameters without, at their own learning rate."""
    new_names = set(new_parameter_names(model))
    matrices, vectors, new = [], [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (new if name in new_names else matrices if parameter.ndim >= 2 else vectors).append(parameter)
    groups = [
        {"params": matrices, "lr": learning_rate, "weight_decay": weight_decay},
        {"params": vectors, "lr": learning_rate, "weight_decay": 0.0},
        {
            "params": new,
            "lr": learning_rate if new_learning_rate is None else new_learning_rate,
            "weight_decay": 0.0,
        },
    ]
    return [group for group in groups if group["params"]]


def start_factors(model: nn.Module, start: str | None, seed: int | None = None) -> None:
    """Gives ASEntmax's factors of a fresh model their start: `neutral`, as they are, `normal`, `beta` or `logarithm`.

    Args:
        seed: of the draws; None draws from torch's own numbers.
    """
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, ASEntmaxScale):
            if start == "normal":
                module.start_normal(generator)
            elif start == "logarithm":
                module.start_logarithm(model.config.sparse_attention["train_length"])
            elif start == "beta":
                module.start_beta()


def freeze(model: nn.Module, trained: str) -> None:
    """Leaves only some parameters trainable: `map`, the map's new ones; `attention`, also everything else in the
    layers whose attention is sparse; `all` changes nothing.

    Raises:
        ValueError: if there would be none.
    """
    if trained == "all":
        return
    chosen = set(new_parameter_names(model))
    if trained == "attention":
        inside = _inside_sparse_layers(model)
        chosen |= {name for name, item in model.named_parameters() if id(item) in inside}
    if not chosen:
        raise ValueError(
            f"trained is {trained!r}, but the model's map has no parameters of its own: use --trained attention, or "
            "adapters with --lora_rank"
        )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in chosen)


def freeze_outside_sparse_layers(model: nn.Module) -> None:
    """Freezes what a stage that matches has no gradient for: adapters elsewhere than in a sparse layer's attention.

    Raises:
        ValueError: if no adapter is left.
    """
    inside = _inside_sparse_layers(model)
    for parameter in model.parameters():
        if id(parameter) not in inside:
            parameter.requires_grad_(False)
    if not any("lora_" in name and item.requires_grad for name, item in model.named_parameters()):
        raise ValueError(
            "lora_targets names nothing in a sparse layer's attention, which is all that stage 'match' trains: leave "
            "it out, or name projections such as q_proj"
        )


def _inside_sparse_layers(model: nn.Module) -> set[int]:
    return {id(item) for _, layer in attention_layers(model) for item in layer.parameters()}


def attention_projections(model: nn.Module) -> list[str]:
    """Where LoRA adapters go by default: `self_attn.q_proj` and its like of every attention layer."""
    kind = FAMILIES[model.config.model_type.removeprefix("sparse_")].dense("Attention")
    found = set()
    for name, module in model.named_modules():
        if isinstance(module, kind):
            parent = name.rpartition(".")[2]
            found |= {f"{parent}.{leaf}" for leaf, child in module.named_children() if isinstance(child, nn.Linear)}
    return sorted(found)


def with_lora(
    model: nn.Module, *, rank: int, alpha: float | None, dropout: float, targets: list[str], merged: bool = False
) -> nn.Module:
    """The model with LoRA adapters; the map's new parameters are trained and saved whole.

    Args:
        merged: whether the adapters are to become part of the weights.

    Raises:
        ImportError: without PEFT.
        ValueError: for a target the model does not have, or one whose weights cannot take up an adapter alone.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ImportError('LoRA needs PEFT: pip install "hf-sparse-attention[peft]"') from error
    modules = dict(model.named_modules())
    targets = targets or attention_projections(model)
    unknown = [target for target in targets if not any(f".{name}".endswith(f".{target}") for name in modules)]
    if unknown:
        raise ValueError(
            f"lora_targets names {', '.join(unknown)}, which the model does not have; its attention has "
            f"{', '.join(attention_projections(model))}"
        )
    if merged and (tied := _tied(modules, targets)):
        raise ValueError(
            f"lora_targets names {tied[0]}, whose weights are also those of {tied[1]}: merged, the adapter would "
            "change both, and the model would be another than the one that was trained. Leave it out, or keep the "
            "adapter of a sparse model with --lora_save adapter"
        )
    whole = [leaf for leaf in NEW_MODULES if any(name.endswith(f".{leaf}") for name in modules)]
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=2 * rank if alpha is None else alpha,
        lora_dropout=dropout,
        target_modules=targets,
        modules_to_save=whole or None,
    )
    return get_peft_model(model, lora)


def _tied(modules: dict[str, nn.Module], targets: list[str]) -> tuple[str, str] | None:
    """Of two modules that share a parameter, one of them a target: the target and the other one."""
    owners: dict[nn.Parameter, str] = {}
    for name, module in modules.items():
        for parameter in module.parameters(recurse=False):
            other = owners.setdefault(parameter, name)
            for one, two in ((name, other), (other, name)):
                if one != two and any(f".{one}".endswith(f".{target}") for target in targets):
                    return one, two
    return None


def idle_parameters(model: nn.Module) -> list[str]:
    """Trainable parameters that the last backward pass gave no gradient."""
    return [name for name, item in model.named_parameters() if item.requires_grad and item.grad is None]


def fused_adamw(device: torch.device) -> bool:
    """Whether torch has a fused AdamW for the device."""
    return device.type in ("cpu", "cuda", "xpu", "mps")
