"""Caches with bounds generate what every other cache does, keep true bounds, and wrong caches are refused."""

import copy

import families
import pytest
import torch
from transformers import DynamicCache, EncoderDecoderCache, StaticCache
from transformers.cache_utils import QuantizedLayer

import hf_sparse_attention as hsa
from hf_sparse_attention.attention import implementation
from hf_sparse_attention.cache import PAGE, BoundedDynamicLayer, BoundedStaticLayer, check_cache, page_bounds

KINDS = ("dynamic", "static")


def new_cache(kind, model, room=256):
    if kind == "dynamic":
        return hsa.BoundedDynamicCache(model.config)
    return hsa.BoundedStaticCache(model.config, max_cache_len=room)


@pytest.fixture(scope="module")
def model():
    dense = families.dense_model("llama", max_position_embeddings=512)
    return families.stir(families.sparse_model(dense, "asentmax"))


@pytest.fixture(scope="module")
def prompt():
    """100 tokens for two, of which the first has 30 of padding on its left."""
    ids, mask = families.tokens(2, 100), torch.ones(2, 100, dtype=torch.long)
    ids[0, :30] = mask[0, :30] = 0
    return {"input_ids": ids, "attention_mask": mask}


GREEDY = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, "disable_compile": True}


def check_bounds(cache, length):
    """The bounds of the whole pages are those of the keys."""
    for layer in cache.layers:
        if not isinstance(layer, (BoundedDynamicLayer, BoundedStaticLayer)):
            continue
        lower, upper, codes, ball, _ = layer.bounds()
        assert int(layer.get_seq_length()) == length
        whole = length // PAGE
        pages = layer.keys[:, :, : whole * PAGE].unflatten(2, (whole, PAGE))
        assert torch.equal(lower[:, :, :whole], pages.amin(3)) and torch.equal(upper[:, :, :whole], pages.amax(3))
        check_balls(pages, codes[:, :, :whole], ball[:, :, :whole])


def check_balls(pages, codes, ball):
    """Every key of a page lies in its ball, which is no larger than one around the page's mean, but for rounding."""
    unit, radius, size = ball.double().unbind(-1)
    assert (unit.log2() == unit.log2().round()).all()
    middle = codes.double() * unit[..., None]
    farthest = (pages.double() - middle.unsqueeze(-2)).norm(dim=-1).amax(-1)
    assert (radius >= farthest).all() and (radius <= farthest * 1.001).all()
    assert (size >= middle.norm(dim=-1)).all() and (size <= middle.norm(dim=-1) * 1.001).all()
    mean = pages.double().mean(-2, keepdim=True)
    coarse = unit * (pages.shape[-1] / 4) ** 0.5
    assert (radius <= ((pages.double() - mean).norm(dim=-1).amax(-1) + coarse) * 1.001).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "how", [{}, {"num_beams": 3}, {"prefill_chunk_size": 33}, {"num_return_sequences": 2, "num_beams": 2}], ids=str
)
def test_generation_equals_that_of_a_plain_cache(kind, how, model, prompt):
    expected = model.generate(**prompt, **GREEDY, **how)
    cache = new_cache(kind, model)
    assert torch.equal(model.generate(**prompt, **GREEDY, **how, past_key_values=cache), expected)
    check_bounds(cache, 139)


@pytest.mark.parametrize("cache", [None, "dynamic"])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_assisted_generation_equals_greedy(family, cache, model):
    if family != "llama":
        model = families.stir(families.sparse_model(families.dense_model(family, max_position_embeddings=512)))
    assistant = families.stir(families.sparse_model(families.dense_model(family, max_position_embeddings=512)), seed=2)
    ids = families.tokens(1, 70)
    expected = model.generate(ids, **GREEDY)
    how = {} if cache is None else {"past_key_values": new_cache(cache, model)}
    assert torch.equal(model.generate(ids, assistant_model=assistant, **GREEDY, **how), expected)
    found = model.generate(ids, prompt_lookup_num_tokens=5, **GREEDY, **({} if cache is None else {
        "past_key_values": new_cache(cache, model)}))  # fmt: skip
    assert torch.equal(found, expected)


