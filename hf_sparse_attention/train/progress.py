"""What a stage has come to: its numbers, metrics.jsonl, evaluations and checkpoints, and when it must end before its
last step."""

from __future__ import annotations

import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import NoReturn

from tqdm import tqdm

from .faults import last_whole, spoiled_parameters
from .job import Job
from .learner import Learner
from .matching import matched, set_matching
from .measures import attention_statistics, held_out_loss
from .reading import Reading
from .run import Metrics, begin_run
from .state import save_state
from .throughput import peak_flops


class Progress:
    """The steps that are done, from the beginning or a checkpoint on.

    Args:
        checkpoint: where to go on from, None to begin.
        begun: when the process began its work, of `time.perf_counter`.

    Attributes:
        start: steps done before this process.
        run: numbers that a checkpoint keeps.
    """

    def __init__(self, job: Job, reading: Reading, learner: Learner, checkpoint: Path | None, begun: float):
        self.job, self.reading, self.learner, self.begun = job, reading, learner, begun
        self.start, self.run = begin_run(
            job.output, job.arguments, job.identity, checkpoint, job.accelerator, learner.model, learner.optimizer,
            reading.data,
        )  # fmt: skip
        self.earlier = self.run["seconds"]
        # A run from before counted its seconds alone.
        self.earlier_of_devices = self.run.setdefault("device_seconds", self.earlier * job.processes)
        self.metrics = Metrics(job.output / "metrics.jsonl", self.start, job.accelerator)
        if job.arguments.report_to:
            config = {key: str(value) for key, value in asdict(job.arguments).items()}
            job.accelerator.init_trackers(job.arguments.run_name, config=config)
        # Some models have rows of no token that are not numbers.
        self.spoiled_before = spoiled_parameters(job.accelerator, learner.model)
        self.peak = peak_flops(job.accelerator.device)

    def open_window(self) -> None:
        """Begins to measure time and tokens between two lines of metrics."""
        self.window_begun, self.window_tokens = time.perf_counter(), 0

    def evaluate(self, step: int) -> None:
        """Loss on what is held out, and what the attention does, at the alpha of a step."""
        job, learner, run = self.job, self.learner, self.run
        alpha = {} if (value := learner.begin_step(step)) is None else {"alpha": value}
        set_matching(learner.model, False)
        if self.reading.held_out is not None:
            loss = held_out_loss(learner.wrapped, self.reading.held_out_batches(), job.accelerator)
            if not math.isfinite(loss):
                # What is trained on is not the matter; the files of a run have no such number.
                job.accelerator.print(f"warning: at step {step} the held-out loss is {loss}")
                loss = None
            run["held_out"].append([step, loss])
            self.metrics.write(step, "eval", loss=loss, **alpha)
        if job.target is not None and job.arguments.statistics_blocks:
            looked = attention_statistics(learner.wrapped, self.reading.watched())
            run["attention"], by_layer = ({} if _not_finite(found) else found for found in looked)
            self.metrics.write(step, "attention", **alpha, **run["attention"])
            self.metrics.write(step, "layers", **by_layer)
        set_matching(learner.model, True)

    def stop(self, step: int, reason: str, error: BaseException | None = None) -> NoReturn:
        """Ends the run with an error."""
        self.metrics.write(step, "failed", reason=reason)
        raise RuntimeError(f"{reason}. {last_whole(self.job.output)}") from error

    def newly_spoiled(self) -> list[str]:
        """Parameters that were numbers when the run began and are not now."""
        spoiled = spoiled_parameters(self.job.accelerator, self.learner.model)
        return [name for name in spoiled if name not in self.spoiled_before]

    def count(self, losses: list[float]) -> None:
        """Counts a step that was made: its loss, when matching one for each layer."""
        window = self.run["window"]
        window["loss"] += sum(losses) / len(losses)
        window["steps"] += 1
        summed = window["layers"] or [0.0] * len(losses)
        window["layers"] = [one + other for one, other in zip(summed, losses, strict=True)]

    def count_skipped(self, step: int, reason: str) -> None:
        """Counts a step that was left out."""
        self.metrics.write(step, "skipped", reason=reason)
        self.run["skipped"] += 1

    def count_tokens(self) -> None:
        """Counts the tokens of a step."""
        self.run["tokens"] += self.job.step_tokens
        self.window_tokens += self.job.step_tokens

    def log(self, step: int, norm: float | None, alpha: float | None, bar: tqdm) -> None:
        """Writes a line of metrics, and begins the next one's window."""
        run, window, now = self.run, self.run["window"], time.perf_counter()
        if window["steps"]:
            run["loss"] = window["loss"] / window["steps"]
        line = {"loss": run["loss"], "gradient_norm": norm, "alpha": alpha}
        if norm is not None and not math.isfinite(norm):
            line["gradient_norm"] = None
        line |= {"learning_rate": self.learner.optimizer.param_groups[0]["lr"], "tokens": run["tokens"]}
        seconds = now - self.window_begun
        timing = {"tokens_per_second": self.window_tokens / seconds, "seconds": self.earlier + now - self.begun}
        if (flops := self.learner.flops[self.reading.phase]) and self.peak:
            run["utilisation"] = timing["tokens_per_second"] * flops / (self.peak * self.job.processes)
            timing["flop_utilisation"] = run["utilisation"]
        known = {key: value for key, value in line.items() if value is not None}
        self.metrics.write(step, "train", **known, timing=timing)
        if self.job.matches and window["steps"]:
            means = [value / window["steps"] for value in window["layers"]]
            named = zip(matched(self.learner.model), means, strict=True)
            self.metrics.write(step, "match", **{f"layer_{number}": value for (number, _), value in named})
        _show(bar, line, timing, run["attention"])
        window |= {"loss": 0.0, "steps": 0, "layers": []}
        self.window_begun, self.window_tokens = now, 0

    def settle(self, step: int) -> None:
        """Evaluates and saves after a step, as far as it is due; the time this takes is no training's."""
        arguments, pause = self.job.arguments, time.perf_counter()
        is_last = step == arguments.steps
        if step % arguments.eval_every == 0 or is_last:
            self.evaluate(step)
            self.learner.learn()
        self.run["seconds"] = self.earlier + time.perf_counter() - self.begun
        # It may have had another number of processes before.
        seconds = self.run["seconds"] - self.earlier
        self.run["device_seconds"] = self.earlier_of_devices + seconds * self.job.processes
        checkpoints = arguments.checkpoint_every and step % arguments.checkpoint_every == 0
        if (checkpoints or is_last) and (spoiled := self.newly_spoiled()):
            # Before it takes the place of a checkpoint, or of the model, that is whole.
            self.stop(step, f"step {step}: {spoiled[0]} is not finite after it")
        if arguments.checkpoint_every and (checkpoints or is_last):
            self._save(step)
        self.window_begun += time.perf_counter() - pause

    def _save(self, step: int) -> None:
        job, learner = self.job, self.learner
        self.metrics.flush()
        save_state(
            job.output / "checkpoints", job.accelerator, learner.model, learner.optimizer,
            self.reading.data.state_dict(), {**self.run, "identity": job.identity}, step=step,
            keep=job.arguments.keep_checkpoints,
        )  # fmt: skip


def _not_finite(numbers: dict[str, float]) -> bool:
    return not all(map(math.isfinite, numbers.values()))


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
