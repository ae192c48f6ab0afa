"""One training step on a batch of a fixed shape, of which nothing waits for the device: parameters, optimizer, rate
and the sum of losses stay there, so that the whole step can be captured as a CUDA graph. (Outside of one the search of
Transformers for packed documents does wait, once a step.)"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from transformers import PreTrainedModel

from ..models import new_parameter_names
from ..tasks.streams import CHUNK, Layout
from .muon import Muon, layer_matrices
from .recipe import parameter_groups
from .task_arguments import TrainTaskArguments
from .task_model import answer_loss

# Steps before a capture: kernels are compiled, the optimizer's state is made.
_WARM_UP = 3


def working_precision(precision: str, device: torch.device) -> torch.autocast:
    """The context in which a model computes in float32 or bfloat16."""
    low = torch.bfloat16 if precision == "bfloat16" else None
    # A cast kept from an earlier step would be of old parameters when a graph is replayed.
    return torch.autocast(device.type, dtype=low, enabled=low is not None, cache_enabled=False)


class TaskStep:
    """Trains a model on batches of one layout, several of which are handed over at a time.

    `loss_sum` adds up the losses until `read_loss` is called, which is what waits for the device.
    """

    def __init__(self, model: PreTrainedModel, arguments: TrainTaskArguments, layout: Layout, device: torch.device):
        self.model, self.device, self.clip = model, device, arguments.clip or math.inf
        self.arguments = arguments
        groups = parameter_groups(
            model, learning_rate=0.0, new_learning_rate=None, weight_decay=arguments.weight_decay
        )
        self.parameters = [parameter for group in groups for parameter in group["params"]]
        new_names = set(new_parameter_names(model))
        self.new = {id(parameter) for name, parameter in model.named_parameters() if name in new_names}
        self.muon = None
        if arguments.optimizer == "muon":
            matrices = layer_matrices(model, new_names)
            taken = {id(matrix) for matrix in matrices}
            self.muon = Muon(matrices, lr=0.0, weight_decay=arguments.weight_decay)
            groups = [
                {**group, "params": [item for item in group["params"] if id(item) not in taken]} for group in groups
            ]
        self.optimizer = torch.optim.AdamW(
            groups,
            lr=0.0,
            betas=(arguments.beta1, arguments.beta2),
            fused=True,
            capturable=device.type == "cuda",
        )
        # Of the map's own parameters, and of all others.
        self.new_rate, self.rate = torch.zeros((), device=device), torch.zeros((), device=device)
        self._share_rate()
        shape = (layout.planes, layout.rows, layout.width)
        # What a captured step reads: the batch whose turn it is, at an address that stays.
        self.chunk = torch.zeros((CHUNK, *shape), dtype=torch.int32, device=device)
        self.rates = torch.zeros(CHUNK, device=device)
        self.turn = torch.zeros(1, dtype=torch.long, device=device)
        self.batch = torch.zeros(shape, dtype=torch.long, device=device)
        self.other, self.left = None, 0
        self.loss_sum = torch.zeros((), device=device)
        self.norm = torch.zeros((), device=device)
        self.steps_summed = 0
        # Captured kernels are replayed on this stream too, so that copies into the batch stay in order.
        self.stream = torch.cuda.Stream(device) if arguments.cuda_graph else None
        self.function_changed()

    def function_changed(self, softmax: bool = False) -> None:
        """To be called when the model computes another function: it is compiled and captured anew.

        Args:
            softmax: whether it is that of alpha 1, in which a factor may be held.
        """
        self.wait()
        held = softmax and self.arguments.factor_while_softmax == "held"
        self.new_share = 0.0 if held else self.arguments.new_learning_rate_share
        self.compiled = torch.compile(self._loss) if self.arguments.compile else self._loss
        self.graph, self.eager_steps = None, 0

    def _share_rate(self) -> None:
        for optimizer in self._optimizers():
            for group in optimizer.param_groups:
                # They are a group of their own.
                group["lr"] = self.new_rate if id(group["params"][0]) in self.new else self.rate

    def _optimizers(self) -> list[torch.optim.Optimizer]:
        return [self.optimizer] if self.muon is None else [self.optimizer, self.muon]

    def hand_over(self, batches: np.ndarray, rates: list[float]) -> None:
        """Hands over the batches (batches, planes, rows, width) of the next steps, `CHUNK` at most, and their rates.

        Raises:
            ValueError: if earlier ones are left, or they are too many.
        """
        if self.left or len(batches) != len(rates) or not 0 < len(batches) <= CHUNK:
            raise ValueError(
                f"{len(batches)} batches and {len(rates)} rates are handed over while {self.left} are left; 1 to "
                f"{CHUNK} are taken when none is"
            )
        values, rates = torch.from_numpy(batches), torch.tensor(rates)
        if self.device.type == "cuda":
            # From pinned memory a copy does not hold up the host; PyTorch keeps it until the copy is done.
            values, rates = values.pin_memory(), rates.pin_memory()
        with self._on_stream():
            values = values.to(self.device, non_blocking=True)
            # Batches of another shape are not for a captured step.
            fits = batches.shape[1:] == self.chunk.shape[1:]
            self.other = None if fits else values
            if fits:
                self.chunk[: len(values)].copy_(values)
            self.rates[: len(values)].copy_(rates, non_blocking=True)
            self.turn.zero_()
        self.left = len(batches)

    @contextmanager
    def _on_stream(self) -> Iterator[None]:
        if self.stream is None:
            yield
            return
        # For what was done to the parameters outside, such as their making, or a look at them.
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            yield

    def __call__(self) -> None:
        """One step; returns before the device is done with it.

        Raises:
            ValueError: if no batch is left.
        """
        if not self.left:
            raise ValueError("no batch is left: hand some over")
        with self._on_stream():
            if self.other is not None:
                batch = self.other.index_select(0, self.turn)[0].long()
                self._step(self._loss, batch)
            elif self.stream is None:
                self._step(self.compiled, self._next())
            else:
                self._graphed_step()
        self.left -= 1
        self.steps_summed += 1

    def _next(self) -> torch.Tensor:
        return self.batch.copy_(self.chunk.index_select(0, self.turn)[0])

    def _loss(self, tokens: torch.Tensor, targets: torch.Tensor, positions: torch.Tensor | None) -> torch.Tensor:
        logits = self.model(input_ids=tokens, position_ids=positions, use_cache=False).logits
        return answer_loss(logits, targets)

    def _step(self, loss_of: Callable, batch: torch.Tensor) -> None:
        for parameter in self.parameters:
            parameter.grad = None
        self.rate.copy_(self.rates.index_select(0, self.turn)[0])
        self.new_rate.copy_(self.rate * self.new_share)
        tokens, targets, *positions = batch
        with working_precision(self.arguments.precision, self.device):
            loss = loss_of(tokens, targets, positions[0] if positions else None)
        loss.backward()
        self.norm.copy_(torch.nn.utils.clip_grad_norm_(self.parameters, self.clip))
        for optimizer in self._optimizers():
            optimizer.step()
        self.loss_sum += loss.detach()
        self.turn += 1

    def _graphed_step(self) -> None:
        if self.graph is not None:
            self.graph.replay()
        elif self.eager_steps < _WARM_UP:
            self._step(self.compiled, self._next())
            self.eager_steps += 1
        else:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=self.stream):
                self._step(self.compiled, self._next())
            self.graph = graph
            # Capturing computes nothing.
            graph.replay()

    def read_loss(self) -> tuple[float, float]:
        """Mean loss of the steps since it was read last, and the gradient norm of the last one; waits for both."""
        self.wait()
        loss, norm = torch.stack([self.loss_sum / max(1, self.steps_summed), self.norm]).tolist()
        self.loss_sum.zero_()
        self.steps_summed = 0
        return loss, norm

    def is_finite(self) -> bool:
        """Whether all parameters are numbers; waits for them."""
        self.wait()
        return all(bool(parameter.isfinite().all()) for parameter in self.parameters)

    def wait(self) -> None:
        """Returns when the steps so far are done: before anything else reads the parameters."""
        if self.stream is not None:
            self.stream.synchronize()

    def state(self) -> dict:
        """Parameters and optimizer, to be saved."""
        self.wait()
        state = {
            "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(),
            "loss_sum": self.loss_sum, "steps_summed": self.steps_summed,
        }  # fmt: skip
        return state if self.muon is None else {**state, "muon": self.muon.state_dict()}

    def load(self, state: dict) -> None:
        """Takes up a saved state; only before the first step, as a graph knows where its numbers lie."""
        self.model.load_state_dict(state["model"])
        # A run may go on on another device.
        for group in state["optimizer"]["param_groups"]:
            group["capturable"] = self.device.type == "cuda"
        self.optimizer.load_state_dict(state["optimizer"])
        if self.muon is not None:
            self.muon.load_state_dict(state["muon"])
        self._share_rate()
        self.loss_sum.copy_(state["loss_sum"])
        self.steps_summed = state["steps_summed"]
