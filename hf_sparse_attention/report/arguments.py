"""Options of `report`, checked as far as they can be without a model or data."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..checkpoint import DEVICES, check_dtype
from ..loading import DTYPES

FORMATS = ("png", "svg", "pdf")


@dataclass
class ReportArguments:
    """What to look at, on what."""

    model: str = field(metadata={"help": "folder or Hub id of a sparse model"})
    data: list[str] = field(
        default_factory=list,
        metadata={"help": "text: .txt, .jsonl or .parquet files (also .gz, .xz, .zst), or names of Hub datasets"},
    )
    output_dir: str = field(
        default="report", metadata={"help": "folder for report.json, report.md, report.html and the pictures"}
    )
    length: int = field(default=512, metadata={"help": "tokens in a window of text"})
    windows: int = field(default=8, metadata={"help": "windows that are looked at, drawn with the seed"})
    concatenate: bool = field(default=False, metadata={"help": "join all documents before windows are cut"})
    seed: int = field(default=0, metadata={"help": "seed of the draw"})
    prompt: str | None = field(
        default=None, metadata={"help": "text whose attention is drawn token by token (default: the data's beginning)"}
    )
    prompt_tokens: int = field(default=40, metadata={"help": "tokens of the prompt in the pictures"})
    page_tokens: int = field(default=256, metadata={"help": "tokens of the prompt on the page"})
    page_weights: int = field(
        default=4_000_000,
        metadata={"help": "attention weights on the page, about 3 bytes each; of a longer prompt fewer queries"},
    )
    dense: str | None = field(
        default=None, metadata={"help": "folder or Hub id of the dense model that is shown beside it (default: none)"}
    )
    heads: list[str] = field(
        default_factory=list,
        metadata={
            "help": "heads that are drawn, as layer:head (default: a median one of the first, middle and last layer)"
        },
    )
    text_column: str = field(
        default="text", metadata={"help": "column of jsonl and parquet files that holds the text"}
    )
    dtype: str = field(default="auto", metadata={"help": f"auto (as the checkpoint is stored), {', '.join(DTYPES)}"})
    device: str = field(default="auto", metadata={"help": f"one of {', '.join(DEVICES)}"})
    html: bool = field(default=True, metadata={"help": "write report.html, one page to look around in"})
    figure: bool = field(default=True, metadata={"help": "draw the pictures (needs matplotlib)"})
    formats: list[str] = field(
        default_factory=lambda: ["png"], metadata={"help": f"files of each picture: {', '.join(FORMATS)}"}
    )

    def __post_init__(self):
        if not self.data:
            raise ValueError("data is empty; name at least one text file or Hub dataset")
        for name, least in (
            ("length", 2), ("windows", 1), ("prompt_tokens", 2), ("page_tokens", 2), ("page_weights", 1)
        ):  # fmt: skip
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it is at least {least}")
        if unknown := [name for name in self.formats if name not in FORMATS]:
            raise ValueError(f"formats has {unknown[0]!r}; choose from {', '.join(FORMATS)}")
        if not self.formats:
            raise ValueError("formats is empty; leave the pictures out with --no_figure")
        check_dtype(self.dtype)
