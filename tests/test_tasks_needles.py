"""Needles: prompts of exactly the asked tokens with the needle where it should be, for tokenizers of two kinds; and
the cells, tables and pictures that evaluate makes of them, of synthetic tasks and of lm-eval."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from matplotlib.lines import Line2D
from test_evaluate import TEXTS, byte_tokenizer, home, stories_tokenizer  # noqa: F401
from tokenizers import Tokenizer, models, pre_tokenizers
from training_cases import dense_folder
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from hf_sparse_attention import cli, evaluate
from hf_sparse_attention.evaluate import EvaluateArguments, evaluate_models
from hf_sparse_attention.figures import Figure
from hf_sparse_attention.results import lacking, markdown, sections, tasks_of, terminal
from hf_sparse_attention.tasks import TASKS, TokenizedText, harness, perplexity, pictures
from hf_sparse_attention.tasks.exact_match import generated, score, teacher_forced
from hf_sparse_attention.tasks.harness import HarnessTask, harness_inputs, harness_tasks, needle_documents
from hf_sparse_attention.tasks.haystack import SENTENCES, Haystack, sentences_of
from hf_sparse_attention.tasks.needles import NAMES, NEEDLES, TooShort, make_prompt, needle_samples
from hf_sparse_attention.tasks.random_bits import RandomBits
from hf_sparse_attention.tasks.samples import NO_TARGET
from hf_sparse_attention.tasks.windows import Windows
from hf_sparse_attention.train import TrainTaskArguments, train_task


@pytest.fixture(params=["stories", "bytes"])
def tokenizer(request, stories_tokenizer, byte_tokenizer):  # noqa: F811
    return stories_tokenizer if request.param == "stories" else byte_tokenizer


def plain(tokenizer, tokens) -> str:
    return tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


# Haystacks


def test_a_haystack_has_exactly_the_tokens_and_whole_sentences(tokenizer):
    haystack = Haystack.of(None, tokenizer)
    lengths = {len(piece) for piece in haystack.pieces}
    assert len(haystack.pieces) == len(SENTENCES) and len(lengths) > 1
    for count in (0, 1, 5, 17, 200, 3001):
        for block in range(5):
            pieces = haystack.fill(RandomBits("test", block), count)
            assert sum(map(len, pieces)) == count
            whole = {piece.tobytes() for piece in haystack.pieces}
            assert all(piece.tobytes() in whole for piece in pieces[1:])
    one, other = (haystack.fill(RandomBits("test", block), 300) for block in (0, 1))
    assert [piece.tolist() for piece in one] != [piece.tolist() for piece in other]


def test_a_haystack_of_documents_keeps_their_order(tokenizer):
    text = ["One is here. Two is there! Is three? Four.", "Five ends it"]
    assert sentences_of(text) == ["One is here.", "Two is there!", "Is three?", "Four.", "Five ends it"]
    haystack = Haystack.of(text, tokenizer)
    assert haystack.sha256 != Haystack.of(None, tokenizer).sha256
    total = sum(map(len, haystack.pieces))
    found = plain(tokenizer, np.concatenate(haystack.fill(RandomBits("a"), 3 * total)))
    around = "One is here. Two is there! Is three? Four. Five ends it "
    assert found.strip() in around * 5
    with pytest.raises(ValueError, match="no sentence"):
        Haystack.of([" "], tokenizer)


# Needles


def answer_of(text: str, name: str) -> str:
    """Reads the prompt's text as a person would."""
    body, _, question = text.rpartition("\n")
    if name == "passkey":
        (key, again) = re.findall(r"The pass key is (\d{5})\. Remember it: (\d{5}) is the pass key\.", body)[0]
        assert key == again and question == "The pass key is"
        return key
    facts = dict(re.findall(r"The number of the (\w+) is (\d{5})\.", body))
    if name in ("needle", "multi_needle"):
        assert len(facts) == (1 if name == "needle" else 4)
        return facts[re.fullmatch(r"The number of the (\w+) is", question)[1]]
    if name == "multi_query":
        asked = re.fullmatch(r"The numbers of the ([\w, ]+), in this order, are", question)[1]
        assert len(facts) == 4
        return ", ".join(facts[thing] for thing in asked.split(", "))
    values, lines = {}, re.findall(r"Let (\w+) be (\w+)\.", body)
    assert len(lines) == 8
    for target, source in lines:
        # In the order of the text: a name is known before it is used.
        values[target] = source if source.isdigit() else values[source]
    assert len(set(values.values())) == 2
    return values[re.fullmatch(r"The value of (\w+) is", question)[1]]


