"""Layers that are sparse in some of their heads: those compute the map, the others the dense model's softmax."""

import json

import families
import pytest
import torch
from training_cases import dense_folder
from transformers import AutoModelForCausalLM, DynamicCache

import hf_sparse_attention as hsa
from hf_sparse_attention import attention, heads, models, reference
from hf_sparse_attention.config import SparseAttentionConfig
from hf_sparse_attention.convert import ConvertArguments, convert_model
from hf_sparse_attention.loading import parse_heads
from hf_sparse_attention.train.measures import attention_statistics

# 4 heads on 2 key heads: a whole group, two groups in part, all but one, one alone.
CHOICES = [(0, 1), (1, 2), (0, 2, 3), (3,)]


@pytest.mark.parametrize("chosen", CHOICES)
def test_parts_come_back_to_their_places(chosen):
    tensor = torch.arange(4.0).reshape(1, 4, 1, 1)
    rest = heads.other_heads(chosen, 4)
    assert heads.take_heads(tensor, chosen).flatten().tolist() == list(chosen)
    merged = heads.merge_heads(heads.take_heads(tensor, chosen), heads.take_heads(tensor, rest), chosen)
    assert torch.equal(merged, tensor)


def test_whole_groups_go_on_sharing_their_key_head():
    key = torch.arange(3.0).reshape(1, 3, 1, 1)
    assert heads.take_key_heads(key, (2, 3, 4, 5), 2).flatten().tolist() == [1, 2]
    assert heads.take_key_heads(key, (0, 1, 3), 2).flatten().tolist() == [0, 0, 1]
    assert heads.take_key_heads(key, (1, 2), 2).flatten().tolist() == [0, 1]


@pytest.mark.parametrize("chosen", CHOICES)
@pytest.mark.parametrize("masked", ["none", "range", "matrix of each head"])
def test_each_head_computes_its_own_map(chosen, masked):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, 9, 8, generator=generator, dtype=torch.float64).requires_grad_()
    key, value = (torch.randn(2, 2, 9, 8, generator=generator, dtype=torch.float64).requires_grad_() for _ in "kv")
    mask = None
    if masked == "range":
        mask = torch.tensor([[max(0, i - 3), i + 1] for i in range(9)], dtype=torch.int32)[None, None]
    if masked == "matrix of each head":
        mask = torch.rand(2, 4, 9, 9, generator=generator) < 0.6
    out, weights = attention.sparse_attention_forward(
        torch.nn.Module(), query, key, value, mask, alpha=1.5, sparse_heads=chosen, output_attentions=True
    )
    visible, matrix = attention.split_mask(mask, 9)
    settings = {"causal": matrix is None, "visible": visible, "mask": matrix}
    alpha = torch.tensor([1.5 if head in chosen else 1.0 for head in range(4)], dtype=torch.float64)
    expected = reference.attention_weights(query, key, alpha=alpha, **settings)
    torch.testing.assert_close(weights, expected, atol=1e-12, rtol=0)
    expected = (expected @ value.repeat_interleave(2, 1)).transpose(1, 2)
    torch.testing.assert_close(out, expected, atol=1e-9, rtol=0)
    for found, wanted in zip(
        *(torch.autograd.grad(tensor.square().sum(), (query, key, value)) for tensor in (out, expected)), strict=True
    ):
        torch.testing.assert_close(found, wanted, atol=1e-8, rtol=0)


