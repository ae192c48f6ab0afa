"""LoRA and the map's own parameters with Transformers' Trainer: python examples/lora_with_trainer.py [output]"""

import sys
from pathlib import Path

from peft import LoraConfig, get_peft_model
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
output = sys.argv[1] if len(sys.argv) > 1 else "lora_output"

tokenizer = AutoTokenizer.from_pretrained(data / "stories260K")
tokenizer.pad_token = tokenizer.eos_token
# An adapter names its base by folder: a dense folder that is converted while loading would be the wrong one.
converted = convert_model(ConvertArguments(model=str(data / "stories260K"), output=f"{output}/converted"))
model = AutoModelForCausalLM.from_pretrained(converted)
adapters = LoraConfig(
    r=8,
    target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
    # The parameters of the factor on the query are few and start at zero: they are trained whole.
    modules_to_save=["sparse_scale"],
)
model = get_peft_model(model, adapters)
model.print_trainable_parameters()

stories = list(read_documents([str(data / "tinystories" / "train.txt.xz")]))[:64]
rows = [tokenizer(story, truncation=True, max_length=256) for story in stories]
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
    data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
)
trainer.train()
merged = model.merge_and_unload()
merged.save_pretrained(f"{output}/merged")
tokenizer.save_pretrained(f"{output}/merged")
print(f"{type(merged).__name__} saved to {output}/merged; its config says {merged.config.sparse_attention}")