@pytest.mark.parametrize("family", ["mistral", "gemma3_text", "gpt_neox"])
@pytest.mark.parametrize("kind", KINDS)
def test_other_families_and_windows(family, kind):
    model = families.stir(families.sparse_model(families.dense_model(family, max_position_embeddings=512)))
    ids = families.tokens(2, 70)
    cache = new_cache(kind, model)
    how = {**GREEDY, "max_new_tokens": 8}
    assert torch.equal(model.generate(ids, **how, past_key_values=cache), model.generate(ids, **how))
    # A sliding layer's keys move from page to page, and are few.
    for index, layer in enumerate(cache.layers):
        bounded = page_bounds(cache, index) is not None
        assert bounded == (not layer.is_sliding) and (not bounded or layer.bounds() is not None)


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_and_steps_equal_the_full_pass(kind, model, prompt):
    """Prefill in chunks, then steps of several tokens: the same logits, whose factor knows how many keys each sees."""
    ids, mask = prompt["input_ids"], prompt["attention_mask"]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        expected = model(**prompt, position_ids=positions, use_cache=False).logits
        cache, found, start = new_cache(kind, model), [], 0
        for piece in (1, 50, 30, 5, 1, 13):
            part = slice(start, start + piece)
            start += piece
            found.append(
                model(ids[:, part], attention_mask=mask[:, :start], position_ids=positions[:, part],
                      past_key_values=cache).logits
            )  # fmt: skip
    torch.testing.assert_close(torch.cat(found, 1)[mask > 0], expected[mask > 0], atol=1e-4, rtol=1e-4)
    check_bounds(cache, 100)


def test_cropping_and_going_on(model):
    ids, other = families.tokens(1, 150), families.tokens(1, 150, seed=5)
    cache = new_cache("dynamic", model)
    with torch.no_grad():
        model(ids[:, :140], past_key_values=cache)
        for keep in (130, 127, 60):
            cache.crop(keep - cache.get_seq_length())
            found = model(other[:, keep : keep + 10], past_key_values=cache).logits
            full = torch.cat([ids[:, :keep], other[:, keep : keep + 10]], 1)
            torch.testing.assert_close(found, model(full, use_cache=False).logits[:, keep:], atol=1e-4, rtol=1e-4)
            check_bounds(cache, keep + 10)
            ids = full