@pytest.mark.parametrize("name", NEEDLES)
def test_prompts_have_exactly_the_tokens_and_the_answer_in_them(tokenizer, name):
    task, haystack = NEEDLES[name], Haystack.of(None, tokenizer)
    seen = set()
    for length in (700, 701, 1500):
        for depth in (0.0, 0.5, 1.0) if task.by_depth else (None,):
            for sample in range(4):
                made = make_prompt(task, haystack, tokenizer, length=length, depth=depth, sample=sample, seed=0)
                assert len(made.prompt) + len(made.answer) == length
                assert made.prompt[: len(haystack.prefix)].tolist() == haystack.prefix
                text = plain(tokenizer, made.prompt)
                assert answer_of(text, name) == made.text
                assert plain(tokenizer, np.concatenate([made.prompt, made.answer])).endswith(f" {made.text}")
                seen.add(made.text)
    assert len(seen) >= 10


@pytest.mark.parametrize("name", ["passkey", "needle", "multi_needle"])
def test_the_needle_that_is_asked_for_stands_at_its_depth(tokenizer, name):
    haystack = Haystack.of(None, tokenizer)
    sentence = max(map(len, haystack.pieces))
    for depth in (0.0, 0.3, 0.5, 1.0):
        for sample in range(6):
            made = make_prompt(NEEDLES[name], haystack, tokenizer, length=2000, depth=depth, sample=sample, seed=1)
            text = plain(tokenizer, made.prompt)
            before = len(tokenizer(text[: text.index(made.text)], add_special_tokens=False)["input_ids"])
            # Between the prefix and the question, up to a sentence and to needles that may stand before it.
            assert abs(before - depth * 1900) < 2 * sentence + 200 * (name == "multi_needle") + 100 * depth + 30
            if depth == 0 and name != "multi_needle":
                assert text.strip().startswith(("The pass key", "The number"))


def test_samples_are_the_same_for_the_same_seed_and_ask_the_answer_alone(tokenizer):
    haystack, task = Haystack.of(None, tokenizer), NEEDLES["needle"]
    options = {"length": 400, "depth": 0.5}
    (few,) = needle_samples(task, haystack, tokenizer, count=3, seed=5, **options)
    (more,) = needle_samples(task, haystack, tokenizer, count=7, seed=5, **options)
    (other,) = needle_samples(task, haystack, tokenizer, count=3, seed=6, **options)
    assert (more.tokens[:3] == few.tokens).all() and (few.tokens != other.tokens).any()
    for sample in range(3):
        made = make_prompt(task, haystack, tokenizer, sample=sample, seed=5, **options)
        asked = few.targets[sample] != NO_TARGET
        assert few.targets[sample][asked].tolist() == made.answer.tolist()
        assert np.flatnonzero(asked)[-1] == 398 and few.tokens[sample].tolist() == [*made.prompt, *made.answer]
    with pytest.raises(TooShort, match="needles, question and answer have"):
        next(needle_samples(NEEDLES["multi_query"], haystack, tokenizer, length=40, depth=None, count=1))


