"""Pushing with an unmodified huggingface_hub to a Hub on this machine: what arrives, what a second push sends, and
what is left, said and leaked when the Hub or the line to it fails. The client runs in a process of its own."""

import contextlib
import io
import json
import logging
import math
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import time
import traceback
import venv
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
import pytest
import torch
from hub_server import CUTS, Blob, HubServer
from safetensors.torch import load_file
from training_cases import ROOT, dense_folder, run, write_text
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from hf_sparse_attention.convert import ConvertArguments, convert_model
from hf_sparse_attention.demo import LENGTHS, DemoArguments, run_demo
from hf_sparse_attention.evaluate import EvaluateArguments, evaluate_models
from hf_sparse_attention.hub import PushArguments, push_model
from hf_sparse_attention.report import ReportArguments, report_model

TOKEN, READER = "hf_" + "Abc123" * 6, "hf_" + "Reads1" * 6
# A token that does not look like one.
PLAIN = "of-another-kind-4711"
REPOSITORY = "ann/story"


@dataclass
class Outcome:
    """What a call in the client's process gave: a value or an error, what it printed and logged, how long it slept."""

    value: object
    error: str | None
    output: str
    sleeps: list[float]


def begin_client() -> None:
    """In the client's process: the waits of the client's retries are noted, and kept short."""
    sleep = time.sleep

    def shorter(seconds):
        SLEEPS.append(seconds)
        sleep(min(seconds, 0.002))

    time.sleep = shorter


SLEEPS: list[float] = []


def recorded(function, arguments: tuple, environment: dict) -> Outcome:
    """In the client's process: a call with everything it says."""
    SLEEPS.clear()
    output = io.StringIO()
    handler = logging.StreamHandler(output)
    logging.getLogger().addHandler(handler)
    for name in ("huggingface_hub", "hf_sparse_attention", "transformers"):
        logging.getLogger(name).setLevel(logging.DEBUG)
        logging.getLogger(name).addHandler(handler)
    value = error = None
    os.environ.update(environment)
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            value = function(*arguments)
        except (Exception, SystemExit) as caught:
            error = f"{type(caught).__name__}: {caught}"
            traceback.print_exc(file=output)
    for name in (None, "huggingface_hub", "hf_sparse_attention", "transformers"):
        logging.getLogger(name).removeHandler(handler)
    return Outcome(value, error, output.getvalue(), list(SLEEPS))


def push(model: str, **options):
    """In the client's process: a push; (commit, url of a pull request, what the card's file says)."""
    done = push_model(PushArguments(model=model, **{"repo_id": REPOSITORY, **options}))
    return (str(done), None) if isinstance(done, Path) else (done.oid, done.pr_url)


@pytest.fixture(scope="module")
def server():
    with HubServer({TOKEN: "ann", PLAIN: "ann"}, readers={READER: "bob"}) as server:
        yield server


@pytest.fixture(scope="module")
def pool(server, tmp_path_factory):
    before = dict(os.environ)
    os.environ.update(server.environment, HF_TOKEN=TOKEN, HF_HOME=str(tmp_path_factory.mktemp("home")))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=begin_client) as pool:
        pool.submit(recorded, time.time, (), {}).result()
        os.environ.clear()
        os.environ.update(before)
        yield pool


@pytest.fixture
def client(pool, server):
    """A function that calls another one in the client's process; nothing it says holds a token."""
    server.begin()

    def call(function, *arguments, token: str = TOKEN, **options) -> Outcome:
        if options:
            function, arguments = _with_options, (function, arguments, options)
        outcome = pool.submit(recorded, function, arguments, {"HF_TOKEN": token}).result(timeout=120)
        for secret in (TOKEN, READER, token):
            assert secret not in f"{outcome.error}{outcome.output}"
        return outcome

    return call


def _with_options(function, arguments, options):
    return function(*arguments, **options)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Converted models: `sharded` in two files, `other` with other weights in one."""
    folder = tmp_path_factory.mktemp("models")
    for name, seed, shard in (("sharded", 0, "40KB"), ("other", 1, "5GB")):
        dense_folder(folder / "dense" / name, seed=seed, shard=shard)
        convert_model(ConvertArguments(model=str(folder / "dense" / name), output=str(folder / name)))
    return folder


@pytest.fixture(scope="module")
def expected(models, tmp_path_factory):
    """The files of a push, by the model's name and the branch."""

    def files(name: str, revision: str | None = None) -> dict[str, bytes]:
        if (name, revision) not in known:
            output = tmp_path_factory.mktemp("dry") / "up"
            push_model(PushArguments(str(models / name), REPOSITORY, str(output), revision=revision))
            known[name, revision] = {file.name: file.read_bytes() for file in output.iterdir()}
        return known[name, revision]

    known = {}
    return files


