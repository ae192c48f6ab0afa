"""The benchmarks of steps, packing and slopes without a GPU: tiny sizes, the reference in the kernels' place."""

import dataclasses
import functools
import importlib.machinery
import importlib.util
import json
import sys
import types
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

import families

import hf_sparse_attention as hsa
from hf_sparse_attention import cli, reference
from hf_sparse_attention.arguments import parse_arguments
from hf_sparse_attention.benchmark import BenchmarkArguments, attention, cold, grid, model, packing, slopes
from hf_sparse_attention.benchmark.arguments import KINDS, check_arguments, fields_of
from hf_sparse_attention.convert import ConvertArguments, convert_model
from hf_sparse_attention.kernels import configurations
from hf_sparse_attention.kernels.configurations import Launch
from hf_sparse_attention.models import dense_config, sparse_config
from hf_sparse_attention.visible import visible_range

# The parts of a step that are compiled leave Python's dictionaries to torch, which warns of itself.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")
STORIES = str(Path(hsa.__file__).parent / "data" / "stories260K")
SHAPE = ["num_hidden_layers=3", "hidden_size=32", "intermediate_size=48", "vocab_size=100"]


def small(tmp_path, **changes):
    settings = {
        "lengths": [128], "heads": 4, "kv_heads": 2, "head_dim": 16, "dtype": "float32", "repeats": 1,
        "noise": [0.3], "output_dir": str(tmp_path / "out"),
    }  # fmt: skip
    return BenchmarkArguments(**{**settings, **changes})


def small_model(tmp_path, **changes):
    return small(tmp_path, **{"what": "model", "shape": SHAPE, "compile": "none", **changes})


def saved(tmp_path, name):
    return json.loads((tmp_path / "out" / name).read_text())


def parsed(*words):
    return parse_arguments(BenchmarkArguments, words, program="benchmark")


def test_what_is_timed_is_one_word_and_has_its_own_defaults():
    assert parsed().what == "attention" and parsed().lengths == [8192, 32768]
    assert parsed("--decode") == parsed("--what", "decode", "--decode")
    assert parsed("--tune").what == "tune" and parsed("--model", "folder").what == "model"
    step = parsed("--what", "model")
    assert (step.lengths, step.head_dim, step.alpha) == ([8192], 64, None)
    assert parsed("--what", "packing").lengths == parsed("--what", "slopes").lengths == [32768]
    both = parsed("--head_dim", "64", "--alpha", "1.333", "--lengths", "4096", "16384")
    assert (both.head_dim, both.alpha, both.lengths) == (64, 1.333, [4096, 16384])
    check_arguments(both)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--what", "speed"], "choose one of attention"),
        (["--what", "packing", "--decode"], "exclude each other"),
        (["--maps", "entmax"], "maps: not read by what 'attention', but by model"),
        (["--what", "model", "--maps", "softmax"], "maps has 'softmax'"),
        (["--what", "model", "--shape", "num_hidden_layers"], "write it like"),
        (["--what", "model", "--shape", "head_dim=8"], "use --heads"),
        (["--what", "model", "--shape", "num_layers=8"], "num_layers, which is no field"),
        (["--what", "model", "--text", "a.txt"], "name a --model"),
        (["--what", "model", "--compile", "yes"], "compile is 'yes'"),
        (["--what", "slopes", "--kernel_times"], "kernel_times: not read by what 'slopes', but by attention, model"),
        (
            ["--model", "folder", "--shape", "hidden_size=8", "--heads", "8"],
            "shape, heads is given, but folder has its",
        ),
        (["--what", "grid", "--lengths", "64"], "lengths: not read by what 'grid', but by attention, model"),
        (["--what", "packing", "--documents", "99999"], "more than the 32768 tokens"),
        (["--what", "slopes", "--heads", "3", "--kv_heads", "1"], "even numbers"),
        (["--repeats", "0"], "repeats is 0"),
        (["--peers", "adasplash"], "peers has 'adasplash'; choose from sdpa flash, sdpa cudnn"),
    ],
)
def test_bad_options_are_named(words, reason, capsys):
    assert cli.main(["benchmark", *words]) == 2
    assert reason in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("what", KINDS)
def test_nothing_is_timed_without_a_gpu(what, capsys):
    assert cli.main(["benchmark", "--what", what]) == 2
    assert "no CUDA or ROCm device" in capsys.readouterr().err


