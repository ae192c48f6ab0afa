"""The mask function: whatever Transformers asks for, the range or matrix it returns shows the same keys as SDPA's."""

import families
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionMaskInterface, DynamicCache, StaticCache
from transformers.masking_utils import (
    and_masks,
    causal_mask_function,
    create_causal_mask,
    create_sliding_window_causal_mask,
    sdpa_mask,
    sliding_window_causal_mask_function,
)

import hf_sparse_attention as hsa
from hf_sparse_attention.attention import is_range, register, sparse_attention_mask, split_mask, visible_entries
from hf_sparse_attention.models.layers import document_starts, visible_lengths, within_documents
from hf_sparse_attention.visible import Padding, as_bool, padding_of, with_new_tokens


def matrix(mask, queries, keys, batch):
    """What a mask of ours shows, (batch, queries, keys)."""
    key = torch.arange(keys)
    if mask is None:
        return (key <= torch.arange(queries)[:, None]).expand(batch, queries, keys)
    if is_range(mask):
        start, end = mask[:, 0].unbind(-1)
        return ((key >= start[..., None]) & (key < end[..., None])).expand(batch, queries, keys)
    return mask[:, 0].expand(batch, queries, keys)


CASES = {
    "plain": {},
    "left padding": {"padding": [[0, 0, 1, 1, 1, 1, 1], [1] * 7]},
    "right padding": {"padding": [[1, 1, 1, 1, 0, 0, 0], [1] * 7]},
    "both sides": {"padding": [[0, 1, 1, 1, 0, 0, 0], [1] * 7]},
    "a hole": {"padding": [[1, 1, 0, 1, 1, 1, 1], [1] * 7]},
    "nothing visible": {"padding": [[0] * 7, [1] * 7]},
    "all ones": {"padding": [[1] * 7, [1] * 7]},
    "one query": {"q_length": 1, "q_offset": 6},
    "one query, padded": {"q_length": 1, "q_offset": 6, "padding": [[0, 0, 1, 1, 1, 1, 1], [1] * 7]},
    "chunk after a cache": {"q_length": 3, "q_offset": 4},
    "chunk after a padded cache": {"q_length": 3, "q_offset": 4, "padding": [[0, 1, 1, 1, 1, 1, 1], [1] * 7]},
    "static cache, prefill": {"q_length": 4, "q_offset": 0, "padding": [[1] * 4, [1] * 4]},
    "static cache, padded prefill": {"q_length": 4, "q_offset": 0, "padding": [[0, 1, 1, 1], [1] * 4]},
    "static cache, a step": {"q_length": 1, "q_offset": torch.tensor(4), "padding": [[1] * 5, [0] + [1] * 4]},
    "window": {"window": 3},
    "window, padded": {"window": 3, "padding": [[0, 0, 0, 1, 1, 1, 1], [1] * 7]},
    "window longer than the text": {"window": 50},
    "sliding cache": {"window": 4, "q_length": 2, "q_offset": 9, "kv_length": 5, "kv_offset": 6},
    "sliding cache, padded": {
        "window": 4, "q_length": 2, "q_offset": 9, "kv_length": 5, "kv_offset": 6,
        "padding": [[0] * 8 + [1] * 3, [1] * 11],
    },
    "custom overlay": {"overlay": lambda batch, head, q, k: k != 2},
}  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_same_keys_as_sdpa(case):
    settings = dict(CASES[case])
    q_length, kv_length = settings.pop("q_length", 7), settings.pop("kv_length", 7)
    padding = settings.pop("padding", None)
    window, overlay = settings.pop("window", None), settings.pop("overlay", None)
    function = causal_mask_function if window is None else sliding_window_causal_mask_function(window)
    if overlay is not None:
        function = and_masks(function, overlay)
    arguments = {
        "batch_size": 2, "q_length": q_length, "kv_length": kv_length, "mask_function": function,
        "attention_mask": None if padding is None else torch.tensor(padding).bool(), "local_size": window,
        "use_vmap": overlay is not None, **settings,
    }  # fmt: skip
    expected = sdpa_mask(allow_is_causal_skip=False, **arguments)[:, 0].expand(2, q_length, kv_length)
    found = sparse_attention_mask(config=None, dtype=torch.float32, **arguments)
    assert torch.equal(matrix(found, q_length, kv_length, 2), expected)
    # A matrix is for what a range cannot say: it costs queries x keys.
    assert (found is None or is_range(found)) == (case not in ("a hole", "custom overlay"))