def holds(server, files: dict[str, bytes], revision: str = "main") -> bool:
    there = dict(server.repositories[REPOSITORY].files(revision))
    there.pop(".gitattributes")
    return there == files


def state(server) -> dict | None:
    """Every reference and its files, None without a repository."""
    repository = server.repositories.get(REPOSITORY)
    return None if repository is None else {name: repository.files(name) for name in repository.references}


def download(repo_id: str, **options) -> dict[str, bytes]:
    """In the client's process: a snapshot, its files, and whether the model loads with the same weights."""
    folder = Path(huggingface_hub.snapshot_download(repo_id, **options))
    model = AutoModelForCausalLM.from_pretrained(repo_id, **options)
    stored = {}
    for file in folder.glob("*.safetensors"):
        stored |= load_file(file)
    state = model.state_dict()
    assert type(model).__name__ == "SparseLlamaForCausalLM"
    assert all(torch.equal(state[name], value) for name, value in stored.items())
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name != ".gitattributes"}


def test_a_new_repository_gets_one_commit_and_comes_back(client, server, models, expected):
    outcome = client(push, str(models / "sharded"), private=True)
    assert outcome.error is None, outcome.output
    repository = server.repositories[REPOSITORY]
    assert repository.private and holds(server, expected("sharded"))
    assert len([name for name in repository.files() if name.startswith("model-")]) > 1
    # One commit beside the one that every repository begins with.
    assert len(repository.commits) == 2 and outcome.value == (repository.find("main"), None)
    assert f"{server.url}/{REPOSITORY}/commit/{outcome.value[0]}" in outcome.output
    assert len(server.sent("/lfs/.*/[0-9a-f]{64}", "PUT")) == 2
    assert client(download, REPOSITORY).value == expected("sharded")


def test_a_second_push_sends_what_changed(client, server, models, expected, tmp_path):
    assert client(push, str(models / "sharded")).error is None
    server.requests.clear()
    outcome = client(push, str(models / "sharded"))
    assert outcome.error is None and "nothing to do" in outcome.output
    assert not server.sent("/lfs/.*/[0-9a-f]{64}", "PUT") and not server.sent("/commit/", "POST")
    assert len(server.repositories[REPOSITORY].commits) == 2
    # Another licence changes the card alone.
    server.requests.clear()
    assert client(push, str(models / "sharded"), license="mit").error is None
    assert not server.sent("/lfs/.*/[0-9a-f]{64}", "PUT")
    ((*_, size, status),) = server.sent("/commit/", "POST")
    assert status == 200 and size < 2 * len(server.repositories[REPOSITORY].files()["README.md"])
    # Another model: its one file goes up, and those of the first one go in the same commit. Other files stay.
    repository = server.repositories[REPOSITORY]
    by_hand = {"notes.txt": Blob(b"mine", False), "onnx/model.safetensors": Blob(b"x", True)}
    repository.commit("main", repository.commits[repository.find("main")] | by_hand, "by hand")
    assert client(push, str(models / "other")).error is None
    assert holds(server, {**expected("other"), "notes.txt": b"mine", "onnx/model.safetensors": b"x"})


def test_branch_and_pull_request(client, server, models, expected):
    assert client(push, str(models / "sharded")).error is None
    outcome = client(push, str(models / "other"), revision="second")
    assert outcome.error is None, outcome.output
    assert holds(server, expected("sharded")) and holds(server, expected("other", "second"), "second")
    assert 'revision="second"' in server.repositories[REPOSITORY].files("second")["README.md"].decode()
    assert client(download, REPOSITORY, revision="second").value == expected("other", "second")

    before = state(server)
    outcome = client(push, str(models / "other"), create_pr=True, token=READER)
    assert outcome.error is None and outcome.value[1] == f"{server.url}/{REPOSITORY}/discussions/1"
    assert outcome.value[1] in outcome.output
    assert holds(server, expected("other"), "refs/pr/1")
    assert state(server) == {**before, "refs/pr/1": server.repositories[REPOSITORY].files("refs/pr/1")}
    # A commit to a pull request that is there.
    assert client(push, str(models / "sharded"), revision="refs/pr/1").error is None
    assert len(server.repositories[REPOSITORY].references) == 3


