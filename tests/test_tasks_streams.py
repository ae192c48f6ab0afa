"""Layouts of training batches: every sample is there once, whole, and nothing else."""

import numpy as np
import pytest

from hf_sparse_attention.tasks.samples import NO_TARGET, PAD
from hf_sparse_attention.tasks.streams import CHUNK, Layout, Stream, laid_out, packed_layout
from hf_sparse_attention.tasks.synthetic import SYNTHETIC, make_task


def stream_of(name="copy", *, first=0, end=3, batch=128, layout=None, **settings):
    task = make_task(name, settings)
    layout = layout or packed_layout(task, batch, task.default_lengths)
    return Stream(task, 5, batch, task.default_lengths, layout, first, end)


def samples_in(array):
    """(tokens, targets) of every sample of (planes, rows, width), as bytes, and the tokens of no sample."""
    tokens, targets, positions = array
    found, rest = [], []
    for row in range(tokens.shape[0]):
        starts = [*np.flatnonzero(positions[row] == 0), tokens.shape[1]]
        for begin, end in zip(starts[:-1], starts[1:], strict=True):
            assert (positions[row, begin:end] == np.arange(end - begin)).all()
            one = (tokens[row, begin:end], targets[row, begin:end])
            if end - begin > 1:
                found.append(tuple(part.astype(np.int64).tobytes() for part in one))
            else:
                rest.append((int(one[0][0]), int(one[1][0])))
    return sorted(found), set(rest)


@pytest.mark.parametrize("name", SYNTHETIC)
def test_every_sample_is_there_once_and_whole(name):
    stream = stream_of(name)
    task = stream.task
    assert stream.layout.packed and stream.layout.width <= 256
    padded = 128 * task.width(task.default_lengths[1])
    assert stream.layout.rows * stream.layout.width < 0.9 * padded
    (arrays,) = stream
    assert arrays.shape == (3, 3, stream.layout.rows, stream.layout.width) and arrays.dtype == np.int16
    for number, array in enumerate(arrays):
        samples = task.training_batch(number, seed=5)
        expected = sorted(
            (tokens[:size].tobytes(), targets[:size].tobytes())
            for tokens, targets, size in zip(samples.tokens, samples.targets, task.width(samples.lengths), strict=True)
        )
        found, rest = samples_in(array)
        assert found == expected and rest <= {(PAD, NO_TARGET)}


def test_a_sample_a_row_is_the_batch_itself():
    stream = stream_of(layout=Layout(128, 131))
    (arrays,) = stream
    for number, array in enumerate(arrays):
        samples = stream.task.training_batch(number, seed=5)
        assert (array[0] == samples.tokens).all() and (array[1] == samples.targets).all() and len(array) == 2


def test_a_stream_begins_anywhere():
    whole = np.concatenate(list(stream_of(end=40)))
    assert (np.concatenate(list(stream_of(first=23, end=40))) == whole[23:]).all()


def test_arrays_hold_all_batches_in_order_and_what_does_not_fit_is_alone():
    # Two samples of 99 tokens on average; some batches have a row of more than 206.
    narrow = stream_of(end=60, layout=Layout(64, 206, packed=True))
    arrays = list(narrow)
    alone = [array for array in arrays if array.shape[2:] != (64, 206)]
    assert 0 < len(alone) < 30 and all(array.shape == (1, 3, 128, 131) for array in alone)
    assert sum(map(len, arrays)) == 60 and max(map(len, arrays)) <= CHUNK
    number = 0
    for array in arrays:
        for one in array:
            samples = narrow.task.training_batch(number, seed=5)
            expected = laid_out(narrow.task, samples, Layout(128, 131))
            found, wanted = samples_in(one)[0], samples_in(np.stack([*expected, _places_of(samples, narrow.task)]))[0]
            assert found == wanted
            number += 1


def _places_of(samples, task):
    place = np.arange(samples.tokens.shape[1])
    return np.where(place < task.width(samples.lengths)[:, None], place, 0)


def test_nearly_all_batches_fit_and_another_sample_in_a_row_pays():
    for name in ("copy", "mqmtar"):
        stream = stream_of(name, end=300)
        assert sum(array.shape[2:] != (stream.layout.rows, stream.layout.width) for array in stream) <= 3
    # One length: rows of several samples save nothing.
    task = make_task("copy")
    assert packed_layout(task, 128, (64, 64)) == Layout(128, 131)
    # Rows of two would be longer than the kernels for few keys take.
    assert packed_layout(task, 128, (100, 120)) == Layout(128, 243)


def test_an_array_takes_every_token():
    wide = stream_of("copy", end=1, symbols=40_000)
    (array,) = wide
    assert array.dtype == np.int32 and array[0, 0].max() > 2**15
    samples = wide.task.training_batch(0, seed=5)
    assert array[0, 0].max() == samples.tokens.max()
