"""The numbers of a report and the attention over a prompt -> one HTML page that loads nothing: style, script and data
are in it, and its Content-Security-Policy allows these alone."""

from __future__ import annotations

import base64
import hashlib
import html
import json
from pathlib import Path
from string import Template

from .encoding import PRECISION, SMALLEST, encoded
from .measures import TILE
from .prompt import PromptAttention

PARTS = Path(__file__).parents[1] / "data" / "report_page"
STYLE = ("page.css",)
# In this order: each uses only what is before it.
SCRIPT = ("elements.js", "decode.js", "scales.js", "heads.js", "curves.js", "weights.js", "tokens.js", "page.js")


def html_page(report: dict, prompt: PromptAttention, dense: PromptAttention | None = None) -> str:
    """One HTML document.

    Args:
        report: the content of report.json.
        prompt, dense: the attention over the same prompt, of the sparse and of the dense model.

    Everything in it that came with the model or the text is data, which the page's script shows as text.

    Raises:
        ValueError: if `dense` is of other tokens, queries or layers than `prompt`.
    """
    if dense is not None:
        _check_alike(prompt, dense)
    style = "\n".join((PARTS / name).read_text(encoding="utf-8") for name in STYLE)
    parts = "\n".join((PARTS / name).read_text(encoding="utf-8") for name in SCRIPT)
    script = f'(() => {{\n"use strict";\n{parts}\n}})();'
    policy = (
        f"default-src 'none'; script-src '{_hash(script)}'; style-src '{_hash(style)}'; base-uri 'none'; "
        "form-action 'none'"
    )
    page = Template((PARTS / "page.html").read_text(encoding="utf-8"))
    content = page.substitute(
        policy=html.escape(policy, quote=True).replace("&#x27;", "'"),
        title=html.escape(f"{_last_part(report['model'])}: what its attention does"),
        style=style,
        data=_json(_data(report, prompt, dense)),
        script=script,
    )
    # Half of a surrogate pair is no character; a name or prompt may hold one.
    return content.encode("utf-8", "replace").decode()


def _check_alike(prompt: PromptAttention, dense: PromptAttention) -> None:
    same = (
        prompt.tokens == dense.tokens
        and prompt.queries.tolist() == dense.queries.tolist()
        and [layer.support.shape for layer in prompt.layers] == [layer.support.shape for layer in dense.layers]
    )
    if not same:
        raise ValueError("the dense model was looked at with other tokens, queries or layers than the sparse one")


def _data(report: dict, prompt: PromptAttention, dense: PromptAttention | None) -> dict:
    settings = report["sparse_attention"]
    return {
        "model": _last_part(report["model"]),
        "dense": None if report.get("dense") is None else _last_part(report["dense"]),
        "map": settings["map"],
        "position": settings["position"],
        "alpha": settings["alpha"],
        "versions": report["versions"],
        "windows": report["windows"],
        "length": report["length"],
        "tile": TILE,
        "mean": report["mean"],
        "layers": report["layers"],
        "precision": PRECISION,
        "smallest": SMALLEST,
        "prompt": {"tokens": prompt.tokens, "total": prompt.total, "sparse": encoded(prompt)}
        | ({} if dense is None else {"dense": encoded(dense)}),
    }


def _last_part(name: str) -> str:
    """A folder's own name: where it is on the author's disk is nobody's business. A run's `model` is named with it."""
    path = Path(name)
    if not (path.is_absolute() or path.expanduser().is_dir()):
        return name
    return "/".join(path.parts[-2:]) if path.name == "model" and len(path.parts) > 2 else path.name


def _json(data: dict) -> str:
    """JSON that no HTML parser takes for markup, whatever the strings in it hold."""
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _hash(content: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}"