def test_private_is_never_dropped(client, server, models):
    server.create(REPOSITORY)
    before = state(server)
    outcome = client(push, str(models / "sharded"), private=True)
    assert "exists and is public" in outcome.error and state(server) == before
    assert not server.sent("/lfs/")


def test_a_repository_that_ignores_weights_is_refused(client, server, models):
    server.create(REPOSITORY, files={".gitignore": b"*.safetensors\n"})
    before = state(server)
    outcome = client(push, str(models / "other"))
    assert ".gitignore of ann/story keeps out model.safetensors" in outcome.error and state(server) == before


def push_with_transformers(model: str, way: str) -> dict:
    """In the client's process: what a user of Transformers writes; returns what differs after coming back."""
    loaded = AutoModelForCausalLM.from_pretrained(model)
    if way == "config":
        loaded.config.push_to_hub(REPOSITORY, private=True)
        loaded.config.save_pretrained(f"{model}-config", push_to_hub=True, repo_id="ann/config")
        return {"type": AutoConfig.from_pretrained(REPOSITORY).model_type}
    if way == "save":
        loaded.save_pretrained(f"{model}-saved", push_to_hub=True, repo_id=REPOSITORY, max_shard_size="40KB")
    else:
        loaded.push_to_hub(REPOSITORY, private=True, max_shard_size="40KB")
    again = AutoModelForCausalLM.from_pretrained(REPOSITORY)
    state = loaded.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in again.state_dict().items())
    return {"type": again.config.model_type}


@pytest.mark.parametrize("way", ["push", "save", "config"])
def test_push_to_hub_of_transformers_carries_the_module(client, server, models, way):
    outcome = client(push_with_transformers, str(models / "other"), way)
    assert outcome.error is None, outcome.output
    assert outcome.value == {"type": "sparse_llama"}
    files = server.repositories[REPOSITORY].files()
    assert json.loads(files["config.json"])["auto_map"]["AutoModelForCausalLM"].endswith(".SparseLlamaForCausalLM")
    assert b"pip install hf-sparse-attention" in files["modeling_hf_sparse_attention.py"]
    if way == "config":
        assert "modeling_hf_sparse_attention.py" in server.repositories["ann/config"].files()
    else:
        assert len([name for name in files if name.endswith(".safetensors")]) > 1
        assert b"- hf-sparse-attention\n" in files["README.md"] and b"- asentmax\n" in files["README.md"]


CASES = [
    # kind, path, method, times, what the error says; None: the push completes
    (401, "/api/models", "GET", 99, "hf auth login"),
    (401, "/commit/", "POST", 1, "hf auth login"),
    (403, "/commit/", "POST", 1, "write access.*--create_pr"),
    (404, "/preupload/", "POST", 1, "check the name"),
    (409, "/commit/", "POST", 1, "changed or is being changed.*push again"),
    (412, "/commit/", "POST", 1, "changed while.*push again"),
    (413, "/lfs/ann/story/", "PUT", 1, "smaller shards"),
    (429, "/commit/", "POST", 1, "wait 7 seconds and push again"),
    (429, "/lfs/ann/story/", "PUT", 2, None),
    (500, "/lfs/ann/story/", "PUT", 2, None),
    (500, "/lfs/ann/story/", "PUT", 99, "fault of its own"),
    (503, "/commit/", "POST", 1, "fault of its own"),
    ("cut-request", "/lfs/ann/story/", "PUT", 1, None),
    ("cut-request", "/lfs/ann/story/", "PUT", 99, "broke off"),
    ("corrupt", "/lfs/ann/story/", "PUT", 1, "checksum"),
    ("cut-request", "/commit/", "POST", 1, "broke off"),
    ("lose-answer", "/commit/", "POST", 1, None),
    ("cut-answer", "/commit/", "POST", 1, None),
    ("slow", "", "", 3, None),
]


