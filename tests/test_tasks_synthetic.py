"""The synthetic tasks: every sample against a solver that reads its tokens, splits that cannot share a sample, streams
that are the same everywhere."""

import hashlib
import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from itertools import groupby

import numpy as np
import pytest

from hf_sparse_attention.tasks.random_bits import RandomBits, hashed
from hf_sparse_attention.tasks.recall import BAR, COLON, FILLER, LETTER
from hf_sparse_attention.tasks.samples import BOS, EOS, FIRST, NO_TARGET, PAD, SEP
from hf_sparse_attention.tasks.synthetic import SYNTHETIC, make_task

SMALL = {
    "mqmtar": {"alphabet": 3, "entries": 9, "queries": 2},
    "reverse": {"symbols": 3},
    "copy": {"symbols": 3},
    "sort": {"symbols": 3},
    "local_count": {"symbols": 2, "longest_run": 3},
    "2back": {"symbols": 3},
    "flip_flop": {},
}
SHORT = {"mqmtar": 17, "flip_flop": 12, "local_count": 10}


def parts(tokens):
    """Source and answer of a sample with an answer, PAD taken off."""
    tokens = tokens[: tokens.index(PAD)] if PAD in tokens else tokens
    assert tokens[0] == BOS and tokens[-1] == EOS and tokens.count(SEP) == 1
    cut = tokens.index(SEP)
    return tokens[1:cut], tokens[cut + 1 : -1]


def asked_tokens(tokens, targets):
    """The targets of a sample with an answer: from SEP to the one before EOS, each the next token; and no other."""
    cut, end = tokens.index(SEP), tokens.index(EOS)
    assert targets[cut:end] == tokens[cut + 1 : end + 1]
    assert set(targets[:cut] + targets[end:]) <= {NO_TARGET}


def solve_copy(task, tokens, targets, length):
    asked_tokens(tokens, targets)
    source, answer = parts(tokens)
    assert len(source) == length and answer == source


def solve_reverse(task, tokens, targets, length):
    asked_tokens(tokens, targets)
    source, answer = parts(tokens)
    assert len(source) == length
    stack = list(source)
    assert answer == [stack.pop() for _ in source]


def solve_sort(task, tokens, targets, length):
    asked_tokens(tokens, targets)
    source, answer = parts(tokens)
    counted = Counter(source)
    assert len(source) == length and answer == [
        token for token in range(task.vocabulary) for _ in range(counted[token])
    ]