def test_selecting_repeating_and_copying(model):
    ids = families.tokens(3, 130)
    cache = new_cache("dynamic", model)
    with torch.no_grad():
        model(ids[:, :129], past_key_values=cache)
        kept = copy.deepcopy(cache)
        cache.batch_select_indices(torch.tensor([2, 0]))
        check_bounds(cache, 129)
        cache.batch_repeat_interleave(2)
        check_bounds(cache, 129)
        cache.reorder_cache(torch.tensor([3, 3, 0, 1]))
        check_bounds(cache, 129)
        rows = [0, 0, 2, 2]
        found = model(ids[rows, 129:], past_key_values=cache).logits
        torch.testing.assert_close(found, model(ids[rows], use_cache=False).logits[:, 129:], atol=1e-4, rtol=1e-4)
        # The copy shares nothing with what was changed since.
        found = model(ids[:, 129:], past_key_values=kept).logits
        torch.testing.assert_close(found, model(ids, use_cache=False).logits[:, 129:], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", [*KINDS, "plain"])
@pytest.mark.parametrize("tokens", [0, 20])
def test_a_call_that_was_interrupted_leaves_no_cache_to_go_on_from(kind, tokens, model, monkeypatch):
    """The layers before the fault have one call more than those after it; without a mask nothing else would tell."""
    cache = DynamicCache() if kind == "plain" else new_cache(kind, model)
    ids = families.tokens(1, 40)
    with torch.no_grad():
        if tokens:
            model(ids[:, :tokens], past_key_values=cache)
        with monkeypatch.context() as patched:
            patched.setattr(model.model.layers[0].mlp, "forward", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                model(ids[:, tokens:], past_key_values=cache)
        with pytest.raises(ValueError, match=f"holds 40 tokens in layer 0 and {tokens} in layer 1: a call was inter"):
            model(ids[:, tokens:], past_key_values=cache)
        # Older releases of Transformers keep the lengths of their own layers.
        if kind == "plain":
            cache = DynamicCache()
        else:
            cache.reset()
        found = model(ids, past_key_values=cache).logits
        torch.testing.assert_close(found, model(ids, past_key_values=DynamicCache()).logits)


@pytest.mark.parametrize("kept", [(4, 10), (0, 6), (0, 0)])
def test_keys_put_in_their_place_are_taken(kept, model):
    """As eviction writes a cache's layers: what was there before is neither shown again nor bounded."""
    ids = families.tokens(1, 150)
    caches = [new_cache("dynamic", model), DynamicCache(config=model.config)]
    outputs = []
    for cache in caches:
        with torch.no_grad():
            model(ids[:, :140], past_key_values=cache)
            for layer in cache.layers:
                first, second = kept
                layer.keys = layer.keys[:, :, second:]
                if first:
                    layer.keys = torch.cat([layer.keys[:, :, :first], layer.keys], 2)
                # The values alone too.
                layer.values = layer.values[:, :, second - first :].flip(2)
            outputs.append(model(ids[:, 140:], past_key_values=cache).logits)
    assert torch.equal(*outputs)
    check_bounds(caches[0], 150 - (second - first))


@pytest.mark.parametrize("kind", KINDS)
def test_reset_forgets(kind, model):
    cache = new_cache(kind, model)
    ids = families.tokens(1, 90)
    with torch.no_grad():
        model(families.tokens(1, 200, seed=3), past_key_values=cache)
        cache.reset()
        found = model(ids, past_key_values=cache).logits
        torch.testing.assert_close(found, model(ids, use_cache=False).logits, atol=1e-4, rtol=1e-4)
    check_bounds(cache, 90)


class _Codes(QuantizedLayer):
    """As a quantised layer of Transformers keeps its keys, in codes that lose nothing."""

    def _quantize(self, tensor, axis):
        return tensor.clone(), axis

    def _dequantize(self, codes):
        return codes[0]


def test_generation_with_a_quantised_cache(model, prompt):
    """Its layers keep the newest keys apart and give all of them anew every step; they have no bounds."""
    expected = model.generate(**prompt, **GREEDY)
    cache = DynamicCache(config=model.config)
    cache.layers = [_Codes(axis_key=0, axis_value=0, residual_length=16) for _ in cache.layers]
    assert torch.equal(model.generate(**prompt, **GREEDY, past_key_values=cache), expected)
    assert cache.layers[0]._quantized_keys[0].shape[2] > 100 and page_bounds(cache, 0) is None


def test_memory_of_a_long_cache():
    layer = BoundedDynamicLayer()
    keys = torch.zeros(1, 1, 131072, 8, dtype=torch.float16)
    layer.update(keys, keys)
    token = keys[:, :, :1]
    for _ in range(100):
        layer.update(token, token)
    held = sum(tensor.untyped_storage().nbytes() for tensor in (layer.keys, layer.values, *layer.bounds()))
    plain = 2 * layer.keys.numel() * layer.keys.element_size()
    assert held <= 1.07 * plain


def test_steps_do_not_copy_the_cache():
    layer, token = BoundedDynamicLayer(), torch.randn(1, 2, 1, 8)
    layer.update(*[torch.randn(1, 2, 100, 8)] * 2)
    addresses = {layer.update(token, token)[0].data_ptr() for _ in range(200)}
    assert len(addresses) == 1


def test_keys_that_want_a_gradient_are_refused(model):
    with pytest.raises(ValueError, match="keeps no gradient"):
        model(families.tokens(1, 5), past_key_values=new_cache("dynamic", model))


def test_offloading_is_refused(model):
    cache = new_cache("dynamic", model)
    with pytest.raises(ValueError, match="offloading=True"):
        cache.layers[0].offload()


def cache_of(**changes):
    """A cache that a model of other sizes has filled."""
    other = families.sparse_model(families.dense_model("llama", **changes))
    cache = DynamicCache(config=other.config)
    with torch.no_grad():
        other(families.tokens(2, 5), past_key_values=cache)
    return cache


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"num_hidden_layers": 3}, "has 3 layers, the model 2"),
        ({"num_hidden_layers": 1}, "has 1 layers, the model 2"),
        ({"num_key_value_heads": 4}, r"shape \(2, 4, 5, 8\)"),
        ({"head_dim": 16}, r"shape \(2, 2, 5, 16\)"),
    ],
)
def test_a_cache_of_another_model_is_refused_untouched(changes, reason, model):
    cache = cache_of(**changes)
    before = [layer.keys for layer in cache.layers]
    with pytest.raises(ValueError, match=reason), torch.no_grad():
        model(families.tokens(2, 1), past_key_values=cache)
    assert all(layer.keys is keys for layer, keys in zip(cache.layers, before, strict=True))