@pytest.mark.parametrize(("kind", "path", "method", "times", "says"), CASES)
def test_a_push_completes_or_changes_nothing(client, server, models, expected, kind, path, method, times, says):
    server.create(REPOSITORY, files={"README.md": b"of before", "model.safetensors": b"of before"})
    before = state(server)
    headers = {"Retry-After": "7"} if kind == 429 else {}
    server.fault(kind, path, method, times=times, say=f"no: {TOKEN}, {PLAIN}, made to fail", headers=headers)
    outcome = client(push, str(models / "sharded"), token=PLAIN)
    if says is None:
        assert outcome.error is None, outcome.error
        assert holds(server, expected("sharded"))
        # The client waits as long as it was told to, and a second more.
        assert kind != 429 or 8.0 in outcome.sleeps
        return
    assert outcome.error.startswith("OSError: ")
    pytest.raises(OSError, _raise, outcome.error).match(f"(?s){says}")
    assert state(server) == before and outcome.error.endswith("Nothing was changed on the Hub")
    assert "Traceback" in outcome.output and "During handling" not in outcome.output
    # Nothing is in the way of the next try.
    server.faults.clear()
    assert client(push, str(models / "sharded")).error is None and holds(server, expected("sharded"))


def _raise(text):
    raise OSError(text)


def test_what_a_failed_push_made_is_said(client, server, models):
    server.fault(403, "/commit/", "POST")
    outcome = client(push, str(models / "other"))
    assert "ann/story, made by this push, is there and holds no model" in outcome.error
    assert list(server.repositories[REPOSITORY].files()) == [".gitattributes"]
    server.fault(403, "/commit/", "POST")
    outcome = client(push, str(models / "other"), revision="second")
    assert "the branch second, made by this push, is there and holds what main holds" in outcome.error
    # A branch is made last: what fails before leaves none.
    server.fault(500, "/lfs/ann/story/", "PUT", times=99)
    assert client(push, str(models / "sharded"), revision="third").error.endswith("Nothing was changed on the Hub")
    server.faults.clear()
    # Who may not write makes nothing.
    outcome = client(push, str(models / "other"), repo_id="ann/second", token=READER)
    assert "write access" in outcome.error and list(server.repositories) == [REPOSITORY]
    outcome = client(push, str(models / "other"), repo_id="ann/none", create_pr=True)
    assert "check the name" in outcome.error and list(server.repositories) == [REPOSITORY]
    outcome = client(push, str(models / "other"), token="hf_" + "Wrong1" * 6)
    assert "hf auth login" in outcome.error


def test_who_commits_in_between_is_not_overwritten(client, server, models):
    repository = server.create(REPOSITORY)

    def commit_first(number, method, path):
        if "/commit/" in path:
            repository.commit("main", {"config.json": Blob(b"of another", False)}, "another")

    server.plan = commit_first
    outcome = client(push, str(models / "other"))
    assert "changed while this commit was made: push again" in outcome.error
    assert "main has got a commit that is not this one meanwhile" in outcome.error
    assert repository.files() == {"config.json": b"of another"}


def push_interrupted(model: str) -> str:
    """In the client's process: a push in which the user loses patience at the first wait."""

    def interrupt(seconds):
        raise KeyboardInterrupt

    before, time.sleep = time.sleep, interrupt
    try:
        push(model)
    except KeyboardInterrupt:
        return "interrupted"
    finally:
        time.sleep = before


def test_an_interrupted_push_says_what_is_there(client, server, models, expected):
    server.fault(500, "/lfs/ann/story/", "PUT")
    outcome = client(push_interrupted, str(models / "other"))
    assert outcome.value == "interrupted", outcome.output
    assert "interrupted: Nothing was committed; ann/story, made by this push, is there and holds" in outcome.output
    server.fault("lose-answer", "/commit/", "POST")
    outcome = client(push_interrupted, str(models / "other"))
    assert outcome.value == "interrupted" and "interrupted: The commit is there, whole: http" in outcome.output
    assert holds(server, expected("other"))


def convert_and_push(model: str, folder: str) -> dict:
    """In the client's process: a model of the Hub is converted and pushed."""
    from huggingface_hub import ModelCard

    convert_model(ConvertArguments(model=model, output=f"{folder}/sparse"))
    push(f"{folder}/sparse")
    return ModelCard.load(REPOSITORY).data.to_dict()


