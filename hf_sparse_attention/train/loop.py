"""Training of a dense or sparse model with a sparse attention map: one stage of it, top to bottom."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from ..files import write_json
from ..models import set_alpha
from .arguments import TrainArguments
from .data import tensors_of
from .distributed import all_agree, clip_gradients, is_sharded, put_parameters, whole_parameters
from .faults import explain_no_memory, explain_not_finite
from .job import Job, decide
from .learner import Learner
from .matching import end_matching
from .progress import Progress
from .reading import Reading
from .recipe import idle_parameters
from .run import checkpoint_to_go_on_from, finished_summary, print_summary, save_model, summary_of
from .state import read_state
from .zero import GradientWatch, is_zero


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
    begun = time.perf_counter()
    job = decide(arguments)
    arguments, accelerator = job.arguments, job.accelerator
    if arguments.resume == "auto":
        finished = finished_summary(job.output, arguments, job.identity)
        if finished is not None:
            accelerator.print(f"{job.output} holds this run, finished: nothing to do")
            return finished
    checkpoint = checkpoint_to_go_on_from(job.output, arguments, job.identity)
    # A launcher that started fewer processes than it was meant to says nothing of it.
    accelerator.print(
        f"{job.processes} process{'es' if job.processes > 1 else ''} on {accelerator.device.type}, "
        f"{job.step_tokens // job.phases[0].block_size:,} blocks of {job.phases[0].block_size:,} tokens in a step"
    )
    reading = Reading(job, first_token=first_token, packed=packed)
    learner = Learner(job, reading)
    reading.begin(0 if checkpoint is None else read_state(checkpoint)["step"])
    if begin is not None:
        begin()
    progress = Progress(job, reading, learner, checkpoint, begun)
    if progress.start == 0:
        progress.evaluate(0)
    steps = _Steps(job, reading, learner, progress)
    progress.open_window()
    learner.learn()
    with tqdm(
        total=arguments.steps, initial=progress.start, desc="train", unit="step",
        disable=not accelerator.is_main_process, mininterval=0.5 if sys.stderr.isatty() else 10, dynamic_ncols=True,
    ) as bar:  # fmt: skip
        for step in range(progress.start, arguments.steps):
            norm, alpha = steps.take(step)
            bar.update()
            if (step + 1) % arguments.log_every == 0 or step + 1 == arguments.steps:
                progress.log(step + 1, norm, alpha, bar)
            progress.settle(step + 1)
    return _finish(job, reading, learner, progress)


class _Steps:
    """Steps of a stage: gradients, a look at whether they are sound, the update."""

    def __init__(self, job: Job, reading: Reading, learner: Learner, progress: Progress):
        self.job, self.reading, self.learner, self.progress = job, reading, learner, progress
        # Whether it was seen that every trainable parameter gets a gradient.
        self.checked = False

    def take(self, step: int) -> tuple[float | None, float | None]:
        """The step after so many; returns the gradient's norm, None if memory ran out, and alpha."""
        learner, progress, done = self.learner, self.progress, step + 1
        self.reading.reach(step)
        alpha = learner.begin_step(step)
        batch, parts, labels, numbers = self.reading.take()
        loss, report = self._gradients(batch, parts, labels, numbers, done)
        losses = norm = None
        if report is None:
            losses, norm = self._gathered(loss)
            again = partial(self._again, batch, parts, labels)
            report = self._unsound(losses, norm, alpha, again, numbers, done)
        if not self.checked and report is None and (alpha != 1.0 or self.job.target == 1.0):
            _warn_of_idle(learner.model, self.job.accelerator)
            self.checked = True
        progress.count_tokens()
        if report is None:
            learner.optimizer.step()
            progress.count(losses)
        else:
            progress.count_skipped(done, report)
        learner.optimizer.zero_grad()
        return norm, alpha

    def _gradients(self, batch, parts, labels, numbers, done: int) -> tuple[torch.Tensor | None, str | None]:
        """This process's share of the losses, or why the step is left out."""
        job, learner = self.job, self.learner
        loss = report = None
        watch = None if self.checked or not is_zero(learner.model) else GradientWatch(learner.model)
        try:
            loss = learner.gradients(batch, parts, labels)
        except torch.OutOfMemoryError as error:
            report = explain_no_memory(error, learner.model, numbers, self.reading.data, step=done)
            # The other processes wait for this one's gradients: no step can be skipped by one of several.
            if job.arguments.on_nonfinite == "stop" or job.processes > 1 or is_zero(learner.model):
                self.progress.stop(done, report, error)
            learner.forget()
        if watch is not None:
            all_agree(job.accelerator, watch.close())
            self.checked = True
        return loss, report

    def _gathered(self, loss: torch.Tensor) -> tuple[list[float], float]:
        """Losses of all processes, when matching one for each layer, and the norm of the clipped gradient."""
        accelerator, learner = self.job.accelerator, self.learner
        loss = accelerator.reduce(loss, "sum")
        norm = clip_gradients(accelerator, learner.model, learner.wrapped, self.job.arguments.clip, loss)
        # Both in one wait for the device.
        *losses, norm = torch.cat([loss, norm.to(loss.device)[None]]).tolist()
        return losses, norm

    def _unsound(
        self, losses: list[float], norm: float, alpha: float | None, again: Callable, numbers, done: int
    ) -> str | None:
        """Why the step is left out, None if loss and gradient are finite."""
        job, learner, progress = self.job, self.learner, self.progress
        loss, scaler = sum(losses) / len(losses), job.accelerator.scaler
        # The scaler of fp16 skips a step with an infinite norm itself: that is how it finds its scale.
        if math.isfinite(loss) and (math.isfinite(norm) or scaler is not None):
            return None
        values = f"step {done}: loss {loss}, gradient norm {norm}" + (
            f", alpha {alpha:g}" if alpha is not None else ""
        )
        report = explain_not_finite(job.accelerator, learner.model, again, numbers, self.reading.data, values=values)
        if job.arguments.on_nonfinite == "stop":
            progress.stop(done, report)
        if spoiled := progress.newly_spoiled():
            progress.stop(done, f"{report}; {spoiled[0]} is not finite itself, which no later step mends")
        if scaler is not None:
            # Its gradients were unscaled, which can be done once between two updates.
            scaler.update()
        return report

    def _again(self, batch: dict, parts: list[slice], labels: torch.Tensor) -> None:
        for part in parts:
            self.learner.share_of_loss(tensors_of(batch, part, self.job.accelerator.device), labels)