def test_changes_name_numbers_switches_and_launches():
    found = fields_of("stray_limit=64,stray_forward=true,forward=4:3,refine=8:2:128")
    assert found == {"stray_limit": 64, "stray_forward": True, "forward": Launch(4, 3), "refine": Launch(8, 2, 128)}
    for text in ("stray_limit", "forward=4:x", "stray_forward=yes", "forward=1:2:3:4"):
        with pytest.raises(ValueError, match="changes has|Launch"):
            check_arguments(parsed("--changes", text))


def test_a_step_with_every_map_beside_softmax(tmp_path, capsys):
    maps, shape = list(hsa.MAPS), [*SHAPE, "initializer_range=0.03"]
    arguments = small_model(tmp_path, maps=maps, lengths=[64, 128], optimizer=True, shape=shape)
    rows = model.time_model(arguments, device="cpu")
    assert [row["implementation"] for row in rows] == [model.SDPA, *maps] * 2
    assert saved(tmp_path, "model.json")["rows"] == rows
    assert saved(tmp_path, "model.json")["step"].endswith("fused AdamW")
    for row in rows:
        assert row["ms"] > 0 and row["gradient_norm"] > 0 and row["loss"] == pytest.approx(4.6, abs=0.2)
        assert row["tokens_per_second"] == pytest.approx(row["length"] / row["ms"] * 1000)
        # What is softmax has no zeros to speak of.
        assert ("support" in row) == (row["implementation"] not in (model.SDPA, "ssmax"))
    assert rows[0]["ratio"] == rows[6]["ratio"] == 1
    assert "tokens/s" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_the_layers_share_one_graph_and_the_model_is_the_same(tmp_path):
    from torch._dynamo.utils import counters

    # alpha 1 is softmax: the reference has graph breaks, and equal losses show equal weights and tokens.
    arguments = small_model(tmp_path, maps=["asentmax"], alpha=1.0, compile="layers", checkpointing=True)
    counters.clear()
    rows = model.time_model(arguments, device="cpu", backend="eager")
    assert rows[1]["loss"] == pytest.approx(rows[0]["loss"], rel=1e-5)
    # A graph of the three layers and one of the loss, for each of the two models.
    assert counters["stats"]["unique_graphs"] == 4
    whole = small_model(tmp_path, maps=["entmax"], alpha=1.0, compile="model")
    assert model.time_model(whole, device="cpu", backend="eager")[1]["loss"] == pytest.approx(rows[0]["loss"])


def test_changed_configurations_are_rows_of_their_own(tmp_path, monkeypatch):
    seen = []
    step = model._step
    monkeypatch.setattr(model, "_step", lambda *rest: seen.append(dict(configurations._changes)) or step(*rest))
    arguments = small_model(tmp_path, maps=["entmax"], changes=["stray_limit=7,pair_tenths=0"])
    rows = model.time_model(arguments, device="cpu")
    names = [model.SDPA, "entmax", "entmax, stray_limit=7,pair_tenths=0"]
    assert [row["implementation"] for row in rows] == names
    assert seen[0] == {} and seen[-1] == {"stray_limit": 7, "pair_tenths": 0} and not configurations._changes
    with pytest.raises(ValueError, match="no field nothing"):
        model.time_model(small_model(tmp_path, changes=["nothing=1"]), device="cpu")


def test_folders_are_timed_on_their_own_scores(tmp_path):
    folder = tmp_path / "sparse"
    convert_model(ConvertArguments(model=STORIES, output=str(folder), map="sparsemax"))
    changes = {"lengths": [64], "shape": [], "heads": 8, "kv_heads": 4}
    dense = model.time_model(small_model(tmp_path, model=STORIES, maps=["sparsemax"], **changes), device="cpu")
    sparse = model.time_model(small_model(tmp_path, model=str(folder), **changes), device="cpu")
    assert [row["implementation"] for row in sparse] == [model.SDPA, "sparsemax"]
    for one, other in zip(dense, sparse, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-6)
    # The numbers of the whole: a model that was trained with softmax looks at few tokens of its text.
    assert sparse[1]["support"] < 10 and 0.5 < sparse[1]["zeros"] < 1
    with pytest.raises(ValueError, match="leave maps and alpha out"):
        model.time_model(small_model(tmp_path, model=str(folder), maps=["entmax"], **changes), device="cpu")
    text = tmp_path / "a.txt"
    text.write_text("Once upon a time")
    with pytest.raises(ValueError, match=r"tokens, fewer than the 64 of a batch"):
        model.time_model(small_model(tmp_path, model=STORIES, text=[str(text)], **changes), device="cpu")


