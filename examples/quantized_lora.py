"""LoRA on a quantised sparse model: python examples/quantized_lora.py [int8 | nf4] [output]

int8: torchao (pip install torchao). nf4: bitsandbytes, 4 bits (pip install bitsandbytes; 0.50.2 also on a CPU).
"""

import sys
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

import hf_sparse_attention
from hf_sparse_attention.convert import ConvertArguments, convert_model
from hf_sparse_attention.text import read_documents

data = Path(hf_sparse_attention.__file__).parent / "data"
kind = sys.argv[1] if len(sys.argv) > 1 else "int8"
output = sys.argv[2] if len(sys.argv) > 2 else "quantized_lora_output"

if kind == "nf4":
    from transformers import BitsAndBytesConfig

    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16,
        # Two linear maps of a few rows: their output is a factor on every query, and they are trained.
        llm_int8_skip_modules=["lm_head", "sparse_scale", "sparse_alpha"],
    )  # fmt: skip
elif kind == "int8":
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    quantization = TorchAoConfig(Int8WeightOnlyConfig())
else:
    raise SystemExit(f"{kind!r} is neither int8 nor nf4")

tokenizer = AutoTokenizer.from_pretrained(data / "stories260K")
tokenizer.pad_token = tokenizer.eos_token
converted = convert_model(ConvertArguments(model=str(data / "stories260K"), output=f"{output}/converted"))
model = AutoModelForCausalLM.from_pretrained(
    converted, quantization_config=quantization, device_map="auto" if torch.cuda.is_available() else "cpu"
)
if kind == "nf4":
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
adapters = LoraConfig(r=8, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], modules_to_save=["sparse_scale"])
model = get_peft_model(model, adapters)
model.print_trainable_parameters()

stories = list(read_documents([str(data / "tinystories" / "train.txt.xz")]))[:64]
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
    train_dataset=[tokenizer(story, truncation=True, max_length=256) for story in stories],
    data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
)
trainer.train()
# The adapters and the map's parameters; their base is the converted folder, in whatever precision it is loaded.
model.save_pretrained(f"{output}/adapters")
print(f"adapters saved to {output}/adapters")
