"""Continued pretraining of a dense or sparse model with a sparse attention map, top to bottom."""

from __future__ import annotations

import math
import sys
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm
from transformers import PreTrainedConfig

from ..config import SparseAttentionConfig
from ..files import write_json
from ..loading import Source, check_settings, find_model, load_model, make_settings
from ..models import check_convertible, new_parameter_names, set_alpha, sparse_config, sparse_layers
from ..text import find_texts, load_tokenizer
from .arguments import TrainArguments, check_numbers
from .data import held_out_batches, held_out_blocks, packed_blocks, rows_of_process, streamed_blocks, tensors_of
from .measures import attention_statistics, held_out_loss
from .packing import ShuffledBlocks, batch_of
from .publish import check_push, push_run
from .recipe import alpha_at, fused_adamw, idle_parameters, parameter_groups, rate_at, with_lora
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
from .state import save_state, whole_states


def train_model(arguments: TrainArguments) -> dict:
    """Trains; writes the model to `output/model`; returns the summary, which is also in `output/summary.json`.

    Raises:
        ValueError: for arguments, a model, data or a tokenizer that do not fit together, before anything is written.
        FileExistsError: if output is in use and the run is neither to go on nor to be replaced.
        OSError: if the model or data is missing or corrupt, the disk is full, or the model could not be pushed.
        RuntimeError: if the loss is not finite and `on_nan` is stop.
    """
    check_numbers(arguments)
    check_push(arguments)
    try:
        from accelerate import Accelerator, DistributedDataParallelKwargs, PartialState
        from accelerate.tracking import filter_trackers
        from accelerate.utils import ProjectConfiguration, set_seed
    except ImportError as error:
        raise ImportError('training needs accelerate: pip install "hf-sparse-attention[train]"') from error
    begun = time.perf_counter()
    known = {
        str(getattr(tracker, "value", tracker)) for tracker in filter_trackers(arguments.report_to, arguments.output)
    }
    if lost := sorted(set(arguments.report_to) - known - {"all"}):
        raise ValueError(f"report_to names {', '.join(lost)}, which is not installed")
    output = Path(arguments.output).expanduser()
    check_output(output, arguments)
    for names in (arguments.train_data, arguments.eval_data):
        if names:
            find_texts(names)

    # The model's folder; what the run will make of it.
    with PartialState(cpu=arguments.cpu).local_main_process_first():
        source = find_model(arguments.model, arguments.revision, _check_family)
    if getattr(source.config, "output_router_logits", False):
        raise ValueError(
            f"{arguments.model} has output_router_logits: its auxiliary loss would be added to every part of a batch. "
            "Set it to false in config.json to train on the tokens alone"
        )
    block_size = arguments.block_size or min(_positions(source) or 2048, 2048)
    settings = _settings(source, arguments, block_size)
    if arguments.alpha_schedule is None:
        arguments = replace(arguments, alpha_schedule="linear" if source.is_untrained else "none")
    _check_block_size(source, settings, block_size)
    tokenizer = load_tokenizer(source.folder, source.config.get_text_config().vocab_size)
    # A head that learns its alpha takes no part while alpha is 1, which DDP has to be told.
    idles = settings is not None and settings.map == "adaptive_entmax"
    accelerator = Accelerator(
        cpu=arguments.cpu,
        mixed_precision=arguments.mixed_precision,
        gradient_accumulation_steps=arguments.gradient_accumulation,
        dynamo_backend="inductor" if arguments.compile else None,
        log_with=arguments.report_to or None,
        project_config=ProjectConfiguration(project_dir=str(output), logging_dir=str(output / "logs")),
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=idles)],
    )
    if accelerator.distributed_type in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        raise ValueError(f"train runs on one device or with DDP, not yet with {accelerator.distributed_type.value}")
    per_step = arguments.batch_size * arguments.gradient_accumulation * accelerator.num_processes
    identity = identity_of(arguments, per_step, block_size, tokenizer)
    if arguments.resume == "auto" and (finished := finished_summary(output, identity)) is not None:
        accelerator.print(f"{output} holds this run, finished: nothing to do")
        if arguments.push_to_hub and accelerator.is_main_process:
            push_run(output, arguments)
        return finished

    checkpoint = checkpoint_to_go_on_from(output, arguments, identity)

    # The data: every process knows all of a step's blocks and computes its share of them.
    held_out = held_out_blocks(arguments, tokenizer, block_size)
    if arguments.streaming:
        data = streamed_blocks(arguments, tokenizer, block_size, arguments.seed)
        # In the order of the data and from its beginning; raises if there is not one block.
        watched, _, _ = streamed_blocks(arguments, tokenizer, block_size, None).take(
            max(1, arguments.statistics_blocks), slice
        )
    else:
        data = ShuffledBlocks(packed_blocks(output, arguments, tokenizer, block_size, accelerator), arguments.seed)
        watched = batch_of(*data.blocks.rows(np.arange(min(arguments.statistics_blocks, len(data.blocks)))))
    if held_out is not None:
        watched = {name: rows[: arguments.statistics_blocks] for name, rows in held_out.items()}

    # The parameters: all of them or adapters, the map's own without decay and at their own rate.
    set_seed(arguments.seed)
    model, _ = load_model(source, None if source.is_sparse else settings, arguments.dtype)
    new_names = new_parameter_names(model)
    if arguments.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if arguments.lora_rank:
        model = with_lora(
            model, rank=arguments.lora_rank, alpha=arguments.lora_alpha, dropout=arguments.lora_dropout,
            targets=arguments.lora_targets,
        )  # fmt: skip
    groups = parameter_groups(
        model, learning_rate=arguments.learning_rate, new_learning_rate=arguments.new_learning_rate,
        weight_decay=arguments.weight_decay,
    )  # fmt: skip
    trainable = [parameter for group in groups for parameter in group["params"]]
    peaks = [group["lr"] for group in groups]
    betas = (arguments.beta1, arguments.beta2)
    optimizer = torch.optim.AdamW(groups, betas=betas, fused=fused_adamw(accelerator.device))
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    # Adapters start the same in every process, dropout does not.
    set_seed(arguments.seed, device_specific=True)

    # Where in the run we are.
    start, run = begin_run(output, arguments, identity, checkpoint, accelerator, model, optimizer, data)
    earlier = run["seconds"]
    metrics = Metrics(output / "metrics.jsonl", start, accelerator)
    if arguments.report_to:
        accelerator.init_trackers(
            arguments.run_name, config={key: str(value) for key, value in asdict(arguments).items()}
        )
    # Step 0 is the dense model however short the run.
    rise = math.ceil(arguments.alpha_share * arguments.steps)
    warmup = round(arguments.warmup_share * arguments.steps)
    target = None if settings is None else settings.alpha

    def begin_step(step: int) -> float | None:
        """Alpha and learning rates follow from the step alone; returns alpha, None for a dense model."""
        rate = rate_at(
            step, steps=arguments.steps, schedule=arguments.schedule, warmup=warmup, final=arguments.final_share
        )
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * rate
        if target is None:
            return None
        alpha = alpha_at(step, target=target, schedule=arguments.alpha_schedule, rise=rise)
        set_alpha(model, alpha)
        return alpha

    def evaluate(step: int) -> None:
        alpha = {} if (value := begin_step(step)) is None else {"alpha": value}
        if held_out is not None:
            loss = held_out_loss(wrapped, held_out_batches(held_out, arguments, accelerator), accelerator)
            run["held_out"].append([step, loss])
            metrics.write(step, "eval", loss=loss, **alpha)
        if target is not None and arguments.statistics_blocks:
            looked = attention_statistics(wrapped, tensors_of(watched, slice(None), accelerator.device))
            run["attention"], by_layer = looked
            metrics.write(step, "attention", **alpha, **run["attention"])
            metrics.write(step, "layers", **by_layer)
        wrapped.train()

    if start == 0:
        evaluate(0)
    mine = partial(rows_of_process, arguments, accelerator)
    window, checked = run["window"], False
    window_begun, window_tokens = time.perf_counter(), 0
    wrapped.train()
    with tqdm(
        total=arguments.steps, initial=start, desc="train", unit="step", disable=not accelerator.is_main_process,
        mininterval=0.5 if sys.stderr.isatty() else 10, dynamic_ncols=True,
    ) as bar:  # fmt: skip
        for step in range(start, arguments.steps):
            alpha = begin_step(step)
            batch, labels, blocks = data.take(per_step, mine)
            labels = torch.tensor(labels, device=accelerator.device)
            loss = torch.zeros((), device=accelerator.device)
            for part in range(arguments.gradient_accumulation):
                rows = slice(part * arguments.batch_size, (part + 1) * arguments.batch_size)
                with accelerator.accumulate(wrapped):
                    # No attention mask and no cache: position_ids that restart are what keeps documents apart.
                    inputs = tensors_of(batch, rows, accelerator.device)
                    share = wrapped(**inputs, num_items_in_batch=labels, use_cache=False).loss
                    # Already a share of the step's mean, but accelerate divides by the parts and DDP by the processes.
                    accelerator.backward(share * (per_step // arguments.batch_size))
                loss += share.detach().float()
            norm = accelerator.clip_grad_norm_(trainable, arguments.clip or math.inf)
            loss, norm = torch.stack([accelerator.reduce(loss, "sum"), norm.float().to(loss.device)]).tolist()
            if not checked and (alpha != 1.0 or target == 1.0):
                _warn_of_idle(model, accelerator)
                checked = True

            done = step + 1
            run["tokens"] += per_step * block_size
            window_tokens += per_step * block_size
            # The scaler of fp16 skips a step with an infinite norm itself: that is how it finds its scale.
            if math.isfinite(loss) and (math.isfinite(norm) or accelerator.scaler is not None):
                optimizer.step()
                window["loss"] += loss
                window["steps"] += 1
            else:
                report = _not_finite(done, loss, norm, alpha, blocks, data)
                if arguments.on_nan == "stop":
                    raise RuntimeError(f"{report}. {_last_whole(output)}")
                metrics.write(done, "skipped", reason=report)
                run["skipped"] += 1
            optimizer.zero_grad()
            bar.update()

            if done % arguments.log_every == 0 or done == arguments.steps:
                now = time.perf_counter()
                if window["steps"]:
                    run["loss"] = window["loss"] / window["steps"]
                line = {"loss": run["loss"], "gradient_norm": norm if math.isfinite(norm) else None, "alpha": alpha}
                line |= {"learning_rate": optimizer.param_groups[0]["lr"], "tokens": run["tokens"]}
                timing = {"tokens_per_second": window_tokens / (now - window_begun), "seconds": earlier + now - begun}
                metrics.write(
                    done, "train", **{key: value for key, value in line.items() if value is not None}, timing=timing
                )
                _show(bar, line, timing, run["attention"])
                window |= {"loss": 0.0, "steps": 0}
                window_begun, window_tokens = now, 0
            pause = time.perf_counter()
            if done % arguments.eval_every == 0 or done == arguments.steps:
                evaluate(done)
            run["seconds"] = earlier + time.perf_counter() - begun
            if arguments.checkpoint_every and (done % arguments.checkpoint_every == 0 or done == arguments.steps):
                metrics.flush()
                save_state(
                    output / "checkpoints", accelerator, model, optimizer, data.state_dict(),
                    {**run, "identity": identity}, step=done, keep=arguments.keep_checkpoints,
                )  # fmt: skip
            window_begun += time.perf_counter() - pause

    begin_step(arguments.steps)
    summary = summary_of(source, settings, arguments, accelerator, model, new_names, run, identity, data.epochs)
    if accelerator.is_main_process:
        save_model(output / "model", source, model, arguments, summary)
        write_json(output / "summary.json", summary)
        print_summary(output, summary)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    if arguments.push_to_hub and accelerator.is_main_process:
        push_run(output, arguments)
    return summary


def _check_family(config: PreTrainedConfig) -> None:
    """Dense models of other families are refused even as a control: packed documents might see each other."""
    if getattr(config, "sparse_attention", None) is None:
        check_convertible(config)


def _positions(source: Source) -> int | None:
    return getattr(source.config.get_text_config(), "max_position_embeddings", None)


def _settings(source: Source, arguments: TrainArguments, block_size: int) -> SparseAttentionConfig | None:
    """What the attention computes at the end of the run; None for a dense model as it is."""
    if arguments.map == "none":
        if source.is_sparse:
            raise ValueError(
                f"map is 'none', but {arguments.model} is sparse; the control starts from the dense model"
            )
        return None
    if not source.is_sparse:
        if arguments.lora_rank and arguments.lora_save == "adapter":
            raise ValueError(
                "lora_save is 'adapter', which needs a sparse model to sit on later: convert the dense model first, "
                "or use merge"
            )
        settings = make_settings(
            arguments.map or "asentmax", arguments.alpha, arguments.position or "rope", arguments.layers or "all",
            block_size,
        )  # fmt: skip
        return check_settings(source, settings)
    saved = SparseAttentionConfig.from_model_config(source.config)
    asked = make_settings(
        arguments.map or saved.map,
        saved.alpha if arguments.alpha is None else arguments.alpha,
        arguments.position or saved.position,
        "all",
        saved.train_length,
    )
    different = [name for name in ("map", "position") if getattr(asked, name) != getattr(saved, name)]
    if different or arguments.layers is not None:
        names = ", ".join(different or ["layers"])
        raise ValueError(
            f"{arguments.model} is already sparse ({saved.map}, {saved.position}): its {names} cannot change"
        )
    if arguments.lora_rank and arguments.lora_save == "adapter" and asked.alpha != saved.alpha:
        raise ValueError(
            f"lora_save is 'adapter', which cannot change the model's alpha from {saved.alpha} to {asked.alpha}"
        )
    return SparseAttentionConfig.from_dict({**saved.to_dict(), "alpha": asked.alpha})


def _check_block_size(source: Source, settings: SparseAttentionConfig | None, block_size: int) -> None:
    rotates = settings is None or settings.position == "rope"
    if not rotates:
        config = source.config if source.is_sparse else sparse_config(source.config, settings)
        rotates = len(sparse_layers(config)) < config.num_hidden_layers
    limit = _positions(source)
    if rotates and limit is not None and block_size > limit:
        raise ValueError(
            f"block_size is {block_size}, but {source.name} has rotary positions up to {limit} "
            "(max_position_embeddings): use shorter blocks, or --position nape"
        )


def _warn_of_idle(model, accelerator) -> None:
    if idle := idle_parameters(model):
        accelerator.print(f"warning: {len(idle)} trainable parameters get no gradient, first {idle[0]}")


def _not_finite(step: int, loss: float, norm: float, alpha: float | None, blocks: list[int], data) -> str:
    named = []
    for block in blocks[:8]:
        documents = data.documents(block)
        named.append(f"{block} (documents {documents.start} to {documents.stop - 1})")
    return (
        f"step {step}: loss {loss}, gradient norm {norm}"
        + (f", alpha {alpha:g}" if alpha is not None else "")
        + f"; blocks {', '.join(named)}{', ...' if len(blocks) > 8 else ''}"
    )


def _last_whole(output: Path) -> str:
    last = next(reversed(whole_states(output / "checkpoints")), None)
    return "There is no checkpoint to go on from" if last is None else f"The last whole checkpoint is {last}"


def _show(bar: tqdm, line: dict, timing: dict, attention: dict) -> None:
    shown = {"tokens/s": f"{timing['tokens_per_second']:,.0f}"}
    if line["loss"] is not None:
        shown = {"loss": f"{line['loss']:.4f}", **shown}
    if line["alpha"] is not None:
        shown["alpha"] = f"{line['alpha']:.3f}"
    if attention:
        shown["support"] = f"{attention['support']:.1f}"
    bar.set_postfix(shown, refresh=False)
