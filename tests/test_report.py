"""What report says of a model's attention, against counts over dense weights; and pictures in which 0 is no colour."""

import json
import math

import numpy as np
import pytest
import torch
from report_cases import TEXT, sparse_folder
from training_cases import STORIES, dense_folder
from transformers import AutoModelForCausalLM, AutoTokenizer, MistralConfig, MistralForCausalLM

from hf_sparse_attention import cli, figures, implementation
from hf_sparse_attention.attention import record
from hf_sparse_attention.models import attention_layers
from hf_sparse_attention.report import Measures, ReportArguments, command, measures, report_model
from hf_sparse_attention.tasks import TokenizedText


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    dense_folder(folder / "dense", initializer_range=0.3, max_position_embeddings=512)
    (folder / "text.txt").write_text(TEXT)
    return folder


def arguments(home, output, **changes):
    values = {
        "model": str(home / "sparse"), "data": [str(home / "text.txt")], "output_dir": str(output), "length": 150,
        "windows": 3, "device": "cpu", "figure": False, "html": False,
    }  # fmt: skip
    return ReportArguments(**{**values, **changes})


def counted(weights, visible):
    """Support, zeros and empty tiles of one head by loops over the dense weights of one window."""
    queries = len(weights)
    support = sum(int((row > 0).sum()) for row in weights)
    tiles = empty = 0
    for first in range(0, queries, measures.TILE):
        for left in range(0, queries, measures.TILE):
            here = slice(first, first + measures.TILE), slice(left, left + measures.TILE)
            if visible[here].any():
                tiles += 1
                empty += not (weights[here] > 0).any()
    return support, int(visible.sum()) - support, tiles, empty