def test_decoding_and_one_pass_agree_on_needles(stories_tokenizer):  # noqa: F811
    """With a model that was made to answer: the largest logit is the right token wherever one is asked."""
    haystack = Haystack.of(None, stories_tokenizer)
    (samples,) = needle_samples(NEEDLES["needle"], haystack, stories_tokenizer, length=150, depth=0.2, count=6)

    class Knows(torch.nn.Module):
        """Follows a table from the tokens so far to the next token; wrong for every second sample."""

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, input_ids, **_):
            logits = torch.zeros(*input_ids.shape, 512)
            for row, tokens in enumerate(input_ids.tolist()):
                for known, whole in enumerate(samples.tokens.tolist()):
                    if whole[:100] == tokens[:100] and known % 2 == 0:
                        for place in range(149):
                            logits[row, place % len(tokens), whole[place + 1]] = 1.0
            return type("Output", (), {"logits": logits})

    from hf_sparse_attention.tasks import exact_match

    model, before = Knows(), exact_match._generate

    def decode(model, prompt, new_tokens, **_):
        tokens = torch.from_numpy(prompt)
        for _ in range(new_tokens):
            following = model(tokens).logits[:, tokens.shape[1] - 1].argmax(-1)
            tokens = torch.cat([tokens, following[:, None]], dim=1)
        return tokens.numpy(), np.ones(len(tokens), dtype=bool)

    forced_model = Knows()
    plain_forward = forced_model.forward
    forced_model.forward = lambda input_ids, logits_to_keep=0, **_: type(
        "Output", (), {"logits": plain_forward(input_ids).logits[:, -logits_to_keep:]}
    )
    exact_match._generate = decode
    try:
        decoded = generated(model, samples, tags=False)
    finally:
        exact_match._generate = before
    forced = teacher_forced(forced_model, samples)
    assert forced.exact.tolist() == decoded.exact.tolist() == [True, False] * 3


# Overlapping windows


@pytest.mark.parametrize("length", [16, 17, 33])
def test_overlapping_windows_score_every_token_once(tokenizer, length):
    text = TokenizedText.of(TEXTS, tokenizer)
    windows, prefix = text.sliding_windows(length), len(text.prefix)
    half = (length - prefix) // 2
    scored, row = [], 0
    documents = [document for document in text.documents if len(document) >= length - prefix]
    for document in documents:
        found, end = ([] if prefix else [int(document[0])]), 0
        while end < len(document):
            tokens, first = windows.tokens[row].tolist(), int(windows.first[row])
            assert end == 0 or first >= prefix + (length - prefix - half)
            assert first >= 1
            found += tokens[first:]
            end = len(found)
            row += 1
        assert found == document.tolist()
        scored.append(len(found) - (0 if prefix else 1))
    assert row == len(windows) and windows.documents == len(documents)
    assert windows.scored == sum(scored)
    assert len(text.sliding_windows(10**6)) == 0


def test_the_loss_of_overlapping_windows_is_that_of_their_scored_tokens(home, stories_tokenizer):  # noqa: F811
    model = AutoModelForCausalLM.from_pretrained(home / "dense")
    windows = TokenizedText.of(TEXTS, stories_tokenizer).sliding_windows(20)
    found = perplexity.score_sliding(model, windows, batch_tokens=100)
    losses = perplexity.token_losses(model, windows.tokens).double()
    kept = [losses[row, first - 1 :] for row, first in enumerate(windows.first.tolist())]
    assert found["loss"] == pytest.approx(float(torch.cat(kept).mean()), rel=1e-6)
    assert found["perplexity"] == pytest.approx(np.exp(found["loss"])) and found["standard_error"] > 0
    one = Windows(windows.tokens[:1], None, 1, windows.first[:1])
    assert perplexity.score_sliding(model, one, batch_tokens=100)["standard_error"] is None
    # Equal counts: the error of a mean.
    same = Windows(windows.tokens, None, 1, torch.full_like(windows.first, 10))
    means = losses[:, 9:].mean(1)
    error = perplexity.score_sliding(model, same, batch_tokens=100)["standard_error"]
    assert error == pytest.approx(float(means.std()) / len(means) ** 0.5, rel=1e-6)


# evaluate


def arguments(output, *models, **changes):
    values = {"models": list(map(str, models)), "output_dir": str(output), "device": "cpu", "figure": False}
    return EvaluateArguments(**{**values, **changes})


