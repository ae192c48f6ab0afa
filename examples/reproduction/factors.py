"""How far the factor on the queries has gone: python examples/reproduction/factors.py RUN [--lengths 64 1024]

RUN is the folder of a run of `train-task` with ASEntmax or SSMax. For each layer and length: quantiles over the tokens
of the fixed test samples and the heads that have a factor. 1 is what a model without one has.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_sparse_attention import tables
from hf_sparse_attention.attention import record
from hf_sparse_attention.tasks.exact_match import score
from hf_sparse_attention.tasks.inputs import trained_task
from hf_sparse_attention.tasks.samples import SyntheticTask

QUANTILES = (0.05, 0.5, 0.95, 1.0)
COLUMNS = ("layer", "length", "5 %", "median", "95 %", "largest")


def factors(model: PreTrainedModel, task: SyntheticTask, length: int, count: int) -> dict[int, torch.Tensor]:
    """Layer -> every factor of a token and a head, in float64.

    Raises:
        ValueError: if no layer has one.
    """
    found = {}

    def keep(module, query, key, tau, *, query_scale, **arguments) -> None:
        if query_scale is None:
            return
        by_head = query_scale[..., 0].double().cpu().transpose(0, 1).flatten(1)
        # Heads that are not scaled have exactly 1.
        found.setdefault(module.layer_idx, []).append(by_head[(by_head != 1).any(1)].flatten())

    with record(keep):
        score(model, task.fixed_blocks(length, count), batch_tokens=65_536)
    if not found:
        raise ValueError("no layer of the model has a factor: it is of another map than asentmax or ssmax")
    return {layer: torch.cat(parts) for layer, parts in sorted(found.items())}


def quantiles(values: torch.Tensor) -> list[float]:
    """`QUANTILES` of them, each the value of a token; 1 where no head's factor has left it."""
    ordered = values.sort().values if len(values) else torch.ones(1)
    return [ordered[round(share * (len(ordered) - 1))].item() for share in QUANTILES]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a run, with model/")
    parser.add_argument("--lengths", type=int, nargs="+", default=[64], help="lengths of the samples")
    parser.add_argument("--samples", type=int, default=50, help="test samples of each length")
    options = parser.parse_args()
    if options.samples < 1:
        parser.error(f"--samples is {options.samples}; take at least 1")
    if not (options.run / "model").is_dir():
        parser.error(f"{options.run} has no model/; RUN is the folder that has it once it is trained")
    try:
        task = trained_task(options.run / "model", str(options.run))
        model = AutoModelForCausalLM.from_pretrained(options.run / "model").eval()
    except (OSError, ValueError) as error:
        parser.error(str(error))
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    rows = []
    try:
        for length in options.lengths:
            for layer, values in factors(model, task, length, options.samples).items():
                numbers = [f"{number:,.2f}" for number in quantiles(values)]
                rows.append([str(layer), f"{length:,}", *numbers])
    except ValueError as error:
        parser.error(str(error))
    print(tables.markdown(COLUMNS, rows))


if __name__ == "__main__":
    main()