@pytest.mark.parametrize("create", [create_causal_mask, create_sliding_window_causal_mask])
def test_through_the_functions_of_transformers(create):
    config = families.dense_config("mistral")
    config._attn_implementation, config.sparse_attention = "entmax", {"map": "entmax"}
    # A model of ours does so when its class is made.
    register()
    embeddings = torch.zeros(2, 9, 32)
    padding = torch.ones(2, 9, dtype=torch.long)
    padding[0, :4] = 0
    arguments = {"inputs_embeds": embeddings, "past_key_values": None}
    found = create(config=config, attention_mask=padding, **arguments)
    config._attn_implementation = "sdpa"
    expected = create(config=config, attention_mask=padding, **arguments)
    assert is_range(found)
    assert torch.equal(matrix(found, 9, 9, 2), expected[:, 0])


def test_lengths_count_visible_keys():
    hidden = torch.zeros(2, 4, 8)
    assert visible_lengths(None, hidden).tolist() == [[2, 3, 4, 5]]
    window = torch.tensor([[[0, 1], [0, 2], [1, 3], [2, 4]]], dtype=torch.int32)[None]
    assert visible_lengths(window, hidden).tolist() == [[2, 3, 3, 3]]
    holes = torch.ones(4, 4).tril().bool()
    holes[:, 1] = False
    assert visible_lengths(holes[None, None], hidden).tolist() == [[2, 2, 3, 4]]
    nothing = torch.zeros(1, 1, 4, 2, dtype=torch.int32)
    assert visible_lengths(nothing, hidden).tolist() == [[2, 2, 2, 2]]
    with pytest.raises(ValueError, match="differs between heads"):
        visible_lengths(torch.ones(2, 3, 4, 4).bool(), hidden)


def test_documents_start_where_positions_restart():
    assert document_starts(torch.arange(5)[None]) is None
    assert document_starts(torch.tensor([[7]])) is None
    assert document_starts(None) is None
    assert document_starts(torch.tensor([[0, 1, 0, 1, 2, 0]])).tolist() == [[0, 0, 2, 2, 2, 5]]
    range_ = within_documents(None, torch.tensor([[0, 0, 2, 2]]))[:, 0]
    assert range_.tolist() == [[[0, 1], [0, 2], [2, 3], [2, 4]]]
    # After 3 cached keys, the second document of these tokens does not reach into the cache.
    cached = torch.tensor([[[0, 4], [0, 5], [0, 6], [0, 7]]], dtype=torch.int32)[None]
    range_ = within_documents(cached, torch.tensor([[0, 0, 2, 2]]))[:, 0]
    assert range_.tolist() == [[[0, 4], [0, 5], [5, 6], [5, 7]]]


