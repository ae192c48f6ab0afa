"""What the dense pass leaves for the others: which tiles can hold weight, by tile of queries."""

from dataclasses import dataclass

import torch

from .configurations import TILE


@dataclass(frozen=True)
class Sparse:
    """What may be taken apart: tiles in which few queries are alive, that is, have a key above their bound.

    rows (B, H, N/TILE, K/TILE) uint8: how many are in each listed tile. queue: numbers of the rows of the lists in
    which there are enough such tiles, in any order; queued[1] says how many. strays (B, H, N/TILE) int32: zeros.
    """

    rows: torch.Tensor
    queue: torch.Tensor
    queued: torch.Tensor
    strays: torch.Tensor


@dataclass(frozen=True)
class Lists:
    """Tiles that can hold weight, ascending, per TILE queries; a pair of such rows is walked together or row by row.

    tiles (B, H, N/TILE, K/TILE) int16 and counts (B, H, N/TILE), -1 where the pair is walked together and less where
    `near` has settled the tile; pairs and pair_counts the same per 2 TILE queries, -1 where it is not; tile_map
    (B, H, K/TILE, N/TILE) to walk along queries: 0 where not listed, for visible ranges 2 where every row sees the
    tile whole, else 1, APART where strays took its place. sparse: where strays are to be sought.
    """

    tiles: torch.Tensor
    counts: torch.Tensor
    pairs: torch.Tensor | None
    pair_counts: torch.Tensor | None
    tile_map: torch.Tensor | None
    sparse: Sparse | None = None

    def walks(self):
        """(rows walked together, their lists, the lengths) of both kinds of rows."""
        yield TILE, self.tiles, self.counts
        if self.pairs is not None:
            yield 2 * TILE, self.pairs, self.pair_counts
