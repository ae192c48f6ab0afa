"""What mkdocs does beyond Markdown: formulas become MathML, which needs no script, and a comment such as
`options: train` or `families` becomes a table or list of what the package has."""

from __future__ import annotations

import html
import importlib
import re
from dataclasses import MISSING, fields


def on_page_markdown(markdown: str, **kwargs) -> str:
    """Replaces `<!-- options: train -->` and its like."""
    for name, table in (("families", families), ("refused", refused), ("commands", commands)):
        if f"<!-- {name} -->" in markdown:
            markdown = markdown.replace(f"<!-- {name} -->", table())
    return re.sub(r"<!-- options: ([\w-]+) -->", lambda found: options(found[1]), markdown)


def on_page_content(content: str, **kwargs) -> str:
    """Replaces what pymdownx.arithmatex marked as a formula."""
    from latex2mathml.converter import convert

    def formula(found: re.Match) -> str:
        text = html.unescape(found[2]).strip()
        return convert(text[2:-2], display="block" if text.startswith(r"\[") else "inline")

    return re.sub(r'<(span|div) class="arithmatex">(.*?)</\1>', formula, content, flags=re.DOTALL)


def options(command: str) -> str:
    """A Markdown table of a command's options, their defaults and their help."""
    from hf_sparse_attention.cli import COMMANDS

    row = COMMANDS[command]
    kind = getattr(importlib.import_module(f"hf_sparse_attention.{row.module}"), row.arguments)
    lines = ["| option | default | |", "|---|---|---|"]
    for field in fields(kind):
        default = field.default if field.default_factory is MISSING else field.default_factory()
        shown = "required" if default is MISSING else "" if default in (None, []) else f"`{default}`"
        text = re.sub(r"([<>|*])", r"\\\1", field.metadata["help"])
        lines.append(f"| `--{field.name}` | {shown} | {text} |")
    return "\n".join(lines)


def families() -> str:
    """The names of the families, as a dense model's config has them."""
    from hf_sparse_attention import FAMILIES

    return ", ".join(f"`{name}`" for name in FAMILIES)


def refused() -> str:
    """The names of those that are refused, each with its reason."""
    from hf_sparse_attention.models.families import REFUSED

    return ", ".join(f"`{name}` ({reason})" for name, reason in REFUSED.items())


def commands() -> str:
    """A Markdown table of the commands, their functions and their dataclasses, where they are imported from."""
    from hf_sparse_attention.cli import COMMANDS

    lines = ["| command | function | options |", "|---|---|---|"]
    for name, row in COMMANDS.items():
        place = f"hf_sparse_attention.{row.module}"
        lines.append(f"| `{name}` | `{place}.{row.function}` | `{place}.{row.arguments}` |")
    return "\n".join(lines)