def test_cells_of_needles_are_computed_once_and_by_depth(home, tmp_path, monkeypatch, capsys, caplog):  # noqa: F811
    changes = {
        "tasks": ["needle", "multi_query", "perplexity"], "lengths": [128, 256], "depths": [0.0, 1.0], "limit": 3,
        "data": [str(home / "text.jsonl")], "concatenate": True, "figure": True,
    }  # fmt: skip
    models = [home / "dense", home / "sparse"]
    first = evaluate_models(arguments(tmp_path / "out", *models, **changes))
    shown = capsys.readouterr().out
    assert "needle: exact match in % ± standard error, 3 samples a length and depth, mean over 2 depths" in shown
    assert "needle: right tokens of the answers in %, 3 samples" in shown and "Perplexity" in shown
    assert len(first["cells"]) == 2 * (2 * 2 + 2 + 2) and not lacking(first)
    assert tasks_of(first) == ["needle", "multi_query", "perplexity"]
    needle = [cell for cell in first["cells"] if cell["task"] == "needle"]
    assert [(cell["length"], cell["depth"]) for cell in needle[:4]] == [(128, 0.0), (128, 1.0), (256, 0.0), (256, 1.0)]
    assert all(cell["samples"] == 3 and cell["answers"] == "forced" for cell in needle)
    assert len({cell["tokens_sha256"] for cell in needle}) == 4
    short = next(cell for cell in first["cells"] if cell["task"] == "multi_query" and cell["length"] == 128)
    assert "needles, question and answer have" in short["missing"] and short["finished"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "results.json", "results.md", "results.png", "depth.png", "exact_match.png",
    }  # fmt: skip
    text = (tmp_path / "out" / "results.md").read_text()
    assert "needle by depth, sparse: exact match in %" in text and "| 100 % |" in text

    monkeypatch.setattr(evaluate, "load", lambda *a, **k: pytest.fail("a model was loaded"))
    assert evaluate_models(arguments(tmp_path / "out", *models, **changes))["cells"] == first["cells"]
    monkeypatch.undo()
    caplog.set_level("INFO", logger="hf_sparse_attention")
    other = evaluate_models(arguments(tmp_path / "out", *models, **{**changes, "seed": 1, "tasks": ["needle"],
                                                                    "data": [], "concatenate": False}))  # fmt: skip
    assert f"results.png in {tmp_path / 'out'}: of an earlier call, not of these numbers" in caplog.messages
    assert {cell["fingerprint"] for cell in other["cells"]}.isdisjoint(cell["fingerprint"] for cell in needle)
    assert len(other["other_cells"]) == len(first["cells"])
    (said,) = [line for line in caplog.messages if "no longer shown" in line]
    for text in ("needle of dense at 128, 256;", "multi_query of sparse at", "perplexity of sparse at 128, 256."):
        assert text in said


@pytest.mark.parametrize(
    ("samples", "right", "shown"),
    # By hand: sqrt(0.4 * 0.6 / 5) and sqrt(0.5 * 0.5 / 4).
    [(1, [1, 1, 0, 0, 0], "40.0 ±21.9"), (1, [0] * 5, "0.0"), (1, [1] * 5, "100.0"), (1, [1], "100.0"),
     (2, [0.5, 0.5], "50.0 ±25.0"), (2, [1, 0], "50.0 ±25.0")],
)  # fmt: skip
def test_the_error_of_needles_is_that_of_all_their_samples(samples, right, shown, monkeypatch):
    """One sample a depth is never without error by itself: its own estimate of it is 0."""
    cells = [
        {"model": "m", "task": "needle", "length": 100, "depth": index / 4, "exact_match": share, "samples": samples,
         "standard_error": (share * (1 - share) / samples) ** 0.5, "token_accuracy": 0.5 + share / 4, "note": None,
         "answers": "forced", "tokens_sha256": str(index)}
        for index, share in enumerate(right)
    ]  # fmt: skip
    results = {
        "models": [{"label": "m"}], "lengths": [100], "cells": cells, "data": {"documents": 0}, "arguments": {},
        "tasks": ["needle"],
    }  # fmt: skip
    tables = {title: rows for title, _, rows in sections(results)}
    exact, tokens = tables
    each = f"{samples} sample{'s' if samples > 1 else ''} a length and depth"
    assert each in exact and each in tokens and ("mean over" in exact) == (len(right) > 1)
    assert tables[exact] == [["m", shown]]
    assert tables[tokens] == [["m", f"{50 + 25 * sum(right) / len(right):.1f}"]]
    text = markdown(results)
    assert "none stands where they do not tell" in text and "±0.0" not in text and text.count(each) == 3
    drawn = []
    monkeypatch.setattr(pictures, "picture", lambda figure: drawn.append(figure) or b"")
    pictures.draw(results)
    (container,) = drawn[-1].axes[0].containers
    bar = container.lines[2][0].get_segments()[0]
    assert bool(bar.size and np.isfinite(bar).all()) == ("±" in shown)