@pytest.mark.parametrize("name", list(hsa.MAPS))
def test_a_model_of_two_kinds_of_heads(name, tmp_path):
    """Layer by layer: the chosen heads' weights are the sparse model's, the others' the dense model's."""
    dense = families.dense_model("llama")
    ids = families.tokens(2, 17)
    split = families.stir(families.sparse_model(dense, name, heads={0: [1, 2], 1: [3]}))
    whole = families.sparse_model(dense, name)
    for parameter, of_split in zip(
        (p for n, p in whole.named_parameters() if "sparse_" in n and "layers.0" in n),
        (p for n, p in split.named_parameters() if "sparse_" in n and "layers.0" in n),
        strict=True,
    ):
        parameter.data[[1, 2]] = of_split.data
    with torch.no_grad():
        out = split(ids, output_attentions=True)
        first = [model(ids, output_attentions=True).attentions[0] for model in (whole, dense)]
    torch.testing.assert_close(out.attentions[0][:, [1, 2]], first[0][:, [1, 2]], atol=1e-6, rtol=0)
    torch.testing.assert_close(out.attentions[0][:, [0, 3]], first[1][:, [0, 3]], atol=1e-6, rtol=0)
    if name != "ssmax":
        assert (out.attentions[1][:, 3] == 0).sum() > (out.attentions[1][:, :3] == 0).sum() / 3

    split.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["sparse_attention"]["heads"] == {"0": [1, 2], "1": [3]}
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, out.logits, atol=1e-6, rtol=0)
        cache = DynamicCache(config=split.config)
        parts = [split(ids[:, :9], past_key_values=cache).logits]
        parts += [split(ids[:, i : i + 1], past_key_values=cache).logits for i in range(9, 17)]
    torch.testing.assert_close(torch.cat(parts, 1), out.logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", list(hsa.MAPS))
def test_every_parameter_of_the_chosen_heads_trains(name):
    model = families.stir(families.sparse_model(families.dense_model("qwen3"), name, heads=(0, 3))).train()
    model(families.tokens(2, 17), labels=families.tokens(2, 17)).loss.backward()
    names = models.new_parameter_names(model)
    assert all(model.get_parameter(key).shape[0] == 2 for key in names)
    assert all(model.get_parameter(key).grad.abs().sum() > 0 for key in names)


def test_at_alpha_one_the_model_is_dense():
    dense = families.dense_model("llama")
    ids = families.tokens(2, 17)
    with torch.no_grad():
        for forced in ("auto", "reference"):
            with hsa.implementation(forced):
                got = families.sparse_model(dense, "asentmax", alpha=1.0, heads=(1,))(ids).logits
            torch.testing.assert_close(got, dense(ids).logits, atol=1e-5, rtol=0)


def test_what_is_recorded_fits_every_head():
    model = families.sparse_model(families.dense_model("llama"), "entmax", heads=(1, 2))
    seen = []

    def look(module, query, key, tau, *, query_scale, **arguments):
        seen.append((reference.support_size(query, key, tau, **arguments), arguments["alpha"].tolist()))

    with torch.no_grad(), attention.record(look):
        model(families.tokens(1, 17))
    for support, alpha in seen:
        assert alpha == [1.0, 1.5, 1.5, 1.0]
        visible = torch.arange(1, 18)
        assert (support[0, [0, 3]] == visible).all()
        assert (support[0, [1, 2]] < visible).any()


def test_dense_heads_are_never_reported_sparse(tmp_path):
    """Softmax gives weight to every key it sees, also where a float rounds it to 0, as it does here."""
    model = families.sparse_model(families.dense_model("llama", initializer_range=0.99), "entmax", heads=(1,))
    ids = families.tokens(2, 40)
    with torch.no_grad():
        assert (model(ids, output_attentions=True).attentions[0].tril()[:, 0] == 0).sum() > 2 * 40 * 39 / 2
    seen = []

    def look(module, query, key, tau, *, query_scale, **arguments):
        occupied = reference.block_occupancy(query, key, tau, block=8, **arguments)
        seen.append((reference.support_size(query, key, tau, **arguments), occupied))

    with torch.no_grad(), attention.record(look):
        model(ids, use_cache=False)
    for support, occupied in seen:
        assert (support[:, [0, 2, 3]] == torch.arange(1, 41)).all() and (support[:, 1] < torch.arange(1, 41)).any()
        assert (occupied[:, [0, 2, 3]] == torch.ones(5, 5).tril().bool()).all()
    means, layers = attention_statistics(model, {"input_ids": ids})
    # Of the heads with the map: 1.5, and nobody learns it.
    assert "head_alpha" not in means and layers["alpha/0"] == 1.5


def test_processes_that_split_the_heads_are_refused(tmp_path):
    """Each would take the numbers of all heads for its own."""
    families.dense_model("llama").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="tensor parallelism.*heads"):
        AutoModelForCausalLM.from_pretrained(
            tmp_path, attn_implementation="entmax", sparse_attention={"heads": [0]}, tp_plan="auto"
        )


def test_choices_of_the_command_line(tmp_path):
    assert parse_heads("all") == "all"
    assert parse_heads("0, 2") == (0, 2)
    assert parse_heads("0:0,1 3:2") == {0: (0, 1), 3: (2,)}
    for wrong in ("0:x", "a:1", "0:1 0:2", "0:"):
        with pytest.raises(ValueError, match="heads"):
            parse_heads(wrong)
    dense = dense_folder(tmp_path / "dense")
    output = convert_model(ConvertArguments(model=str(dense), output=str(tmp_path / "sparse"), heads="1:0"))
    model = AutoModelForCausalLM.from_pretrained(output)
    assert [module.sparse_heads for _, module in models.attention_layers(model)] == [None, (0,)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": "some"}, "choose all"),
        ({"heads": [-1]}, "integers from 0"),
        ({"heads": [True]}, "integers from 0"),
        ({"heads": {"x": [1]}}, "layers by their numbers"),
        ({"heads": [0], "position": "nape"}, "position 'rope'"),
        ({"heads": [4]}, "heads 0 to 3"),
        ({"heads": {5: [0]}}, r"layers \[5\]"),
        ({"heads": {0: [0]}, "layers": [1]}, r"layers \[0\]"),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        hsa.sparse_config(
            families.dense_config("llama"), SparseAttentionConfig.from_dict({"map": "entmax", **options})
        )
    for empty in ([], {0: []}, 3):
        with pytest.raises((TypeError, ValueError), match=r"sparse_attention\.heads"):
            SparseAttentionConfig(heads=empty)
