"""A run that ends on the Hub: whether it can is asked before the first step; it is done after the last one."""

from __future__ import annotations

from pathlib import Path

from ..hub import PushArguments, push_model
from ..hub.push import check_repo_id
from ..hub.upload import check_online
from .arguments import TrainArguments


def check_push(arguments: TrainArguments) -> None:
    """Finds before the training what would keep its model from the Hub afterwards.

    Raises:
        ValueError: for options that do not fit together, or a model that is not published.
        OSError: without a connection or an access token.
    """
    if not arguments.push_to_hub:
        given = [name for name in ("hub_model_id", "hub_private") if getattr(arguments, name)]
        if given:
            raise ValueError(f"{', '.join(given)} needs push_to_hub")
        return
    if arguments.hub_model_id is None:
        raise ValueError("push_to_hub needs hub_model_id, where the model goes: owner/name")
    check_repo_id(arguments.hub_model_id, "hub_model_id")
    if arguments.map == "none":
        raise ValueError(
            "push_to_hub publishes sparse models, and map is 'none': push the dense one with Transformers"
        )
    if arguments.lora_rank and arguments.lora_save == "adapter":
        raise ValueError("push_to_hub publishes whole models, and lora_save is 'adapter': use merge")
    check_online()


def push_run(output: Path, arguments: TrainArguments) -> None:
    """Pushes `output/model` with the run's numbers in its card.

    Raises:
        OSError: if it did not get there; the run is finished all the same, and the error says how to go on.
    """
    try:
        push_model(PushArguments(str(output / "model"), arguments.hub_model_id, private=arguments.hub_private))
    except (OSError, ValueError) as error:
        private = " --private" if arguments.hub_private else ""
        raise OSError(
            f"the run is finished and its model is in {output / 'model'}, but not on the Hub: {error}. Go on with: "
            f"hf-sparse-attention push --model {output / 'model'} --repo_id {arguments.hub_model_id}{private}"
        ) from error