def test_documents_stay_apart_beside_a_hole_in_the_padding():
    model = families.stir(families.sparse_model(families.dense_model("llama"), "asentmax"))
    first, second = families.tokens(2, 6, seed=3), families.tokens(2, 5, seed=4)
    packed, mask = torch.cat([first, second], 1), torch.ones(2, 11, dtype=torch.long)
    mask[0, 2] = 0
    positions = torch.cat([torch.arange(6), torch.arange(5)])[None]
    with torch.no_grad():
        found = model(packed, position_ids=positions, attention_mask=mask, use_cache=False).logits
        expected = model(second, use_cache=False).logits
        torch.testing.assert_close(found[:, 6:], expected, atol=1e-5, rtol=1e-5)
        alone = model(first, attention_mask=mask[:, :6], use_cache=False).logits
        torch.testing.assert_close(found[1, :6], alone[1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("cache", [DynamicCache, StaticCache])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_padding_between_tokens_begins_no_document(family, cache):
    """`generate` gives padding position 0, and what comes after it sees what is before it."""
    dense = families.dense_model(family)
    # Rows that see no key are not a number in the eager attention.
    dense.set_attn_implementation("sdpa")
    model = families.sparse_model(dense, "asentmax", alpha=1.0)
    ids, mask = families.tokens(3, 9), torch.ones(3, 9, dtype=torch.long)
    mask[0, :2], mask[0, 4:6], mask[1, 5] = 0, 0, 0
    room = {"max_cache_len": 13} if cache is StaticCache else {}
    how = {
        "max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, "output_logits": True,
        "return_dict_in_generate": True, "disable_compile": True,
    }  # fmt: skip
    # Padding behind the tokens too, where the first query that is asked is padding.
    for seen in (mask, mask.flip(-1)):
        expected, found = (
            each.generate(ids, attention_mask=seen, past_key_values=cache(config=each.config, **room), **how)
            for each in (dense, model)
        )
        for one, other in zip(found.logits, expected.logits, strict=True):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_documents_behind_padding_stay_apart():
    model = families.stir(families.sparse_model(families.dense_model("llama"), "asentmax"))
    first, second = families.tokens(1, 6, seed=3), families.tokens(1, 5, seed=4)
    packed = torch.cat([first, families.tokens(1, 2), second], 1)
    positions = torch.cat([torch.arange(6), torch.zeros(2, dtype=torch.long), torch.arange(5)])[None]
    mask = torch.ones_like(packed)
    mask[:, 6:8] = 0
    with torch.no_grad():
        found = model(packed, position_ids=positions, attention_mask=mask, use_cache=False).logits
        torch.testing.assert_close(found[:, :6], model(first).logits, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found[:, 8:], model(second).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_documents_stay_apart_while_compiling_with_a_mask():
    model = families.stir(families.sparse_model(families.dense_model("llama"), "asentmax"))
    packed, mask = families.tokens(2, 11), torch.ones(2, 11, dtype=torch.long)
    positions = torch.cat([torch.arange(6), torch.arange(5)])[None]
    arguments = {"position_ids": positions, "attention_mask": mask, "use_cache": False}
    with torch.no_grad():
        found = torch.compile(model, backend="eager")(packed, **arguments).logits
        torch.testing.assert_close(found, model(packed, **arguments).logits, atol=1e-5, rtol=1e-5)


def test_positions_that_jump_forward_are_one_document():
    dense = families.dense_model("llama")
    model = families.sparse_model(dense, "asentmax", alpha=1.0)
    ids, positions = families.tokens(1, 12), torch.cat([torch.arange(7), torch.arange(20, 25)])[None]
    for arguments in ({"attention_mask": torch.ones_like(ids)}, {"use_cache": True}, {"use_cache": False}):
        with torch.no_grad():
            found = model(ids, position_ids=positions, **arguments).logits
            expected = dense(ids, position_ids=positions, **arguments).logits
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_masks_that_would_lose_something_are_refused():
    with pytest.raises(ValueError, match="there are 7 keys"):
        split_mask(torch.ones(1, 1, 7, 9).bool(), 7)
    with pytest.raises(ValueError, match="no other bias"):
        visible_entries(torch.tensor([0.0, -1.5])[None, None, None])
    with pytest.raises(ValueError, match="int64"):
        visible_entries(torch.ones(1, 1, 2, 3, dtype=torch.long))
    with pytest.raises(ValueError, match="4-D"):
        split_mask(torch.ones(2, 7).bool(), 7)
    lowest = torch.finfo(torch.float16).min
    assert visible_entries(torch.tensor([0.0, lowest, float("-inf")]).half()).tolist() == [True, False, False]


@pytest.mark.parametrize("position", ["rope", "nape"])
@pytest.mark.parametrize("map_name", ["asentmax", "ssmax"])
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_a_matrix_of_the_caller_equals_the_range(map_name, position, kind):
    model = families.stir(families.sparse_model(families.dense_model("llama"), map_name, position=position))
    ids = families.tokens(2, 9)
    matrix_ = torch.ones(9, 9).tril().bool()[None, None].expand(2, 1, 9, 9)
    if kind == "float":
        matrix_ = torch.where(matrix_, 0.0, torch.finfo(torch.float32).min)
    with torch.no_grad():
        found = model(ids, attention_mask=matrix_, use_cache=False).logits
        expected = model(ids, use_cache=False).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "rows, looks",
    [
        ([[1, 1, 1], [1, 1, 1]], Padding.NONE),
        ([[0, 1, 1], [0, 0, 0]], Padding.LEFT),
        ([[0, 1, 0], [1, 1, 1]], Padding.RANGES),
        ([[1, 0, 1], [1, 1, 1]], Padding.ANY),
    ],
)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_what_padding_looks_like_as_tokens_are_appended(rows, looks, mode):
    """As looked at anew; what is written to a mask on the way is seen, also where writes are not counted."""
    for written in (None, 2, 4):
        with mode():
            mask = torch.tensor(rows)
            assert padding_of(mask) == looks
            for step in range(6):
                mask = with_new_tokens(mask, 1 + step % 2)
                if step == written:
                    mask[0, mask.shape[1] - 2] = 0
                converted = as_bool(mask, mask.device)
                for one in (mask, converted):
                    assert padding_of(one) == padding_of(one.clone())
            assert torch.equal(converted, mask.bool()) and mask.shape[1] == 12
            # As Transformers would append them.
            if written is None:
                assert torch.equal(mask, torch.cat([torch.tensor(rows), torch.ones(2, 9, dtype=torch.long)], -1))


class _Waits(TorchDispatchMode):
    """Counts what a device would be waited for."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        self.count += name in ("_local_scalar_dense", "item", "is_nonzero", "nonzero", "equal", "masked_select")
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("cache", [DynamicCache, StaticCache, hsa.BoundedDynamicCache, hsa.BoundedStaticCache])
@pytest.mark.parametrize("padding", ["none", "left", "right", "holes"])
def test_a_step_of_generate_does_not_look_at_the_padding(padding, cache, mode, monkeypatch):
    """The masks of a prompt are looked at, those of its steps are made without; and they show the same keys."""
    model = families.stir(families.sparse_model(families.dense_model("gemma3_text", max_position_embeddings=512)))
    mask, ids = torch.ones(2, 20, dtype=torch.long), families.tokens(2, 20)
    mask[0, {"none": [], "left": range(7), "right": range(15, 20), "holes": [3, 9]}[padding]] = 0
    room = {"max_cache_len": 40} if "Static" in cache.__name__ else {}
    how = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, "disable_compile": True}
    waited, own = [], sparse_attention_mask

    def watched(*args, **kwargs):
        with _Waits() as waits:
            found = own(*args, **kwargs)
        waited.append((kwargs["q_length"], waits.count))
        # What is known of the mask is what is there.
        if kwargs["attention_mask"] is not None:
            fresh = own(*args, **{**kwargs, "attention_mask": kwargs["attention_mask"].clone()})
            assert (found is None) == (fresh is None) and (found is None or torch.equal(found, fresh))
        return found

    with mode():
        plain = model.generate(ids, attention_mask=mask, past_key_values=cache(config=model.config, **room), **how)
        monkeypatch.setitem(AttentionMaskInterface._global_mapping, model.config._attn_implementation, watched)
        again = model.generate(ids, attention_mask=mask, past_key_values=cache(config=model.config, **room), **how)
    assert torch.equal(plain, again)
    # Full attention and windows: a mask of each for every step.
    assert [count for queries, count in waited if queries == 1] == [0] * 22
    # Newer releases of Transformers drop a mask of ones themselves.
    assert padding == "none" or sum(count for queries, count in waited if queries > 1) > 0