def _warn_of_idle(model, accelerator) -> None:
    if idle := idle_parameters(model):
        accelerator.print(f"warning: {len(idle)} trainable parameters get no gradient, first {idle[0]}")


def _finish(job: Job, reading: Reading, learner: Learner, progress: Progress) -> dict:
    """Saves the model and the summary."""
    arguments, accelerator, model, run = job.arguments, job.accelerator, learner.model, progress.run
    learner.begin_step(arguments.steps)
    epochs = reading.epochs(run["tokens"])
    summary = summary_of(
        job.source, job.settings, arguments, accelerator, learner.counts, run, job.identity, epochs
    )  # fmt: skip
    # Losses at different alphas are of different functions.
    summary["eval_alpha"] = None if job.target is None else [job.alpha(step) for step, _ in run["held_out"]]
    if is_sharded(model):
        # No process has the whole model: the first one puts it together again.
        values = whole_parameters(accelerator, model)
        if accelerator.is_main_process:
            model = learner.build()
            put_parameters(model, values)
            if job.target is not None:
                set_alpha(model, job.alpha(arguments.steps))
    if accelerator.is_main_process:
        end_matching(model)
        save_model(job.output / "model", job.source, model, arguments, summary)
        write_json(job.output / "summary.json", summary)
        print_summary(job.output, summary)
    accelerator.wait_for_everyone()
    for tracker in accelerator.trackers:
        tracker.finish()
    accelerator.free_memory()
    return summary
