"""A model and a tokenizer -> everything there is to see of its attention, for a notebook: the page, the pictures, the
numbers."""

from __future__ import annotations

import html
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from transformers import PreTrainedModel

from ..config import VERSION, SparseAttentionConfig
from ..files import write_text
from ..models import attention_layers
from .dense import load_dense_like
from .measures import mean_over_heads, measure_attention, typical_heads
from .page import html_page
from .prompt import PromptAttention, look_at_prompt

FORMAT = 1
# Most keys of a query that the page keeps: of a sparse head all but in rare cases, of a dense one the heaviest.
SPARSE_KEYS, DENSE_KEYS = 1024, 32


@dataclass(frozen=True)
class AttentionLook:
    """What `look_at` found. In a notebook it shows itself as the page.

    Args:
        report: the numbers, as in report.json.
        prompt: the attention over the prompt, for the page.
        dense: the same of the dense model, or None.
        drawn: every weight of the first tokens, for the pictures.
        drawn_dense: the same of the dense model, or None.
    """

    report: dict
    prompt: PromptAttention
    dense: PromptAttention | None
    drawn: PromptAttention
    drawn_dense: PromptAttention | None

    def page(self) -> str:
        """The page: one HTML document that loads nothing."""
        return html_page(self.report, self.prompt, self.dense)

    def save_page(self, path: str | Path) -> None:
        """Writes the page."""
        write_text(path, self.page())

    def figures(self, heads: list[tuple[int, int]] | None = None) -> dict:
        """Matplotlib figures by name: "heads", "positions" and "attention".

        Args:
            heads: (layer, head) of those in "attention"; default: a median one of the first, middle and last layer.
        """
        from .pictures import figures_of

        chosen = heads or typical_heads(self.report["layers"])
        return figures_of(self.report, self.drawn, self.drawn_dense, chosen)

    def _repr_html_(self) -> str:
        # A frame of its own: the page's style and script touch nothing of the notebook.
        return (
            f'<iframe srcdoc="{html.escape(self.page())}" sandbox="allow-scripts" title="attention report" '
            'style="width: 100%; height: 44rem; border: 0"></iframe>'
        )


def look_at(
    model: PreTrainedModel,
    tokenizer,
    prompt: str,
    *,
    windows: torch.Tensor | None = None,
    dense: str | None = None,
    name: str | None = None,
    page_tokens: int = 256,
    page_weights: int = 4_000_000,
    prompt_tokens: int = 40,
) -> AttentionLook:
    """Looks at the attention of a sparse model.

    Args:
        model: a sparse causal language model of this package.
        prompt: text whose attention is shown token by token.
        windows: (windows, tokens) token ids over which the numbers per head are means; default: the prompt.
        dense: folder or Hub id of the dense model to show beside it.
        name: what the page calls the model; default: the last part of its own name.
        page_tokens: first tokens of the prompt on the page.
        prompt_tokens: first tokens of the prompt in the pictures.
        page_weights: weights on the page; where the prompt has more, it keeps every second, fourth, ... query.

    Raises:
        ValueError: for a dense model, a prompt of fewer than 2 tokens, or a `dense` that cannot be compared.
        OSError: if `dense` cannot be read.
    """
    if not attention_layers(model):
        raise ValueError(f"{type(model).__name__} has no sparse attention: every visible key carries weight")
    # Before any work, what can be wrong.
    other = None if dense is None else load_dense_like(dense, model, tokenizer, prompt=prompt)
    seen = look_at_prompt(model, tokenizer, prompt, tokens=page_tokens, heaviest=SPARSE_KEYS, budget=page_weights)
    drawn = look_at_prompt(model, tokenizer, prompt, tokens=prompt_tokens)
    beside = drawn_beside = None
    if other is not None:
        # The same queries, and as many keys of each as fit beside the sparse model's.
        rows = sum(layer.kept.size for layer in seen.layers)
        keys = max(4, min(DENSE_KEYS, page_weights // rows))
        beside = look_at_prompt(other, tokenizer, prompt, tokens=page_tokens, heaviest=keys, queries=seen.queries)
        drawn_beside = look_at_prompt(other, tokenizer, prompt, tokens=prompt_tokens)
    if windows is None:
        windows = torch.tensor([tokenizer(prompt)["input_ids"][:page_tokens]])
    report = described(model, measure_attention(model, windows), windows, name=name, dense=dense)
    return AttentionLook(report, seen, beside, drawn, drawn_beside)


def described(model, rows: list[dict], windows: torch.Tensor, *, name: str | None, dense: str | None) -> dict:
    """The numbers and what they are of."""
    return {
        "format": FORMAT,
        "versions": {
            "hf_sparse_attention": VERSION, "transformers": transformers.__version__, "torch": torch.__version__,
        },
        "model": name or model.name_or_path or type(model).__name__,
        "dense": dense,
        "sparse_attention": SparseAttentionConfig.from_model_config(model.config).to_dict(),
        "windows": len(windows),
        "length": windows.shape[1],
        "mean": mean_over_heads(rows),
        "layers": rows,
    }  # fmt: skip
