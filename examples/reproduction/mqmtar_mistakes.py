"""What a trained MQMTAR model gets wrong: python examples/reproduction/mqmtar_mistakes.py RUN [--lengths 64 1024]

A value has two letters. Having said the first, a model can find the second by the key that was asked, or by the letter
it has just said, which is the right value's only as long as no other value in the haystack begins with it. RUN is the
folder of a run of `train-task`. The last column is what a model would have that never makes another mistake and takes
one of the values that begin alike, each as likely.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_sparse_attention import tables
from hf_sparse_attention.tasks.inputs import trained_task
from hf_sparse_attention.tasks.recall import COLON, ITEM, MultiQueryRecall
from hf_sparse_attention.tasks.samples import NO_TARGET, Samples

COLUMNS = (
    "length", "exact match", "value begins alone", "wrong", "others begin alike", "first letter wrong",
    "second letter wrong", "then another's", "exact match by first letters",
)  # fmt: skip


def questions(sample: Samples, queries: int) -> tuple[np.ndarray, np.ndarray]:
    """Letters of the values in the haystack (pairs, 2) and of those that are asked (queries, 2), of one sample."""
    haystack = sample.tokens[0, 1 : sample.lengths[0] + 1]
    colons = np.flatnonzero(haystack == COLON)
    asked = sample.targets[0][sample.targets[0] != NO_TARGET]
    values = np.stack([haystack[colons + 1], haystack[colons + 2]], axis=1)
    return values, asked[: ITEM * queries].reshape(-1, ITEM)[:, :2]


@torch.inference_mode()
def said(model: PreTrainedModel, sample: Samples, queries: int) -> tuple[np.ndarray, bool]:
    """Letters that are likeliest at the places of the answer (queries, 2), and whether the whole answer is right."""
    tokens = torch.from_numpy(sample.tokens).to(model.device)
    asked = sample.targets[0] != NO_TARGET
    logits = model(input_ids=tokens, use_cache=False, logits_to_keep=tokens.shape[1] - int(asked.argmax())).logits[0]
    if not logits.isfinite().all():
        raise ValueError("logits of the model are not finite (NaN or infinity): what it says is no answer")
    tokens = logits.argmax(-1).cpu().numpy()[asked[asked.argmax() :]]
    whole = bool((tokens == sample.targets[0][asked]).all())
    return tokens[: ITEM * queries].reshape(-1, ITEM)[:, :2], whole


def mistakes(model: PreTrainedModel, task: MultiQueryRecall, length: int, count: int) -> list[str]:
    """A row of the table."""
    exact, alone, alone_wrong, alike, first, second, another, expected = 0, 0, 0, 0, 0, 0, 0, 0.0
    for sample in tqdm(_single(task, length, count), total=count, desc=f"length {length}", disable=None):
        values, asked = questions(sample, task.queries)
        answers, whole = said(model, sample, task.queries)
        exact += whole
        share = 1.0
        for right, answer in zip(asked, answers, strict=True):
            begin_alike = values[values[:, 0] == right[0]]
            # Several keys may have the same value, and each is then right.
            same = (begin_alike == right).all(1)
            share *= same.mean()
            if same.all():
                alone += 1
                alone_wrong += bool((answer != right).any())
                continue
            alike += 1
            first += bool(answer[0] != right[0])
            wrong = bool(answer[1] != right[1])
            second += wrong
            another += wrong and answer[1] in begin_alike[:, 1]
        expected += share
    numbers = [f"{number:,}" for number in (alone, alone_wrong, alike, first, second, another)]
    return [f"{length:,}", f"{100 * exact / count:.1f}", *numbers, f"{100 * expected / count:.1f}"]


def _single(task: MultiQueryRecall, length: int, count: int) -> Iterator[Samples]:
    for block in task.fixed_blocks(length, count):
        for number in range(len(block)):
            yield block[number : number + 1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a run, with model/")
    parser.add_argument("--lengths", type=int, nargs="+", default=[64, 1024], help="tokens of the haystack")
    parser.add_argument("--samples", type=int, default=100, help="test samples of each length")
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
    if task.name != MultiQueryRecall.name:
        parser.error(f"{options.run} is a run of {task.name}, this reads those of {MultiQueryRecall.name}")
    for length in options.lengths:
        try:
            task.check_lengths((length, length))
        except ValueError as error:
            parser.error(str(error))
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    rows = [mistakes(model, task, length, options.samples) for length in options.lengths]
    print(tables.markdown(COLUMNS, rows))


if __name__ == "__main__":
    main()
