"""What a saved folder carries for `trust_remote_code=True`: a module that hands out the package's own classes, or says
what to install, and the names under which config.json asks for them."""

from __future__ import annotations

from importlib.resources import files as resources
from pathlib import Path

from .classes import CLASSES, class_name
from .families import Family

# The Auto class of each kind of model.
AUTO_CLASSES = {
    "Model": "AutoModel",
    "ForCausalLM": "AutoModelForCausalLM",
    "ForSequenceClassification": "AutoModelForSequenceClassification",
}
MODULE = "modeling_hf_sparse_attention"


def module_source() -> bytes:
    """The module's text, which is the same for every model."""
    return (resources("hf_sparse_attention") / "data" / "remote_code" / f"{MODULE}.py").read_bytes()


def write_module(folder: str | Path) -> None:
    """Puts the module beside a config.json."""
    (Path(folder) / f"{MODULE}.py").write_bytes(module_source())


def auto_map(family: Family) -> dict[str, str]:
    """What config.json says under `auto_map`: {"AutoModel": "modeling_hf_sparse_attention.SparseLlamaModel", ...}."""
    kinds = {"AutoConfig": "Config", **{auto: kind for kind, auto in AUTO_CLASSES.items()}}
    found = {auto: class_name(family, kind) for auto, kind in kinds.items()}
    return {auto: f"{MODULE}.{name}" for auto, name in found.items() if name in CLASSES}
