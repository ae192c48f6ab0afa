"""The decoding benchmark without a GPU: its inputs, rows and files, with a timer that only counts."""

import itertools
import json

import pytest
import torch

pytest.importorskip("triton")

import families

from hf_sparse_attention import benchmark, cli, kernels, reference
from hf_sparse_attention.benchmark import decode, generation
from hf_sparse_attention.kernels.decode import pages as page_kernels

pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
    pytest.mark.skipif(
        torch.cuda.is_available(), reason="runs whole on a GPU: hf-sparse-attention benchmark --decode"
    ),
]


def small(tmp_path, **changes):
    settings = {
        "decode": True, "cache_lengths": [128, 256], "batches": [2], "noise": [0.0, 0.9], "heads": 4, "kv_heads": 2,
        "head_dim": 16, "dtype": "float32", "new_tokens": 3, "output_dir": str(tmp_path / "out"),
    }  # fmt: skip
    return benchmark.BenchmarkArguments(**{**settings, **changes})


def test_rows_tables_and_files(tmp_path, capsys):
    arguments, timed = small(tmp_path), []

    def timer(calls):
        times = {}
        for name, call in calls.items():
            call()
            timed.append(name)
            times[name] = float(len(timed))
        return times

    rows = decode.benchmark_decoding(arguments, device="cpu", timer=timer, shape=families.COMMON)
    saved = json.loads((tmp_path / "out" / "decode.json").read_text())
    assert saved["rows"] + saved["generation"] + saved["memory"] == rows and saved["device"] == "cpu"
    steps = saved["rows"]
    names = [decode.OURS, decode.BOUNDED, decode.RESTING, "eager"]
    assert [row["implementation"] for row in steps] == names * 4
    assert all(row["error"] < 1e-5 for row in steps if row["implementation"] != "eager")
    # Keys without noise lie on their page's code: only the pages aimed at are read.
    by_noise = {row["noise"]: row["pages_read"] for row in steps if row["implementation"] == names[1]}
    assert by_noise[0.0] < by_noise[0.9] <= 1
    # Softmax is timed once for all noises.
    assert len(timed) == 2 * (3 + 3 + 1)
    generated = saved["generation"]
    assert [row["length"] for row in generated] == [128] * 3 + [256] * 3
    assert all(row["tokens_per_second"] > 0 for row in generated) and generated[0]["ratio"] == 1
    assert [row.get("layers_at_rest") for row in generated] == [None, None, 0] * 2
    text = capsys.readouterr().out
    assert "pages read" in text and "tokens/s" in text and "ms at 128" in text and "MiB" in text
    assert (tmp_path / "out" / "decode.png").stat().st_size > 1000


def test_bounds_at_rest_are_timed_at_rest(tmp_path, monkeypatch):
    """Before and after whatever a timer calls; it is then the plain kernel that computes a step, to the bit."""
    attend, states = kernels.entmax_attention, []

    def watched(*tensors, pages=None, **arguments):
        out = attend(*tensors, pages=pages, **arguments)
        states.append("plain" if pages is None else "at rest" if pages[4][0] > page_kernels.REST else "as it is")
        return out

    def timer(calls):
        for call in calls.values():
            outputs.append(call())
            states.append("timed")
        return dict.fromkeys(calls, 1.0)

    monkeypatch.setattr(kernels, "entmax_attention", watched)
    outputs = []
    arguments = small(tmp_path, cache_lengths=[256], noise=[0.9], new_tokens=0)
    decode.benchmark_decoding(arguments, device="cpu", timer=timer)
    kinds = [before for before, after in itertools.pairwise(states) if after == "timed"]
    assert kinds[:3] == ["plain", "as it is", "at rest"]
    assert torch.equal(outputs[0], outputs[2])


def test_memory_is_that_of_what_the_caches_hold(tmp_path):
    """Keys and values take 8 bytes an entry; bounds add two rows and a number per page, a growing cache room."""
    rows = decode.memory_rows(small(tmp_path), 16384, "cpu")
    assert [row["cache"] for row in rows] == [
        "DynamicCache", "BoundedDynamicCache", "StaticCache", "BoundedStaticCache",
    ]  # fmt: skip
    plain, growing, static, bounded = (row["bytes"] for row in rows)
    assert plain == 2 * 16384 * 16 * 8 and static - plain < 64
    assert bounded - static == 2 * 256 * (2 * 16 * 4 + 16 + 3 * 4) + 12
    assert rows[1]["ratio"] == growing / plain < 1.07 and rows[3]["ratio"] == bounded / static < 1.02


def test_growth_is_between_the_shortest_and_the_longest_cache():
    rows = [
        {"implementation": "ours", "batch": 1, "noise": 0.1, "length": length, "ms": ms, "support": 70.0}
        for length, ms in ((1024, 0.25), (64, 0.1), (256, 0.2))
    ]
    lines = decode.growth_table(rows).splitlines()
    assert lines[0].split("  ")[-1].strip() == "support" and "ms at 64" in lines[0] and "ms at 1024" in lines[0]
    assert lines[2].split() == ["ours", "1", "0.10", "0.100", "0.250", "2.50", "70", "->", "70"]


