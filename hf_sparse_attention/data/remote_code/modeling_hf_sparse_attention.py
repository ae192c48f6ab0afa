"""Loads this model through the package that computes its attention; without the package it does not load at all."""

try:
    import hf_sparse_attention
except ModuleNotFoundError as error:
    if error.name != "hf_sparse_attention":
        raise
    raise ImportError(
        "The attention of this model is not plain softmax. It is computed by a package that is not installed: "
        "pip install hf-sparse-attention"
    ) from error


def __getattr__(name):
    """What config.json names under `auto_map`."""
    if name.startswith("_"):
        raise AttributeError(name)
    if not hasattr(hf_sparse_attention, name):
        raise ImportError(
            f"hf-sparse-attention {hf_sparse_attention.__version__} with the installed Transformers has no {name}: "
            "pip install --upgrade hf-sparse-attention transformers"
        )
    if not name.endswith("Config"):
        return getattr(hf_sparse_attention, name)

    class Config:
        """The package's config class. It is not marked as remote code: saving it would copy the package's files."""

        from_pretrained = getattr(hf_sparse_attention, name).from_pretrained

        @staticmethod
        def register_for_auto_class(auto_class="AutoConfig"):
            pass

    return Config