def test_a_length_without_all_of_its_depths_is_no_point_of_the_picture(monkeypatch):
    cell = {"model": "m", "task": "needle", "exact_match": 1.0, "standard_error": 0.0}
    cells = [{**cell, "length": length, "depth": depth} for length in (100, 200) for depth in (0.0, 1.0)]
    cells[3] = {"model": "m", "task": "needle", "length": 200, "depth": 1.0, "missing": "no memory"}
    drawn = {}
    monkeypatch.setattr(pictures, "by_length", lambda results, cells: drawn.setdefault("cells", cells) and Figure())
    assert set(pictures.draw({"models": [{"label": "m"}], "cells": cells})) == {"depth.png", "exact_match.png"}
    assert drawn["cells"] == cells[:2]


def test_the_legend_shows_which_line_is_dashed():
    cell = {"model": "m", "loss": 1.0, "standard_error": 0.1, "note": None, "positions": [], "last_quarter": 1.0}
    cells = [
        {**cell, "task": task, "length": length} for task in ("perplexity", "sliding_perplexity") for length in (8, 16)
    ]
    legend = pictures.by_context({"models": [{"label": "m"}]}, cells).axes[0].get_legend()
    (dashed,) = [
        artist for artist in legend.findobj(Line2D)
        if artist.get_linestyle() == "--" and len(set(artist.get_xdata())) > 1
    ]  # fmt: skip
    on, off = pictures._DASHES[1]
    # At least two dashes and the gap between them, in points.
    assert legend.handlelength * 8 >= dashed.get_linewidth() * (2 * on + off)


def test_needles_in_the_users_own_text(home, tmp_path):  # noqa: F811
    changes = {"tasks": ["passkey"], "lengths": [200], "depths": [0.5], "limit": 2}
    own = evaluate_models(
        arguments(tmp_path / "own", home / "dense", haystack="data", data=[str(home / "text.jsonl")], **changes)
    )
    ours = evaluate_models(arguments(tmp_path / "ours", home / "dense", **changes))
    assert own["cells"][0]["tokens_sha256"] != ours["cells"][0]["tokens_sha256"]
    assert own["data"]["documents"] == len(TEXTS) and ours["data"]["documents"] == 0


