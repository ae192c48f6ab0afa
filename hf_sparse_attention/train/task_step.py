"""One training step on a batch of a fixed shape, of which nothing waits for the device: parameters, optimizer, rate
and the sum of losses stay there, so that the whole step can be captured as a CUDA graph. (Outside of one the search of
Transformers for packed documents does wait, once a step.)"""

from __future__ import annotations

import math

import torch
from transformers import PreTrainedModel

from ..tasks.samples import Samples
from .recipe import parameter_groups
from .task_arguments import TrainTaskArguments
from .task_model import answer_loss

# Steps before a capture: kernels are compiled, the optimizer's state is made.
_WARM_UP = 3


def working_precision(arguments: TrainTaskArguments, device: torch.device) -> torch.autocast:
    """The context in which the model computes, in training, validation and test alike."""
    low = torch.bfloat16 if arguments.precision == "bfloat16" else None
    # A cast kept from an earlier step would be of old parameters when a graph is replayed.
    return torch.autocast(device.type, dtype=low, enabled=low is not None, cache_enabled=False)


class TaskStep:
    """Trains a model on batches of `shape` (samples, width).

    `loss_sum` adds up the losses until `read_loss` is called, which is what waits for the device.
    """

    def __init__(
        self, model: PreTrainedModel, arguments: TrainTaskArguments, shape: tuple[int, int], device: torch.device
    ):
        self.model, self.device, self.clip = model, device, arguments.clip or math.inf
        self.called = torch.compile(model) if arguments.compile else model
        self.arguments = arguments
        self.wants_graph, self.graph, self.eager_steps = arguments.cuda_graph, None, 0
        groups = parameter_groups(
            model, learning_rate=0.0, new_learning_rate=None, weight_decay=arguments.weight_decay
        )
        self.optimizer = torch.optim.AdamW(
            groups,
            lr=0.0,
            betas=(arguments.beta1, arguments.beta2),
            fused=True,
            capturable=device.type == "cuda",
        )
        self.rate = torch.zeros((), device=device)
        self._share_rate()
        self.parameters = [parameter for group in groups for parameter in group["params"]]
        self.tokens = torch.zeros(shape, dtype=torch.long, device=device)
        self.targets = torch.zeros(shape, dtype=torch.long, device=device)
        self.loss_sum = torch.zeros((), device=device)
        self.norm = torch.zeros((), device=device)
        self.steps_summed = 0
        # Captured kernels are replayed on this stream too, so that copies into the batch stay in order.
        self.stream = torch.cuda.Stream(device) if self.wants_graph else None

    def _share_rate(self) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate

    def __call__(self, batch: Samples, rate: float) -> None:
        """One step at a learning rate; returns before the device is done with it."""
        if self.stream is None:
            self._load(batch, rate)
            self._step()
        else:
            # For what was done to the parameters outside, such as their making, or a look at them.
            self.stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self.stream):
                self._load(batch, rate)
                self._graphed_step()
        self.steps_summed += 1

    def _load(self, batch: Samples, rate: float) -> None:
        for place, array in ((self.tokens, batch.tokens), (self.targets, batch.targets)):
            values = torch.from_numpy(array)
            # From pinned memory the copy does not hold up the host; PyTorch keeps it until the copy is done.
            place.copy_(values.pin_memory() if self.device.type == "cuda" else values, non_blocking=True)
        self.rate.fill_(rate)

    def _step(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None
        with working_precision(self.arguments, self.device):
            logits = self.called(input_ids=self.tokens, use_cache=False).logits
        loss = answer_loss(logits, self.targets)
        loss.backward()
        self.norm.copy_(torch.nn.utils.clip_grad_norm_(self.parameters, self.clip))
        self.optimizer.step()
        self.loss_sum += loss.detach()

    def _graphed_step(self) -> None:
        if self.graph is not None:
            self.graph.replay()
        elif self.eager_steps < _WARM_UP:
            self._step()
            self.eager_steps += 1
        else:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=self.stream):
                self._step()
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

    def wait(self) -> None:
        """Returns when the steps so far are done: before anything else reads the parameters."""
        if self.stream is not None:
            self.stream.synchronize()

    def state(self) -> dict:
        """Parameters and optimizer, to be saved."""
        self.wait()
        return {
            "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(),
            "loss_sum": self.loss_sum, "steps_summed": self.steps_summed,
        }  # fmt: skip

    def load(self, state: dict) -> None:
        """Takes up a saved state; only before the first step, as a graph knows where its numbers lie."""
        self.model.load_state_dict(state["model"])
        # A run may go on on another device.
        for group in state["optimizer"]["param_groups"]:
            group["capturable"] = self.device.type == "cuda"
        self.optimizer.load_state_dict(state["optimizer"])
        self._share_rate()
        self.loss_sum.copy_(state["loss_sum"])
        self.steps_summed = state["steps_summed"]