def expected(folder, windows, window=math.inf):
    """Per layer and head (support, zeros, block sparsity), from `output_attentions`."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        layers = model(windows, use_cache=False, output_attentions=True).attentions
    position = torch.arange(windows.shape[1])
    distance = position[:, None] - position
    visible = (distance >= 0) & (distance < window)
    found = []
    for weights in layers:
        rows = []
        for head in range(weights.shape[1]):
            counts = np.array([counted(weights[batch, head], visible) for batch in range(len(windows))]).sum(0)
            rows.append((counts[0] / windows.numel(), counts[1] / (counts[0] + counts[1]), counts[3] / counts[2]))
        found.append(rows)
    return found


def check(result, found):
    for row, layer in zip(result["layers"], found, strict=True):
        support, zeros, empty = zip(*layer, strict=True)
        assert row["support"] == pytest.approx(support, abs=1e-9)
        assert row["zeros"] == pytest.approx(zeros, abs=1e-9)
        assert row["block_sparsity"] == pytest.approx(empty, abs=1e-9)


@pytest.mark.parametrize(
    "options",
    [{"map": "asentmax"}, {"map": "sparsemax"}, {"map": "adaptive_entmax"}, {"map": "asentmax", "position": "nape"}],
    ids=lambda options: "-".join(options.values()),
)
@pytest.mark.parametrize("tile", [10, 64])
def test_numbers_are_those_of_the_dense_weights(home, tmp_path, options, tile, monkeypatch):
    monkeypatch.setattr(measures, "TILE", tile)
    folder = sparse_folder(home, "-".join(options.values()), **options)
    result = report_model(arguments(home, tmp_path / "out", model=str(folder)))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    windows = TokenizedText.of([TEXT], tokenizer).windows(150, limit=3).tokens
    check(result, expected(folder, windows))
    assert all(0 < zeros < 1 for row in result["layers"] for zeros in row["zeros"])
    assert tile == 64 or max(empty for row in result["layers"] for empty in row["block_sparsity"]) > 0
    assert [row["visible"] for row in result["layers"]] == [75.5, 75.5]
    model = AutoModelForCausalLM.from_pretrained(folder)
    for (_, attention), row in zip(attention_layers(model), result["layers"], strict=True):
        if options["map"] == "adaptive_entmax":
            alphas = 1 + torch.sigmoid(attention.sparse_alpha.alpha_bias)
            assert row["alpha"] == pytest.approx(alphas.tolist(), rel=1e-6)
        else:
            assert row["alpha"] == [2.0 if options["map"] == "sparsemax" else 1.5] * 4


def test_the_mean_scale_is_that_of_the_formula(home, tmp_path):
    folder = sparse_folder(home)
    result = report_model(arguments(home, tmp_path / "out"))
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    windows = TokenizedText.of([TEXT], AutoTokenizer.from_pretrained(folder)).windows(150, limit=3).tokens
    entering = []
    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(
            lambda module, args, kwargs: entering.append(kwargs["hidden_states"]), with_kwargs=True
        )
    with torch.no_grad():
        model(windows, use_cache=False)
    log_n = torch.arange(2, 152).double().log()
    for (_, attention), hidden, row in zip(attention_layers(model), entering, result["layers"], strict=True):
        part = {name: value.detach().double() for name, value in attention.sparse_scale.named_parameters()}
        hidden = hidden.double()
        start = math.log(math.expm1(0.05))
        beta = torch.nn.functional.softplus(hidden @ part["beta_bias_weight"].T + part["beta_bias"] + start)
        gamma = 2 * torch.tanh(hidden @ part["gamma_bias_weight"].T + part["gamma_bias"])
        factor = 0.95 + part["delta_bias"] + beta * log_n[:, None] ** gamma
        assert row["scale"] == pytest.approx(factor.mean((0, 1)).tolist(), rel=1e-5)


@pytest.mark.parametrize("forced", ["auto", "reference"])
def test_softmax_has_no_zeros(home, tmp_path, forced):
    """ssmax is softmax; far weights that a float rounds to 0 are no zeros of the map."""
    folder = sparse_folder(home, "ssmax", map="ssmax")
    with implementation(forced):
        result = report_model(arguments(home, tmp_path / "out", model=str(folder)))
    for row in result["layers"]:
        assert row["support"] == [75.5] * 4 and row["alpha"] == [1.0] * 4
        assert row["zeros"] == row["block_sparsity"] == [0.0] * 4
        assert row["scale"] != [1.0] * 4


def test_a_window_and_layers_that_stayed_dense(home, tmp_path):
    torch.manual_seed(0)
    sizes = {"vocab_size": 512, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.3}
    dense = MistralForCausalLM(MistralConfig(**sizes, **heads, sliding_window=70))
    dense.save_pretrained(tmp_path / "dense")
    AutoTokenizer.from_pretrained(STORIES).save_pretrained(tmp_path / "dense")
    folder = sparse_folder(tmp_path, layers=[1])
    result = report_model(arguments(home, tmp_path / "out", model=str(folder)))
    windows = TokenizedText.of([TEXT], AutoTokenizer.from_pretrained(folder)).windows(150, limit=3).tokens
    found = expected(folder, windows, window=70)
    # A layer that stayed dense is not part of the report: its softmax would blur every mean.
    assert [row["layer"] for row in result["layers"]] == [1]
    check(result, found[1:])
    mean = sum(min(query + 1, 70) for query in range(150)) / 150
    assert result["layers"][0]["visible"] == pytest.approx(mean)
    assert result["mean"]["alpha"] == 1.5


def test_padding_is_not_visible(home):
    """Left padding changes none of a row's numbers; a query of padding counts as one that sees no key."""
    model = AutoModelForCausalLM.from_pretrained(sparse_folder(home)).eval()
    tokens = torch.randint(3, 512, (1, 90), generator=torch.Generator().manual_seed(0))
    measured = []
    for padding in (0, 40):
        ids = torch.nn.functional.pad(tokens, (padding, 0), value=2)
        mask = torch.nn.functional.pad(torch.ones_like(tokens), (padding, 0))
        sums = Measures()
        with record(sums), torch.no_grad():
            model(ids, attention_mask=mask, use_cache=False)
        measured.append(sums.layers)
    for layer, sums in measured[0].items():
        assert sums["visible"] == measured[1][layer]["visible"] == 90 * 91 / 2
        assert torch.equal(sums["support"], measured[1][layer]["support"])


def test_files_table_and_picture(home, tmp_path, capsys):
    sparse_folder(home)
    result = report_model(
        arguments(home, tmp_path / "out", figure=True, prompt="Tom $aw a _cat 🐈", heads=["0:1", "1:3"])
    )
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == result
    shown, page = capsys.readouterr().out, (tmp_path / "out" / "report.md").read_text()
    zeros = np.mean(result["layers"][1]["zeros"])
    assert f"{zeros:.1%}" in shown and f"{zeros:.1%}" in page
    assert result["mean"]["zeros"] == pytest.approx(np.mean([row["zeros"] for row in result["layers"]]))
    for name in ("heads.png", "attention.png", "positions.png"):
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "attention.png", "heads.png", "positions.png", "report.json", "report.md",
    ]  # fmt: skip
    assert (
        report_model(arguments(home, tmp_path / "again", figure=True, prompt="Tom $aw a _cat 🐈"))["layers"]
        == (result["layers"])
    )