def test_a_model_of_a_synthetic_task_is_evaluated_without_a_tokenizer(tmp_path, capsys):
    values = {
        "task": "copy", "task_settings": ["symbols=6"], "lengths": [4, 6], "layers": 2, "hidden_size": 32, "heads": 4,
        "ffn_size": 64, "batch_size": 32, "learning_rates": [1e-2], "warmup_steps": 20, "device": "cpu", "steps": 200,
        "validation_lengths": [6], "checkpoint_every": 0,
    }  # fmt: skip
    runs = {name: train_task(TrainTaskArguments(**values, map=name, output=str(tmp_path / name)))
            for name in ("asentmax", "softmax")}  # fmt: skip
    models = [f"{name}={tmp_path / name / runs[name]['best'] / 'model'}" for name in runs]
    changes = {"tasks": ["copy"], "lengths": [6, 12], "limit": 100}
    forced = evaluate_models(arguments(tmp_path / "forced", *models, figure=True, **changes))
    decoded = evaluate_models(arguments(tmp_path / "decoded", *models, answers="generated", **changes))
    exact = [cell["exact_match"] for cell in forced["cells"]]
    assert exact == [cell["exact_match"] for cell in decoded["cells"]]
    assert exact[0] > 0.9 and exact[2] > 0.9
    # 6 is the longest training length, which is 14 tokens, and their max_position_embeddings.
    assert "* beyond the training length of asentmax, softmax: 6." in capsys.readouterr().out
    assert [cell["note"] for cell in forced["cells"][:2]] == [None, "beyond the model's training length of 6"]
    assert "decoded token by token" in markdown(decoded)
    assert (tmp_path / "forced" / "exact_match.png").exists() and not (tmp_path / "forced" / "results.png").exists()
    with pytest.raises(ValueError, match="was trained on copy .*, not on sort"):
        evaluate_models(arguments(tmp_path / "sort", *models, tasks=["sort"]))
    folder = tmp_path / "asentmax" / runs["asentmax"]["best"] / "model"
    (folder / "task.json").unlink()
    with pytest.raises(ValueError, match="has no task.json of train-task"):
        evaluate_models(arguments(tmp_path / "none", *models, **changes))
    (folder / "task.json").write_text('{"task": "copy", "settings": {"symbols": 60}}')
    with pytest.raises(ValueError, match="has 10 tokens, but its task.json needs 64"):
        evaluate_models(arguments(tmp_path / "large", *models, **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": ["passkey"], "data": ["text.txt"]}, "data is given, but none of the tasks"),
        ({"tasks": ["passkey"], "concatenate": True}, "concatenate is given"),
        ({"tasks": ["multi_query"], "depths": [0.5]}, "depths is given"),
        ({"tasks": ["copy"], "haystack": "sentences"}, "haystack is given"),
        ({"tasks": ["perplexity"], "data": ["a"], "answers": "forced"}, "answers is given"),
        ({"tasks": ["passkey"], "lm_eval_folder": "x"}, "lm_eval_folder is given"),
        ({"tasks": ["passkey"], "haystack": "data"}, "data is empty"),
        ({"tasks": ["passkey"], "haystack": "essays"}, "haystack is 'essays'"),
        ({"tasks": ["passkey"], "answers": "guessed"}, "answers is 'guessed'"),
        ({"tasks": ["passkey"], "depths": [50.0]}, "each is from 0 to 1"),
        ({"tasks": ["passkey", "passkey"]}, "named twice"),
        ({"tasks": ["nonsense"]}, "choose from perplexity, sliding_perplexity, passkey"),
        ({}, "data is empty"),
    ],
)
def test_options_are_used_or_refused(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        EvaluateArguments(models=["x"], **changes)


def test_a_run_that_was_cut_off_says_what_it_lacks(home, tmp_path):  # noqa: F811
    changes = {"tasks": ["needle", "passkey"], "lengths": [100, 200], "limit": 1}
    results = evaluate_models(arguments(tmp_path / "out", home / "dense", **changes))
    cells = results["cells"]
    # A mean over some of the depths is not the mean over depths.
    for kept in ([cells[0]], cells[:4], cells[1:]):
        assert lacking({**results, "cells": kept})[0] == "needle of dense at 100"
    results["cells"] = [cell for cell in cells if cell["task"] == "needle"]
    assert lacking(results) == ["passkey of dense at 100", "passkey of dense at 200"]
    assert not lacking({**results, "cells": cells})
    for show in (markdown, terminal):
        assert "passkey" in show(results)
    assert [title for title, _, _ in sections(results)][0].startswith("needle")


def test_every_task_is_in_the_table_once():
    assert list(TASKS)[:2] == ["perplexity", "sliding_perplexity"] and set(NEEDLES) < set(TASKS)
    assert len({row.name for row in TASKS.values()}) == len(TASKS)


# lm-eval


def test_lm_eval_without_lm_eval_and_its_numbers(home, tmp_path, monkeypatch):  # noqa: F811
    """What evaluate makes of lm-eval's numbers, without lm-eval."""
    monkeypatch.setitem(__import__("sys").modules, "lm_eval.tasks", None)
    with pytest.raises(ImportError, match=r"hf-sparse-attention\[lm-eval\]"):
        evaluate_models(arguments(tmp_path / "out", home / "dense", lm_eval=["niah_single_1"]))
    asked = []

    def tasks(names, folder):
        asked.append((names, folder))
        by_length = HarnessTask("lm_eval:a", tmp_path, True, [128, 256], "1")
        return [by_length, HarnessTask("lm_eval:b", tmp_path, False, None, "1")][: len(names)]

    def scores(task, length, limit, seed, folder, tokenizer, model, *, batch_tokens, progress):
        progress(1)
        return {"metrics": {"acc": 0.5 if length is None else length / 1000}, "samples": 3, "limit": limit}

    monkeypatch.setattr(evaluate, "harness_tasks", tasks)
    monkeypatch.setattr(harness, "_score", scores)
    changes = {"lm_eval": ["a,b"], "lengths": [128, 256], "limit": 3}
    found = evaluate_models(arguments(tmp_path / "out", home / "dense", **changes))
    assert asked == [(["a", "b"], None)]
    assert [(cell["task"], cell["length"]) for cell in found["cells"]] == [
        ("lm_eval:a", 128), ("lm_eval:a", 256), ("lm_eval:b", None),
    ]  # fmt: skip
    assert [rows for _, _, rows in sections(found)] == [[["dense", "0.128", "0.256"]], [["dense", "0.500"]]]
    assert not lacking(found)
    # Before any text is read or tokenized, and with a way on.
    text = {"tasks": ["perplexity"], "data": [str(home / "text.jsonl")]}
    monkeypatch.setattr(evaluate, "read_documents", lambda *a, **k: pytest.fail("text was read"))
    with pytest.raises(
        ValueError, match="reports lengths 128, 256 alone, not 16, 64: .* --lm_eval hsa_passkey,hsa_ne"
    ):
        evaluate_models(arguments(tmp_path / "other", home / "dense", **{**changes, **text, "lengths": [16, 64, 128]}))


def test_documents_for_lm_eval(home, stories_tokenizer):  # noqa: F811
    pytest.importorskip("datasets")
    found = needle_documents("needle", tokenizer=str(home / "dense"), max_seq_lengths=[150, 300], samples=12)["test"]
    assert len(found) == 24 and set(found["length"]) == {150, 300} and max(found["depth"]) == 1.0
    for row in found:
        assert answer_of(row["input"], "needle") == row["outputs"]
        counted = len(stories_tokenizer(row["input"])["input_ids"])
        assert abs(counted + 6 - row["length"]) <= 12


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_lm_eval_runs_our_files_and_a_users_on_a_model_object(home, tmp_path):  # noqa: F811
    """lm-eval and what it loads warn of many things of their own."""
    pytest.importorskip("lm_eval")
    names = [path.stem for path in harness.FOLDER.glob("*.yaml")]
    assert {name.removeprefix("hsa_") for name in names} == set(NEEDLES)
    assert all(task.by_length and task.lengths is None for task in harness_tasks(names))
    (tmp_path / "own").mkdir()
    rows = [{"question": f"{number} and", "answer": str(number)} for number in range(4)]
    (tmp_path / "own" / "rows.json").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "own" / "mine.yaml").write_text(
        "task: mine\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: "
        f"{tmp_path / 'own' / 'rows.json'}\noutput_type: loglikelihood\ntest_split: test\n"
        'doc_to_text: "{{question}}"\ndoc_to_target: " {{answer}}"\nmetric_list:\n  - metric: acc\n'
        "    aggregation: mean\n    higher_is_better: true\n"
    )
    found = evaluate_models(
        arguments(tmp_path / "out", home / "sparse", lm_eval=["hsa_passkey", "mine"], lengths=[128, 200], limit=3,
                  lm_eval_folder=str(tmp_path / "own"))
    )  # fmt: skip
    assert [(cell["task"], cell["length"], cell["samples"]) for cell in found["cells"]] == [
        ("lm_eval:hsa_passkey", 128, 3), ("lm_eval:hsa_passkey", 200, 3), ("lm_eval:mine", None, 3),
    ]  # fmt: skip
    assert found["cells"][0]["metrics"] == {"exact_match": 0.0} and "acc" in found["cells"][2]["metrics"]
    with pytest.raises(ValueError, match="is not a folder"):
        harness_tasks(["mine"], str(tmp_path / "nowhere"))


