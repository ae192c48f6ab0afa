"""Supervised fine-tuning with TRL's SFTTrainer, packing on: python examples/sft_with_packing.py [output]"""

import sys
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import hf_sparse_attention
from hf_sparse_attention.text import read_documents

data = Path(hf_sparse_attention.__file__).parent / "data"
output = sys.argv[1] if len(sys.argv) > 1 else "sft_output"

tokenizer = AutoTokenizer.from_pretrained(data / "stories260K")
tokenizer.pad_token = tokenizer.eos_token
model = AutoModelForCausalLM.from_pretrained(data / "stories260K", attn_implementation="asentmax")
stories = list(read_documents([str(data / "tinystories" / "train.txt.xz")]))[:64]
trainer = SFTTrainer(
    model=model,
    processing_class=tokenizer,
    train_dataset=Dataset.from_dict({"text": stories}),
    args=SFTConfig(
        output_dir=output,
        max_steps=8,
        per_device_train_batch_size=8,
        learning_rate=1e-3,
        # The map's parameters start at zero, and decay would pull them back there.
        weight_decay=0.0,
        max_length=256,
        # bfd and bfd_split keep documents apart by their positions; wrapped has none, and documents see each other.
        packing=True,
        packing_strategy="bfd",
        bf16=torch.cuda.is_available(),
        logging_steps=1,
        save_strategy="no",
        report_to=[],
    ),
)
trainer.train()
trainer.save_model(output)
print(f"{type(model).__name__} saved to {output}; its config says {model.config.sparse_attention}")
