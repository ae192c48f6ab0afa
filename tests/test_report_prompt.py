"""What the page keeps of a prompt's attention, against the dense weights; and its bytes, against what went in."""

import math
import zlib
from base64 import b64decode

import numpy as np
import pytest
import torch
from report_cases import TEXT, sparse_folder
from training_cases import STORIES, dense_folder
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from hf_sparse_attention.models import attention_layers
from hf_sparse_attention.report import encoding, look_at_prompt, measure_attention, prompt
from hf_sparse_attention.report.dense import load_dense_like


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prompt")
    dense_folder(folder / "dense", initializer_range=0.3, max_position_embeddings=512)
    return folder


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder).double().eval(), AutoTokenizer.from_pretrained(folder)


def dense_weights(model, tokenizer, tokens):
    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"][:, :tokens]
    with torch.no_grad():
        return [layer[0].numpy() for layer in model(ids, use_cache=False, output_attentions=True).attentions]


@pytest.mark.parametrize(
    "options",
    [{"map": "asentmax"}, {"map": "sparsemax"}, {"map": "adaptive_entmax"}, {"map": "asentmax", "position": "nape"},
     {"map": "ssmax"}],
    ids=lambda options: "-".join(options.values()),
)  # fmt: skip
@pytest.mark.parametrize("tokens", [2, 40, 301])
def test_every_weight_is_that_of_the_model(home, options, tokens):
    model, tokenizer = load(sparse_folder(home, "-".join(options.values()), **options))
    model.train()
    looked = look_at_prompt(model, tokenizer, TEXT, tokens=tokens)
    assert model.training and len(looked.tokens) == tokens and looked.total == len(tokenizer(TEXT)["input_ids"])
    assert looked.queries.tolist() == list(range(tokens)) and looked.block == -(-tokens // prompt.BLOCKS)
    model.eval()
    seen = np.tril(np.ones((tokens, tokens), dtype=bool))
    for layer, weights in zip(looked.layers, dense_weights(model, tokenizer, tokens), strict=True):
        assert not layer.rest.any()
        for head, wanted in enumerate(weights):
            found, visible = looked.matrix(layer.layer, head)
            assert np.array_equal(visible, seen)
            if options["map"] == "ssmax":
                # A softmax has no zeros, whatever a float makes of its smallest weights.
                assert layer.support[head].tolist() == list(range(1, tokens + 1))
                found = np.nan_to_num(found, nan=0)
            else:
                assert ((found > 0) == (wanted > 0)).all() and (tokens == 2 or (found[seen] == 0).any())
                assert layer.support[head].tolist() == (wanted > 0).sum(-1).tolist()
            np.testing.assert_allclose(found, wanted, atol=2e-7)
            padded = np.zeros((len(layer.largest[head]) * looked.block,) * 2)
            padded[:tokens, :tokens] = wanted
            side = len(layer.largest[head])
            blocks = padded.reshape(side, looked.block, side, looked.block).max((1, 3))
            np.testing.assert_allclose(layer.largest[head], blocks, atol=2e-7)
            if options["map"] != "ssmax":
                assert ((layer.largest[head] > 0) == (blocks > 0)).all()
            else:
                assert (layer.largest[head] > 0).sum() == side * (side + 1) / 2


def test_a_window_hides_keys(tmp_path):
    torch.manual_seed(0)
    sizes = {"vocab_size": 512, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.3}
    MistralForCausalLM(MistralConfig(**sizes, **heads, sliding_window=17)).save_pretrained(tmp_path / "dense")
    AutoTokenizer.from_pretrained(STORIES).save_pretrained(tmp_path / "dense")
    model, tokenizer = load(sparse_folder(tmp_path, layers=[1]))
    looked = look_at_prompt(model, tokenizer, TEXT, tokens=50)
    # A layer that stayed dense is not among those one can look at.
    assert [(layer.layer, layer.window) for layer in looked.layers] == [(1, 17)]
    weights, visible = looked.matrix(1, 2)
    distance = np.arange(50)[:, None] - np.arange(50)
    assert np.array_equal(visible, (distance >= 0) & (distance < 17))
    np.testing.assert_allclose(weights, dense_weights(model, tokenizer, 50)[1][2], atol=2e-7)
    with pytest.raises(ValueError, match="no sparse head 0 of layer 0"):
        looked.matrix(0, 0)


def test_a_budget_leaves_out_queries_and_says_which(home):
    model, tokenizer = load(sparse_folder(home))
    whole = look_at_prompt(model, tokenizer, TEXT, tokens=200)
    size = sum(len(layer.keys) for layer in whole.layers)
    some = look_at_prompt(model, tokenizer, TEXT, tokens=200, budget=size // 3)
    assert sum(len(layer.keys) for layer in some.layers) <= size // 3
    assert some.queries.tolist() == list(range(3, 200, 4))
    one = look_at_prompt(model, tokenizer, TEXT, tokens=200, budget=1)
    assert one.queries.tolist() == [199]
    for found in (some, one):
        for all_layer, layer in zip(whole.layers, found.layers, strict=True):
            # The coarse picture is of all queries, however few are kept.
            assert np.array_equal(all_layer.largest, layer.largest)
            for head in range(4):
                expected = whole.matrix(all_layer.layer, head)[0][found.queries]
                assert np.array_equal(found.matrix(layer.layer, head)[0], expected)


def test_of_the_heaviest_the_rest_is_known(home):
    model, tokenizer = load(sparse_folder(home))
    whole = look_at_prompt(model, tokenizer, TEXT, tokens=90)
    some = look_at_prompt(model, tokenizer, TEXT, tokens=90, heaviest=3)
    assert max(layer.support.max() for layer in whole.layers) > 3
    for all_layer, layer in zip(whole.layers, some.layers, strict=True):
        assert np.array_equal(all_layer.support, layer.support)
        assert np.array_equal(layer.kept, np.minimum(layer.support, 3))
        for head in range(4):
            every, kept = whole.matrix(layer.layer, head)[0], some.matrix(layer.layer, head)[0]
            cut = layer.support[head] > 3
            assert np.isnan(kept[cut]).any() and not np.isnan(kept[~cut]).any()
            largest = np.sort(every, axis=1)[:, -3:].sum(1)
            np.testing.assert_allclose(np.nan_to_num(kept).sum(1), largest, rtol=1e-6)
            np.testing.assert_allclose(layer.rest[head], every.sum(1) - largest, atol=1e-6)
            assert (layer.rest[head][~cut] == 0).all()


def test_the_dense_model_beside_it_is_the_dense_model(home):
    model, tokenizer = load(sparse_folder(home))
    dense = load_dense_like(str(home / "dense"), model, tokenizer, prompt=TEXT).double()
    looked = look_at_prompt(dense, tokenizer, TEXT, tokens=60)
    # Transformers' own softmax is in float32 whatever the model.
    plain = LlamaForCausalLM.from_pretrained(home / "dense", attn_implementation="eager").double()
    for layer, weights in zip(looked.layers, dense_weights(plain, tokenizer, 60), strict=True):
        for head in range(4):
            np.testing.assert_allclose(np.nan_to_num(looked.matrix(layer.layer, head)[0]), weights[head], atol=2e-6)


def test_a_dense_model_that_cannot_be_compared(home, tmp_path):
    model, tokenizer = load(sparse_folder(home))
    with pytest.raises(ValueError, match="which is sparse"):
        load_dense_like(str(home / "sparse"), model, tokenizer, prompt=TEXT)
    dense_folder(tmp_path / "deep", num_hidden_layers=3)
    with pytest.raises(ValueError, match="num_hidden_layers 3, the sparse model 2"):
        load_dense_like(str(tmp_path / "deep"), model, tokenizer, prompt=TEXT)
    with pytest.raises(ValueError, match="has no sparse attention"):
        look_at_prompt(LlamaForCausalLM.from_pretrained(home / "dense"), tokenizer, TEXT)
    with pytest.raises(ValueError, match="has 1 tokens"):
        look_at_prompt(model, tokenizer, "")


def test_what_is_no_number_is_not_sparse(home):
    """No weight of a broken model is above 0: it would look like the sparsest of all."""
    model, tokenizer = load(sparse_folder(home))
    with torch.no_grad():
        attention_layers(model)[1][1].k_proj.weight[3, 5] = math.nan
    with pytest.raises(ValueError, match="layer 1 has queries or keys that are not finite"):
        look_at_prompt(model, tokenizer, TEXT)
    with pytest.raises(ValueError, match="layer 1 has queries or keys that are not finite"):
        measure_attention(model, torch.tensor([tokenizer(TEXT)["input_ids"][:20]]))


def test_tokens_keep_their_spaces():
    tokenizer = AutoTokenizer.from_pretrained(STORIES)
    text = "Once upon a time, Tom saw a cat 🐈."
    ids = tokenizer(text)["input_ids"]
    texts = prompt.token_texts(tokenizer, ids)
    assert (
        "".join(texts[1 : texts.index(" cat") + 1] if " cat" in texts else texts[1:]).lstrip().startswith("Once upon")
    )
    # Parts of a character have names, not replacement characters.
    assert not any("\ufffd" in piece or not piece for piece in texts)


def test_only_an_exact_zero_is_coded_as_zero():
    weights = np.array([0, 1e-45, 1e-30, 1e-6, 1.6e-5, 2e-5, 0.1, 0.5, 1, 1.0000001], dtype=np.float32)
    codes = encoding.weight_codes(weights)
    assert codes.tolist()[:4] == [0, 1, 1, 1] and codes.tolist()[-2:] == [255, 255]
    many = np.exp(np.linspace(np.log(encoding.SMALLEST), 0, 10_001))
    shown = encoding.weights_of_codes(encoding.weight_codes(many))
    assert np.abs(shown / many - 1).max() <= encoding.PRECISION + 1e-12
    assert encoding.PRECISION < 0.0220 and 1.6e-5 < encoding.SMALLEST < 1.7e-5


def decode_varints(content, amount):
    numbers, at = [], 0
    for _ in range(amount):
        value = shift = 0
        while True:
            byte = content[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                break
        numbers.append(value)
    return np.array(numbers), at


def test_varints():
    numbers = [0, 1, 127, 128, 16383, 16384, 2**21 - 1, 2**21, 2**28 - 1, 5]
    content = encoding.varints(np.array(numbers))
    assert len(content) == 1 + 1 + 1 + 2 + 2 + 3 + 3 + 4 + 4 + 1
    found, at = decode_varints(content, len(numbers))
    assert found.tolist() == numbers and at == len(content)
    assert encoding.varints(np.array([], dtype=int)) == b""
    for wrong in ([2**28], [-1]):
        with pytest.raises(ValueError, match="28 bits"):
            encoding.varints(np.array(wrong))


@pytest.mark.parametrize("limits", [{}, {"heaviest": 5}, {"budget": 3000}], ids=str)
def test_the_stream_holds_what_went_in(home, limits):
    model, tokenizer = load(sparse_folder(home))
    looked = look_at_prompt(model, tokenizer, TEXT, tokens=200, **limits)
    content = encoding.encoded(looked)
    assert content["queries"] == looked.queries.tolist()
    for layer, part in zip(looked.layers, content["layers"], strict=True):
        stream = zlib.decompress(b64decode(part["stream"]))
        rows = part["heads"] * len(looked.queries)
        numbers, at = decode_varints(stream, 2 * rows + part["entries"])
        assert np.array_equal(numbers[:rows], layer.support.ravel())
        assert np.array_equal(numbers[rows : 2 * rows], layer.kept.ravel())
        codes = np.frombuffer(stream, np.uint8, offset=at)
        assert np.array_equal(codes[:rows], encoding.weight_codes(layer.rest.ravel()))
        steps, weights = numbers[2 * rows :], codes[rows : rows + part["entries"]]
        entry = 0
        for head in range(part["heads"]):
            expected, _ = looked.matrix(layer.layer, head)
            for place, query in enumerate(looked.queries):
                key, found = query, {}
                for _ in range(layer.kept[head, place]):
                    key -= steps[entry]
                    found[key] = weights[entry]
                    entry += 1
                wanted = {key: weight for key, weight in enumerate(expected[place]) if weight > 0}
                assert found == {key: encoding.weight_codes(np.array(weight)) for key, weight in wanted.items()}
        assert entry == part["entries"]
        side = layer.largest.shape[-1]
        blocks = codes[rows + part["entries"] :].reshape(part["heads"], -1)
        assert blocks.shape[1] == side * (side + 1) / 2
        below, left = np.tril_indices(side)
        largest = layer.largest[:, below, left]
        assert ((blocks > 0) == (largest > 0)).all()
        upper = 2.0 ** ((16.0 * blocks - 255) / 16)
        inside = largest > 2 * encoding.SMALLEST
        assert (largest[inside] <= upper[inside] * 1.03).all() and (largest[inside] > upper[inside] / 2.1).all()
