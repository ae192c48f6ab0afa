"""A dense checkpoint with sparse attention: python examples/load_and_generate.py [model] [map]"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_sparse_attention

embedded = Path(hf_sparse_attention.__file__).parent / "data" / "stories260K"
name = sys.argv[1] if len(sys.argv) > 1 else str(embedded)
attention = sys.argv[2] if len(sys.argv) > 2 else "asentmax"

tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForCausalLM.from_pretrained(name, attn_implementation=attention)
inputs = tokenizer("Once upon a time", return_tensors="pt")

# At alpha = 1 the converted model is the dense one; larger alphas need training.
if attention != "ssmax":
    hf_sparse_attention.set_alpha(model, 1.0)
tokens = model.generate(**inputs, max_new_tokens=60, do_sample=False)
print(tokenizer.decode(tokens[0], skip_special_tokens=True))

if attention != "ssmax":
    hf_sparse_attention.set_alpha(model, hf_sparse_attention.MAPS[attention].alpha)
with torch.no_grad():
    attentions = model(tokens, output_attentions=True).attentions
for layer, weights in enumerate(attentions):
    visible = torch.ones_like(weights).tril().bool()
    zeros = (weights == 0) & visible
    print(f"layer {layer}: {zeros.sum() / visible.sum():.1%} of the visible keys weigh exactly zero")
