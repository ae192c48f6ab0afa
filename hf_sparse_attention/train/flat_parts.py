"""Parts of a tensor that is spread flat, as DeepSpeed does: some of its elements in row-major order enter, leave the
boxes as which torch's checkpoints write and read them, so that the same file serves every way of spreading."""

from __future__ import annotations

import math

import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType


class FlatPart(torch.Tensor):
    """Elements `first` to `first + len(values)` of a tensor of `shape`, row after row, for torch's checkpoints, which
    know boxes: such a run is a few of them, each a view of `values`.

    A tensor in name, as what is no tensor would be pickled; of its methods only those here have a meaning.
    """

    @staticmethod
    def __new__(cls, shape: torch.Size, first: int, values: torch.Tensor):
        part = values.as_subclass(cls)
        part.whole_shape, part.held, part.boxes = shape, values, {}
        start = 0
        for offsets, sizes in boxes(tuple(shape), first, first + len(values)):
            count = math.prod(sizes)
            part.boxes[torch.Size(offsets)] = values[start : start + count].view(sizes)
            start += count
        return part

    def size(self) -> torch.Size:
        return self.whole_shape

    def __create_write_items__(self, name: str, _) -> list[WriteItem]:
        properties = TensorProperties.create_from_tensor(self.held)
        return [
            WriteItem(
                index=MetadataIndex(name, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk=chunk, properties=properties, size=self.whole_shape),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(offsets, box.shape) for offsets, box in self.boxes.items()]

    def __get_tensor_shard__(self, index: MetadataIndex) -> torch.Tensor:
        return self.boxes[index.offset]


def boxes(shape: tuple[int, ...], first: int, end: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(offsets, sizes) of boxes that together are the elements `first` to `end` of a tensor in row-major order."""
    if first >= end:
        return []
    if len(shape) < 2:
        return [((first,), (end - first,))] if shape else [((), ())]
    row = math.prod(shape[1:])

    def within(number: int, start: int, stop: int):
        inner = boxes(shape[1:], max(start - number * row, 0), min(stop - number * row, row))
        return [((number, *offsets), (1, *sizes)) for offsets, sizes in inner]

    top, bottom = -(-first // row), end // row
    if top > bottom:
        return within(bottom, first, end)
    found = within(top - 1, first, top * row) if first < top * row else []
    if bottom > top:
        found.append(((top, *(0 for _ in shape[1:])), (bottom - top, *shape[1:])))
    return found + within(bottom, bottom * row, end)
