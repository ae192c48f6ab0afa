"""The model of a stage, its optimizer and what a step computes: the loss on text, or how far layers are from the dense
ones."""

from __future__ import annotations

import torch
from torch import nn

from ..loading import count_parameters, load_model
from ..models import new_parameter_names, set_alpha
from .compilation import compile_parts, hold_rising_alpha
from .data import tensors_of
from .distributed import backward, checkpoint_activations, spread, wants_checkpointing, way_of
from .head import Distillation, chunk_loss
from .job import Job
from .matching import begin_matching, leave_out_dropout, match_errors, matched, measure_scales
from .reading import Reading
from .recipe import (
    freeze,
    freeze_outside_sparse_layers,
    fused_adamw,
    parameter_groups,
    start_factors,
    with_lora,
)
from .throughput import flops_per_token
from .zero import in_working_precision


class Learner:
    """A model that is spread over the processes and learns.

    Attributes:
        model: the model itself; `wrapped` is what is called to train it.
        layers: attention layers that learn to match, none if the model learns from text.
        counts: numbers of parameters, and how they are spread.
        flops: of a token, by phase; None where they are not counted.
    """

    def __init__(self, job: Job, reading: Reading):
        from accelerate.utils import set_seed

        self.job, arguments = job, job.arguments
        set_seed(arguments.seed)
        self.model = model = self.build()
        recompute = wants_checkpointing(arguments)
        if recompute and not job.matches:
            checkpoint_activations(model)
        self.counts = _counts(model)
        if job.matches:
            same = (arguments.trained or "map") == "map" and not arguments.lora_rank
            begin_matching(model, same_projections=same, recompute=recompute)
        if arguments.loss_chunk or job.teacher is not None:
            _compute_loss_in_chunks(model, job)
        if arguments.compile:
            compile_parts(model)
        groups = parameter_groups(
            model, learning_rate=arguments.learning_rate, new_learning_rate=arguments.new_learning_rate,
            weight_decay=arguments.weight_decay,
        )  # fmt: skip
        self.peaks = [group["lr"] for group in groups]
        betas = (arguments.beta1, arguments.beta2)
        optimizer = torch.optim.AdamW(groups, betas=betas, fused=fused_adamw(job.accelerator.device))
        self.layers = [layer for _, layer in matched(model)]
        self.flops = [None if job.matches else flops_per_token(model, phase.block_size) for phase in job.phases]
        kinds = tuple({type(layer) for layer in self.layers})
        self.wrapped, self.optimizer = spread(job.accelerator, model, optimizer, own_units=kinds)
        self.counts["spread"] = way_of(model, job.processes)
        if job.matches:
            # Before the random numbers of the run begin, and the same after a stop.
            measure_scales(self.wrapped, self.layers, reading.watched())
        # Adapters start the same in every process, dropout does not.
        set_seed(arguments.seed, device_specific=True)

    def build(self) -> nn.Module:
        """The model before its first step, what is not trained of it frozen: all of it or adapters."""
        job, arguments = self.job, self.job.arguments
        model, _ = load_model(job.source, None if job.source.is_sparse else job.settings, arguments.dtype)
        start_factors(model, arguments.scale_start, arguments.seed)
        if arguments.lora_rank:
            model = with_lora(
                model, rank=arguments.lora_rank, alpha=arguments.lora_alpha, dropout=arguments.lora_dropout,
                targets=arguments.lora_targets, merged=arguments.lora_save == "merge",
            )  # fmt: skip
            if job.matches:
                freeze_outside_sparse_layers(model)
            return model
        freeze(model, arguments.trained or ("map" if job.matches else "all"))
        return model

    def begin_step(self, step: int) -> float | None:
        """Alpha and learning rates follow from the step alone; returns alpha, None for a dense model."""
        rate = self.job.rate(step)
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * rate
        if self.job.target is None:
            return None
        alpha = self.job.alpha(step)
        set_alpha(self.model, alpha)
        if self.job.arguments.compile and alpha not in (1.0, self.job.target):
            hold_rising_alpha(self.model, alpha)
        return alpha

    def learn(self) -> None:
        """Puts the model in the mode in which it is trained."""
        self.wrapped.train()
        if self.job.matches:
            leave_out_dropout(self.model)

    def share_of_loss(self, inputs: dict[str, torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
        """(1,) this part's share of the step's mean loss; when matching (layers,), one for each layer."""
        if self.job.matches:
            return match_errors(self.wrapped, self.layers, inputs) / self.job.step_tokens
        return self.wrapped(**inputs, num_items_in_batch=labels, use_cache=False).loss[None]

    def gradients(self, batch: dict, parts: list[slice], labels: torch.Tensor) -> torch.Tensor:
        """Adds up the gradients of a step's passes; returns this process's share of the losses, as `share_of_loss`."""
        accelerator = self.job.accelerator
        loss = torch.zeros(len(self.layers) if self.job.matches else 1, device=accelerator.device)
        for part in parts:
            with accelerator.accumulate(self.wrapped):
                # No attention mask and no cache: position_ids that restart are what keeps documents apart.
                share = self.share_of_loss(tensors_of(batch, part, accelerator.device), labels)
                backward(accelerator, self.wrapped, share.mean(), passes=len(parts), last=part is parts[-1])
            loss += share.detach().float()
        return loss

    def forget(self) -> None:
        """Takes back what the passes of a step gave before memory ran out."""
        self.job.accelerator.step = 0
        if self.job.accelerator.device.type == "cuda":
            torch.cuda.empty_cache()
        # In the middle of a step's passes accelerate's optimizer would keep what the earlier ones gave.
        self.model.zero_grad()


def _counts(model: nn.Module) -> dict:
    return {
        # Of the model that is saved: adapters are merged into it, and what they replace is not.
        "parameters": sum(
            parameter.numel()
            for name, parameter in model.named_parameters()
            if "lora_" not in name and ".original_module." not in name
        ),
        "trainable_parameters": count_parameters(model, trainable=True),
        "new_parameters": sum(model.get_parameter(name).numel() for name in new_parameter_names(model)),
    }


def _compute_loss_in_chunks(model: nn.Module, job: Job) -> None:
    """The model's loss `loss_chunk` labels at a time, and with what it learns from the dense model's logits."""
    arguments, distillation = job.arguments, None
    plain = model.get_base_model() if arguments.lora_rank else model
    if job.teacher is not None:
        # Of a converted folder without what its map added, which may be nothing.
        teacher, _ = load_model(job.teacher, None, arguments.dtype, without=job.teacher.record.get("new"))
        teacher = teacher.requires_grad_(False).eval().to(job.accelerator.device)
        teacher = in_working_precision(job.accelerator, teacher)
        distillation = Distillation(teacher, arguments.distill_weight, arguments.distill_temperature)
    chunk_loss(plain, arguments.loss_chunk, distillation)