def broken(monkeypatch, change):
    """Every model that is timed passes through `change`."""
    build = model._with_weights

    def built(*arguments):
        made = build(*arguments)
        change(made)
        return made

    monkeypatch.setattr(model, "_with_weights", built)


def test_steps_that_compute_nothing_are_errors(tmp_path, monkeypatch):
    arguments = small_model(tmp_path, maps=["entmax"])
    with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="softmax, sdpa, 128 tokens: the loss is"):
        broken(patched, lambda made: made.model.embed_tokens.weight.data[5:].fill_(float("nan")))
        model.time_model(arguments, device="cpu")
    with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="not finite; first in model.norm.weight"):
        broken(patched, lambda made: made.model.norm.weight.register_hook(lambda gradient: gradient / 0))
        model.time_model(arguments, device="cpu")
    with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="1 parameters got no gradient, first x"):
        broken(patched, lambda made: made.register_parameter("x", torch.nn.Parameter(torch.zeros(1))))
        model.time_model(arguments, device="cpu")
    with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="without compilation"):
        patched.setattr(model, "_look", lambda *_: {"loss_uncompiled": 9.0})
        model.time_model(arguments, device="cpu")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", families.NAMES)
def test_a_sparse_config_gives_its_dense_one_back(name):
    dense = families.dense_config(name)
    found = dense_config(sparse_config(dense, hsa.SparseAttentionConfig(map="entmax")))
    assert type(found) is type(dense) and found.to_dict() == dense.to_dict()


@pytest.mark.parametrize("window", [None, 40])
def test_sparsity_is_that_of_the_weights(window):
    torch.manual_seed(0)
    query, key = 3 * torch.randn(1, 4, 200, 8), torch.randn(1, 2, 200, 8)
    visible = None if window is None else visible_range(200, 200, window=window)
    arguments = {"alpha": 1.5, "scaling": None, "causal": True, "visible": visible, "slopes": None}
    _, tau = reference.attention(query, key, torch.randn(1, 2, 200, 8), **arguments)
    found = model._sparsity(query, key, tau, 3, **arguments).tolist()
    # Layer 3 shows the second group.
    weights = reference.attention_weights(query, key, **arguments)[0, 2:] > 0
    position = torch.arange(200)
    seen = position <= position[:, None]
    if window is not None:
        seen &= position > position[:, None] - window

    def blocks(entries):
        padded = torch.nn.functional.pad(entries, (0, 56, 0, 56))
        return padded.unflatten(-1, (4, 64)).any(-1).unflatten(-2, (4, 64)).any(-2).sum().item()

    expected = [
        1 - blocks(weights) / (2 * blocks(seen[None])),
        weights.sum(-1).float().mean().item(),
        1 - weights.sum().item() / (2 * seen.sum().item()),
    ]
    assert found == pytest.approx(expected, abs=1e-6)


def test_packed_documents_beside_the_documents_alone(tmp_path, capsys):
    rows = packing.time_packing(small(tmp_path, what="packing", documents=5, batch=2), device="cpu")
    assert saved(tmp_path, "packing.json")["rows"] == rows
    assert [row["documents"] for row in rows][0] == "5 x 25" and "5 of " in rows[1]["documents"]
    assert all(row["error"] < 1e-5 and row["training_ratio"] > 0 for row in rows)
    assert "alone is" in capsys.readouterr().out
    for equal in (True, False):
        lengths = packing.document_lengths(1000, 32, equal=equal, seed=1)
        assert len(lengths) == 32 and min(lengths) > 0 and sum(lengths) == (992 if equal else 1000)


def test_documents_that_see_each_other_are_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "visible_range", lambda *a, document_starts, **k: visible_range(*a, **k))
    with pytest.raises(RuntimeError, match="leakage"):
        packing.time_packing(small(tmp_path, what="packing", documents=5), device="cpu")


