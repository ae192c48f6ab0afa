"""Training of a dense or sparse model with a sparse attention map: one stage of it, top to bottom."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
from tqdm import tqdm

from ..files import write_json
from ..loading import count_parameters, load_model
from ..models import new_parameter_names, set_alpha
from ..text import load_tokenizer
from .arguments import TrainArguments, check_arguments
from .compilation import compile_parts, hold_rising_alpha
from .data import (
    check_texts,
    held_out_batches,
    held_out_blocks,
    packed_tokens,
    rows_of_process,
    streamed_blocks,
    tensors_of,
)
from .distributed import (
    all_agree,
    backward,
    check_launch,
    clip_gradients,
    is_sharded,
    join_processes,
    make_accelerator,
    put_parameters,
    spread,
    wants_checkpointing,
    way_of,
    whole_parameters,
)
from .faults import explain_no_memory, explain_not_finite, last_whole, spoiled_parameters
from .head import Distillation, chunk_loss
from .lengths import parse_block_sizes, phase_at, phases_of
from .matching import (
    begin_matching,
    end_matching,
    leave_out_dropout,
    match_errors,
    matched,
    measure_scales,
    set_matching,
)
from .measures import attention_statistics, held_out_loss
from .packing import Blocks, ShuffledBlocks, batch_of
from .plan import (
    alpha_schedule_of,
    check_block_size,
    check_fit,
    default_block_size,
    find_source,
    find_teacher,
    settings_of,
)
from .recipe import (
    LOWEST_ALPHA,
    alpha_at,
    freeze,
    freeze_outside_sparse_layers,
    fused_adamw,
    idle_parameters,
    parameter_groups,
    rate_at,
    start_factors,
    with_lora,
)
from .run import (
    Metrics,
    begin_run,
    check_output,
    checkpoint_to_go_on_from,
    finished_summary,
    identity_of,
    print_summary,
    save_model,
    summary_of,
)
from .state import read_state, save_state
from .throughput import flops_per_token, peak_flops
from .zero import GradientWatch, in_working_precision, is_zero


def train_stage(
    arguments: TrainArguments,
    *,
    first_token: int = 0,
    packed: Path | None = None,
    begin: Callable[[], None] | None = None,
) -> dict:
    """Trains; writes the model to `output/model`; returns the summary, which is also in `output/summary.json`.

    Args:
        first_token: how many tokens of the data an earlier stage has seen.
        packed: folder of encoded text that several stages share (default: `output/packed`).
        begin: called by every process before anything else is written, when nothing is left to be refused.

    Raises:
        ValueError: for arguments, a model, data or a tokenizer that do not fit together, before anything is written.
        FileExistsError: if output is in use and the run is neither to go on nor to be replaced.
        OSError: if the model or data is missing or corrupt, or the disk is full.
        RuntimeError: if the loss is not finite or memory runs out, and `on_nonfinite` is stop.
    """
    arguments = check_arguments(arguments)
    check_launch(arguments)
    try:
        from accelerate.tracking import filter_trackers
        from accelerate.utils import set_seed
    except ImportError as error:
        raise ImportError('training needs accelerate: pip install "hf-sparse-attention[train]"') from error
    begun = time.perf_counter()
    # What looks for trackers logs, which accelerate does only when it knows its processes.
    state = join_processes(arguments)
    known = {
        str(getattr(tracker, "value", tracker)) for tracker in filter_trackers(arguments.report_to, arguments.output)
    }
    if lost := sorted(set(arguments.report_to) - known - {"all"}):
        raise ValueError(f"report_to names {', '.join(lost)}, which is not installed")
    output = Path(arguments.output).expanduser()
    check_output(output, arguments)
    check_texts(arguments)

    # The model's folder; what the run will make of it.
    with state.local_main_process_first():
        source = find_source(arguments)
        dense_source = find_teacher(arguments, source)
    sizes = parse_block_sizes(arguments.block_size or default_block_size(source))
    phases = phases_of(sizes, arguments.steps, arguments.batch_size)
    block_size = phases[-1].block_size
    settings = settings_of(source, arguments, phases[0].block_size)
    check_fit(source, settings, arguments)
    arguments = replace(arguments, alpha_schedule=alpha_schedule_of(arguments, source, settings))
    matches = arguments.stage == "match"
    check_block_size(source, settings, block_size, matches=matches)
    tokenizer = load_tokenizer(source.folder, source.config.get_text_config().vocab_size)
    # At 1 a layer is the dense one, and there is nothing to match.
    first_alpha = arguments.alpha_start or (LOWEST_ALPHA if matches else 1.0)
    if settings is not None and arguments.alpha_schedule == "none":
        first_alpha = settings.alpha
    # A head that learns its alpha takes no part while alpha is 1, which DDP has to be told.
    idles = settings is not None and settings.map == "adaptive_entmax" and first_alpha == 1
    accelerator = make_accelerator(arguments, output, idles=idles)
    passes, processes = arguments.gradient_accumulation, accelerator.num_processes
    step_tokens = phases[0].batch_size * phases[0].block_size * passes * processes
    lengths = block_size if len(sizes) == 1 else sizes
    # What accelerate was told counts as if it were an option.
    known = replace(arguments, mixed_precision=accelerator.mixed_precision)
    identity = identity_of(known, step_tokens // phases[0].block_size, lengths, tokenizer, source, dense_source)
    if arguments.resume == "auto" and (finished := finished_summary(output, arguments, identity)) is not None:
        accelerator.print(f"{output} holds this run, finished: nothing to do")
        return finished

    checkpoint = checkpoint_to_go_on_from(output, arguments, identity)
    # A launcher that started fewer processes than it was meant to says nothing of it.
    accelerator.print(
        f"{processes} process{'es' if processes > 1 else ''} on {accelerator.device.type}, "
        f"{step_tokens // phases[0].block_size:,} blocks of {phases[0].block_size:,} tokens in a step"
    )

    # The data: every process knows all of a step's blocks and computes its share of them.
    held_out = held_out_blocks(arguments, tokenizer, block_size)
    if arguments.streaming:
        # In the order of the data and from its beginning; raises if there is not one block.
        watched, _, _ = streamed_blocks(arguments, tokenizer, block_size, None).take(
            max(1, arguments.statistics_blocks), slice
        )
    else:
        tokens, starts = packed_tokens(packed or output / "packed", arguments, tokenizer, block_size, accelerator)
        blocks = Blocks(tokens, starts, block_size)
        watched = batch_of(*blocks.rows(np.arange(min(max(1, arguments.statistics_blocks), len(blocks)))))
    if held_out is not None:
        watched = {name: rows[: max(1, arguments.statistics_blocks)] for name, rows in held_out.items()}

    def walk(phase: int):
        """The way through the data in a phase, from its beginning."""
        size = phases[phase].block_size
        if arguments.streaming:
            data = streamed_blocks(arguments, tokenizer, size, arguments.seed)
        else:
            # Each block size in an order of its own.
            order = arguments.seed if phase == 0 else [arguments.seed, phase]
            data = ShuffledBlocks(Blocks(tokens, starts, size), order)
        data.skip((first_token + phases[phase].first * step_tokens) // size)
        return data

    # The parameters: all of them or adapters, the map's own without decay and at their own rate.
    def build():
        model, _ = load_model(source, None if source.is_sparse else settings, arguments.dtype)
        start_factors(model, arguments.scale_start, arguments.seed)
        if arguments.lora_rank:
            model = with_lora(
                model, rank=arguments.lora_rank, alpha=arguments.lora_alpha, dropout=arguments.lora_dropout,
                targets=arguments.lora_targets, merged=arguments.lora_save == "merge",
            )  # fmt: skip
            if matches:
                freeze_outside_sparse_layers(model)
            return model
        freeze(model, arguments.trained or ("map" if matches else "all"))
        return model

    set_seed(arguments.seed)
    model = build()
    recompute = wants_checkpointing(arguments)
    if recompute and not matches:
        # The second is its name in older Transformers, of which 5.23 warns; both leave out reentrant checkpoints.
        (getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable)()
    counts: dict = {
        # Of the model that is saved: adapters are merged into it, and what they replace is not.
        "parameters": sum(
            parameter.numel()
            for name, parameter in model.named_parameters()
            if "lora_" not in name and ".original_module." not in name
        ),
        "trainable_parameters": count_parameters(model, trainable=True),
        "new_parameters": sum(model.get_parameter(name).numel() for name in new_parameter_names(model)),
    }
    if matches:
        same = (arguments.trained or "map") == "map" and not arguments.lora_rank
        begin_matching(model, same_projections=same, recompute=recompute)
    if arguments.loss_chunk or dense_source is not None:
        _compute_loss_in_chunks(model, arguments, dense_source, accelerator)
    if arguments.compile:
        compile_parts(model)
    groups = parameter_groups(
        model, learning_rate=arguments.learning_rate, new_learning_rate=arguments.new_learning_rate,
        weight_decay=arguments.weight_decay,
    )  # fmt: skip
    peaks = [group["lr"] for group in groups]
    betas = (arguments.beta1, arguments.beta2)
    optimizer = torch.optim.AdamW(groups, betas=betas, fused=fused_adamw(accelerator.device))
    layers = [layer for _, layer in matched(model)]
    flops = [None if matches else flops_per_token(model, phase.block_size) for phase in phases]
    wrapped, optimizer = spread(accelerator, model, optimizer, own_units=tuple({type(layer) for layer in layers}))
    counts["spread"] = way_of(model, processes)
    if matches:
        # Before the random numbers of the run begin, and the same after a stop.
        measure_scales(wrapped, layers, tensors_of(watched, slice(None), accelerator.device))
    # Adapters start the same in every process, dropout does not.
    set_seed(arguments.seed, device_specific=True)

    # Where in the run we are.
    begins = 0 if checkpoint is None else read_state(checkpoint)["step"]
    phase = phase_at(phases, max(0, begins - 1))
    data = walk(phase)
    # Of a stream, which counts from its beginning, those of earlier stages.
    passed = data.epochs if arguments.streaming else 0.0
    if begin is not None:
        begin()
    start, run = begin_run(output, arguments, identity, checkpoint, accelerator, model, optimizer, data)
    earlier = run["seconds"]
    # A run from before counted its seconds alone.
    earlier_of_devices = run.setdefault("device_seconds", earlier * processes)
    metrics = Metrics(output / "metrics.jsonl", start, accelerator)
    if arguments.report_to:
        accelerator.init_trackers(
            arguments.run_name, config={key: str(value) for key, value in asdict(arguments).items()}
        )
    # Step 0 is the dense model however short the run.
    rise = math.ceil(arguments.alpha_share * arguments.steps)
    warmup = round(arguments.warmup_share * arguments.steps)
    target = None if settings is None else settings.alpha
    alpha_of = partial(
        alpha_at, target=target, schedule=arguments.alpha_schedule, rise=rise,
        start=first_alpha, plateaus=arguments.alpha_plateaus,
    )  # fmt: skip

    def begin_step(step: int) -> float | None:
        """Alpha and learning rates follow from the step alone; returns alpha, None for a dense model."""
        rate = rate_at(
            step, steps=arguments.steps, schedule=arguments.schedule, warmup=warmup, final=arguments.final_share
        )
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * rate
        if target is None:
            return None
        alpha = alpha_of(step)
        set_alpha(model, alpha)
        if arguments.compile and alpha not in (1.0, target):
            hold_rising_alpha(model, alpha)
        return alpha

    def evaluate(step: int) -> None:
        alpha = {} if (value := begin_step(step)) is None else {"alpha": value}
        set_matching(model, False)
        if held_out is not None:
            loss = held_out_loss(wrapped, held_out_batches(held_out, phases[-1].batch_size, accelerator), accelerator)
            if not math.isfinite(loss):
                # What is trained on is not the matter; the files of a run have no such number.
                accelerator.print(f"warning: at step {step} the held-out loss is {loss}")
                loss = None
            run["held_out"].append([step, loss])
            metrics.write(step, "eval", loss=loss, **alpha)
        if target is not None and arguments.statistics_blocks:
            looked = attention_statistics(wrapped, tensors_of(watched, slice(None), accelerator.device))
            run["attention"], by_layer = ({} if _not_finite(found) else found for found in looked)
            metrics.write(step, "attention", **alpha, **run["attention"])
            metrics.write(step, "layers", **by_layer)
        set_matching(model, True)

    def stop(step: int, reason: str, error: BaseException | None = None) -> NoReturn:
        metrics.write(step, "failed", reason=reason)
        raise RuntimeError(f"{reason}. {last_whole(output)}") from error

    # Some models have rows of no token that are not numbers.
    spoiled_before = spoiled_parameters(accelerator, model)

    def newly_spoiled() -> list[str]:
        return [name for name in spoiled_parameters(accelerator, model) if name not in spoiled_before]

    def learn() -> None:
        wrapped.train()
        if matches:
            leave_out_dropout(model)

    def share_of_loss(inputs: dict[str, torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
        """(1,) this part's share of the step's mean loss; when matching (layers,), one for each layer."""
        if matches:
            return match_errors(wrapped, layers, inputs) / step_tokens
        return wrapped(**inputs, num_items_in_batch=labels, use_cache=False).loss[None]

    if start == 0:
        evaluate(0)
    window, checked = run["window"], False
    window_begun, window_tokens = time.perf_counter(), 0
    peak = peak_flops(accelerator.device)
    learn()
    with tqdm(
        total=arguments.steps, initial=start, desc="train", unit="step", disable=not accelerator.is_main_process,
        mininterval=0.5 if sys.stderr.isatty() else 10, dynamic_ncols=True,
    ) as bar:  # fmt: skip
        for step in range(start, arguments.steps):
            if phase != phase_at(phases, step):
                phase = phase_at(phases, step)
                data = walk(phase)
            alpha = begin_step(step)
            size, done = phases[phase].batch_size, step + 1
            mine = partial(rows_of_process, passes, size, accelerator)
            batch, labels, numbers = data.take(size * passes * processes, mine)
            labels = torch.tensor(labels, device=accelerator.device)
            loss = torch.zeros(len(layers) if matches else 1, device=accelerator.device)
            parts = [slice(part * size, (part + 1) * size) for part in range(passes)]
            report = norm = None
            watch = None if checked or not is_zero(model) else GradientWatch(model)
            try:
                for part in parts:
                    with accelerator.accumulate(wrapped):
                        # No attention mask and no cache: position_ids that restart are what keeps documents apart.
                        share = share_of_loss(tensors_of(batch, part, accelerator.device), labels)
                        backward(accelerator, wrapped, share.mean(), passes=passes, last=part is parts[-1])
                    loss += share.detach().float()
            except torch.OutOfMemoryError as error:
                report = explain_no_memory(error, model, numbers, data, step=done)
                # The other processes wait for this one's gradients: no step can be skipped by one of several.
                if arguments.on_nonfinite == "stop" or processes > 1 or is_zero(model):
                    stop(done, report, error)
                accelerator.step = 0
                if accelerator.device.type == "cuda":
                    torch.cuda.empty_cache()
                # In the middle of a step's passes accelerate's optimizer would keep what the earlier ones gave.
                model.zero_grad()
            if watch is not None:
                all_agree(accelerator, watch.close())
                checked = True
            if report is None:
                loss = accelerator.reduce(loss, "sum")
                norm = clip_gradients(accelerator, model, wrapped, arguments.clip, loss)
                loss, norm = torch.cat([loss, norm.to(loss.device)[None]]).split([len(loss), 1])
                layer_losses, norm = loss.tolist(), norm.item()
                loss = sum(layer_losses) / len(layer_losses)
                # The scaler of fp16 skips a step with an infinite norm itself: that is how it finds its scale.
                if not math.isfinite(loss) or not (math.isfinite(norm) or accelerator.scaler is not None):
                    values = f"step {done}: loss {loss}, gradient norm {norm}"
                    report = explain_not_finite(
                        accelerator, model, partial(_again, share_of_loss, batch, parts, labels, accelerator.device),
                        numbers, data, values=values + (f", alpha {alpha:g}" if alpha is not None else ""),
                    )  # fmt: skip
                    if arguments.on_nonfinite == "stop":
                        stop(done, report)
                    if spoiled := newly_spoiled():
                        stop(done, f"{report}; {spoiled[0]} is not finite itself, which no later step mends")
                    if accelerator.scaler is not None:
                        # Its gradients were unscaled, which can be done once between two updates.
                        accelerator.scaler.update()
            if not checked and report is None and (alpha != 1.0 or target == 1.0):
                _warn_of_idle(model, accelerator)
                checked = True

            run["tokens"] += step_tokens
            window_tokens += step_tokens
            if report is None:
                optimizer.step()
                window["loss"] += loss
                window["steps"] += 1
                summed = window["layers"] or [0.0] * len(layer_losses)
                window["layers"] = [one + other for one, other in zip(summed, layer_losses, strict=True)]
            else:
                metrics.write(done, "skipped", reason=report)
                run["skipped"] += 1
            optimizer.zero_grad()
            bar.update()

            if done % arguments.log_every == 0 or done == arguments.steps:
                now = time.perf_counter()
                if window["steps"]:
                    run["loss"] = window["loss"] / window["steps"]
                line = {"loss": run["loss"], "gradient_norm": norm, "alpha": alpha}
                if norm is not None and not math.isfinite(norm):
                    line["gradient_norm"] = None
                line |= {"learning_rate": optimizer.param_groups[0]["lr"], "tokens": run["tokens"]}
                timing = {"tokens_per_second": window_tokens / (now - window_begun), "seconds": earlier + now - begun}
                if flops[phase] and peak:
                    run["utilisation"] = timing["tokens_per_second"] * flops[phase] / (peak * processes)
                    timing["flop_utilisation"] = run["utilisation"]
                metrics.write(
                    done, "train", **{key: value for key, value in line.items() if value is not None}, timing=timing
                )
                if matches and window["steps"]:
                    means = [value / window["steps"] for value in window["layers"]]
                    named = zip(matched(model), means, strict=True)
                    metrics.write(done, "match", **{f"layer_{number}": value for (number, _), value in named})
                _show(bar, line, timing, run["attention"])
                window |= {"loss": 0.0, "steps": 0, "layers": []}
                window_begun, window_tokens = now, 0
            pause = time.perf_counter()
            if done % arguments.eval_every == 0 or done == arguments.steps:
                evaluate(done)
                learn()
            run["seconds"] = earlier + time.perf_counter() - begun
            # It may have had another number of processes before.
            run["device_seconds"] = earlier_of_devices + (run["seconds"] - earlier) * processes
            checkpoints = arguments.checkpoint_every and done % arguments.checkpoint_every == 0
            if (checkpoints or done == arguments.steps) and (spoiled := newly_spoiled()):
                # Before it takes the place of a checkpoint, or of the model, that is whole.
                stop(done, f"step {done}: {spoiled[0]} is not finite after it")
            if arguments.checkpoint_every and (checkpoints or done == arguments.steps):
                metrics.flush()
                save_state(
                    output / "checkpoints", accelerator, model, optimizer, data.state_dict(),
                    {**run, "identity": identity}, step=done, keep=arguments.keep_checkpoints,
                )  # fmt: skip
            window_begun += time.perf_counter() - pause

    begin_step(arguments.steps)
    epochs = data.epochs - passed if arguments.streaming else run["tokens"] / (len(blocks) * block_size)
    summary = summary_of(source, settings, arguments, accelerator, counts, run, identity, epochs)
    # Losses at different alphas are of different functions.
    summary["eval_alpha"] = None if target is None else [alpha_of(step) for step, _ in run["held_out"]]
    if is_sharded(model):
        # No process has the whole model: the first one puts it together again.
        values = whole_parameters(accelerator, model)
        if accelerator.is_main_process:
            model = build()
            put_parameters(model, values)
            if target is not None:
                set_alpha(model, alpha_of(arguments.steps))
    if accelerator.is_main_process:
        end_matching(model)
        save_model(output / "model", source, model, arguments, summary)
        write_json(output / "summary.json", summary)
        print_summary(output, summary)
    accelerator.wait_for_everyone()
    for tracker in accelerator.trackers:
        tracker.finish()
    accelerator.free_memory()
    return summary


def _not_finite(numbers: dict[str, float]) -> bool:
    return not all(map(math.isfinite, numbers.values()))


def _compute_loss_in_chunks(model, arguments: TrainArguments, dense_source, accelerator) -> None:
    """The model's loss `loss_chunk` labels at a time, and with what it learns from the dense model's logits."""
    plain = model.get_base_model() if arguments.lora_rank else model
    distillation = None
    if dense_source is not None:
        # Of a converted folder without what its map added, which may be nothing.
        teacher, _ = load_model(dense_source, None, arguments.dtype, without=dense_source.record.get("new"))
        teacher = in_working_precision(accelerator, teacher.requires_grad_(False).eval().to(accelerator.device))
        distillation = Distillation(teacher, arguments.distill_weight, arguments.distill_temperature)
    chunk_loss(plain, arguments.loss_chunk, distillation)


def _again(share_of_loss, batch, parts: list[slice], labels: torch.Tensor, device: torch.device) -> None:
    for part in parts:
        share_of_loss(tensors_of(batch, part, device), labels)


def _warn_of_idle(model, accelerator) -> None:
    if idle := idle_parameters(model):
        accelerator.print(f"warning: {len(idle)} trainable parameters get no gradient, first {idle[0]}")


def _show(bar: tqdm, line: dict, timing: dict, attention: dict) -> None:
    shown = {"tokens/s": f"{timing['tokens_per_second']:,.0f}"}
    if line["loss"] is not None:
        shown = {"loss": f"{line['loss']:.4f}", **shown}
    if line["alpha"] is not None:
        shown["alpha"] = f"{line['alpha']:.3f}"
    if "flop_utilisation" in timing:
        shown["MFU"] = f"{timing['flop_utilisation']:.1%}"
    if attention:
        # Measured at evaluations only, at the alpha of their step.
        shown["support at the last evaluation"] = f"{attention['support']:.1f}"
    bar.set_postfix(shown, refresh=False)
