"""Launch parameters per card family: no autotuning happens on the user's time.

Enters: head dimension, element size, device. Leaves: a `Configuration` with tile sizes, warps and pipeline depths.
`measured` names the card the row was tuned on, or is empty for a safe default.
"""

import json
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from functools import cache, wraps
from pathlib import Path

import torch

# Rows and columns of the tiles the lists speak of: what can be skipped is skipped in this unit.
TILE = 64


def _kept(function):
    """`functools.cache` that torch.compile passes by: it would do so by itself, with a warning to every user."""
    kept = cache(function)

    @wraps(function)
    def call(*arguments):
        return function(*arguments) if torch.compiler.is_dynamo_compiling() else kept(*arguments)

    return call


@dataclass(frozen=True)
class Launch:
    """Warps per program, depth of the software pipeline, and the most registers a thread may take (0: no limit)."""

    warps: int
    stages: int
    registers: int = 0

    def limit(self):
        """The keyword that limits the registers, where there is a limit."""
        return {"maxnreg": self.registers} if self.registers else {}


@dataclass(frozen=True)
class Configuration:
    """How the kernels are launched for a head dimension on a card family; `pairs` walk 2 * TILE queries together."""

    threshold_rows: int
    threshold_columns: int
    threshold: Launch
    threshold_programs: int
    refine: Launch
    refine_pairs: Launch
    forward: Launch
    forward_pairs: Launch
    query_gradient: Launch
    query_gradient_pairs: Launch
    key_gradient: Launch
    # The forward of calls that need no mean of the values under u: see `Call.sums_means`.
    output: Launch
    output_pairs: Launch
    # Tiles with at most so many (query, key) pairs above the bound, up to 255, are taken apart; 0: all are walked.
    stray_limit: int = 0
    # Whether calls without a backward have strays too: they win less there.
    stray_forward: bool = True
    # Pairs per query that are kept for a backward, a power of two. Without one they lie where the output will.
    stray_room: int = 16
    # Depth of the pipeline of gathered rows.
    stray_stages: int = 1
    collect: Launch = Launch(4, 2, 128)
    # Programs of TILE queries that run on a multiprocessor.
    collect_programs: int = 4
    # Where a slope leaves at most so many tiles in reach, a power of two, `near` settles them; 0: it settles none.
    near_tiles: int = 8
    near: Launch = Launch(4, 1)
    # The query gradient of settled tiles, and how many columns of a listed tile it takes at once.
    near_gradient: Launch = Launch(4, 1)
    near_columns: int = TILE
    # Columns of a listed tile taken at once, a divisor of TILE.
    inner: int = TILE
    # Two tiles of queries are walked together where their lists have at most so many tenths of the tiles together that
    # they have one by one, and threshold_rows covers both; 0: none are.
    pair_tenths: int = 7
    # Whether calls with a backward have pairs too.
    pair_backward: bool = True
    # Heads are walked at a time while what their programs read, keys and values or queries and the gradient of the
    # output, takes at most so many bytes, so that it stays in the card's cache; 0: one head after the other.
    resident: int = 16 << 20
    # Calls of at most so many keys, and as many queries, are computed by `short/`; 0: none are.
    short_keys: int = 256
    # Queries a program of it takes at once, and keys of a block of its scores.
    short_rows: int = TILE
    short_columns: int = 32
    short_forward: Launch = Launch(4, 1)
    short_query_gradient: Launch = Launch(4, 1)
    short_key_gradient: Launch = Launch(4, 1)
    measured: str = ""

    @property
    def paired(self):
        """Whether there are tiles of queries that are walked together."""
        return self.threshold_rows > TILE and self.pair_tenths > 0

    @property
    def stray_rows(self):
        """In how many of its queries a tile that is taken apart is alive at most: most have one or two pairs each."""
        return max(self.stray_limit * 3 // 4, 1)


@_kept
def _default(element_size, block_dim):
    wide = block_dim * element_size >= 512
    warps = 8 if block_dim > 128 else 4
    stages = 1 if wide else 2
    return Configuration(
        threshold_rows=64 if wide else 128,
        threshold_columns=64,
        threshold=Launch(4 if wide else 8, stages),
        threshold_programs=2,
        refine=Launch(warps, stages),
        refine_pairs=Launch(8, stages),
        forward=Launch(warps, stages),
        forward_pairs=Launch(8, stages),
        query_gradient=Launch(warps, stages),
        query_gradient_pairs=Launch(8, stages),
        key_gradient=Launch(warps, 1),
        output=Launch(warps, stages),
        near=Launch(warps, 1),
        near_gradient=Launch(warps, 1),
        output_pairs=Launch(8, stages),
        collect=Launch(warps, stages),
        inner=32 if block_dim * element_size > 512 else TILE,
        # Where registers hold the scores without a spill.
        short_keys=256 if block_dim * element_size <= (64 if element_size == 4 else 256) else 128 * (block_dim == 64),
        short_rows=16 if block_dim <= 32 or element_size == 4 else TILE,
        # Two documents side by side take 8 blocks of scores: as many registers as twelve warps can have cost less.
        short_forward=Launch(1, 1, 168 if element_size == 2 else 0) if block_dim <= 32 else Launch(4, 1),
        short_query_gradient=Launch(1 if block_dim <= 32 else 4, 1),
        short_key_gradient=Launch(1 if block_dim <= 32 else 4, 1),
    )


_HOPPER = Configuration(
    threshold_rows=128,
    threshold_columns=128,
    threshold=Launch(8, 2, 128),
    threshold_programs=2,
    refine=Launch(4, 2, 128),
    refine_pairs=Launch(8, 2, 80),
    forward=Launch(4, 3),
    forward_pairs=Launch(8, 3),
    query_gradient=Launch(4, 2),
    query_gradient_pairs=Launch(8, 3),
    key_gradient=Launch(4, 2),
    output=Launch(4, 3),
    output_pairs=Launch(8, 3),
    pair_backward=False,
    stray_limit=16,
    stray_forward=False,
    near=Launch(4, 1, 128),
    near_gradient=Launch(4, 1, 128),
    near_columns=32,
    measured="NVIDIA H200",
)

# Of 64 dimensions a tile is half as large: what pairs save in traffic does not pay for the programs they cost.
_HOPPER_64 = replace(
    _HOPPER,
    pair_tenths=0,
    refine=Launch(4, 2, 80),
    forward=Launch(4, 2, 168),
    output=Launch(4, 2, 128),
    query_gradient=Launch(4, 2, 128),
    key_gradient=Launch(4, 4),
)

# Small heads bring many programs: fewer launches, and loads that are ahead, are worth more than shared traffic.
_HOPPER_32 = replace(
    _default(2, 32),
    pair_tenths=0,
    threshold_columns=128,
    threshold=Launch(8, 2, 128),
    refine=Launch(4, 2, 80),
    forward=Launch(4, 3, 128),
    query_gradient=Launch(4, 3, 128),
    key_gradient=Launch(4, 3, 168),
    measured="NVIDIA H200",
)
# (compute capability major, element size, padded head dimension) -> Configuration
MEASURED = {(9, 2, 128): _HOPPER, (9, 2, 64): _HOPPER_64, (9, 2, 32): _HOPPER_32}


# What `configured` has changed; of all threads, as the backward runs in one of its own.
_changes = {}
# What `use` has put before the table: (device name, element size, padded head dimension) -> Configuration
_chosen = {}


class use:
    """Rows before the table, until the end of the process or of a `with` block; `benchmark --tune` writes such a file.

        configurations.use("tuned.json")          with configurations.use(rows): ...

    rows: a JSON file {"rows": [{"device": the card's name, "element_size": bytes, "block_dim": padded head dimension,
    "configuration": fields of `Configuration`}, ...]}, or a dict (device, element_size, block_dim) -> Configuration.
    Cards that the rows do not name keep the table's. A model that torch.compile has compiled keeps what it was traced
    with: call this before.
    Raises OSError for a file that cannot be read, ValueError for one that does not say this.
    """

    def __init__(self, rows):
        rows = rows if isinstance(rows, dict) else read_rows(rows)
        self._before = dict(_chosen)
        _chosen.update(rows)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        _chosen.clear()
        _chosen.update(self._before)


def read_rows(path):
    """The rows of a file as `use` describes it."""
    text = Path(path).read_text(encoding="utf-8")
    try:
        return {
            (str(row["device"]), int(row["element_size"]), int(row["block_dim"])): from_dict(row["configuration"])
            for row in json.loads(text)["rows"]
        }
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} holds no rows of kernel configurations: {error!r}") from error