def test_heads_with_slopes_beside_heads_without(tmp_path, monkeypatch):
    arguments = small(tmp_path, what="slopes", lengths=[256])
    rows = slopes.time_slopes(arguments, device="cpu")
    assert saved(tmp_path, "slopes.json")["rows"] == rows
    assert [row["heads_are"] for row in rows] == [slopes.PLAIN, slopes.SLOPED, slopes.BOTH]
    assert [row["heads"] for row in rows] == [2, 2, 4] and rows[0]["training_times_faster"] == 1
    attend = slopes.attend

    def without_slopes(*tensors, **keywords):
        return attend(*tensors, alpha=keywords["alpha"])

    monkeypatch.setattr(slopes, "attend", without_slopes)
    with pytest.raises(RuntimeError, match="what is timed is wrong"):
        slopes.time_slopes(arguments, device="cpu")


def test_the_grid_has_every_kind_and_names_its_slowest(tmp_path, capsys):
    for name, several in (("mask", grid.MASKS), ("head_dim", grid.HEAD_DIMS), ("alpha", grid.ALPHAS)):
        assert {getattr(variant, name) for variant in grid.VARIANTS} == set(several)
    assert {variant.dtype for variant in grid.VARIANTS} == {"bfloat16", "float16", "float32"}
    arguments = BenchmarkArguments(what="grid", repeats=1, output_dir=str(tmp_path / "out"))
    rows = grid.time_grid(arguments, device="cpu", shapes=grid.SHAPES[:4])
    assert len(rows) == 4 * len(grid.VARIANTS) and all(row["ratio"] > 0 and row["error"] == 0 for row in rows)
    found = saved(tmp_path, "grid.json")
    assert found["rows"] == rows and found["variants"] == len(grid.VARIANTS)
    worst = max(row["ratio"] for row in rows)
    assert f"the slowest takes {worst:.2f} of its time" in capsys.readouterr().out


def test_the_grid_goes_on_where_it_was_interrupted(tmp_path, monkeypatch, caplog):
    arguments = BenchmarkArguments(what="grid", repeats=1, output_dir=str(tmp_path / "out"))
    time_row, timed = grid._row, []

    def row(arguments, variant, *rest):
        if len(timed) == 5:
            raise KeyboardInterrupt
        timed.append(variant)
        return time_row(arguments, variant, *rest)

    monkeypatch.setattr(grid, "_row", row)
    call = functools.partial(grid.time_grid, device="cpu", variants=grid.VARIANTS[:4], shapes=((1, 1), (7, 7)))
    with pytest.raises(KeyboardInterrupt):
        call(arguments)
    kept = saved(tmp_path, grid.PARTIAL)["rows"]
    # The third variant was not whole.
    assert len(kept) == 4 and not (tmp_path / "out" / "grid.json").exists()
    timed.clear()
    monkeypatch.setattr(grid, "_row", lambda *given: timed.append(given[1]) or time_row(*given))
    # Of other variants nothing is kept.
    text = (tmp_path / "out" / grid.PARTIAL).read_text(encoding="utf-8")
    assert len(call(arguments, variants=grid.VARIANTS[:1])) == 2 == len(timed)
    assert "this one begins anew" in caplog.text
    (tmp_path / "out" / grid.PARTIAL).write_text(text, encoding="utf-8")
    timed.clear()
    rows = call(arguments)
    assert timed == [variant for variant in grid.VARIANTS[2:4] for _ in range(2)]
    assert rows[:4] == kept and len(rows) == 8 and saved(tmp_path, "grid.json")["rows"] == rows
    assert not (tmp_path / "out" / grid.PARTIAL).exists()


def test_a_fast_wrong_answer_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(grid, "attend", lambda query, *_, **__: query * 0)
    arguments = BenchmarkArguments(what="grid", repeats=1, output_dir=str(tmp_path / "out"))
    with pytest.raises(RuntimeError, match=r"causal, bfloat16, head_dim 8, alpha 1.5, \(7, 7\)"):
        grid.time_grid(arguments, device="cpu", shapes=((7, 7),))


def small_cold(tmp_path):
    changes = {"heads": 2, "kv_heads": 1, "head_dim": 16, "dtype": "float32", "lengths": [128, 65]}
    return BenchmarkArguments(what="cold", output_dir=str(tmp_path / "out"), **changes)


