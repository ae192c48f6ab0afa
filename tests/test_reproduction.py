"""The scripts of examples/reproduction: they tell mistakes of models that make known ones, read known factors, and
train what a row says."""

import importlib.util
import math
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from hf_sparse_attention.arguments import parse_arguments
from hf_sparse_attention.tasks.recall import COLON, LETTER, MultiQueryRecall
from hf_sparse_attention.tasks.samples import EOS, SEP
from hf_sparse_attention.tasks.synthetic import SYNTHETIC
from hf_sparse_attention.train import TrainTaskArguments, train_task
from hf_sparse_attention.train.task_arguments import RISING, check_task_arguments

SCRIPT = Path(__file__).parent.parent / "examples" / "reproduction" / "mqmtar_mistakes.py"
RUN = SCRIPT.with_name("run.sh")
TASK = MultiQueryRecall(alphabet=6, entries=36, queries=2)


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("mqmtar_mistakes", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Reader:
    """Answers from the haystack; the second letter by the key, or as any value with that first letter has it."""

    device = torch.device("cpu")

    def __init__(self, by_key: bool):
        self.by_key, self.draw = by_key, np.random.default_rng(0).choice

    def __call__(self, *, input_ids, use_cache, logits_to_keep):
        tokens = input_ids[0].tolist()
        colons = [place for place, token in enumerate(tokens) if token == COLON]
        pairs = {tuple(tokens[place - 2 : place]): tuple(tokens[place + 1 : place + 3]) for place in colons}
        end = tokens.index(SEP)
        asked = [tuple(tokens[place : place + 2]) for place in range(end - 3 * TASK.queries, end, 3)]
        said = []
        for key in asked:
            first, second = pairs[key]
            alike = [value[1] for value in pairs.values() if value[0] == first]
            said += [first, second if self.by_key else int(self.draw(alike)), tokens[end - 1]]
        logits = torch.zeros(1, len(tokens), TASK.vocabulary)
        for place, token in enumerate([*said, EOS], start=end):
            logits[0, place, token] = 1
        return SimpleNamespace(logits=logits[:, -logits_to_keep:])


def test_a_model_that_reads_the_key_makes_no_mistake(script):
    row = dict(zip(script.COLUMNS, script.mistakes(Reader(True), TASK, 40, 30), strict=True))
    assert row["exact match"] == "100.0" and int(row["value begins alone"]) + int(row["others begin alike"]) == 60
    assert row["wrong"] == row["first letter wrong"] == row["second letter wrong"] == row["then another's"] == "0"
    assert float(row["exact match by first letters"]) < 65


def test_a_model_that_reads_the_first_letter_makes_that_mistake_alone(script):
    row = dict(zip(script.COLUMNS, script.mistakes(Reader(False), TASK, 40, 1500), strict=True))
    assert row["wrong"] == row["first letter wrong"] == "0"
    assert row["second letter wrong"] == row["then another's"] and int(row["then another's"]) > 50
    # It takes one of those that begin alike without regard to the key: each as likely, and right if it is the same.
    assert float(row["exact match"]) == pytest.approx(float(row["exact match by first letters"]), abs=2.5)


def test_questions_are_those_of_the_sample(script):
    values, asked = script.questions(TASK.fixed_set(40, 1), TASK.queries)
    assert values.shape == (5, 2) and asked.shape == (2, 2) and (values >= LETTER).all()
    assert all((values == right).all(1).any() for right in asked) and np.isin(asked, values).all()


def run_of(folder, **changes) -> Path:
    """A small run of MQMTAR."""
    train_task(
        TrainTaskArguments(
            task="mqmtar", task_settings=["alphabet=6", "entries=36", "queries=2"], lengths=[16, 20], layers=2,
            hidden_size=16, heads=2, ffn_size=16, batch_size=4, steps=2, warmup_steps=1, learning_rates=[1e-3],
            validation_lengths=[16], validation_samples=2, device="cpu", output=str(folder), **changes,
        )
    )  # fmt: skip
    return folder / "rate-0.001-seed-0"


def test_the_command_reads_the_folder_of_a_run(tmp_path):
    words = [sys.executable, str(SCRIPT), str(run_of(tmp_path)), "--lengths", "24", "--samples", "3"]
    text = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    assert text.splitlines()[0].startswith("| length | exact match |")
    cells = [cell.strip() for cell in text.splitlines()[2].strip("| ").split("|")]
    assert cells[0] == "24" and int(cells[2]) + int(cells[4]) == 6
    refused = partial(subprocess.run, capture_output=True, text=True)
    for wrong, reason in (([str(tmp_path)], "has no model/"), ([words[2], "--lengths", "3"], "takes lengths from")):
        answer = refused([*words[:2], *wrong])
        assert answer.returncode == 2 and reason in answer.stderr
    (tmp_path / "rate-0.001-seed-0" / "model" / "task.json").unlink()
    answer = refused(words)
    assert answer.returncode == 2 and "has no task.json" in answer.stderr


def test_what_a_model_says_in_nan_is_no_mistake(script):
    def broken(*, input_ids, use_cache, logits_to_keep):
        return SimpleNamespace(logits=torch.full((1, logits_to_keep, TASK.vocabulary), torch.nan))

    broken.device = torch.device("cpu")
    with pytest.raises(ValueError, match="not finite"):
        script.mistakes(broken, TASK, 40, 1)


def test_factors_are_those_of_the_tokens(tmp_path):
    """One that is known: SSMax's start grows with log n, and is 1 in the mean over the training length."""
    still = {"new_learning_rate_share": 0.0}
    grown, neutral, none = (
        run_of(tmp_path / name, **changes)
        for name, changes in {
            "grown": {"scale_start": "logarithm", **still}, "neutral": still, "none": {"map": "entmax"},
        }.items()
    )  # fmt: skip
    script = SCRIPT.with_name("factors.py")

    def read(run, *options):
        return subprocess.run([sys.executable, str(script), str(run), *options], capture_output=True, text=True)

    tokens, length = TASK.fixed_set(40, 1).tokens.shape[1], TASK.width(20)
    slope = length / math.lgamma(length + 2)
    lines = read(grown, "--lengths", "40", "--samples", "3").stdout.splitlines()[2:]
    for layer, line in enumerate(lines):
        cells = [cell.strip() for cell in line.strip("| ").split("|")]
        assert cells[:2] == [str(layer), "40"] and len(lines) == 2
        assert float(cells[-1]) == pytest.approx(slope * math.log(tokens + 1), abs=6e-3)
        assert float(cells[2]) < float(cells[3]) < float(cells[4]) <= float(cells[5])
    assert read(neutral).stdout.splitlines()[2].endswith("| 1.00 | 1.00 | 1.00 | 1.00 |")
    for refused, reason in ((read(none), "another map"), (read(tmp_path), "has no model/")):
        assert refused.returncode == 2 and reason in refused.stderr


# run.sh, which calls train-task and table for a row

FAKE = """#!/bin/sh
echo "$CUDA_VISIBLE_DEVICES $*"
case "$*" in *ssmax*) exit 3 ;; esac
while [ $# -gt 1 ]; do
    [ "$1" = --output ] && mkdir -p "$2/run" && touch "$2/run/run.json"
    shift
done
"""


def called(tmp_path, *words, **environment) -> subprocess.CompletedProcess:
    """run.sh with a program that says how it was called, and cannot train `ssmax`."""
    fake = tmp_path / "hf-sparse-attention"
    fake.write_text(FAKE)
    fake.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", **environment}
    return subprocess.run(["sh", str(RUN), *words], capture_output=True, text=True, env=environment, cwd=tmp_path)


def commands(tmp_path, *words, **environment):
    """The commands that run.sh calls, and its exit code."""
    ended = called(tmp_path, *words, **environment)
    return [line.split() for line in ended.stdout.splitlines()], ended.returncode


@pytest.mark.parametrize("task", SYNTHETIC)
def test_a_command_makes_the_whole_row_of_a_task(tmp_path, task):
    found, code = commands(tmp_path, task, "maps", "rope", "ablations")
    assert code == 1 and {words[0] for words in found[:-1]} == {"0"} and len(found) == 12
    outputs = []
    for words in found[:-1]:
        assert words[1] == "train-task"
        arguments = parse_arguments(TrainTaskArguments, words[2:], program="")
        check_task_arguments(arguments)
        assert arguments.task == task and arguments.resume == "auto"
        assert len(arguments.learning_rates) * len(arguments.seeds) >= 3
        # The paper's own rate, which is AdamW's, is among them, but for Reverse.
        plain = parse_arguments(TrainTaskArguments, [*words[2:4], "--output", ""], program="")
        is_muon = task in ("sort", "local_count", "mqmtar")
        assert arguments.optimizer == ("muon" if is_muon else "adamw")
        is_searched = not is_muon and task != "reverse"
        assert not is_searched or plain.learning_rates[0] == pytest.approx(arguments.learning_rates[1])
        assert arguments.together == (1 if task == "mqmtar" else 4)
        rises = task == "mqmtar" and arguments.map in RISING
        assert arguments.softmax_share == (0.5 if rises else 0)
        assert arguments.warmup_steps == (0 if "no-warmup" in arguments.output else arguments.steps // 20)
        outputs.append((arguments.output, arguments.map, arguments.position, arguments.scale_start))
    assert outputs[1:3] + outputs[5:9] == [
        (f"runs/{task}/ssmax", "ssmax", "nape", "neutral"),
        (f"runs/{task}/entmax", "entmax", "nape", "neutral"),
        (f"runs/{task}/softmax-rope", "softmax", "rope", "neutral"),
        (f"runs/{task}/asentmax-rope", "asentmax", "rope", "neutral"),
        (f"runs/{task}/asentmax-normal", "asentmax", "nape", "normal"),
        (f"runs/{task}/asentmax-logarithm", "asentmax", "nape", "logarithm"),
    ]
    assert found[-1][:3] == ["table", "--runs", f"runs/{task}"]


def test_rows_go_on_several_cards_and_one_that_fails_stops_no_other(tmp_path):
    found, code = commands(
        tmp_path, "sort", "softmax", "ssmax", "entmax", "asentmax", CARDS="1 3", STEPS="400", SEEDS="0 1",
        OPTIONS="--checkpoint_every 0", OUT="elsewhere", OPTIMIZER="adamw", SHARE="0.1",
    )  # fmt: skip
    maps = {words[words.index("--map") + 1]: words[0] for words in found[:-1]}
    assert code == 1 and maps == {"softmax": "1", "entmax": "1", "ssmax": "3", "asentmax": "3"}
    assert "--steps 400 --warmup_steps 20" in " ".join(found[0]) and "--seeds 0 1 --tested" in " ".join(found[0])
    assert all("--optimizer adamw" in " ".join(words) for words in found[:-1])
    shares = {words[words.index("--map") + 1] for words in found[:-1] if "--softmax_share 0.1" in " ".join(words)}
    assert shares == {"entmax", "asentmax"}
    assert found[-1][:3] == ["table", "--runs", "elsewhere/sort"]
    assert commands(tmp_path, "sort", "softmax")[1] == 0 and commands(tmp_path, "nothing") == ([], 2)


def test_the_script_says_what_it_takes_and_what_went_wrong(tmp_path):
    alone = called(tmp_path)
    assert alone.returncode == 2 and "run.sh TASK [ROW...]" in alone.stderr and "flip_flop" in alone.stderr
    # No table of nothing.
    failed = called(tmp_path, "sort", "ssmax", FAST="")
    assert failed.returncode == 1 and failed.stdout.split()[1] == "train-task" and "table --" not in failed.stdout
    assert "Not every row was trained" in failed.stderr and "no NVIDIA GPU" not in failed.stderr
    unknown = called(tmp_path, "sort", "asentmax", "asentmx")
    assert unknown.returncode == 2 and unknown.stdout == "" and "row is 'asentmx'" in unknown.stderr


@pytest.mark.parametrize("name", ["INT", "TERM"])
def test_what_interrupts_the_script_ends_its_training(tmp_path, name):
    """A row in the background would go on, and the next one begin."""
    fake = tmp_path / "hf-sparse-attention"
    fake.write_text('#!/bin/sh\necho "$*" >> called; echo $$ >> trained; exec sleep 60\n')
    fake.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "CARDS": "0 1", "FAST": ""}
    words = ["sh", str(RUN), "sort", "softmax", "ssmax", "entmax"]
    with subprocess.Popen(words, env=environment, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as script:
        trained = tmp_path / "trained"
        while not trained.exists() or len(trained.read_text().split()) < 2:
            assert script.poll() is None
            time.sleep(0.02)
        script.send_signal(getattr(signal, f"SIG{name}"))
        _, said = script.communicate(timeout=30)
    assert script.returncode == 130 and "the same command goes on" in said
    assert len((tmp_path / "called").read_text().splitlines()) == 2
    for process in trained.read_text().split():
        with pytest.raises(ProcessLookupError):
            os.kill(int(process), 0)