def test_base_model_and_licence_are_those_of_the_hub(client, server, models, tmp_path):
    dense = {file.name: file.read_bytes() for file in (models / "dense" / "other").iterdir()}
    card = b"---\nlicense: llama3.1\n---\n# dense\n"
    commit = server.create("bob/dense", files={**dense, "README.md": card}).find("main")
    outcome = client(convert_and_push, "bob/dense", str(tmp_path))
    assert outcome.error is None, outcome.output
    assert outcome.value["base_model"] == "bob/dense" and outcome.value["base_model_relation"] == "finetune"
    assert outcome.value["license"] == "llama3.1"
    files = server.repositories[REPOSITORY].files()
    assert files["LICENSE"] == dense["LICENSE"] and commit in files["README.md"].decode()
    # Pickled weights are not even fetched.
    torch.save({}, tmp_path / "weights")
    server.create("bob/pickled", files={"config.json": dense["config.json"],
                                        "pytorch_model.bin": (tmp_path / "weights").read_bytes()})  # fmt: skip
    outcome = client(convert_and_push, "bob/pickled", str(tmp_path / "two"))
    assert "a .bin file is a pickle" in outcome.error and not server.sent("pytorch_model")


def random_plan(seed: int):
    """A fault at a random request; half of them stay to the end."""
    draw = random.Random(seed)
    kinds = [401, 403, 404, 409, 412, 429, 500, 503, *(kind for kind in CUTS if kind != "slow")]
    kind, place, stays = draw.choice(kinds), draw.randrange(16), draw.random() < 0.5
    return lambda number, method, path: kind if number == place or (stays and number > place) else None


def check_random_cuts(client, server, models, expected, seeds) -> dict[str, int]:
    """Pushes that are cut at random; returns how many ended how."""
    ends = {"complete": 0, "unchanged": 0, "made and said": 0}
    for seed in seeds:
        draw = random.Random(-seed)
        server.begin(plan=random_plan(seed))
        options = draw.choice([{}, {}, {"revision": "second"}, {"create_pr": True}])
        if options.get("create_pr") or draw.random() < 0.6:
            server.create(REPOSITORY, files={"README.md": b"of before", "model.safetensors": b"of before"})
        before = state(server)
        name = draw.choice(["sharded", "other"])
        outcome = client(push, str(models / name), **options)
        after = state(server)
        reference = "refs/pr/1" if options.get("create_pr") else options.get("revision", "main")
        arrived = after is not None and reference in after and holds(
            server, expected(name, options.get("revision")), reference
        )  # fmt: skip
        told = f"seed {seed}, {options}, {server.requests}: {outcome.error}"
        # Whatever else is there is as it was.
        others = {key: value for key, value in (after or {}).items() if key != reference}
        assert all(value == (before or {}).get(key, {".gitattributes": value[".gitattributes"]})
                   for key, value in others.items()), told  # fmt: skip
        if arrived:
            # An error is allowed only where the Hub could not be asked any more.
            assert outcome.error is None or "could not be asked" in outcome.error, told
            ends["complete"] += 1
            continue
        assert outcome.error is not None, told
        if after == before:
            assert "made by this push" not in outcome.error, told
            ends["unchanged"] += 1
            continue
        # An empty repository, or a branch that holds what main holds; and it was said.
        assert "made by this push" in outcome.error or "could not be asked" in outcome.error, told
        assert after.get(reference) in (None, after["main"]) and before in (None, {"main": after["main"]}), told
        assert before is not None or set(after["main"]) == {".gitattributes"}, told
        ends["made and said"] += 1
    return ends


def test_two_hundred_random_cuts(client, server, models, expected):
    ends = check_random_cuts(client, server, models, expected, range(200))
    print(json.dumps(ends))
    assert min(ends.values()) > 5, ends


def train_and_push(folder: str, **changes) -> dict:
    """In the client's process: a short run that ends on the Hub."""
    return run(Path(folder), steps=2, push_to_hub=True, hub_model_id=REPOSITORY, **changes)


@pytest.fixture
def texts(tmp_path):
    """dense/, train.txt and eval.txt."""
    dense_folder(tmp_path / "dense")
    write_text(tmp_path / "train.txt", 200)
    write_text(tmp_path / "eval.txt", seed=1)
    return tmp_path