def solve_recall(task, tokens, targets, length):
    asked_tokens(tokens, targets)
    source, answer = parts(tokens)
    letter = {COLON: ":", BAR: "|", FILLER: "."}
    text = "".join(letter.get(token) or f"<{token - LETTER}>" for token in source[:length])
    item = r"<\d+><\d+>"
    assert re.fullmatch(rf"(\.|{item}:{item}\|)*", text)
    pairs = re.findall(rf"({item}):({item})\|", text)
    assert len(pairs) == int(length * 8 // 10 // 6) == len(dict(pairs))
    questions = "".join(letter.get(token) or f"<{token - LETTER}>" for token in source[length:])
    assert re.fullmatch(rf"({item}\|){{{task.queries}}}", questions)
    keys = questions.rstrip("|").split("|")
    assert len(set(keys)) == task.queries
    said = "".join(letter.get(token) or f"<{token - LETTER}>" for token in answer)
    assert said == "".join(dict(pairs)[key] + "|" for key in keys)


def solve_2back(task, tokens, targets, length):
    assert tokens[0] == BOS and targets[0] == targets[1] == targets[2] == NO_TARGET
    before, last = tokens[1], tokens[2]
    for place in range(3, length + 1):
        assert targets[place] == before
        before, last = last, tokens[place]
    assert set(tokens[length + 1 :]) <= {PAD} and set(targets[length + 1 :]) <= {NO_TARGET}


def solve_local_count(task, tokens, targets, length):
    assert tokens[0] == BOS and targets[0] == NO_TARGET
    runs = [len(list(group)) for _, group in groupby(tokens[1 : length + 1])]
    assert max(runs) <= task.longest_run
    expected = [FIRST + task.symbols + number for size in runs for number in range(size)]
    assert targets[1 : length + 1] == expected
    assert set(tokens[length + 1 :]) <= {PAD} and set(targets[length + 1 :]) <= {NO_TARGET}


def solve_flip_flop(task, tokens, targets, length):
    names = dict(enumerate("01wir", start=FIRST))
    text = "".join(names[token] for token in tokens[1:] if token != PAD)
    assert len(text) == length // 2 * 2 and text[0] == "w" and text[-2] == "r"
    memory = None
    for place in range(0, len(text), 2):
        instruction, bit = text[place : place + 2]
        assert instruction in "wir" and bit in "01"
        memory = bit if instruction == "w" else memory
        if instruction == "r":
            assert bit == memory
        assert targets[1 + place] == (FIRST + int(memory) if instruction == "r" else NO_TARGET)
        assert targets[2 + place] == NO_TARGET


SOLVERS = {
    "mqmtar": solve_recall, "reverse": solve_reverse, "copy": solve_copy, "sort": solve_sort,
    "local_count": solve_local_count, "2back": solve_2back, "flip_flop": solve_flip_flop,
}  # fmt: skip


def check(task, samples):
    assert samples.tokens.dtype == samples.targets.dtype == np.int64
    assert samples.tokens.min() >= 0 and samples.tokens.max() < task.vocabulary
    assert samples.targets.max() < task.vocabulary
    for tokens, targets, length in zip(
        samples.tokens.tolist(), samples.targets.tolist(), samples.lengths.tolist(), strict=True
    ):
        SOLVERS[task.name](task, tokens, targets, length)


@pytest.mark.parametrize("name", SYNTHETIC)
def test_every_sample_is_what_the_docstring_says(name):
    for settings in ({}, SMALL[name]):
        task = make_task(name, settings)
        low, high = task.default_lengths
        batch = task.training_batch(3, batch=200)
        assert batch.tokens.shape == (200, task.width(high))
        assert set(batch.lengths) == set(range(low, high + 1)) or len(set(batch.lengths)) > 25
        check(task, batch)
        for split in ("validation", "test"):
            check(task, task.fixed_set(high + 7, 60, split=split))
        check(task, task.training_batch(0, batch=20, lengths=(task.shortest, task.shortest)))
        check(task, task.training_batch(0, batch=20, lengths=(task.shortest, task.shortest + 40)))


@pytest.mark.parametrize("settings", [{}, {"queries": 1}, {"entries": 4, "alphabet": 2, "queries": 1}])
def test_recall_at_lengths_with_few_and_many_pairs(settings):
    """Fewer pairs than decide for the split, and more than can be drawn one by one."""
    task = make_task("mqmtar", settings)
    many = 30 if "entries" in settings else 1500
    for lengths in ((task.shortest, many), (many, many)):
        check(task, task.training_batch(0, batch=30, lengths=lengths))
    check(make_task("mqmtar"), next(make_task("mqmtar").fixed_blocks(9001, 2)))
    with pytest.raises(ValueError, match="only"):
        task.training_batch(0, lengths=(task.shortest, 80_000))


@pytest.mark.parametrize("name", SYNTHETIC)
def test_no_sample_of_one_split_is_in_another(name):
    """With so few different samples that without the split nearly all of the test would be trained on."""
    task = make_task(name, SMALL[name])
    length = SHORT.get(name, 8)
    sets = {
        "train": {tuple(row) for step in range(60) for row in task.training_batch(
            step, batch=512, lengths=(length - 2, length)).tokens.tolist()},
    }  # fmt: skip
    width = task.width(length)
    for split in ("validation", "test"):
        sets[split] = {tuple(row) for row in task.fixed_set(length, 300, split=split).tokens.tolist()}
        assert all(len(row) == width for row in sets[split])
        assert len(sets[split]) >= 3
    assert not sets["train"] & sets["test"]
    assert not sets["train"] & sets["validation"]
    assert not sets["validation"] & sets["test"]


def test_a_task_with_too_few_samples_to_split_says_so():
    task = make_task("flip_flop")
    with pytest.raises(ValueError, match="too few different samples of length 4 to 4"):
        # Only the bit that is written is free.
        task.fixed_set(4, 10)


def test_a_fixed_set_begins_the_same_whatever_its_size():
    task = make_task("mqmtar")
    few, many = task.fixed_set(40, 7), task.fixed_set(40, 130)
    assert len(few) == 7 and len(many) == 130
    assert (many.tokens[:7] == few.tokens).all() and (many.targets[:7] == few.targets).all()


def test_a_training_batch_is_a_function_of_seed_and_step():
    task = make_task("sort")
    assert (task.training_batch(5, seed=1).tokens == task.training_batch(5, seed=1).tokens).all()
    rows = [task.training_batch(step, seed=seed).tokens.tobytes() for step in range(3) for seed in range(3)]
    assert len(set(rows)) == 9


# SHA-256 of the first 1,000 training samples of seed 0 and of the fixed test set of the longest training length. A
# change of them is a change of every number measured with the task: raise its version.
HASHES = {
    "mqmtar": "1ebc55fdae266131",
    "reverse": "49f35a227c7c107c",
    "copy": "3b784d6dbf233f40",
    "sort": "c5ccca81f3789224",
    "local_count": "9b0d2235fdad785d",
    "2back": "bd268337c4aec4c4",
    "flip_flop": "c327178ac875e777",
}
_HASHING = """
import hashlib, json
import numpy as np
from hf_sparse_attention.tasks.synthetic import SYNTHETIC, make_task
found = {}
for name in SYNTHETIC:
    task, digest = make_task(name), hashlib.sha256()
    batches = [task.training_batch(step) for step in range(8)]
    for field in ("tokens", "targets"):
        digest.update(np.concatenate([getattr(batch, field) for batch in batches])[:1000].astype("<i8").tobytes())
    test = task.fixed_set(task.default_lengths[1], 1000)
    digest.update(test.tokens.astype("<i8").tobytes() + test.targets.astype("<i8").tobytes())
    found[name] = digest.hexdigest()[:16]
print(json.dumps(found))
"""


def test_the_same_samples_in_every_process_and_version():
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    ran = subprocess.run([sys.executable, "-c", _HASHING], capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout) == HASHES


def test_random_bits_are_those_of_philox_and_splitmix():
    """Philox4x64-10 of counter and key 0 is Random123's published known answer; NumPy counts before it draws."""
    before = np.full(4, 2**64 - 1, dtype=np.uint64)
    words = np.random.Philox(counter=before, key=np.zeros(2, dtype=np.uint64)).random_raw(4).tolist()
    assert words == [0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B]
    bits = RandomBits("a name", 3)
    key = np.frombuffer(hashlib.sha256(b"a name").digest()[:16], dtype="<u8").astype(np.uint64)
    plain = np.random.Philox(counter=np.array([0, 0, 3, 0], dtype=np.uint64), key=key).random_raw(4)
    assert bits.words((2, 2)).ravel().tolist() == plain.tolist()
    assert RandomBits("a name", 4).words((4,)).tolist() != plain.tolist()
    drawn = RandomBits("b").below(10, (100_000,))
    assert drawn.min() == 0 and drawn.max() == 9
    assert (np.abs(np.bincount(drawn) - 10_000) < 500).all()
    mask = 2**64 - 1

    def plainly(values):
        state = 0x9E3779B97F4A7C15
        for value in values:
            state = (state + (value & mask) + 0x9E3779B97F4A7C15) & mask
            state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
            state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask
            state ^= state >> 31
        return state

    rows = [[3, -1, 5], [0, 0, 0]]
    assert hashed(np.array(rows)).tolist() == [plainly(row) for row in rows]


def test_distributions():
    flip_flop = make_task("flip_flop").training_batch(0, batch=2000, lengths=(200, 200)).tokens[:, 3:-2:2] - FIRST - 2
    shares = np.bincount(flip_flop.ravel()) / flip_flop.size
    assert np.abs(shares - [0.1, 0.8, 0.1]).max() < 0.01
    count = make_task("local_count")
    batch = count.training_batch(0, batch=2000, lengths=(100, 100))
    # The first run, where it is not the last: uniform.
    first = [len(list(next(groupby(row))[1])) for row in batch.tokens[:, 1:].tolist()]
    assert np.abs(np.bincount(first, minlength=49)[1:] - 2000 / 48).max() < 35
    recall = make_task("mqmtar").training_batch(0, batch=2000, lengths=(60, 60))
    # Questions come from every pair alike: the place of the first one's key.
    places = []
    for row in recall.tokens.tolist():
        text, asked = row[1:61], row[61:63]
        starts = [place for place, token in enumerate(text) if token == COLON]
        places.append([text[place - 2 : place] for place in starts].index(asked))
    assert np.abs(np.bincount(places) - 250).max() < 80


@pytest.mark.parametrize("name", SYNTHETIC)
def test_data_never_limits_250_steps_a_second(name):
    task = make_task(name)
    task.training_batch(0)
    seconds = []
    for step in range(20):
        begun = time.process_time()
        task.training_batch(step)
        seconds.append(time.process_time() - begun)
    assert min(seconds) < 1 / 250


def test_settings_are_used_or_refused():
    assert make_task("copy", {"symbols": 5}).vocabulary == 9
    for name, settings, message in (
        ("count", {}, "choose one of mqmtar"),
        ("copy", {"queries": 2}, "copy has no queries; it has symbols"),
        ("flip_flop", {"symbols": 3}, "nothing to set"),
        ("copy", {"symbols": 1}, "at least 2"),
        ("2back", {"symbols": 1}, "at least 2"),
        ("local_count", {"longest_run": 0}, "at least 2 and 1"),
        ("mqmtar", {"entries": 70_000}, "square of the alphabet"),
        ("mqmtar", {"share": 1.5}, "share is 1.5"),
    ):
        with pytest.raises(ValueError, match=message):
            make_task(name, settings)
    for lengths in ((10, 5), (0, 4)):
        with pytest.raises(ValueError, match="lengths are"):
            make_task("copy").training_batch(0, lengths=lengths)
    assert make_task("mqmtar").shortest == 30
