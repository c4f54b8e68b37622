"""`jattn.explain`: the choice that a call would make, said before it is made."""

import functools

import jax
import numpy as np
import pytest

import jattn
from jattn.softmax import api, dispatch, platforms


def shaped(length, source=None, dtype="float32"):
    source = length if source is None else source
    return tuple(jax.ShapeDtypeStruct((1, n, 2, 8), dtype) for n in (length, source, source))


@pytest.mark.parametrize(
    ("sizes", "chosen"),
    [
        ((64,), "reference"),
        ((512,), "reference"),
        ((513,), "blockwise"),
        ((1, 9000), "reference"),
        ((4096,), "blockwise"),
    ],
)
def test_by_the_number_of_pairs(sizes, chosen):
    for implementation in (None, "xla"):
        found = jattn.explain(*shaped(*sizes), implementation=implementation, is_causal=True)
        assert found.chosen == chosen
        assert set(found.others) == set(dispatch.IMPLEMENTATIONS) - {chosen}
        assert all(found.others.values())


@pytest.mark.parametrize("name", ["reference", "blockwise"])
def test_what_is_asked_for_is_taken(name):
    found = jattn.explain(*shaped(4), implementation=name)
    assert (found.chosen, found.reason) == (name, "asked for")


def below_the_next(b, h, i, j, aux):
    return j < (aux + 1)[b]


def test_a_kernel_is_chosen_unasked_only_once_it_was_verified(monkeypatch):
    with platforms.compiling_for("gpu", "9.0"):
        found = jattn.explain(*shaped(1024))
        assert found.chosen == "blockwise"
        assert "no run on hardware has verified it yet" in found.others["triton"]
        assert jattn.explain(*shaped(1024), implementation="triton").chosen == "triton"
        monkeypatch.setattr(dispatch, "VERIFIED", frozenset({"triton"}))
        assert jattn.explain(*shaped(1024)).chosen == "triton"
        masked = jattn.explain(*shaped(1024), mask=jattn.masks.mask_mod(below_the_next, np.array([3])))
        assert masked.chosen == "blockwise"
        assert "a mask that does more with its arrays than reading entries" in masked.others["triton"]


def test_the_text_names_all():
    lines = str(jattn.explain(*shaped(1024))).split("\n")
    assert lines[0].startswith("blockwise: 1024 x 1024 pairs a head")
    assert [line.split(":")[0] for line in lines[1:]] == [
        f"  not {x}" for x in dispatch.IMPLEMENTATIONS if x != "blockwise"
    ]


def test_arrays_and_every_argument_serve(monkeypatch):
    """Nothing is computed, and the choice is the one that the call makes."""
    rng = np.random.default_rng(0)
    query, key, value = rng.normal(size=(3, 1, 6, 2, 4)).astype(np.float32)
    arguments = {
        "bias": np.zeros((6, 6), np.float32),
        "mask": jattn.masks.sliding_window(3),
        "segment_ids": np.zeros((1, 6), int),
        "sinks": np.zeros(2, np.float32),
        "dropout_rate": 0.5,
        "dropout_key": jax.random.key(0),
        "layout": jattn.layouts.from_block_mask(np.ones((1, 1), bool), query_slots=6, key_slots=6),
        "return_residual": True,
    }
    ran = []
    monkeypatch.setattr(api, "_run", lambda problem, sinks, chosen, *_: ran.append(chosen) or (query, query[..., 0]))
    found = jattn.explain(query, key, value, **arguments)
    assert not ran
    jattn.dot_product_attention(query, key, value, **arguments)
    assert ran == [found.chosen]


def test_shapes_serve_everywhere():
    shape = jax.ShapeDtypeStruct
    arguments = {
        "segment_ids": (shape((1, 6), "int32"), shape((1, 4), "int32")),
        "mask": jattn.masks.prefix(np.array([2])) & jattn.masks.causal(),
        "sinks": shape((2,), "float32"),
        "key_positions": shape((1, 4), "int32"),
    }
    assert jattn.explain(*shaped(6, 4), bias=shape((6, 4), "float32"), **arguments).chosen == "reference"


def test_it_refuses_what_the_call_refuses():
    with pytest.raises(ValueError, match="unknown implementation 'fast'"):
        jattn.explain(*shaped(8), implementation="fast")
    with pytest.raises(ValueError, match="value has shape"):
        jattn.explain(*shaped(8)[:2], shaped(9)[0])
    with pytest.raises(TypeError, match="unexpected keyword argument 'causal'"):
        jattn.explain(*shaped(8), causal=True)


def test_the_kernel_for_tpus_says_what_its_lists_and_products_do_not_take():
    """Before anything is traced, so that another implementation can be taken."""
    explain = functools.partial(jattn.explain, implementation="tpu", is_causal=True)
    with platforms.compiling_for("tpu"):
        long = shaped(2**18, dtype="bfloat16")
        with pytest.raises(NotImplementedError, match="so many tiles: .* 525312 bytes .*; 'blockwise' does"):
            explain(*long)
        assert explain(*long, local_window_size=(1000, 0)).chosen == "tpu"
        with pytest.raises(NotImplementedError, match="a single key.*; 'blockwise' does"):
            explain(*shaped(8, 1))
    assert explain(*shaped(8, 1)).chosen == "tpu"
