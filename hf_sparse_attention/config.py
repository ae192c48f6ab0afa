"""What a sparse model is, as kept under `sparse_attention` in its config.json: enters as keywords or a dict, leaves as
a frozen dataclass whose every field was checked. How the model runs (device, kernels) is not part of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from math import isfinite
from typing import Any

# The installed package's version, written into every config so that a reader knows what wrote it.
VERSION = "0.1.0"
# Version of the layout of this block: raised when an older package could misread what a newer one wrote.
FORMAT = 1

# Stands behind the activation's name in a saved config. The classes of Transformers ignore a model_type that is not
# theirs and would run the weights as softmax; none of them knows an activation of this name.
GUARD = " | not a softmax model: pip install hf-sparse-attention, then import hf_sparse_attention"
GUARDED_FIELDS = ("hidden_act", "hidden_activation")

POSITIONS = {
    "rope": "the dense model's own rotary positions",
    "nape": "half of the heads without positions, half with ALiBi slopes 1, 1/2, 1/3, ... (no rotary positions)",
    "nope": "no positions in attention at all",
    "nape_scaled": "as nape, with the map's factor also on the heads with ALiBi",
}
# Schemes in which the second half of the heads has slopes.
ALIBI = ("nape", "nape_scaled")
LAYERS = {
    "all": "every attention layer",
    "full_attention": "layers without a sliding window; the others keep the dense model's softmax",
}


@dataclass(frozen=True)
class MapSpecification:
    """The numbers of an attention map that a config must respect.

    Args:
        alpha: the alpha the map is trained towards, and the default of a new config.
        lowest, highest: the range of alpha allowed in a config. Below its target a map is still being annealed.
    """

    alpha: float
    lowest: float
    highest: float


# The names a config may hold. maps.py adds to each what it computes, and refuses to load if a row is missing there.
SPECIFICATIONS = {
    "entmax": MapSpecification(alpha=1.5, lowest=1.0, highest=4.0),
    "sparsemax": MapSpecification(alpha=2.0, lowest=1.0, highest=2.0),
    "asentmax": MapSpecification(alpha=1.5, lowest=1.0, highest=4.0),
    "ssmax": MapSpecification(alpha=1.0, lowest=1.0, highest=1.0),
    "adaptive_entmax": MapSpecification(alpha=1.5, lowest=1.0, highest=2.0),
}


def _help(text: str) -> dict[str, str]:
    return {"help": text}


def _other(version: Any) -> str:
    """What to try where another version of the package may know more."""
    if version in (None, VERSION):
        return ""
    return f". It was written by hf-sparse-attention {version}, this is {VERSION}: pip install --upgrade may help"


@dataclass(frozen=True)
class SparseAttentionConfig:
    """What the attention of a sparse model computes.

    Raises:
        ValueError: for an unknown map, position scheme or layer choice, or an alpha outside the map's range.
        TypeError: for a field of the wrong type.
    """

    map: str = field(
        default="asentmax",
        metadata=_help(f"attention map that turns scores into weights: {', '.join(SPECIFICATIONS)}"),
    )
    alpha: float | None = field(
        default=None, metadata=_help("alpha of entmax, 1 is softmax; default: the map's own (entmax 1.5, sparsemax 2)")
    )
    position: str = field(default="rope", metadata=_help(f"position scheme: {', '.join(POSITIONS)}"))
    layers: str | tuple[int, ...] = field(
        default="all", metadata=_help("layers with sparse attention: all, full_attention, or a list of layer numbers")
    )
    heads: str | tuple[int, ...] | dict[int, tuple[int, ...]] = field(
        default="all",
        metadata=_help(
            "heads with the map in those layers: all, a list of head numbers, or a dict of layer number to such a "
            "list (a layer it leaves out: all); the others keep the dense model's softmax"
        ),
    )
    train_length: int | None = field(
        default=None,
        metadata=_help(
            "tokens in a training context; SSMax starts with a mean factor of 1 over it "
            "(default: the dense model's max_position_embeddings)"
        ),
    )
    version: str = VERSION
    format: int = FORMAT

    def __post_init__(self):
        if not isinstance(self.version, str):
            raise TypeError(f"sparse_attention.version is {self.version!r}; it must be a version such as {VERSION!r}")
        if isinstance(self.format, bool) or not isinstance(self.format, int) or not 1 <= self.format <= FORMAT:
            raise ValueError(
                f"sparse_attention.format is {self.format!r}, written by hf-sparse-attention {self.version}; this is "
                f"{VERSION}, which reads formats from 1 to {FORMAT}: pip install --upgrade hf-sparse-attention"
            )
        for name, choices in (("map", SPECIFICATIONS), ("position", POSITIONS)):
            value = getattr(self, name)
            if not isinstance(value, str) or value not in choices:
                raise ValueError(
                    f"sparse_attention.{name} is {value!r}; choose one of {', '.join(choices)}{_other(self.version)}"
                )
        specification = SPECIFICATIONS[self.map]
        alpha = specification.alpha if self.alpha is None else self.alpha
        allowed = f"{self.map} takes {specification.lowest:g} <= alpha <= {specification.highest:g}"
        if isinstance(alpha, bool) or not isinstance(alpha, (int, float)):
            raise TypeError(f"sparse_attention.alpha is {alpha!r}; it must be a number, {allowed}")
        if not isfinite(alpha) or not specification.lowest <= alpha <= specification.highest:
            raise ValueError(f"sparse_attention.alpha is {alpha}; {allowed}")
        object.__setattr__(self, "alpha", float(alpha))
        if isinstance(self.layers, str):
            if self.layers not in LAYERS:
                raise ValueError(
                    f"sparse_attention.layers is {self.layers!r}; choose {', '.join(LAYERS)} or a list of numbers"
                )
        else:
            if not isinstance(self.layers, (list, tuple)) or not self.layers:
                raise TypeError(f"sparse_attention.layers is {self.layers!r}; it must be a name or a list of numbers")
            if any(isinstance(layer, bool) or not isinstance(layer, int) or layer < 0 for layer in self.layers):
                raise ValueError(f"sparse_attention.layers is {self.layers!r}; layer numbers are integers from 0")
            object.__setattr__(self, "layers", tuple(sorted(set(self.layers))))
        object.__setattr__(self, "heads", _checked_heads(self.heads))
        if self.heads != "all" and self.position != "rope":
            raise ValueError(
                f"sparse_attention.heads is {self.heads!r} with position {self.position!r}: heads that stay dense "
                "need the positions of their layer; use position 'rope' or heads 'all'"
            )
        length = self.train_length
        if length is not None and (isinstance(length, bool) or not isinstance(length, int) or length < 1):
            raise ValueError(f"sparse_attention.train_length is {length!r}; it must be an integer from 1")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> SparseAttentionConfig:
        """Checks and freezes a dict; an unknown key raises, it is never dropped."""
        if not isinstance(values, dict):
            raise TypeError(f"sparse_attention is {values!r}; it must be a dict such as {{'map': 'asentmax'}}")
        known = [item.name for item in fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ValueError(
                f"sparse_attention has unknown fields {', '.join(unknown)}; known: {', '.join(known)}"
                f"{_other(values.get('version'))}"
            )
        return cls(**values)

    @classmethod
    def from_saved(cls, values: dict[str, Any]) -> SparseAttentionConfig:
        """As `from_dict`, for a block that was saved: every field is in it, and none is filled in for it."""
        checked = cls.from_dict(values)
        if missing := [item.name for item in fields(cls) if item.name not in values]:
            raise ValueError(
                f"sparse_attention lacks {', '.join(missing)}, so it does not say what the attention computes: "
                "config.json was changed by hand"
            )
        return checked

    @classmethod
    def from_model_config(cls, config) -> SparseAttentionConfig:
        """Reads the block of a Transformers config.

        Raises:
            ValueError: if the config has no `sparse_attention`, i.e. belongs to a dense model or was tampered with.
        """
        values = getattr(config, "sparse_attention", None)
        if values is None:
            raise ValueError(
                f"{type(config).__name__} has no `sparse_attention`: nothing says which attention map this model "
                "computes. Convert a dense model with `hf-sparse-attention convert`"
            )
        if isinstance(values, dict) and "map" not in values:
            raise ValueError(
                f"{type(config).__name__}.sparse_attention is {values!r}, which names no map: a change of a model's "
                "own settings goes to the model's from_pretrained(..., sparse_attention=...)"
            )
        return cls.from_dict(values)

    def to_dict(self) -> dict[str, Any]:
        """The plain dict that goes into config.json."""
        values = asdict(self)
        if isinstance(self.layers, tuple):
            values["layers"] = list(self.layers)
        if isinstance(self.heads, tuple):
            values["heads"] = list(self.heads)
        elif isinstance(self.heads, dict):
            # JSON has no numbers for names.
            values["heads"] = {str(layer): list(heads) for layer, heads in self.heads.items()}
        return values


def _checked_heads(heads) -> str | tuple[int, ...] | dict[int, tuple[int, ...]]:
    if isinstance(heads, dict):
        layers = [layer for layer in heads if not str(layer).isdecimal()]
        if layers or not heads:
            raise ValueError(
                f"sparse_attention.heads is {heads!r}; it names layers by their numbers, such as {{0: [1]}}"
            )
        return {int(layer): _checked_list(heads[layer]) for layer in sorted(heads, key=int)}
    if isinstance(heads, str):
        if heads != "all":
            raise ValueError(f"sparse_attention.heads is {heads!r}; choose all, a list of numbers or a dict of lists")
        return heads
    return _checked_list(heads)


def _checked_list(heads) -> tuple[int, ...]:
    if not isinstance(heads, (list, tuple)) or not heads:
        raise TypeError(
            f"sparse_attention.heads has {heads!r}; it must be a list of head numbers. A layer without any belongs "
            "out of sparse_attention.layers"
        )
    if any(isinstance(head, bool) or not isinstance(head, int) or head < 0 for head in heads):
        raise ValueError(f"sparse_attention.heads has {heads!r}; head numbers are integers from 0")
    return tuple(sorted(set(heads)))
