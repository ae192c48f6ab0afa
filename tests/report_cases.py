"""A small random sparse model and text for the tests of the report."""

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_sparse_attention.models import attention_layers

TEXT = " ".join(f"Tom saw {number} dogs in the park, and the little cat was happy." for number in range(60))


def sparse_folder(home, name="sparse", *, seed=0, **options):
    """The random dense model with a map, its new parameters moved away from their neutral start."""
    map_name = options.pop("map", "asentmax")
    model = AutoModelForCausalLM.from_pretrained(
        home / "dense", attn_implementation=map_name, **({"sparse_attention": options} if options else {})
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer, attention in attention_layers(model):
            # Scores far enough apart that some keys, and some tiles, get nothing.
            attention.q_proj.weight.mul_(1 + layer)
            for part in (attention.sparse_scale, attention.sparse_alpha):
                for parameter in [] if part is None else part.parameters():
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    model.save_pretrained(home / name)
    AutoTokenizer.from_pretrained(home / "dense").save_pretrained(home / name)
    return home / name
