"""Names of packages -> what is installed of them, for records that say what computed them."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from .config import VERSION


def versions(*packages: str) -> dict[str, str]:
    """{name: version}, this package first; one that is not installed is left out."""
    found = {"hf-sparse-attention": VERSION}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