def test_first_calls_say_what_is_new():
    arguments = {"batch": 1, "heads": 2, "kv_heads": 1, "head_dim": 16, "dtype": "float32", "seed": 0, "alpha": 1.5}
    rows = cold.first_calls(lengths=[130, 65], device="cpu", **arguments)
    assert [row["new"] for row in rows] == ["everything", "length", "mask", "length"]
    assert [(row["mask"], row["length"]) for row in rows[1:3]] == [("causal", 65), ("documents", 130)]
    assert all(row["first_s"] > 0 and row["second_s"] > 0 for row in rows)


def test_a_process_that_fails_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(cold, "PROGRAM", "raise SystemExit('no card')")
    with pytest.raises(RuntimeError, match="empty cache: no card"):
        cold.time_first_calls(small_cold(tmp_path), device="cpu")


@pytest.mark.slow
def test_first_calls_of_processes_of_their_own(tmp_path):
    rows = cold.time_first_calls(small_cold(tmp_path), device="cpu")
    assert [row["process"] for row in rows] == [cold.EMPTY] * 4 + [cold.ON_DISK] * 4
    assert saved(tmp_path, "cold.json")["rows"] == rows


def test_attention_of_any_head_dimension_and_alpha_beside_softmax(tmp_path, monkeypatch):
    changes = {"lengths": [512, 128], "head_dim": 32, "alpha": 1.333, "noise": [0.0, 0.9], "peers": ["sdpa cudnn"]}
    rows = attention.time_attention(small(tmp_path, **changes), device="cpu")
    assert saved(tmp_path, "results.json")["rows"] == rows and (tmp_path / "out" / "results.png").exists()
    ours = [row for row in rows if row["implementation"] == "ours"]
    assert len(ours) == 4 and all(row["error"] < 1e-5 and row["training_ms"] > 0 for row in ours)
    assert ours[0]["block_sparsity"] > ours[1]["block_sparsity"]
    # There is no cuDNN here: a row that says so, and no ratio.
    assert all("refused" in row for row in rows if row not in ours) and "training_ratio" not in ours[0]
    right = attention.attend_with_tau

    def wrong(*tensors, **keywords):
        out, tau = right(*tensors, **keywords)
        return out * 1.01, tau

    monkeypatch.setattr(attention, "attend_with_tau", wrong)
    with pytest.raises(RuntimeError, match="what is timed is wrong"):
        attention.time_attention(small(tmp_path, **changes), device="cpu")


def splash(monkeypatch, **functions):
    """A module like AdaSplash's, which needs a card: what it is given, and functions that take its place."""
    module, calls = types.ModuleType("adasplash", None), []
    module.__spec__ = importlib.machinery.ModuleSpec("adasplash", None)

    def version(name, alpha=1.5):
        def attend(query, key, value, **keywords):
            calls.append((name, key.shape[1], keywords))
            if query.shape[2] & (query.shape[2] - 1):
                raise AssertionError
            return reference.attention(query, key, value, alpha=keywords.get("alpha", alpha))[0]

        return attend

    for name in ("adasplash_v1", "adasplash_v2"):
        setattr(module, name, functions.get(name, version(name)))
    monkeypatch.setitem(sys.modules, "adasplash", module)
    return calls


def timed_peers(tmp_path, **changes):
    changes = {"peers": ["adasplash 1", "adasplash 2"], "noise": [0.9], **changes}
    rows = attention.time_attention(small(tmp_path, **changes), device="cpu")
    assert saved(tmp_path, "results.json")["rows"] == rows
    assert [row["implementation"] for row in rows[:3]] == ["ours", "adasplash 1", "adasplash 2"]
    return rows


def test_both_versions_of_adasplash_are_peers(tmp_path, monkeypatch, caplog):
    calls = splash(monkeypatch)
    rows = timed_peers(tmp_path)
    assert all(row["training_ms"] > 0 and row["error"] < 1e-5 for row in rows)
    # The first has no grouped heads and an alpha, the second has them and one alpha.
    seen = {(name, heads, tuple(sorted(keywords.items()))) for name, heads, keywords in calls}
    assert seen == {("adasplash_v1", 4, (("alpha", 1.5), ("is_causal", True))), ("adasplash_v2", 2, ())}
    # A wrong one is timed, and its error stands beside it.
    splash(monkeypatch, adasplash_v2=lambda query, key, value: query * 1.0 + 0 * key.sum() + 0 * value.sum())
    assert timed_peers(tmp_path)[2]["error"] > 0.1
    assert not caplog.records