def test_train_ends_on_the_hub(client, server, texts):
    server.fault(503, "/commit/", "POST")
    outcome = client(train_and_push, str(texts), hub_private=True)
    # The run is kept, and the way to go on is said.
    assert f"its model is in {texts / 'run' / 'model'}, but not on the Hub" in outcome.error
    assert f"push --model {texts / 'run' / 'model'} --repo_id ann/story --private" in outcome.error
    trained = (texts / "run" / "model" / "model.safetensors").read_bytes()
    outcome = client(train_and_push, str(texts), hub_private=True, resume="auto")
    assert outcome.error is None and "nothing to do" in outcome.output
    repository = server.repositories[REPOSITORY]
    files = repository.files()
    assert repository.private and files["model.safetensors"] == trained
    card = files["README.md"].decode()
    assert "| steps | 2 |" in card and f"| held-out loss | {outcome.value['eval_loss'][0][1]:.4f} at step 0" in card
    # A run of its own.
    outcome = client(train_and_push, str(texts), output=str(texts / "other"), seed=3)
    assert outcome.error is None and server.repositories[REPOSITORY].files()["model.safetensors"] != trained


def test_what_keeps_a_run_from_the_hub_is_said_before_it(client, server, texts):
    for changes, says in (
        ({"hub_model_id": None}, "needs hub_model_id"),
        ({"hub_model_id": "story"}, "hub_model_id is 'story'; write owner/name"),
        ({"map": "none"}, "publishes sparse models"),
        ({"lora_rank": 2, "lora_save": "adapter"}, "lora_save is 'adapter'"),
        ({"push_to_hub": False}, "hub_model_id needs push_to_hub"),
    ):
        outcome = client(_run_with, str(texts), {"push_to_hub": True, "hub_model_id": REPOSITORY, **changes})
        assert outcome.error.startswith("ValueError") and says in outcome.error
    assert not (texts / "run").exists() and not server.requests


def _run_with(folder: str, changes: dict) -> dict:
    return run(Path(folder), **changes)


FRESH = """
import json, sys
import torch
from huggingface_hub import ModelCard
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

repo_id, trust = sys.argv[1], sys.argv[2] == "trust"
if not trust:
    import hf_sparse_attention
model = AutoModelForCausalLM.from_pretrained(repo_id, **({"trust_remote_code": True} if trust else {}))
tokenizer = AutoTokenizer.from_pretrained(repo_id)
inputs = tokenizer("Once upon a time", return_tensors="pt")
tokens = model.generate(**inputs, max_new_tokens=20, do_sample=False)[0].tolist()
card = ModelCard.load(repo_id)
numbers = {result.metric_name: result.metric_value for result in card.data.eval_results}
rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in card.text.splitlines() if line.startswith("| ")]
print(json.dumps({"class": type(model).__name__, "tokens": tokens, "numbers": numbers, "rows": rows,
                  "package": sys.modules["hf_sparse_attention"].__file__}))
"""


