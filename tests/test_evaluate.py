"""Windows of text, losses by length and position, and cells that are computed once: against plain forward passes."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from families import NAMES, dense_model, sparse_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from training_cases import STORIES, dense_folder
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from hf_sparse_attention import cli, evaluate
from hf_sparse_attention.convert import ConvertArguments, convert_model
from hf_sparse_attention.evaluate import EvaluateArguments, evaluate_models
from hf_sparse_attention.results import markdown, remarks, terminal
from hf_sparse_attention.tasks import TokenizedText, Windows, perplexity, pictures

TEXTS = [
    "Once upon a time there was a little cat. She saw a red ball, and she was happy.",
    "Über die Brücke ging 日本 — ein Kätzchen 🐈 und sein Freund, " * 9,
    " ".join(f"Tom saw {number} dogs in the park." for number in range(40)),
    "The end.",
]
LENGTHS = [16, 64, 128]


@pytest.fixture(scope="module")
def stories_tokenizer():
    return AutoTokenizer.from_pretrained(STORIES)


@pytest.fixture(scope="module")
def byte_tokenizer():
    """One token a byte, nothing put before or after a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: index for index, letter in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<end>"])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A dense model, the asentmax model made of it, and text."""
    folder = tmp_path_factory.mktemp("evaluate")
    dense_folder(folder / "dense")
    sparse = AutoModelForCausalLM.from_pretrained(folder / "dense", attn_implementation="asentmax")
    sparse.save_pretrained(folder / "sparse")
    AutoTokenizer.from_pretrained(folder / "dense").save_pretrained(folder / "sparse")
    lines = [json.dumps({"text": text}) for text in TEXTS]
    (folder / "text.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


def arguments(home, output, **changes):
    values = {
        "models": [f"dense={home / 'dense'}", str(home / "sparse")], "data": [str(home / "text.jsonl")],
        "output_dir": str(output), "lengths": LENGTHS, "device": "cpu", "figure": False,
    }  # fmt: skip
    return EvaluateArguments(**{**values, **changes})


# Windows


def test_windows_are_the_text_in_order_without_overlap(stories_tokenizer):
    text = TokenizedText.of(TEXTS, stories_tokenizer)
    assert text.prefix == [1] and text.separator == [1]
    windows = text.windows(16)
    expected = []
    for document in TEXTS:
        ids = stories_tokenizer(document, add_special_tokens=False)["input_ids"]
        expected += [[1, *ids[start : start + 15]] for start in range(0, len(ids) - 14, 15)]
    assert windows.tokens.tolist() == expected
    assert windows.documents == 3
    assert text.longest == 1 + max(len(stories_tokenizer(t, add_special_tokens=False)["input_ids"]) for t in TEXTS)


def test_windows_know_the_bytes_they_predict(stories_tokenizer, byte_tokenizer):
    bytewise = TokenizedText.of(TEXTS, byte_tokenizer).windows(20)
    assert bytewise.tokens.shape[0] == sum(len(text.encode()) // 20 for text in TEXTS)
    # The first token of a window without a prefix is given. A character's bytes end together.
    document = TEXTS[1].encode()
    assert sum(bytewise.bytes.tolist()) == pytest.approx(19 * len(bytewise), abs=2 * len(bytewise))
    ascii_only = TokenizedText.of([TEXTS[2]], byte_tokenizer).windows(20)
    assert ascii_only.bytes.tolist() == [19] * len(ascii_only)
    whole = TokenizedText.of([TEXTS[1]], stories_tokenizer)
    length = whole.total + 1
    assert whole.windows(length).bytes.tolist() == [len(document)]


def test_what_the_tokenizer_puts_before_a_text_is_not_scored(byte_tokenizer, monkeypatch):
    """Some put two tokens there: that the second follows the first says nothing of the text."""
    backend = Tokenizer.from_str(byte_tokenizer.backend_tokenizer.to_str())
    backend.add_special_tokens(["<one>", "<two>"])
    pieces = [(name, backend.token_to_id(name)) for name in ("<one>", "<two>")]
    backend.post_processor = processors.TemplateProcessing(single="<one> <two> $A", special_tokens=pieces)
    text = TokenizedText.of(["abcdefghij"], PreTrainedTokenizerFast(tokenizer_object=backend))
    assert len(text.prefix) == 2
    windows = text.windows(7)
    assert windows.scored == 2 * 5 and windows.bytes.tolist() == [5, 5]
    losses = torch.tensor([[100.0, 1, 2, 3, 4, 5]] * 2)
    monkeypatch.setattr(perplexity, "token_losses", lambda model, tokens: losses)
    found = perplexity.score(None, windows, batch_tokens=100)
    assert found["loss"] == 3 and found["last_quarter"] == 5 and found["perplexity"] == pytest.approx(math.exp(3))
    assert found["bits_per_byte"] == pytest.approx(3 / math.log(2))
    places = [(bucket["start"], bucket["end"], bucket["loss"]) for bucket in found["positions"]]
    assert places == [(2, 3, 1), (3, 4, 2), (4, 6, 3.5), (6, 7, 5)]
    plain = perplexity.score(None, Windows(windows.tokens, None, 1), batch_tokens=100)
    # Beside a model whose tokenizer puts one there: every row has the ranges of its own.
    cell = {"task": "perplexity", "length": 7, "note": None, "windows": 2, "tokens": 10, "tokens_sha256": ""}
    shown = markdown({
        "models": [{"label": "two"}, {"label": "one"}], "lengths": [7], "arguments": {}, "data": {"documents": 0},
        "cells": [{"model": "two", **cell, **found}, {"model": "one", **cell, **plain}],
    })  # fmt: skip
    assert "| 1 | - | 100.000 ±0.000 |\n| 2 | 1.000 ±0.000 | 1.000 ±0.000 |" in shown


def test_bits_per_byte_are_of_the_text_even_where_its_tokens_are_those_of_another(home, tmp_path):
    """A tokenizer that knows few words gives different texts the same tokens."""
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    folder = dense_folder(tmp_path / "words")
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>").save_pretrained(folder)
    found = []
    for word in ("dog", "hippopotamus"):
        (tmp_path / "text.txt").write_text(f"a {word} " * 40)
        changes = {"models": [str(folder)], "data": [str(tmp_path / "text.txt")], "lengths": [16]}
        found += evaluate_models(arguments(home, tmp_path / "out", **changes))["cells"]
    assert found[0]["tokens_sha256"] == found[1]["tokens_sha256"] and found[0]["loss"] == found[1]["loss"]
    assert found[0]["bits_per_byte"] > 2 * found[1]["bits_per_byte"]


def test_a_limit_draws_with_the_seed_and_a_smaller_one_is_a_part(stories_tokenizer):
    text = TokenizedText.of(TEXTS, stories_tokenizer)
    everything = text.windows(16).tokens.tolist()
    few, more = (text.windows(16, limit=limit, seed=3).tokens.tolist() for limit in (3, 9))
    assert len(few) == 3 and len(more) == 9
    places = [everything.index(window) for window in more]
    assert places == sorted(places) and all(window in more for window in few)
    assert text.windows(16, limit=9, seed=3).tokens.tolist() == more
    assert text.windows(16, limit=9, seed=4).tokens.tolist() != more
    assert text.windows(16, limit=10**6).tokens.tolist() == everything


def test_under_a_limit_all_lengths_and_ways_are_cut_from_one_sample(stories_tokenizer, byte_tokenizer):
    """Otherwise a table by length would compare texts."""
    for tokenizer in (stories_tokenizer, byte_tokenizer):
        text = TokenizedText.of(TEXTS, tokenizer)
        prefix = len(text.prefix)
        longest, spans = text.drawn([8, 16 + prefix, 64 + prefix, 10**5], limit=2, seed=3)
        assert longest == 64 + prefix and len(spans) == 2 and text.drawn([10**5], limit=2) == (0, [])
        wanted = [text.documents[index][start:end].tolist() for index, start, end in spans]
        at_longest = text.windows(longest, limit=2, seed=3)
        assert at_longest.sha256 == text.windows(longest, spans=spans).sha256
        assert at_longest.tokens[:, prefix:].tolist() == wanted
        short = text.windows(16 + prefix, spans=spans).tokens[:, prefix:].flatten().tolist()
        assert short == wanted[0] + wanted[1]
        for length in (16 + prefix, 33, longest):
            sliding = text.sliding_windows(length, spans=spans)
            rows = zip(sliding.tokens.tolist(), sliding.first.tolist(), strict=True)
            scored = [token for row, first in rows for token in row[first:]]
            # Without a prefix the first token of a document is given.
            assert scored == [
                token for (_, start, _), tokens in zip(spans, wanted, strict=True)
                for token in (tokens if start or prefix else tokens[1:])
            ]  # fmt: skip
            inside = [start for _, start, _ in spans if start]
            assert inside and (sliding.first >= prefix + (length - prefix) // 2).sum() >= len(sliding) - 1


def test_a_limited_run_says_what_its_columns_are_of(home, tmp_path, capsys):
    changes = {"models": [str(home / "dense")], "lengths": [16, 64], "tasks": ["perplexity", "sliding_perplexity"]}
    results = evaluate_models(arguments(home, tmp_path / "out", limit=2, **changes))
    # One token of a window is the tokenizer's own.
    assert [cell["windows"] for cell in results["cells"][:2]] == [8, 2]
    assert [cell["tokens"] for cell in results["cells"]] == [8 * 15, 2 * 63, 2 * 63, 2 * 63]
    said = "all columns are cut from the text of 2 windows of 64 tokens, drawn with seed 0"
    assert said in capsys.readouterr().out and said in (tmp_path / "out" / "results.md").read_text()
    for cell in results["cells"]:
        del cell["drawn"]
    assert "at most 2 windows a length, seed 0: columns are of different text" in markdown(results)
    whole = evaluate_models(arguments(home, tmp_path / "whole", **changes))
    assert "cut from" not in markdown(whole) and "drawn" not in whole["cells"][0]


def test_joined_documents_stand_apart_by_what_the_tokenizer_puts_there(stories_tokenizer, byte_tokenizer):
    for tokenizer, between in ((stories_tokenizer, [1]), (byte_tokenizer, [byte_tokenizer.eos_token_id])):
        text = TokenizedText.of(TEXTS, tokenizer)
        ids = [tokenizer(document, add_special_tokens=False)["input_ids"] for document in TEXTS]
        joined = text.joined()
        (tokens,) = joined.documents
        assert tokens.tolist() == ids[0] + between + ids[1] + between + ids[2] + between + ids[3]
        assert joined.ends[0][-1] == sum(len(document.encode()) for document in TEXTS)
        assert (np.diff(joined.ends[0]) >= 0).all()
        whole = joined.windows(len(tokens) + len(text.prefix))
        assert len(whole) == 1 and whole.documents == 1


def test_no_window_and_bad_lengths(stories_tokenizer):
    text = TokenizedText.of(TEXTS, stories_tokenizer)
    nothing = text.windows(10**5)
    assert nothing.tokens.shape == (0, 10**5) and len(nothing) == 0 and nothing.documents == 0
    for length in (0, 1):
        with pytest.raises(ValueError, match=f"length is {length}"):
            text.windows(length)
    assert TokenizedText.of([], stories_tokenizer).longest == 0
    assert text.windows(16).sha256 != text.windows(17).sha256


# Losses


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_losses_in_pieces_equal_a_plain_forward(name, kind):
    """Families scale or cap their logits after the head; all of that is in the loss."""
    model = dense_model(name)
    if kind == "sparse":
        model = sparse_model(model)
    tokens = torch.randint(3, 64, (2, 23), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(input_ids=tokens, use_cache=False).logits.double()
    expected = -logits[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
    sizes = []
    handle = model.get_output_embeddings().register_forward_hook(lambda *call: sizes.append(call[2].shape[1]))
    losses = perplexity.token_losses(model, tokens, logits_at_once=2 * 64 * 5)
    handle.remove()
    torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=1e-5)
    assert sizes == [5, 5, 5, 5, 2]
    assert "forward" not in vars(model.base_model)


def test_an_error_in_the_head_leaves_the_model_as_it_was():
    model = dense_model("llama")
    tokens = torch.randint(3, 64, (1, 9))
    handle = model.lm_head.register_forward_hook(lambda *call: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        perplexity.token_losses(model, tokens)
    handle.remove()
    assert "forward" not in vars(model.base_model)


@pytest.mark.parametrize("length", [2, 3, 5, 64, 1000])
def test_position_buckets_cover_every_position_once(length):
    edges = perplexity.position_edges(length)
    covered = [position for start, end in zip(edges, edges[1:], strict=False) for position in range(start, end)]
    assert covered == list(range(1, length))


def test_score_is_the_mean_of_the_losses_with_its_error(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    losses = torch.rand(7, 40, generator=generator) * 3
    tokens = torch.arange(7)[:, None].repeat(1, 41)
    monkeypatch.setattr(perplexity, "token_losses", lambda model, tokens: losses[tokens[:, 0]])
    counts = []
    found = perplexity.score(None, Windows(tokens, torch.full((7,), 100), 2), batch_tokens=100, progress=counts.append)
    exact = losses.double().numpy()
    assert counts == [2, 2, 2, 1]
    assert found["loss"] == pytest.approx(exact.mean(), rel=1e-12)
    assert found["standard_error"] == pytest.approx(exact.mean(1).std(ddof=1) / math.sqrt(7), rel=1e-9)
    assert found["perplexity"] == pytest.approx(math.exp(exact.mean()), rel=1e-12)
    assert found["last_quarter"] == pytest.approx(exact[:, 30:].mean(), rel=1e-12)
    assert found["bits_per_byte"] == pytest.approx(exact.sum() / math.log(2) / 700, rel=1e-12)
    for bucket in found["positions"]:
        part = exact[:, bucket["start"] - 1 : bucket["end"] - 1]
        assert bucket["loss"] == pytest.approx(part.mean(), rel=1e-12)
        assert bucket["standard_error"] == pytest.approx(part.mean(1).std(ddof=1) / math.sqrt(7), rel=1e-9)
    single = perplexity.score(None, Windows(tokens[:1], None, 1), batch_tokens=1)
    assert single["standard_error"] is None and single["bits_per_byte"] is None


def test_a_batch_that_does_not_fit_is_halved(monkeypatch):
    seen = []

    def limited(model, tokens):
        seen.append(len(tokens))
        if len(tokens) > 2:
            raise torch.OutOfMemoryError("no memory")
        return torch.ones(len(tokens), tokens.shape[1] - 1)

    monkeypatch.setattr(perplexity, "token_losses", limited)
    windows = Windows(torch.zeros(9, 10, dtype=torch.int64), None, 1)
    assert perplexity.score(None, windows, batch_tokens=80)["loss"] == 1
    assert seen == [8, 4, 2, 2, 2, 2, 1]


# The command


def test_numbers_equal_plain_transformers_and_both_models_see_the_same_tokens(home, tmp_path, capsys):
    results = evaluate_models(arguments(home, tmp_path / "out"))
    assert results == json.loads((tmp_path / "out" / "results.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(home / "dense")
    cells = {(cell["model"], cell["length"]): cell for cell in results["cells"]}
    for label in ("dense", "sparse"):
        model = AutoModelForCausalLM.from_pretrained(home / label).eval()
        for length in LENGTHS:
            windows = TokenizedText.of(TEXTS, tokenizer).windows(length)
            with torch.no_grad():
                means = [float(model(input_ids=row[None], labels=row[None]).loss) for row in windows.tokens]
            cell = cells[label, length]
            assert cell["loss"] == pytest.approx(np.mean(means), rel=1e-5)
            assert cell["standard_error"] == pytest.approx(np.std(means, ddof=1) / math.sqrt(len(means)), rel=1e-3)
            assert (cell["windows"], cell["tokens"]) == (len(windows), len(windows) * (length - 1))
            assert cells["dense", length]["tokens_sha256"] == cell["tokens_sha256"]
            beyond = length > 64
            assert (cell["note"] is not None) == beyond
    assert cells["dense", 64]["loss"] != cells["sparse", 64]["loss"]
    shown = capsys.readouterr().out
    assert f"{cells['sparse', 128]['perplexity']:.2f}*" in shown
    assert "All models saw the same tokens." in shown
    assert [model["map"] for model in results["models"]] == ["softmax", "asentmax"]


def test_a_length_without_windows_is_a_missing_cell_and_joining_fills_it(home, tmp_path):
    longer = TokenizedText.of(TEXTS, AutoTokenizer.from_pretrained(STORIES)).longest + 1
    options = {"models": [str(home / "dense")], "lengths": [32, longer]}
    results = evaluate_models(arguments(home, tmp_path / "out", **options))
    cell = results["cells"][1]
    assert cell["missing"] == f"no document has {longer:,} tokens" and cell["windows"] == 0 and "loss" not in cell
    assert terminal(results).count(cell["missing"]) == 1 and "beyond" not in terminal(results)
    assert "| dense |" in markdown(results) and " - |" in markdown(results)
    results = evaluate_models(arguments(home, tmp_path / "joined", concatenate=True, limit=2, **options))
    assert results["cells"][1]["loss"] > 0 and "joined" in remarks(results)[0] and "beyond" in terminal(results)
    assert [cell["windows"] for cell in results["cells"]] == [(longer - 1) // 31, 1]
    options["lengths"] = [32, 10**4]
    results = evaluate_models(arguments(home, tmp_path / "joined", concatenate=True, limit=2, **options))
    assert results["cells"][1]["missing"] == "the joined documents have fewer than 10,000 tokens"


def test_finished_cells_are_kept_and_a_changed_model_is_measured_anew(home, tmp_path, monkeypatch):
    shutil.copytree(home / "dense", tmp_path / "dense")
    models = [str(tmp_path / "dense"), str(home / "sparse")]
    first = evaluate_models(arguments(home, tmp_path / "out", models=models))
    content = (tmp_path / "out" / "results.json").read_bytes()
    loaded = []
    load = evaluate.load
    monkeypatch.setattr(
        evaluate, "load", lambda checkpoint, **kw: loaded.append(checkpoint.path) or load(checkpoint, **kw)
    )
    evaluate_models(arguments(home, tmp_path / "out", models=models))
    assert not loaded and (tmp_path / "out" / "results.json").read_bytes() == content

    fewer = evaluate_models(arguments(home, tmp_path / "out", models=models[:1], lengths=[16]))
    assert not loaded and len(fewer["cells"]) == 1 and len(fewer["other_cells"]) == 5
    assert evaluate_models(arguments(home, tmp_path / "out", models=models)) == first and not loaded

    dense_folder(tmp_path / "dense", seed=1)
    changed = evaluate_models(arguments(home, tmp_path / "out", models=models))
    assert loaded == models[:1]
    assert changed["cells"][0]["loss"] != first["cells"][0]["loss"] and changed["cells"][3:] == first["cells"][3:]
    evaluate_models(arguments(home, tmp_path / "out", models=models, overwrite=True))
    assert loaded == models[:1] + models


def test_a_number_does_not_depend_on_what_was_measured_before(home, tmp_path):
    """Dynamic rotary positions stretch with the longest text seen, and would stay so."""
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    folder = dense_folder(tmp_path / "dense", rope_parameters=rope)
    changes = {"models": [str(folder)], "concatenate": True, "tasks": ["sliding_perplexity", "perplexity"]}
    found = [
        {
            (cell["task"], cell["length"]): cell["loss"]
            for cell in evaluate_models(arguments(home, tmp_path / str(lengths), lengths=lengths, **changes))["cells"]
        }
        for lengths in ([100, 200], [100])
    ]
    assert found[1].keys() < found[0].keys()
    assert all(found[0][place] == loss for place, loss in found[1].items())


def test_an_interrupted_run_goes_on_where_it_was(home, tmp_path, monkeypatch):
    whole = evaluate_models(arguments(home, tmp_path / "whole"))
    score, calls = perplexity.token_losses, []

    def interrupted(model, tokens):
        calls.append(tokens.shape[1])
        if len(calls) == 5:
            raise KeyboardInterrupt
        return score(model, tokens)

    monkeypatch.setattr(perplexity, "token_losses", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate_models(arguments(home, tmp_path / "out", batch_tokens=10**6))
    saved = json.loads((tmp_path / "out" / "results.json").read_text())
    assert len(saved["cells"]) == 4
    evaluate_models(arguments(home, tmp_path / "out", batch_tokens=10**6))
    assert calls == [16, 64, 128, 16, 64, 64, 128]
    again = json.loads((tmp_path / "out" / "results.json").read_text())
    for cell, other in zip(whole["cells"], again["cells"], strict=True):
        assert cell["loss"] == pytest.approx(other["loss"], rel=1e-6)


def test_what_is_not_a_number_is_said(home, tmp_path, monkeypatch):
    shutil.copytree(home / "dense", tmp_path / "broken")
    model = AutoModelForCausalLM.from_pretrained(home / "dense")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    model.save_pretrained(tmp_path / "broken")
    one = {"models": [str(tmp_path / "broken")], "lengths": [16]}
    (cell,) = evaluate_models(arguments(home, tmp_path / "nan", **one))["cells"]
    assert "not finite" in cell["missing"] and cell["finished"] and "loss" not in cell

    def full(model, tokens):
        raise torch.OutOfMemoryError("no memory")

    one["models"] = [str(home / "dense")]
    with monkeypatch.context() as patch:
        patch.setattr(perplexity, "token_losses", full)
        (cell,) = evaluate_models(arguments(home, tmp_path / "full", **one))["cells"]
    assert "does not fit into the memory" in cell["missing"]
    (cell,) = evaluate_models(arguments(home, tmp_path / "full", **one))["cells"]
    assert cell["loss"] > 0


def test_models_of_different_tokenizers_are_compared_by_bytes(home, tmp_path, byte_tokenizer, capsys):
    folder = dense_folder(tmp_path / "bytes")
    byte_tokenizer.save_pretrained(folder)
    results = evaluate_models(
        arguments(home, tmp_path / "out", models=[str(home / "dense"), str(folder)], lengths=[64])
    )
    assert "compare bits per byte" in capsys.readouterr().out
    stories, bytewise = results["cells"]
    assert stories["tokens_sha256"] != bytewise["tokens_sha256"]
    # Nearly one token a byte: bits per byte are bits per token.
    assert bytewise["bits_per_byte"] == pytest.approx(bytewise["loss"] / math.log(2), rel=0.02)


def test_the_same_run_gives_the_same_file_and_dtype_and_batch_matter_little(home, tmp_path):
    one, two = (evaluate_models(arguments(home, tmp_path / name, limit=4)) for name in "ab")
    assert one == two
    half = evaluate_models(arguments(home, tmp_path / "c", limit=4, dtype="bfloat16", batch_tokens=16))
    for cell, other in zip(one["cells"], half["cells"], strict=True):
        assert cell["loss"] == pytest.approx(other["loss"], rel=0.02) and cell["loss"] != other["loss"]
        assert cell["fingerprint"] != other["fingerprint"]


def test_the_picture_is_drawn_whatever_the_models_are_called(home, tmp_path):
    labels = [f"_$x^{{={home / 'dense'}", f"b|c={home / 'sparse'}"]
    results = evaluate_models(arguments(home, tmp_path / "out", models=labels, figure=True, lengths=[16, 128, 5000]))
    assert (tmp_path / "out" / "results.png").read_bytes().startswith(b"\x89PNG")
    assert "b\\|c" in (tmp_path / "out" / "results.md").read_text()
    assert [model["label"] for model in results["models"]] == ["_$x^{", "b|c"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"models": []}, "models is empty"),
        ({"data": []}, "data is empty"),
        ({"lengths": [1, 64]}, "at least 2 tokens"),
        ({"tasks": ["needles"]}, "choose from perplexity"),
        ({"limit": 0}, "limit is 0"),
        ({"batch_tokens": 0}, "batch_tokens is 0"),
        ({"dtype": "int8"}, "choose one of auto, float32"),
        ({"device": "abacus"}, "device is 'abacus'"),
        ({"device": "cuda:77"}, "CUDA devices"),
        ({"lengths": [10**5]}, "the longest document has"),
        ({"data": ["missing.txt"]}, "missing.txt"),
        ({"models": ["nowhere/"]}, "nowhere"),
    ],
)
def test_wrong_arguments_are_named_before_any_work(home, tmp_path, changes, message, monkeypatch):
    monkeypatch.setattr(evaluate, "load", lambda *a, **k: pytest.fail("a model was loaded"))
    with pytest.raises((ValueError, OSError), match=message):
        evaluate_models(arguments(home, tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


def test_a_run_gives_its_model_the_name(home, tmp_path):
    shutil.copytree(home / "dense", tmp_path / "first" / "model")
    shutil.copytree(home / "sparse", tmp_path / "second" / "model")
    models = [str(tmp_path / name / "model") for name in ("first", "second")]
    results = evaluate_models(arguments(home, tmp_path / "out", models=models, lengths=[16], limit=1))
    assert [model["label"] for model in results["models"]] == ["first", "second"]


def test_a_star_is_for_what_a_model_was_trained_at(home, tmp_path, monkeypatch):
    """Schemes without rotary positions do not know max_position_embeddings."""
    for position in ("nope", "rope"):
        convert_model(ConvertArguments(
            model=str(home / "dense"), output=str(tmp_path / position), position=position, train_length=40
        ))  # fmt: skip
    models = [str(tmp_path / name) for name in ("nope", "rope")]
    results = evaluate_models(arguments(home, tmp_path / "out", models=models, lengths=[32, 48, 128], figure=True))
    assert [cell["note"] and cell["note"].removeprefix("beyond the model's ") for cell in results["cells"]] == [
        None, "training length of 40", "training length of 40", None, None, "max_position_embeddings of 64",
    ]  # fmt: skip
    lines = remarks(results)
    assert "* beyond the training length of nope: 40." in lines
    assert "* beyond the max_position_embeddings of rope: 64." in lines
    drawn = []
    monkeypatch.setattr(pictures, "picture", lambda figure: drawn.append(figure) or b"")
    pictures.draw(results)
    notes = {text.get_text() for text in drawn[0].axes[1].texts}
    assert notes == {"training length 40", "max_position_embeddings 64"}


def test_blocks_that_grew_are_what_a_model_was_trained_at(home, tmp_path):
    """Its factors are started for the first of them."""
    pytest.importorskip("accelerate")
    from hf_sparse_attention.train import TrainArguments, train_model

    def trained(name, **changes):
        (tmp_path / "train.txt").write_text("once upon a time there was a little cat " * 40)
        train_model(TrainArguments(
            model=str(home / "dense"), output=str(tmp_path / name), train_data=[str(tmp_path / "train.txt")], cpu=True,
            position="nope", batch_size=4, checkpoint_every=0, statistics_blocks=0, **changes
        ))  # fmt: skip
        return str(tmp_path / name / "model")

    models = [
        trained("grown", steps=2, block_size="12:0.5,24:0.5"),
        trained("stages", stages=["{steps: 1, block_size: 24}", "{steps: 1, block_size: 12}"]),
    ]
    results = evaluate_models(arguments(home, tmp_path / "out", models=models, lengths=[16, 32], limit=1))
    notes = [None, "beyond the model's training length of 24"]
    assert [cell["note"] for cell in results["cells"]] == [*notes, *notes]


def test_two_models_of_one_name_need_labels(home, tmp_path):
    with pytest.raises(ValueError, match="two models are called 'dense'"):
        evaluate_models(arguments(home, tmp_path / "out", models=[str(home / "dense")] * 2))
    twice = [f"a={home / 'dense'}", f"b={home / 'dense'}"]
    one, two = evaluate_models(arguments(home, tmp_path / "out", models=twice, lengths=[16]))["cells"]
    assert one["loss"] == two["loss"] and (one["model"], two["model"]) == ("a", "b")


def test_a_sparse_model_never_runs_as_another(home, tmp_path):
    """A config that says llama beside sparse_attention, a map without its parameters, an adapter, a lost file."""
    for name in ("renamed", "robbed", "adapter", "lost"):
        shutil.copytree(home / "sparse", tmp_path / name)
    config = json.loads((home / "sparse" / "config.json").read_text())
    (tmp_path / "renamed" / "config.json").write_text(json.dumps({**config, "model_type": "llama"}))
    shutil.copy(home / "dense" / "model.safetensors", tmp_path / "robbed" / "model.safetensors")
    (tmp_path / "adapter" / "config.json").rename(tmp_path / "adapter" / "adapter_config.json")
    (tmp_path / "lost" / "model.safetensors").unlink()
    messages = {
        "renamed": "would run it as softmax", "robbed": "lacks", "adapter": "is an adapter", "lost": "has no weights",
    }  # fmt: skip
    for name, message in messages.items():
        with pytest.raises((ValueError, OSError), match=message):
            evaluate_models(arguments(home, tmp_path / "out", models=[str(tmp_path / name)]))
        assert not (tmp_path / "out").exists()


def test_a_tokenizer_of_another_model_is_found(home, tmp_path):
    dense_folder(tmp_path / "small", vocab_size=100)
    with pytest.raises(ValueError, match="do not belong together"):
        evaluate_models(arguments(home, tmp_path / "out", models=[str(tmp_path / "small")]))
    (tmp_path / "small" / "tokenizer.json").write_text("{}")
    with pytest.raises(OSError, match="no tokenizer that can be loaded"):
        evaluate_models(arguments(home, tmp_path / "out", models=[str(tmp_path / "small")]))


def test_what_else_is_in_the_output_folder_is_respected(home, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious.txt").write_text("mine")
    with pytest.raises(ValueError, match="not empty and has no results.json"):
        evaluate_models(arguments(home, tmp_path / "full"))
    (tmp_path / "full" / "results.json").write_text("{}")
    with pytest.raises(ValueError, match="not a results.json of this version"):
        evaluate_models(arguments(home, tmp_path / "full"))
    evaluate_models(arguments(home, tmp_path / "full", overwrite=True, lengths=[16]))
    assert (tmp_path / "full" / "precious.txt").read_text() == "mine"
    with pytest.raises(OSError, match="is a file"):
        evaluate_models(arguments(home, tmp_path / "full" / "precious.txt"))


def test_the_command_line(home, tmp_path, capsys):
    words = ["evaluate", "--models", f"dense={home / 'dense'}", "--data", str(home / "text.jsonl")]
    words += ["--lengths", "16", "32", "--limit", "3", "--device", "cpu", "--output_dir", str(tmp_path / "out")]
    assert cli.main([*words, "--no_figure"]) == 0
    assert "Perplexity" in capsys.readouterr().out
    assert not (tmp_path / "out" / "results.png").exists()
    assert cli.main([*words, "--dtype", "int8"]) == 2
    assert "error: dtype is 'int8'" in capsys.readouterr().err