def test_what_a_peer_refuses_is_a_row_and_no_end(tmp_path, monkeypatch, capsys):
    splash(monkeypatch)
    other = timed_peers(tmp_path, alpha=1.333)
    assert "error" in other[1] and other[2]["refused"] == "ValueError: its alpha is 1.5, not 1.333"
    above = timed_peers(tmp_path, alpha=3.0)
    assert above[1]["refused"] == "ValueError: its alpha is in (1, 2], not 3.0"
    # An assertion without a word, as for a length that is no power of two; what follows is timed.
    odd = timed_peers(tmp_path, lengths=[192, 128])
    assert [row.get("refused") for row in odd] == [None, "AssertionError", "AssertionError", None, None, None]
    assert "AssertionError" in capsys.readouterr().out

    class CompilationError(Exception):
        """Triton's are neither runtime nor value errors."""

    def broken(query, key, value):
        raise CompilationError("at 1:2:\nno such layout")

    splash(monkeypatch, adasplash_v2=broken)
    assert timed_peers(tmp_path)[2]["refused"] == "CompilationError: at 1:2:"
    splash(monkeypatch, adasplash_v2=lambda query, key, value: query / 0 + 0 * key.sum() + 0 * value.sum())
    assert timed_peers(tmp_path)[2].keys() & {"refused", "training_ms"} == {"refused"}
    # A version that has only one of them, or none.
    del sys.modules["adasplash"].adasplash_v2
    assert timed_peers(tmp_path)[2]["refused"].startswith("ImportError: cannot import name 'adasplash_v2'")
    right, calls = sys.modules["adasplash"].adasplash_v1, []

    def fails_at_last(*tensors, **keywords):
        calls.append(1)
        # After it was timed.
        if len(calls) > 8:
            raise RuntimeError("an illegal memory access")
        return right(*tensors, **keywords)

    splash(monkeypatch, adasplash_v1=fails_at_last)
    assert timed_peers(tmp_path)[1]["refused"] == "RuntimeError: an illegal memory access"


class BrokenGradient(torch.autograd.Function):
    """The right output, and gradients that are `factor` of the right ones."""

    @staticmethod
    def forward(ctx, out, factor):
        ctx.factor = factor
        return out.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.factor, None


def test_a_peer_with_wrong_gradients_or_another_order_of_heads(tmp_path, monkeypatch):
    """The output of the first head is right in all three."""

    def broken(factor):
        def attend(query, key, value, **keywords):
            return BrokenGradient.apply(reference.attention(query, key, value, alpha=1.5)[0], factor)

        return attend

    def interleaved(query, key, value):
        key, value = key.repeat(1, 2, 1, 1), value.repeat(1, 2, 1, 1)
        return reference.attention(query, key, value, alpha=1.5)[0]

    splash(monkeypatch, adasplash_v1=broken(0.9), adasplash_v2=interleaved)
    ours, first, second = timed_peers(tmp_path)
    assert ours["error"] < 1e-5 and ours["gradient_error"] < 1e-5
    assert first["error"] < 1e-5 and 0.09 < first["gradient_error"] < 0.11
    assert second["error"] > 0.1
    splash(monkeypatch, adasplash_v1=broken(float("nan")))
    refused = timed_peers(tmp_path)[1]
    assert refused["refused"].startswith("RuntimeError: values are not finite") and "training_ms" not in refused


def test_peers_that_are_not_installed_are_named(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "adasplash", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_, **__: None)
    rows = attention.time_attention(small(tmp_path, peers=["adasplash 1"], noise=[0.9]), device="cpu")
    assert [row["implementation"] for row in rows] == ["ours"]
    assert "not installed, so not timed: adasplash 1" in caplog.text


@pytest.mark.slow
def test_the_grid_is_compiled_by_processes_of_their_own(tmp_path):
    arguments = BenchmarkArguments(what="grid", repeats=1, output_dir=str(tmp_path / "out"))
    grid.time_grid(arguments, device="cpu", variants=grid.VARIANTS[:2], shapes=((7, 7),), processes=2)
    assert saved(tmp_path, "grid.json")["processes"] == 2
    # An error in one of them is an error here.
    with pytest.raises(KeyError, match="float8"):
        wrong = dataclasses.replace(grid.VARIANTS[0], dtype="float8")
        grid.time_grid(arguments, device="cpu", variants=(wrong,), shapes=((7, 7),), processes=1)