@pytest.fixture(params=["dynamic", "static", "plain", "plain static"])
def filled(request, model):
    """A function that makes a cache which a model has filled with 5 tokens for two."""

    def fill(other=model):
        plain = {
            "plain": lambda: DynamicCache(config=other.config),
            "plain static": lambda: StaticCache(config=other.config, max_cache_len=32),
        }
        cache = plain[request.param]() if request.param in plain else new_cache(request.param, other, 32)
        with torch.no_grad():
            other(families.tokens(2, 5), past_key_values=cache)
        return cache

    return fill


def refuses(model, cache, kind, reason, ids=None, **arguments):
    """The model names the fault, and no layer has another key or another length than before."""
    kept = [None if layer.keys.device.type == "meta" else layer.keys.clone() for layer in cache.layers]
    with pytest.raises(kind, match=reason), torch.no_grad():
        model(families.tokens(2, 1) if ids is None else ids, past_key_values=cache, **arguments)
    for layer, keys in zip(cache.layers, kept, strict=True):
        assert int(layer.get_seq_length()) == 5 and (keys is None or torch.equal(layer.keys, keys))


@pytest.mark.parametrize("covered", [4, 5, 9])
def test_a_mask_of_another_length_than_the_cache_is_refused(covered, filled, model):
    """Shorter ones would hide the newest keys; longer ones speak of tokens that the cache does not hold."""
    reason = f"covers {covered} tokens, but the cache holds 5 and the input 1"
    refuses(model, filled(), ValueError, reason, attention_mask=torch.ones(2, covered, dtype=torch.long))


@pytest.mark.parametrize("filled", ["static", "plain static"], indirect=True)
def test_a_mask_may_describe_the_whole_room_of_a_static_cache(filled, model):
    cache = filled()
    with torch.no_grad():
        expected = model(families.tokens(2, 1), past_key_values=filled()).logits
        found = model(
            families.tokens(2, 1), past_key_values=cache, attention_mask=torch.ones(2, 32, dtype=torch.long)
        ).logits
    assert torch.equal(found, expected)
    refuses(model, filled(), ValueError, "covers 33 tokens, but the cache has room for 32",
            attention_mask=torch.ones(2, 33, dtype=torch.long))  # fmt: skip


@pytest.mark.parametrize("filled", ["static", "plain static"], indirect=True)
def test_more_tokens_than_a_static_cache_has_room_for_are_refused(filled, model):
    said = "the input has 28 tokens behind the 5 that past_key_values holds, but the cache has room for 32: .*least 33"
    refuses(model, filled(), ValueError, said, ids=families.tokens(2, 28))
    cache = filled()
    with torch.no_grad():
        # To the last place.
        model(families.tokens(2, 27), past_key_values=cache)
    with pytest.raises(ValueError, match="1 tokens behind the 32"), torch.no_grad():
        model(families.tokens(2, 1), past_key_values=cache)
    assert int(cache.get_seq_length()) == 32
    new = type(cache)(config=model.config, max_cache_len=32)
    long = families.tokens(2, 33)
    said = "the input has 33 tokens, but the cache has room for 32: make one with max_cache_len of at least 33"
    for inputs in ({"input_ids": long}, {"inputs_embeds": model.get_input_embeddings()(long)}):
        with pytest.raises(ValueError, match=said), torch.no_grad():
            model(**inputs, past_key_values=new)
    with pytest.raises(ValueError, match=said):
        model.generate(long, past_key_values=new, **GREEDY)
    assert not any(layer.is_initialized for layer in new.layers)


def test_a_length_on_a_device_is_not_waited_for(model):
    """No one can read a number from the meta device: what is refused is what fits into no cache of this size."""
    cache = new_cache("static", model, 32)
    with torch.no_grad():
        model(families.tokens(2, 5), past_key_values=cache)
    for layer in cache.layers:
        layer.cumulative_length = layer.cumulative_length.to("meta")
    check_cache(cache, model.config, families.tokens(2, 32), None, model)
    with pytest.raises(ValueError, match="the input has 33 tokens, but the cache has room for 32"):
        check_cache(cache, model.config, families.tokens(2, 33), None, model)


def test_layers_that_slide_take_more_tokens_than_their_window():
    dense = families.dense_model("mistral", sliding_window=8)
    model = families.stir(families.sparse_model(dense, "asentmax"))
    cache, ids = new_cache("static", model, 16), families.tokens(2, 24)
    assert all(cache.is_sliding)
    with torch.no_grad():
        found = model(ids, past_key_values=cache).logits
        expected = model(ids, use_cache=False).logits
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("index, names", [(0, ["keys", "values"]), (0, ["values"]), (1, ["keys", "values"])])
def test_mixed_devices_are_refused(index, names, filled, model):
    cache = filled()
    for name in names:
        setattr(cache.layers[index], name, getattr(cache.layers[index], name).to("meta"))
    refuses(model, cache, ValueError, f"meta in layer {index}, the input on cpu")


