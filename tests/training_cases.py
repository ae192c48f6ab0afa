"""A tiny random Llama folder with a real tokenizer, text, and runs of `train` on them, for the tests of commands."""

import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

import hf_sparse_attention
from hf_sparse_attention.train import TrainArguments, train_model

ROOT = Path(hf_sparse_attention.__file__).parent
STORIES = ROOT / "data" / "stories260K"
_WORDS = ("once", "upon", "a", "time", "the", "little", "cat", "and", "her", "friend", "saw", "red", "sun", "happy")


def dense_folder(folder: Path, *, seed: int = 0, dtype=torch.float32, shard: str = "5GB", **changes) -> Path:
    """A random Llama of 2 layers with the tokenizer of stories260K (512 tokens)."""
    torch.manual_seed(seed)
    values = {
        "vocab_size": 512, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
        "tie_word_embeddings": True, "initializer_range": 0.1, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    model = LlamaForCausalLM(LlamaConfig(**{**values, **changes})).to(dtype)
    model.save_pretrained(folder, max_shard_size=shard)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(STORIES / name, folder / name)
    (folder / "LICENSE").write_text("a licence\n")
    return folder


def write_text(path: Path, documents: int = 60, *, seed: int = 0, longest: int = 40) -> Path:
    """Random sentences, some documents of a few words, some longer than a block."""
    draw = np.random.default_rng(seed)
    texts = [" ".join(draw.choice(_WORDS, size=draw.integers(2, longest))) for _ in range(documents)]
    path.write_text("".join(text + "\n<|endoftext|>\n" for text in texts), encoding="utf-8")
    return path


def home_folder(folder: Path) -> Path:
    """With dense/, train.txt and eval.txt, which no test changes."""
    dense_folder(folder / "dense")
    write_text(folder / "train.txt")
    write_text(folder / "eval.txt", 20, seed=1)
    return folder


def options(folder: Path, **changes) -> dict:
    """Arguments of a short run; `folder` holds dense/, train.txt and eval.txt."""
    values = {
        "model": str(folder / "dense"), "output": str(folder / "run"), "train_data": [str(folder / "train.txt")],
        "eval_data": [str(folder / "eval.txt")], "block_size": 32, "batch_size": 4, "steps": 8, "eval_every": 4,
        "eval_blocks": 4, "log_every": 2, "checkpoint_every": 4, "learning_rate": 1e-2, "cpu": True,
    }  # fmt: skip
    if changes.get("stages"):
        # They have their own.
        del values["steps"]
    return {**values, **changes}


def run(folder: Path, **changes) -> dict:
    return train_model(TrainArguments(**options(folder, **changes)))


def weights(run_folder: Path, name: str = "model") -> dict[str, torch.Tensor]:
    return load_file(run_folder / name / "model.safetensors")


def metrics(run_folder: Path) -> list[dict]:
    """The lines of metrics.jsonl without what depends on the clock."""
    lines = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line.pop("timing", None)
    return lines


def assert_same_weights(first: Path, second: Path) -> None:
    one, other = weights(first), weights(second)
    assert one.keys() == other.keys()
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert not different


def python(code: str, *words: str, **environment) -> subprocess.Popen:
    """A Python process with the package, on one thread."""
    paths = os.pathsep.join([str(ROOT.parent), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen(
        [sys.executable, "-c", code, *words], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


# Processes that train together. A server that has imported everything forks them, which takes no time.
FSDP = {
    "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false", "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
}  # fmt: skip


def zero_environment(stage: int) -> dict:
    """DeepSpeed's own configuration as accelerate hands it on; a small model is spread like a large one."""
    small = {"stage3_param_persistence_threshold": 0, "sub_group_size": 1000} if stage == 3 else {}
    config = {
        "zero_optimization": {"stage": stage, **small},
        "gradient_accumulation_steps": "auto", "gradient_clipping": "auto", "train_micro_batch_size_per_gpu": "auto",
    }  # fmt: skip
    return {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": json.dumps(config)}


def train_together(
    values: dict, log: Path, *, count: int = 2, fsdp: bool = False, zero: int = 0, before=None, run=None, each=None
) -> list[int]:
    """The same run in several gloo processes; returns their exit codes, 0 or 1 or minus the signal that ended one.

    Args:
        zero: the stage of DeepSpeed's ZeRO, 0 for none.
        before: a function of this module, called with the process's number before it trains.
        run: a function of this module that is called with the values instead of training.
        each: more of the environment, of every process by its number.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["training_cases"])
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    common = {
        "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
        "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": 1, **(FSDP if fsdp else {}),
        **(zero_environment(zero) if zero else {}),
    }  # fmt: skip
    running = []
    for rank in range(count):
        environment = {**common, "RANK": rank, "LOCAL_RANK": rank, **({} if each is None else each[rank])}
        running.append(
            context.Process(target=_train_as, args=(values, f"{log}-{rank}", environment, before, rank, run))
        )
        running[-1].start()
    for process in running:
        process.join(timeout=60)
        if process.is_alive():
            process.kill()
            process.join()
    return [process.exitcode for process in running]


def _train_as(values: dict, log: str, environment: dict, before, rank: int, run) -> None:
    import traceback

    os.environ.update({name: str(value) for name, value in environment.items()})
    torch.set_num_threads(1)
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        if before is not None:
            before(rank)
        if run is not None:
            run(values)
        else:
            train_model(TrainArguments(**values))
    except BaseException:
        traceback.print_exc()
        # Without waiting for the others, as a launcher would end it.
        os._exit(1)


def all_die_in_second_checkpoint(rank: int) -> None:
    """Every process is killed when it has written its part of the second checkpoint."""
    die_in_second_checkpoint(1)


def die_in_second_checkpoint(rank: int) -> None:
    """The last process is killed when it has written its part of the second checkpoint."""
    from hf_sparse_attention.train import state

    save, calls = state.sharded.save, []

    def save_and_die(*arguments, **keywords):
        save(*arguments, **keywords)
        calls.append(1)
        if len(calls) == 2 and rank:
            os.kill(os.getpid(), signal.SIGKILL)

    state.sharded.save = save_and_die


def encode_slowly(rank: int) -> None:
    """Both look for the encoded text before one has it; the last process then takes longer."""
    from hf_sparse_attention.train import data

    pack = data.pack

    def slow(*arguments):
        time.sleep(1 + rank)
        return pack(*arguments)

    data.pack = slow


def die_in_third_step(rank: int) -> None:
    """The last process is killed on its way through the third step."""
    from transformers.models.llama.modeling_llama import LlamaMLP

    forward, calls = LlamaMLP.forward, []

    def dying(self, hidden):
        calls.extend([1] if self.training else [])
        if rank and len(calls) == 6:
            os.kill(os.getpid(), signal.SIGKILL)
        return forward(self, hidden)

    LlamaMLP.forward = dying


def nan_in_third_step_of_one(rank: int) -> None:
    """The last process's second MLP gives NaN in the third step, and when it is looked at again."""
    from transformers.models.llama.modeling_llama import LlamaMLP

    forward, calls = LlamaMLP.forward, []

    def broken(self, hidden):
        calls.extend([1] if self.training else [])
        bad = rank and self.training and len(calls) in (6, 8)
        return forward(self, hidden) * (float("nan") if bad else 1)

    LlamaMLP.forward = broken


def infinite_loss_in_third_step_of_one(rank: int) -> None:
    """The last process's third loss is infinite, its gradients are not."""
    from transformers.loss import loss_utils

    entropy, calls = loss_utils.fixed_cross_entropy, []

    def broken(*arguments, **keywords):
        calls.extend([1] if torch.is_grad_enabled() else [])
        bad = rank and torch.is_grad_enabled() and len(calls) == 3
        return entropy(*arguments, **keywords) + (float("inf") if bad else 0.0)

    loss_utils.fixed_cross_entropy = broken


def leave_out_mlps(rank: int) -> None:
    """No MLP takes part, so none gets a gradient."""
    from transformers.models.llama.modeling_llama import LlamaMLP

    LlamaMLP.forward = lambda self, hidden: hidden


def split_heads(values: dict) -> None:
    """A model split by tensor parallelism computes what the whole one does."""
    import warnings

    from transformers import AutoModelForCausalLM

    warnings.filterwarnings("ignore", "Passing `tp_plan`", FutureWarning)
    torch.distributed.init_process_group("gloo")
    options = {"attn_implementation": values["map"]}
    whole = AutoModelForCausalLM.from_pretrained(values["model"], **options)
    split = AutoModelForCausalLM.from_pretrained(values["model"], tp_plan="auto", **options)
    assert type(split.model.layers[0].self_attn.q_proj.weight).__name__ == "DTensor"
    tokens = torch.arange(3, 35)[None]
    with torch.no_grad():
        torch.testing.assert_close(split(tokens).logits, whole(tokens).logits, atol=1e-5, rtol=1e-4)
    torch.distributed.destroy_process_group()


def save_flat_parts(values: dict) -> None:
    """Two processes save a tensor and a matrix in flat parts of any length and load them in others."""
    import torch.distributed.checkpoint as sharded

    from hf_sparse_attention.train.flat_parts import FlatPart

    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    whole = {"a/b.c": torch.randn(5, 3, 7), "d": torch.randn(11), "e": torch.randn(4, 4), "f": torch.tensor(3.0)}
    for value in whole.values():
        torch.distributed.broadcast(value, 0)

    def parts(tensors: dict, cut: float) -> dict:
        """What a process holds when the first one has the share `cut`."""
        found = {}
        for name, tensor in tensors.items():
            place = int(cut * tensor.numel())
            flat = tensor.flatten()[:place] if rank == 0 else tensor.flatten()[place:]
            found[name] = FlatPart(tensor.shape, 0 if rank == 0 else place, flat) if tensor.ndim else tensor
        return found

    empty = {name: torch.zeros_like(tensor) for name, tensor in whole.items()}
    for number, (save, load) in enumerate(((0.4, 0.73), (0.05, 1.0), (0.0, 0.31), (None, 0.55), (0.47, None))):
        folder = f"{values['folder']}/{number}"
        saved = whole if save is None else parts(whole, save)
        sharded.save(saved, storage_writer=sharded.FileSystemWriter(folder))
        loaded = {name: tensor.clone() for name, tensor in empty.items()}
        loaded = loaded if load is None else parts(loaded, load)
        sharded.load(loaded, storage_reader=sharded.FileSystemReader(folder))
        wanted = whole if load is None else parts(whole, load)
        for name, tensor in wanted.items():
            same = torch.equal(getattr(loaded[name], "held", loaded[name]), getattr(tensor, "held", tensor))
            assert same, (name, save, load)
    torch.distributed.destroy_process_group()


def full_disk_for_one(rank: int) -> None:
    """The last process cannot write its part of the second checkpoint."""
    from hf_sparse_attention.train import state

    def save(content, path):
        if "step-00000004" in str(path):
            raise OSError(28, "No space left on device")
        torch.save(content, path)

    if rank:
        state.torch = type(
            "Torch", (), {"save": staticmethod(save), "__getattr__": lambda _, name: getattr(torch, name)}
        )()


def assert_close_metrics(first: Path, second: Path, *, rel: float = 1e-4) -> None:
    one, other = metrics(first), metrics(second)
    assert [(line["step"], line["kind"]) for line in one] == [(line["step"], line["kind"]) for line in other]
    for line, wanted in zip(one, other, strict=True):
        del line["kind"], wanted["kind"]
        assert line == pytest.approx(wanted, rel=rel)