def check_fresh(
    server, wanted: list[int], numbers: dict, rows: list[list[str]], folder: Path, *, python: str = sys.executable,
    package: Path = ROOT, paths: str = str(ROOT.parent),
) -> None:  # fmt: skip
    """A fresh process with a cache of its own loads the model by its name, with our import and with trust_remote_code:
    the tokens it writes, the numbers of the card's metadata and rows of its tables are these."""
    for way in ("import", "trust"):
        environment = {
            **os.environ, **server.environment, "HF_TOKEN": TOKEN, "HF_HOME": str(folder / way),
            "PYTHONPATH": paths, "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        done = subprocess.run(
            [python, "-c", FRESH, REPOSITORY, way], env=environment,
            capture_output=True, text=True, cwd=folder, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert TOKEN not in done.stdout + done.stderr
        found = json.loads(done.stdout.splitlines()[-1])
        assert found["class"] == "SparseLlamaForCausalLM" and found["tokens"] == wanted
        assert found["numbers"] == numbers
        assert Path(found["package"]).is_relative_to(package)
        assert [row for row in rows if row not in found["rows"]] == []


def written(model: Path) -> list[int]:
    """Tokens of the model's folder on this machine."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    inputs = tokenizer("Once upon a time", return_tensors="pt")
    model = AutoModelForCausalLM.from_pretrained(model)
    return model.generate(**inputs, max_new_tokens=20, do_sample=False)[0].tolist()


def perplexities(results: dict, name: str) -> dict[str, float]:
    cells = [cell for cell in results["cells"] if cell["model"] == name]
    # Both callers limit their evaluation.
    return {
        f"perplexity, windows of {cell['length']} tokens (limited to {cell['windows']} windows)": cell["perplexity"]
        for cell in cells
    }


def rows_of(summary: dict, report: Path) -> list[list[str]]:
    zeros = json.loads(report.read_text())["mean"]["zeros"]
    return [
        ["steps", f"{summary['steps']}"],
        ["tokens", f"{summary['tokens']:,}"],
        ["at the end of training", f"loss on text {summary['train_loss']:.4f}"],
        ["visible keys whose weight is exactly 0", f"{zeros:.1%}"],
    ]


def test_the_whole_cycle(client, server, texts, tmp_path):
    """Convert, train, evaluate, report, push; a fresh process loads it by its name, writes the same, and reads the
    same numbers."""
    sparse, folder = texts / "sparse", texts / "run"
    convert_model(ConvertArguments(model=str(texts / "dense"), output=str(sparse)))
    summary = run(texts, model=str(sparse), steps=12, new_learning_rate=0.05, recipe="anneal")
    data = [str(texts / "eval.txt")]
    results = evaluate_models(
        EvaluateArguments(
            models=[f"dense={texts / 'dense'}", f"sparse={folder / 'model'}"], data=data, lengths=[16, 32],
            output_dir=str(folder / "evaluation"), concatenate=True, limit=4, device="cpu",
        )
    )  # fmt: skip
    report_model(
        ReportArguments(
            model=str(folder / "model"), data=data, output_dir=str(folder / "report"), length=32, windows=2,
            concatenate=True, device="cpu",
        )
    )  # fmt: skip
    assert client(push, str(folder / "model"), private=True).error is None
    assert server.repositories[REPOSITORY].private

    rows = rows_of(summary, folder / "report" / "report.json")
    check_fresh(server, written(folder / "model"), perplexities(results, "sparse"), rows, tmp_path)


def fresh_environment(folder: Path) -> tuple[str, Path]:
    """A virtual environment with the libraries of this one: its Python, and its copy of the package."""
    venv.create(folder, with_pip=False)
    (packages,) = folder.glob("lib/python*/site-packages")
    shutil.copytree(ROOT, packages / ROOT.name, ignore=shutil.ignore_patterns("__pycache__"))
    (packages / "libraries.pth").write_text(str(Path(torch.__file__).parent.parent))
    return str(folder / "bin" / "python"), packages / ROOT.name


@pytest.mark.slow
def test_from_the_demo_to_a_fresh_environment(client, server, tmp_path):
    """pytest -m slow tests/test_hub_push.py -k demo: `hf-sparse-attention demo`, shortened, then a push; a fresh
    virtual environment loads the model by its id, writes the same tokens and prints the card's numbers."""
    output = tmp_path / "demo"
    losses = run_demo(DemoArguments(output_dir=str(output), steps=6, windows=1))
    model, results, report = output / "asentmax" / "model", output / "evaluation/results.json", output / "report"
    outcome = client(push, str(model), results=str(results), report=str(report / "report.json"), license="mit")
    assert outcome.error is None, outcome.output

    # What the demo rendered to be looked at is what others get, but for the name in the card.
    files = server.repositories[REPOSITORY].files()
    rendered = {file.name: file.read_bytes() for file in (output / "upload").iterdir()}
    assert files.keys() - {".gitattributes"} == rendered.keys()
    assert all(files[name] == content for name, content in rendered.items() if name != "README.md")

    results = json.loads(results.read_text())
    numbers = perplexities(results, "asentmax")
    names = {
        length: f"perplexity, windows of {length} tokens (limited to {max(LENGTHS) // length} windows)"
        for length in LENGTHS
    }
    assert sorted(numbers) == sorted(names.values())
    assert math.exp(losses["asentmax"]) == pytest.approx(numbers[names[512]])
    rows = rows_of(json.loads((output / "asentmax" / "summary.json").read_text()), report / "report.json")
    assert rows[0] == ["steps", "6"]
    python, package = fresh_environment(tmp_path / "environment")
    check_fresh(server, written(model), numbers, rows, tmp_path, python=python, package=package, paths="")
