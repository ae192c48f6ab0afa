"""Launch parameters by trial: what is wrong or refused is not taken, and the file that is written is what is used."""

import json

import pytest
import torch

triton = pytest.importorskip("triton")

from hf_sparse_attention import tune  # noqa: E402
from hf_sparse_attention.kernels import configurations, entmax_attention, operators  # noqa: E402
from hf_sparse_attention.kernels.configurations import Launch  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="the rows are those of the CPU"),
]
CPU = torch.device("cpu")
KEY = ("cpu", 2, 16)


@pytest.fixture
def inputs():
    return [tuple(torch.randn(1, 1, 64, 16).half() for _ in range(3))]


@pytest.fixture
def without_check(monkeypatch):
    monkeypatch.setattr(tune.Check, "__init__", lambda *_: None)
    monkeypatch.setattr(tune.Check, "refusal", lambda _: None)


def present():
    return configurations.configuration(CPU, 2, 16)


def faster_with(name, value, *, saves=1.0):
    """A clock: 10 ms, less what each of the present configuration's fields saves."""
    return lambda call, repeats: 10.0 - saves * (getattr(present(), name) == value)


def test_the_fastest_is_written_and_used(inputs, tmp_path, without_check, capsys):
    path, before = tmp_path / "tuned.json", present()
    choices = {
        "forward": [{"forward": Launch(4, 3)}, {"forward": Launch(4, 4)}],
        "inner": [{"inner": 64}, {"inner": 32}],
    }
    rows = tune.tune_kernels(inputs, path, median=faster_with("forward", Launch(4, 3)), choices=choices)
    # inner 64 is what is there: it is not tried again.
    assert [row["ms"] for row in rows] == [10.0, 9.0, 10.0, 9.0]
    assert present() is before, "a trial leaves nothing behind"
    assert "configurations.use(" in capsys.readouterr().out
    with configurations.use(path):
        assert present().forward == Launch(4, 3) and present().inner == 64 and present().measured == "cpu"
        assert configurations.configuration(CPU, 4, 16).measured == "", "another dtype keeps the table's row"
        query = inputs[0][0]
        assert operators.describe(
            query, query, query, 1.5, None, 0.25, True, None, None, None
        ).configuration.forward == Launch(4, 3)
    assert present() is before
    assert json.loads(path.read_text())["measured"]["ms"] == 9.0


def test_gains_of_noise_are_not_taken(inputs, tmp_path, without_check):
    clock = faster_with("inner", 32, saves=0.05)
    tune.tune_kernels(inputs, tmp_path / "a.json", median=clock, choices={"inner": [{"inner": 32}]})
    assert configurations.read_rows(tmp_path / "a.json")[KEY].inner == 64


@pytest.mark.slow
def test_what_computes_something_else_is_not_taken(inputs, tmp_path, monkeypatch):
    """The check itself, in the interpreter: configurations that are right and one that is 1 % off."""

    def broken(*tensors, **arguments):
        out, tau = entmax_attention(*tensors, **arguments)
        return (out * 1.01 if present().inner == 32 else out), tau

    monkeypatch.setattr(tune, "entmax_attention", broken)
    choices = {"inner": [{"inner": 32}], "forward": [{"forward": Launch(4, 3)}]}
    rows = tune.tune_kernels(inputs, tmp_path / "a.json", median=lambda *_: 10.0, choices=choices)
    assert rows[1]["refused"].startswith("wrong output") and "ms" not in rows[1]
    assert "refused" not in rows[0] and "refused" not in rows[2]


def test_what_does_not_run_is_not_taken(inputs, tmp_path, without_check):
    def clock(call, repeats):
        if present().forward.stages == 9:
            raise triton.runtime.errors.OutOfResources(1, 0, "shared memory")
        return 1.0

    rows = tune.tune_kernels(
        inputs, tmp_path / "a.json", median=clock, choices={"forward": [{"forward": Launch(4, 9)}]}
    )
    assert "shared memory" in rows[1]["refused"]
    assert configurations.read_rows(tmp_path / "a.json")[KEY].forward == present().forward


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[]", "no rows"),
        ('{"rows": [{}]}', "no rows"),
        ("nonsense", "no rows"),
        ('{"rows": [{"device": "cpu", "element_size": 2, "block_dim": 16, "configuration": {}}]}', "fields"),
    ],
)
def test_files_that_hold_something_else_are_refused(text, reason, tmp_path):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=reason):
        configurations.use(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("name", "value"), [("inner", 48), ("inner", "64"), ("threshold_rows", 256), ("stray_forward", 1), ("forward", 4)]
)
def test_values_no_kernel_takes_are_refused(name, value):
    row = configurations.to_row(*KEY, present())["configuration"]
    assert configurations.from_dict(row) == present()
    with pytest.raises(ValueError, match=name):
        configurations.from_dict({**row, name: value})
    with pytest.raises((TypeError, ValueError)):
        configurations.from_dict({**row, "forward": {"warps": 4, "steps": 2}})


def test_every_candidate_is_one_that_a_file_can_hold():
    for wide in (False, True):
        for several in tune.candidates(wide).values():
            for values in several:
                row = {**configurations.to_row(*KEY, present())["configuration"]}
                row |= {name: vars(value) if isinstance(value, Launch) else value for name, value in values.items()}
                assert configurations.from_dict(row)