def test_generation_tells_whose_bounds_rest_and_the_median_of_its_times(tmp_path, monkeypatch):
    """One slow run of three changes nothing, and a layer's state is read when all of them are done."""
    runs = iter([9.0, 4.0, 1.0, 2.0])

    def timed(model, cache, ids, tokens):
        cache.layers[1].state[0] += 1
        return next(runs)

    monkeypatch.setattr(generation, "_timed_generation", timed)
    model = families.sparse_model(families.dense_model("llama"), "entmax")
    row = generation._generation_row(small(tmp_path, new_tokens=8), 64, model, generation.BoundedStaticCache)
    assert row == {"first_seconds": 9.0, "tokens_per_second": 4.0, "layers_at_rest": 1, "layers": 2}
    line = generation.generation_table([{"implementation": "x", "length": 64, "ratio": 1.0} | row]).splitlines()[-1]
    assert line.split()[-3:] == ["1", "of", "2"]


@pytest.mark.parametrize("fault", ["refusal", "wrong"])
def test_what_our_kernels_do_not_compute_raises(tmp_path, monkeypatch, fault):
    """Of the others it is told in the table."""

    def attend(query, key, value, **arguments):
        if fault == "refusal":
            raise RuntimeError("out of resource: shared memory")
        return torch.zeros_like(query), None

    monkeypatch.setattr("hf_sparse_attention.kernels.entmax_attention", attend)
    with pytest.raises(RuntimeError, match="out of resource" if fault == "refusal" else "away from float64"):
        decode.benchmark_decoding(
            small(tmp_path, new_tokens=0), device="cpu", timer=lambda calls: dict.fromkeys(calls, 1)
        )


@pytest.mark.slow
def test_what_others_do_not_compute_stands_in_the_table(tmp_path, monkeypatch, capsys):
    def refuse(*arguments):
        raise RuntimeError("No available kernel")

    monkeypatch.setattr(decode, "_eager", refuse)
    rows = decode.benchmark_decoding(
        small(tmp_path, new_tokens=0), device="cpu", timer=lambda calls: dict.fromkeys(calls, 1.0)
    )
    assert [row.get("refused") for row in rows if row.get("implementation") == "eager"] == [
        "RuntimeError: No available kernel"
    ] * 4
    assert "No available kernel" in capsys.readouterr().out


def test_inputs_are_those_of_the_training_benchmark(tmp_path):
    query, key, value = decode.cache_inputs(small(tmp_path), 256, 1, 0.3, "cpu")
    assert query.shape == (1, 4, 1, 16) and key.shape == value.shape == (1, 2, 256, 16)
    weights = reference.attention_weights(query, key)[0, :, 0].unflatten(1, (4, 64)).sum(-1)
    # Every head's weight lies in its own block of keys, the last, and in one earlier.
    assert ((weights > 0.02).sum(-1) <= 2).all() and (weights[:, -1] > 0.1).all()


def test_the_command_refuses_without_a_gpu_and_names_bad_values(capsys):
    assert cli.main(["benchmark", "--decode"]) == 2
    assert "no CUDA or ROCm device" in capsys.readouterr().err
    assert cli.main(["benchmark", "--decode", "--cache_lengths", "100"]) == 2
    assert "cache_lengths has 100" in capsys.readouterr().err
    assert cli.main(["benchmark", "--decode", "--batches", "0"]) == 2
    assert "batches is [0]" in capsys.readouterr().err


def test_a_run_that_was_cut_short_goes_on(tmp_path, monkeypatch):
    """With what it had measured, if the same is asked for on the same card; one that came to its end starts anew."""
    sizes = {"cache_lengths": [64, 128], "batches": [1], "heads": 2, "kv_heads": 1, "new_tokens": 1}
    arguments, file, timed = small(tmp_path, **sizes), tmp_path / "out" / "decode.json", []
    whole = generation._generation_row

    def timer(calls):
        times = {}
        for name, call in calls.items():
            timed.append(call())
            if len(timed) == 8:
                raise KeyboardInterrupt
            times[name] = float(len(timed))
        return times

    def generate(arguments, length, model, kind):
        if length == 128 and len(known()["generation"]) == 3:
            raise KeyboardInterrupt
        return whole(arguments, length, model, kind)

    def known():
        return json.loads(file.read_text())

    def run(arguments=arguments):
        return decode.benchmark_decoding(arguments, device="cpu", timer=timer, shape=families.COMMON)

    with pytest.raises(KeyboardInterrupt):
        run()
    assert known()["unfinished"] and [row["ms"] for row in known()["rows"]] == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 4.0]
    monkeypatch.setattr(generation, "_generation_row", generate)
    with pytest.raises(KeyboardInterrupt):
        run()
    # Two noises at the second length are left, and softmax there once; of the rows before none is measured again.
    assert len(timed) == 8 + 7
    assert [row["ms"] for row in known()["rows"]][:8] == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 4.0]
    assert len(known()["generation"]) == 3 and len(known()["memory"]) == 8
    before = known()["generation"]
    monkeypatch.setattr(generation, "_generation_row", whole)
    rows = run()
    assert len(timed) == 15 and "unfinished" not in known()
    found = [row for row in rows if "tokens_per_second" in row]
    assert [(row["length"], row["implementation"]) for row in found] == [
        (length, name) for length in (64, 128) for name in generation.GENERATED
    ]
    kept = {(row["length"], row["implementation"]): row["tokens_per_second"] for row in found}
    assert all(kept[row["length"], row["implementation"]] == row["tokens_per_second"] for row in before)
    # All of it again: another command, or the same one after its end.
    file.write_text(json.dumps(known() | {"unfinished": True}))
    other = small(tmp_path, **sizes | {"cache_lengths": [64], "noise": [0.9], "new_tokens": 0})
    for count in (4, 8):
        assert len(run(other)) == 4 + 4 and len(timed) == 15 + count
    file.write_text("{")
    with pytest.raises(ValueError, match="is no JSON file"):
        run()