def test_a_users_task_of_lm_eval_is_what_all_of_its_files_say(tmp_path):
    pytest.importorskip("lm_eval")
    files = {
        "mine.yaml": "include: base.yaml\ntask: mine\n",
        "base.yaml": "dataset_path: json\ndataset_kwargs:\n  data_files:\n"
        f"    test: {tmp_path / 'far' / 'rows.json'}\n"
        "output_type: loglikelihood\ntest_split: test\ndoc_to_text: !function words.text\n",
        "words.py": "def text(row):\n    return row['question']\n",
        "../far/rows.json": '{"question": "a", "answer": "b"}\n',
    }
    for folder in ("own", "far"):
        (tmp_path / folder).mkdir()
    for name, text in files.items():
        (tmp_path / "own" / name).write_text(text)
    seen = []
    for name in (None, None, *files):
        if name is not None:
            with open(tmp_path / "own" / name, "a") as file:
                file.write("\n")
        (task,) = harness_tasks(["mine"], str(tmp_path / "own"))
        seen.append(task.version)
    assert seen[0] == seen[1] and len(set(seen)) == 1 + len(files)
    # lm-eval's own are not read anew: they are those of its version.
    ours, theirs = harness_tasks(["hsa_passkey", "niah_single_1"])
    assert ours.version != theirs.version