def from_dict(values):
    """A `Configuration` from `dataclasses.asdict` of one; every field must be there and nothing else."""
    names = {field.name for field in fields(Configuration)}
    if not isinstance(values, dict) or set(values) != names:
        raise ValueError(f"a configuration has the fields {', '.join(sorted(names))}, not {values!r}")
    made = {name: Launch(**value) if isinstance(value, dict) else value for name, value in values.items()}
    configuration = Configuration(**made)
    return _checked(configuration)


def _checked(configuration):
    """The same, or ValueError that names a field whose value no kernel takes."""
    for field in fields(Configuration):
        value = getattr(configuration, field.name)
        given = {"int": int, "str": str, "bool": bool}.get(getattr(field.type, "__name__", field.type), field.type)
        if type(value) is not given:
            raise ValueError(f"{field.name} is {value!r}, not {given.__name__}")
    if configuration.threshold_rows not in (TILE, 2 * TILE) or configuration.threshold_columns not in (TILE, 2 * TILE):
        raise ValueError(f"threshold_rows and threshold_columns are {TILE} or {2 * TILE}")
    if not 0 <= configuration.pair_tenths <= 10:
        raise ValueError(f"pair_tenths is {configuration.pair_tenths}, not 0 to 10; 0 walks no queries together")
    if configuration.inner not in (16, 32, TILE):
        raise ValueError(f"inner is {configuration.inner}, not 16, 32 or {TILE}")
    if not 0 <= configuration.stray_limit <= 255:
        raise ValueError(f"stray_limit is {configuration.stray_limit}, not 0 to 255; 0 turns strays off")
    if configuration.stray_limit and configuration.inner < 32:
        raise ValueError(f"inner is {configuration.inner}; strays (stray_limit > 0) need 32 or {TILE}")
    if configuration.short_keys < 0:
        raise ValueError(f"short_keys is {configuration.short_keys}; 0 leaves every call to the tile lists")
    if configuration.resident < 0:
        raise ValueError(f"resident is {configuration.resident}; 0 walks one head after the other")
    for name in ("short_rows", "short_columns"):
        if getattr(configuration, name) not in (16, 32, TILE):
            raise ValueError(f"{name} is {getattr(configuration, name)}, not 16, 32 or {TILE}")
    if configuration.near_columns not in (16, 32, TILE):
        raise ValueError(f"near_columns is {configuration.near_columns}, not 16, 32 or {TILE}")
    if configuration.near_tiles not in (0, 1, 2, 4, 8, 16):
        raise ValueError(f"near_tiles is {configuration.near_tiles}, not a power of two up to 16; 0 settles none")
    for name in ("stray_room", "stray_stages", "collect_programs"):
        if getattr(configuration, name) < 1:
            raise ValueError(f"{name} is {getattr(configuration, name)}; the least is 1")
    return configuration