def test_a_cache_filled_by_another_model_is_refused(filled, model):
    refuses(model, filled(), ValueError, "another batch", ids=families.tokens(3, 1))
    other = families.sparse_model(families.dense_model("llama", num_key_value_heads=4))
    refuses(model, filled(other), ValueError, "filled by another model")
    half = families.sparse_model(families.dense_model("llama")).to(torch.bfloat16)
    refuses(model, filled(half), ValueError, "keys in torch.bfloat16 in layer 0, the model computes in torch.float32")
    for one in (other, half):
        cache = filled()
        cache.layers[1] = filled(one).layers[1]
        refuses(model, cache, ValueError, "in layer 1: they are of different models")


# Transformers' static layers take keys and values of one dtype only.
@pytest.mark.parametrize("filled", ["dynamic", "plain"], indirect=True)
def test_autocast_fills_a_cache_in_its_own_dtype(filled, model):
    cache = filled()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(families.tokens(2, 1), past_key_values=cache)
    assert int(cache.get_seq_length()) == 6


def test_what_is_no_decoders_cache_is_refused(model):
    cache = cache_of()
    with pytest.raises(TypeError, match="EncoderDecoderCache"), torch.no_grad():
        model(families.tokens(2, 1), past_key_values=EncoderDecoderCache(cache, DynamicCache()))
    with pytest.raises(TypeError, match="a tuple"), torch.no_grad():
        model(families.tokens(2, 1), past_key_values=((torch.zeros(2, 2, 5, 8),) * 2,) * 2)
    # A layer of a model with linear attention keeps a state.
    cache.layers[1] = type("LinearAttentionLayer", (), {"is_initialized": True})()
    with pytest.raises(TypeError, match="layer 1 of past_key_values is a LinearAttentionLayer, which keeps no keys"):
        model(families.tokens(2, 1), past_key_values=cache)
    assert cache.layers[0].get_seq_length() == 5


def test_a_static_cache_does_not_recompile_as_it_fills(model):
    """One graph for all steps: the length is a tensor, also for the bounds."""
    cache, ids = new_cache("static", model), families.tokens(1, 130)
    expected = model(ids, use_cache=False).logits
    step = torch.compile(model, backend="eager", dynamic=False)
    with torch.no_grad():
        model(ids[:, :60], past_key_values=cache)
        for index in range(60, 130):
            mask = torch.tensor([[0, index + 1]], dtype=torch.int32)[None, None]
            arguments = {"attention_mask": mask, "position_ids": torch.tensor([[index]]), "past_key_values": cache}
            with torch._dynamo.config.patch(error_on_recompile=index > 61), implementation("reference"):
                found = step(ids[:, index : index + 1], **arguments).logits
            if index > 126:
                torch.testing.assert_close(found[:, 0], expected[:, index], atol=1e-4, rtol=1e-4)
    check_bounds(cache, 130)


@pytest.mark.parametrize("covered", [5, 7, 33])
def test_a_matrix_for_other_keys_than_the_cache_holds_is_refused(covered, filled, model):
    """Before the first layer is written, whatever its dtype says."""
    matrix = torch.ones(2, 1, 1, covered, dtype=torch.bool)
    for mask in (matrix, torch.zeros(matrix.shape), matrix.to(torch.uint8)):
        refuses(model, filled(), ValueError, f"attention_mask covers {covered} tokens", attention_mask=mask)


@pytest.mark.parametrize("filled", ["static", "plain static"], indirect=True)
def test_a_matrix_without_the_places_a_static_cache_has_left_is_refused(filled, model):
    """Before the first layer is written, which could not be gone on with."""
    matrix = torch.ones(2, 1, 1, 6, dtype=torch.bool)
    refuses(model, filled(), ValueError, "a matrix must have a column for each", attention_mask=matrix)
    whole = torch.cat([matrix, torch.zeros(2, 1, 1, 26, dtype=torch.bool)], -1)
    with torch.no_grad():
        expected = model(families.tokens(2, 1), past_key_values=filled()).logits
        found = model(families.tokens(2, 1), past_key_values=filled(), attention_mask=whole).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
