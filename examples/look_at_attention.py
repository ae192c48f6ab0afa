"""Look at the attention of a sparse model: numbers per head, the page, the pictures for a paper.

    python examples/look_at_attention.py [model] [dense model]

Without a model it converts the embedded one, which is not trained with its new attention. In a notebook the last line
of a cell, `look`, shows the page itself.
"""

import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_sparse_attention
from hf_sparse_attention.report import look_at

EMBEDDED = str(Path(hf_sparse_attention.__file__).parent / "data" / "stories260K")
path = sys.argv[1] if len(sys.argv) > 1 else EMBEDDED
dense = sys.argv[2] if len(sys.argv) > 2 else (EMBEDDED if path == EMBEDDED else None)

options = {"attn_implementation": "asentmax"} if path == EMBEDDED else {}
model = AutoModelForCausalLM.from_pretrained(path, **options)
tokenizer = AutoTokenizer.from_pretrained(path)
prompt = "Once upon a time, there was a little girl named Lily. She loved to play with her red ball in the park."

look = look_at(model, tokenizer, prompt, dense=dense)

# Per layer: lists with one number per head. `positions` has support and factor by the query's position.
for row in look.report["layers"]:
    print(f"layer {row['layer']}: exact zeros", " ".join(f"{zeros:6.1%}" for zeros in row["zeros"]))

# The weights themselves: (queries, tokens), exactly 0 off the support.
weights, visible = look.prompt.matrix(layer=0, head=0)
print(f"layer 0, head 0: {(weights > 0).sum()} of {visible.sum()} weights are not 0")

look.save_page("attention.html")
for name, figure in look.figures().items():
    figure.savefig(f"attention-{name}.svg")
print("written: attention.html, attention-heads.svg, attention-positions.svg, attention-attention.svg")