def to_row(device, element_size, block_dim, configuration):
    """One row of such a file."""
    return {
        "device": device,
        "element_size": element_size,
        "block_dim": block_dim,
        "configuration": asdict(configuration),
    }


@_kept
def _card(device_index):
    return torch.cuda.get_device_name(device_index)


def device_name(device):
    """The card's name, as rows of a file name it; the device's type where it is no card."""
    if device.type != "cuda":
        return device.type
    return _card(device.index if device.index is not None else torch.cuda.current_device())


@_kept
def _capability(device_index):
    return torch.cuda.get_device_capability(device_index)[0]


@cache
def processors(device_index):
    """Number of multiprocessors of the card (1 under the interpreter)."""
    if not torch.cuda.is_available():
        return 1
    return torch.cuda.get_device_properties(device_index).multi_processor_count


def configuration(device, element_size, block_dim):
    """The row that `use` has put there, or that of the table for this device, or the default; changed by `configured`.

    The same object whenever the same is asked for: what was prepared for a configuration is found by it.
    """
    row = _row(device, element_size, block_dim)
    return _changed(row, tuple(_changes.items())) if _changes else row


def short_keys(device, element_size, block_dim):
    """That field of `configuration`, asked for inside a graph, where a changed row cannot be made."""
    known = _changes.get("short_keys")
    return _row(device, element_size, block_dim).short_keys if known is None else known


@cache
def _changed(row, changes):
    return _checked(replace(row, **dict(changes)))


@cache
def without_pairs(row):
    """The same where no tiles of queries are walked together: what few of them save costs launches of all others."""
    return replace(row, pair_tenths=0)


@contextmanager
def configured(**changes):
    """Fields of every `Configuration` have other values inside, to measure them: configured(stray_limit=64).

    On top of the rows of `use`, whichever of the two was entered first. Raises ValueError for what is no field or no
    value of it.
    """
    unknown = sorted(changes.keys() - Configuration.__dataclass_fields__.keys())
    if unknown:
        names = ", ".join(Configuration.__dataclass_fields__)
        raise ValueError(f"a configuration has no field {', '.join(unknown)}; its fields are {names}")
    before = dict(_changes)
    _checked(replace(_default(2, 64), **before | changes))
    _changes.update(changes)
    try:
        yield
    finally:
        _changes.clear()
        _changes.update(before)


def _row(device, element_size, block_dim):
    if _chosen:
        found = _chosen.get((device_name(device), element_size, block_dim))
        if found is not None:
            return found
    if device.type == "cuda" and torch.version.hip is None:
        index = device.index if device.index is not None else torch.cuda.current_device()
        found = MEASURED.get((_capability(index), element_size, block_dim))
        if found is not None:
            return found
    return _default(element_size, block_dim)
