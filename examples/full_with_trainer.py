"""All parameters with Transformers' Trainer, documents packed: python examples/full_with_trainer.py [output]"""

import sys
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorWithFlattening,
    Trainer,
    TrainingArguments,
)

import hf_sparse_attention
from hf_sparse_attention.text import encode_documents, read_documents

data = Path(hf_sparse_attention.__file__).parent / "data"
output = sys.argv[1] if len(sys.argv) > 1 else "trainer_output"

tokenizer = AutoTokenizer.from_pretrained(data / "stories260K")
model = AutoModelForCausalLM.from_pretrained(data / "stories260K", attn_implementation="asentmax")
stories = list(read_documents([str(data / "tinystories" / "train.txt.xz")]))[:64]
rows = [{"input_ids": tokens[:256]} for tokens in encode_documents(tokenizer, stories)]

# The map's parameters start at zero and would be pulled back there: weight decay is for matrices of the dense model.
new = set(hf_sparse_attention.models.new_parameter_names(model))
named = list(model.named_parameters())
groups = [
    {"params": [item for name, item in named if item.ndim > 1 and name not in new], "weight_decay": 0.1},
    {"params": [item for name, item in named if item.ndim < 2 or name in new], "weight_decay": 0.0},
]
trainer = Trainer(
    model=model,
    args=TrainingArguments(
        output_dir=output,
        max_steps=8,
        per_device_train_batch_size=8,
        learning_rate=1e-3,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
    ),
    train_dataset=rows,
    # One row of all documents with positions that restart: none sees another.
    data_collator=DataCollatorWithFlattening(),
    optimizers=(torch.optim.AdamW(groups, lr=1e-3), None),
)
trainer.train()
trainer.save_model(output)
tokenizer.save_pretrained(output)
print(f"{type(model).__name__} saved to {output}; its config says {model.config.sparse_attention}")