def test_a_length_that_lm_eval_does_not_report(tmp_path):
    task = HarnessTask("lm_eval:niah", tmp_path, True, [4096], "1")
    assert (
        harness_inputs(task, 4096, None, 0, tmp_path, None).sha256
        != harness_inputs(task, 4096, 5, 0, tmp_path, None).sha256
    )
    with pytest.raises(ValueError, match="reports lengths 4096 alone, not 100"):
        task.check_lengths([4096, 100])
    assert {path.stem for path in harness.FOLDER.glob("*.yaml")} == set(harness.OWN)


@pytest.mark.parametrize("known", [(), ("00000", "11111")])
def test_needles_that_a_tokenizer_cannot_tell_apart_are_refused(home, tmp_path, known):  # noqa: F811
    """All numbers would be one unknown token, and every answer right that is it."""
    words = ["<unk>", *" ".join(SENTENCES).split(), *NAMES, *known]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(dict.fromkeys(words))}, "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    folder = dense_folder(tmp_path / "words")
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>").save_pretrained(folder)
    with pytest.raises(ValueError, match="no tokens of their own for the numbers"):
        evaluate_models(arguments(tmp_path / "out", folder, tasks=["passkey"], lengths=[100], limit=1))


def test_needles_of_a_models_without_its_own_tokenizer_are_refused(home, tmp_path):  # noqa: F811
    dense_folder(tmp_path / "small", vocab_size=100)
    with pytest.raises(ValueError, match="do not belong together"):
        evaluate_models(arguments(tmp_path / "out", tmp_path / "small", tasks=["passkey"]))
    shutil.rmtree(tmp_path / "small")


def test_the_command_line_of_needles(home, tmp_path, capsys):  # noqa: F811
    words = [
        "evaluate",
        "--models",
        str(home / "sparse"),
        "--tasks",
        "passkey",
        "--lengths",
        "100",
        "--depths",
        "0",
        "0.5",
    ]
    words += ["--limit", "2", "--device", "cpu", "--no_figure", "--output_dir", str(tmp_path / "out")]
    assert cli.main(words) == 0
    assert "passkey: exact match in %" in capsys.readouterr().out
    assert cli.main([*words, "--answers", "generated"]) == 0
    assert cli.main([*words, "--haystack", "data"]) == 2
    assert "data is empty" in capsys.readouterr().err
    loaded = AutoTokenizer.from_pretrained(home / "sparse")
    model = AutoModelForCausalLM.from_pretrained(home / "sparse")
    blocks = needle_samples(NEEDLES["passkey"], Haystack.of(None, loaded), loaded, length=100, depth=0.5, count=2)
    saved = json.loads((tmp_path / "out" / "results.json").read_text())["other_cells"][1]
    assert saved["loss"] == pytest.approx(score(model, blocks, batch_tokens=1)["loss"], rel=1e-5)


def test_windows_with_and_without_overlap_side_by_side(home, tmp_path, capsys):  # noqa: F811
    changes = {"tasks": ["perplexity", "sliding_perplexity"], "lengths": [16, 64], "data": [str(home / "text.jsonl")]}
    found = evaluate_models(arguments(tmp_path / "out", home / "dense", home / "sparse", figure=True, **changes))
    names = {"results.json", "results.md", "results.png", "context.png"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    apart, sliding = ([cell for cell in found["cells"] if cell["task"] == task] for task in changes["tasks"])
    for one, other in zip(apart, sliding, strict=True):
        assert other["windows"] > one["windows"] and other["tokens"] > one["tokens"] and other["loss"] > 0
    shown = capsys.readouterr().out
    assert "Perplexity in overlapping windows" in shown and "do not overlap" not in shown


@pytest.mark.gpu
def test_a_passkey_in_256_thousand_tokens(home, tmp_path):  # noqa: F811
    changes = {"tasks": ["passkey"], "lengths": [262_144], "depths": [0.5], "limit": 1, "device": "cuda"}
    (cell,) = evaluate_models(arguments(tmp_path / "out", home / "sparse", **changes))["cells"]
    assert cell["samples"] == 1 and cell["loss"] > 0