def test_an_exact_zero_is_hatched_and_a_small_number_is_not():
    values = np.array([[0.0, 1e-6, 0.5], [1.0, 0.0, np.nan]])
    figure = figures.heads([("zeros", values, "{:.2f}", False)], [0, 1], title="a $title")
    axes = figure.axes[0]
    hatched = [(patch.get_y() + 0.5, patch.get_x() + 0.5) for patch in axes.patches if patch.get_hatch()]
    assert hatched == [(0, 0), (1, 1)]
    image = np.ma.getmaskarray(axes.images[0].get_array())
    assert image.tolist() == [[True, False, False], [False, True, True]]
    assert [text.get_text() for text in axes.texts] == ["0.00", "<0.01", "0.50", "1.00", "0.00"]
    assert figures.picture(figure).startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("value", "pattern", "text"),
    [(0.0, "{:.2f}", "0.00"), (0.004, "{:.2f}", "<0.01"), (0.996, "{:.2f}", ">0.99"), (1.0, "{:.2f}", "1.00"),
     (1.003, "{:.2f}", "1.00"), (0.4, "{:.0f}", "<1"), (0.9, "{:.0f}", "1"), (12.4, "{:.0f}", "12")],
)  # fmt: skip
def test_rounding_never_makes_a_zero(value, pattern, text):
    assert figures._shown(value, pattern) == text


def test_an_attention_picture_tells_zero_small_and_unseen_apart():
    weights = np.array([[1, 0, 0], [0.999999, 1e-6, 0], [0, 1e-30, 1.0]])
    visible = np.tril(np.ones((3, 3), dtype=bool))
    figure = figures.attention([("layer 0, head 0", weights, visible)], ["<s>", "$a", "_b"], title="attention")
    axes = figure.axes[0]
    assert axes.patch.get_hatch()
    drawn, blank = axes.images
    # Zeros are left open, so that the hatched background shows; unseen keys are covered in white.
    assert np.ma.getmaskarray(drawn.get_array()).tolist() == (weights == 0).tolist()
    assert (blank.get_array()[~visible] == 1).all() and (blank.get_array()[visible][:, 3] == 0).all()
    assert drawn.norm(float(drawn.get_array()[2, 1])) == 0
    assert "exact zeros" in axes.get_title() and axes.get_title().startswith("layer 0, head 0: 16.7%")
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["weight exactly 0", "not visible to the query"]
    assert "smaller than 1e-06" in figure.axes[-1].get_ylabel()
    assert figures.picture(figure, "svg").startswith(b"<?xml")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": []}, "data is empty"),
        ({"length": 1}, "length is 1"),
        ({"windows": 0}, "windows is 0"),
        ({"dtype": "int8"}, "choose one of auto"),
        ({"device": "abacus"}, "device is 'abacus'"),
        ({"length": 10**5}, "the longest has"),
        ({"heads": ["7:0"]}, "heads has '7:0'"),
        ({"heads": ["last"]}, "layers 0 to 1 and heads 0 to 3"),
        ({"data": ["missing.txt"]}, "missing.txt"),
    ],
)
def test_wrong_arguments_are_named_before_any_work(home, tmp_path, changes, message, monkeypatch):
    sparse_folder(home)
    monkeypatch.setattr(command, "load", lambda *a, **k: pytest.fail("a model was loaded"))
    with pytest.raises((ValueError, OSError), match=message):
        report_model(arguments(home, tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


def test_a_dense_model_has_nothing_to_report(home, tmp_path, capsys):
    words = ["report", "--model", str(home / "dense"), "--data", str(home / "text.txt")]
    assert cli.main([*words, "--output_dir", str(tmp_path / "out")]) == 2
    assert "is dense: every visible key carries weight" in capsys.readouterr().err
    words[2] = str(sparse_folder(home))
    words += ["--length", "100", "--windows", "1", "--no_figure", "--no_html"]
    assert cli.main([*words, "--output_dir", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "report.json").exists()
