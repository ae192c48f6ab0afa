"""Packing: documents that do not see each other, every block once an epoch, streams that go on from their state."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_sparse_attention.train.packing import Blocks, ShuffledBlocks, StreamedBlocks, batch_of, pack

pytest.importorskip("accelerate")


def lists(count=40, seed=0, longest=50):
    draw = np.random.default_rng(seed)
    return [draw.integers(3, 500, size=draw.integers(1, longest)).tolist() for _ in range(count)]


def blocks_of(documents, block_size=16):
    return Blocks(*pack(iter(documents), 512), block_size)


def test_documents_are_kept_apart():
    documents = [[10, 11, 12], [20, 21, 22, 23, 24, 25], [30], [40, 41]]
    batch = batch_of(*blocks_of(documents, 4).rows(np.arange(3)))
    assert batch["input_ids"].tolist() == [[10, 11, 12, 20], [21, 22, 23, 24], [25, 30, 40, 41]]
    # A document that goes on in the next block starts there again at 0.
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0], [0, 1, 2, 3], [0, 0, 0, 1]]
    assert batch["labels"].tolist() == [[-100, 11, 12, -100], [-100, 22, 23, 24], [-100, -100, -100, 41]]


def test_counted_labels_and_documents():
    blocks = blocks_of(lists())
    starts = [*blocks.starts, len(blocks.tokens)]
    for number in range(len(blocks)):
        tokens, positions = blocks.rows(np.array([number]))
        assert blocks.labels[number] == (batch_of(tokens, positions)["labels"] != -100).sum()
        for document in blocks.documents(number):
            assert starts[document] < (number + 1) * 16 and starts[document + 1] > number * 16
    assert sum(len(blocks.documents(number)) for number in range(len(blocks))) >= 40 - 1


@pytest.mark.parametrize("map_name", [None, "asentmax", "entmax", "ssmax", "adaptive_entmax"])
def test_packed_loss_is_that_of_separate_documents(home, map_name):
    chosen = {} if map_name is None else {"attn_implementation": map_name}
    model = AutoModelForCausalLM.from_pretrained(home / "dense", **chosen).eval()
    documents = [tokens for tokens in lists(seed=3, longest=30) if len(tokens) > 1]
    blocks = blocks_of(documents, 60)
    batch = {name: torch.from_numpy(value) for name, value in batch_of(*blocks.rows(np.arange(len(blocks)))).items()}
    total = count = 0
    with torch.no_grad():
        packed = model(**batch, use_cache=False).loss.item()
        for tokens, positions in zip(*blocks.rows(np.arange(len(blocks))), strict=True):
            for piece in np.split(tokens, np.flatnonzero(positions == 0)[1:]):
                if len(piece) > 1:
                    ids = torch.from_numpy(piece)[None]
                    total += model(input_ids=ids, labels=ids).loss.item() * (len(piece) - 1)
                    count += len(piece) - 1
    assert count == blocks.labels.sum()
    assert packed == pytest.approx(total / count, abs=1e-5)


def test_every_epoch_has_every_block_once_in_another_order():
    blocks = blocks_of(lists())
    walk = ShuffledBlocks(blocks, seed=5)
    orders = [walk.take(len(blocks), slice)[2] for _ in range(2)]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(len(blocks)))
    assert orders[0] != orders[1]
    again = ShuffledBlocks(blocks, seed=5)
    again.load_state_dict({"consumed": len(blocks)})
    assert again.take(len(blocks), slice)[2] == orders[1]


def test_skipping_is_taking_without_looking():
    for make in (lambda: ShuffledBlocks(blocks_of(lists()), seed=5), lambda: streamed(lists(), seed=5)):
        one, other = make(), make()
        one.take(70, slice)
        other.skip(70)
        (first, count, numbers), (second, other_count, other_numbers) = one.take(9, slice), other.take(9, slice)
        assert all((first[name] == second[name]).all() for name in first)
        assert (count, numbers) == (other_count, other_numbers)


def streamed(documents, seed, buffer=4):
    texts = [" ".join(map(str, tokens)) for tokens in documents]
    return StreamedBlocks(
        lambda: iter(texts), lambda some: ([int(word) for word in text.split()] for text in some), 16, seed, buffer
    )


def test_streaming_packs_the_same_blocks():
    documents = lists()
    blocks = blocks_of(documents)
    walk = streamed(documents, seed=None)
    for _ in range(2):
        batch, labels, _ = walk.take(len(blocks), slice)
        wanted = batch_of(*blocks.rows(np.arange(len(blocks))))
        assert all((batch[name] == wanted[name]).all() for name in wanted)
        assert labels == blocks.labels.sum()
    # A document that was shuffled is still known by its number.
    named = streamed(documents, seed=1)
    batch, _, numbers = named.take(len(blocks), slice)
    order = {tuple(row): number for number, row in enumerate(wanted["input_ids"].tolist())}
    for row, number in zip(batch["input_ids"].tolist(), numbers, strict=True):
        assert named.documents(number) == blocks.documents(order[tuple(row)])
    shuffled, _, _ = streamed(documents, seed=1).take(len(blocks), slice)
    assert not (shuffled["input_ids"] == wanted["input_ids"]).all()
    assert sorted(shuffled["input_ids"].tolist()) == sorted(wanted["input_ids"].tolist())


@pytest.mark.parametrize("taken", [1, 7, 100])
def test_streaming_goes_on_from_its_state(taken):
    walk, other = streamed(lists(), seed=2), streamed(lists(), seed=2)
    walk.take(taken, slice)
    state = walk.state_dict()
    plain = json.loads(json.dumps({key: value for key, value in state.items() if not isinstance(value, np.ndarray)}))
    other.load_state_dict({**state, **plain})
    for _ in range(3):
        (one, count, numbers), (two, other_count, other_numbers) = walk.take(9, slice), other.take(9, slice)
        assert all((one[name] == two[name]).all() for name in one)
        assert (count, numbers) == (other_count, other_numbers)
