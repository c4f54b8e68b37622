"""Masks that hold arrays, permuted layouts and tables of offsets, through the kernels in the interpreter."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jattn
from jattn.softmax.compilers import from_block_mask, from_mask_mod, from_token_selection, tile_bits
from tests.grids import mostly_slow
from tests.softmax.test_kernels import (
    KERNELS,
    B,
    K,
    N,
    compare,
    draw,
    each_kernel,
    inputs,
    on_kernels,
    positions,
    segments,
)

TRITON = KERNELS["triton"]
T, S = TRITON.length, TRITON.source
SEGMENTS, POSITIONS = segments(TRITON), positions(TRITON)
on_triton = functools.partial(compare, TRITON)


def random(*shape, share=0.5, seed=0):
    return np.random.default_rng(seed).random(shape) < share


def near(b, h, i, j, aux):
    return (jnp.abs(aux["at"][b, j] - i) <= aux["reach"]) | (aux["open"][h, -1] & (j == 0))


def what_is_near(x):
    return {
        "at": np.random.default_rng(1).integers(0, x.length, (B, x.source)),
        "reach": np.int32(9),
        "open": random(N, 3, seed=2),
    }


MASKS = {
    "prefix": lambda x: {"mask": jattn.masks.prefix_lm_mask(np.array([5, 20]))},
    "prefix of one row": lambda x: {"mask": jattn.masks.prefix(np.array([7]))},
    "prefix of no axis": lambda x: {"mask": jattn.masks.prefix(np.array(7)) | jattn.masks.causal()},
    "dense": lambda x: {"mask": jattn.masks.dense(random(B, N, x.length, x.source)) & jattn.masks.local_window(20, 3)},
    "dense, one head": lambda x: {"mask": ~jattn.masks.dense(random(B, 1, x.length, x.source))},
    "dense by position": lambda x: {"mask": jattn.masks.dense(random(1, N, 600, 600)), **positions(x)},
    "segments": lambda x: {"mask": jattn.masks.segment_mask(*segments(x))},
    "function": lambda x: {
        "mask": jattn.masks.mask_mod(near, what_is_near(x)),
        "bias": draw(1, 1, x.length, x.source, seed=3),
    },
    "sigmoid": lambda x: {"mask": jattn.masks.prefix(np.array([5, 20])), "normalizer": jattn.normalizers.sigmoid()},
}


def sizes(x):
    return {"query_slots": x.length, "key_slots": x.source, "query_block": x.block, "key_block": x.block}


def from_dense(x, mask, batch, heads, bits=False):
    cut = (batch, heads, x.length, x.source, x.block, x.block)
    return from_mask_mod(tile_bits(mask, *cut) if bits else mask, *cut)


LAYOUTS = {
    "selection": lambda x: from_token_selection(
        random(B, K, x.length, -(-x.source // 8), share=0.4, seed=4),
        1,
        8,
        jattn.masks.causal(),
        num_heads=N,
        **sizes(x),
    ),
    "selection of groups": lambda x: from_token_selection(
        random(1, 1, -(-x.length // 4), x.source, share=0.3, seed=5), 4, 1, **sizes(x)
    ),
    "selection and window": lambda x: from_token_selection(
        random(B, N, x.length, -(-x.source // 8), share=0.3), 1, 8, include=jattn.masks.local_window(3, 0), **sizes(x)
    ),
    "bits": lambda x: from_dense(x, jattn.masks.dense(random(B, N, x.length, x.source)), B, N, bits=True),
    "prefix": lambda x: from_dense(x, jattn.masks.prefix(np.array([5, 20])), B, 1),
}


@on_kernels("name", MASKS, triton=("prefix", "dense", "function"), tpu=("segments", "function"))
def test_masks_that_hold_arrays(name, kernel):
    compare(kernel, MASKS[name](kernel))


@on_kernels("name", LAYOUTS, triton=("selection",), tpu=("bits",))
def test_layouts_whose_predicate_holds_arrays(name, kernel):
    compare(kernel, {"layout": LAYOUTS[name](kernel)})


@each_kernel
def test_a_single_query(kernel):
    arrays = {n: x[:, :1] if n == "query" else x for n, x in inputs(kernel).items()}
    for mask in (
        jattn.masks.prefix(np.array([5, 20])),
        jattn.masks.dense(random(B, N, 1, kernel.source)),
        jattn.masks.mask_mod(near, what_is_near(kernel)),
    ):
        found, expected = (
            jattn.dot_product_attention(**arrays, mask=mask, implementation=name) for name in (kernel.name, "reference")
        )
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_vmap_over_the_arrays_of_a_mask():
    arrays, lengths = inputs(TRITON), np.array([[5, 20], [29, 1], [0, 7]])

    def gradients(lengths, implementation):
        def loss(arrays):
            mask = jattn.masks.prefix(lengths) & jattn.masks.local_window(9, None)
            return jnp.sin(jattn.dot_product_attention(**arrays, mask=mask, implementation=implementation)).sum()

        return jax.grad(loss)(arrays)

    found, expected = (jax.vmap(lambda n, name=name: gradients(n, name))(lengths) for name in ("triton", "reference"))
    for name in arrays:
        np.testing.assert_allclose(found[name], expected[name], atol=1e-5)


def perm(length, slots, *lead, seed=0):
    """Tokens in random slots, `[*lead, slots]`; the slots that are left over are empty."""
    draws = np.random.default_rng(seed)
    tokens = np.concatenate([np.arange(length), np.full(slots - length, -1)])
    return draws.permuted(np.broadcast_to(tokens, (*lead, slots)), axis=-1).astype(np.int32)


def permuted(kernel, query_perm, key_perm, predicate=None):
    sides = ((kernel.length, query_perm), (kernel.source, key_perm))
    slots = [n if p is None else p.shape[2] for n, p in sides]
    tiles = [-(-n // kernel.block) for n in slots]
    return from_block_mask(
        random(B, K, *tiles, share=0.7, seed=6),
        predicate,
        query_slots=slots[0],
        key_slots=slots[1],
        query_block=kernel.block,
        key_block=kernel.block,
        query_perm=query_perm,
        key_perm=key_perm,
    )


def of_rows_and_columns(logit, b, h, i, j, at_query, at_key, table):
    return logit * (1 + at_query) + at_key + table


def rows_and_columns(kernel):
    operands = {
        "at_query": jattn.Operand(0.1 * draw(kernel.length, seed=1), "query"),
        "at_key": jattn.Operand(draw(B, 1, kernel.source, seed=2), "key"),
        "table": jattn.Operand(draw(N, seed=3), "head"),
    }
    return jattn.ScoreMod(of_rows_and_columns, operands)


PERMS = {
    "both": lambda x: (perm(x.length, x.length + 4, B, N), perm(x.source, 2 * x.block, B, K, seed=1)),
    "queries": lambda x: (perm(x.length, 3 * x.block, 1, 1), None),
    "keys of query heads": lambda x: (None, perm(x.source, x.source, 1, N)),
}
OF_PERMUTED = {
    "plain": lambda x: {},
    "masks": lambda x: {"is_causal": True, "segment_ids": segments(x)},
    "positions": lambda x: {"mask": jattn.masks.sliding_window(9), **positions(x)},
    "operands": lambda x: {"score_mod": rows_and_columns(x), "bias": draw(1, N, 1, x.source, seed=4)},
    "dropout": lambda x: {"dropout_rate": 0.3, "dropout_key": jax.random.key(2)},
}
OF_MOVED_PAIRS = {
    "masks": lambda x: {"is_causal": True, "segment_ids": segments(x), "mask": random(B, 1, x.length, x.source)},
    "mask by position": lambda x: {
        "mask": jattn.masks.prefix(np.array([9, 40])) | jattn.masks.causal(),
        **positions(x),
    },
}


@on_kernels(
    "case",
    [(name, perms) for name in OF_PERMUTED for perms in PERMS if perms == "both" or name in ("plain", "operands")],
    triton=(("plain", "both"), ("operands", "keys of query heads")),
    tpu=(("plain", "queries"), ("masks", "both")),
)
def test_layouts_that_permute_tokens(case, kernel):
    name, perms = case
    compare(kernel, {"layout": permuted(kernel, *PERMS[perms](kernel)), **OF_PERMUTED[name](kernel)})


@on_kernels(
    "case",
    [(name, perms) for name in OF_MOVED_PAIRS for perms in ("both", "queries")],
    triton=(("masks", "queries"),),
    tpu=(("mask by position", "both"),),
)
def test_layouts_that_permute_what_is_read_by_pairs(case, kernel):
    name, perms = case
    compare(kernel, {"layout": permuted(kernel, *PERMS[perms](kernel)), **OF_MOVED_PAIRS[name](kernel)})


@pytest.mark.parametrize("perms", mostly_slow(PERMS, ["queries"]))
def test_layouts_that_permute_the_pairs_of_a_bias(perms):
    on_triton({"layout": permuted(TRITON, *PERMS[perms](TRITON)), "bias": draw(1, 1, T, S, seed=5)})


PREDICATES = {
    "of slots": lambda: LAYOUTS["selection"](TRITON).predicate,
    "of positions": lambda: jattn.masks.prefix_lm_mask(np.array([5, 20])),
}


@pytest.mark.parametrize("name", mostly_slow(PREDICATES, ["of positions"]))
def test_predicates_of_permuted_layouts_see_slots_and_positions(name):
    on_triton({"layout": permuted(TRITON, *PERMS["both"](TRITON), PREDICATES[name]())})


def add_both(logit, b, h, i, j, one, other):
    return logit * (1 + one) + other


def tables(one, other, centers=(None, None)):
    return jattn.ScoreMod(
        add_both,
        {
            "one": jattn.Operand(0.1 * draw(*one, seed=1), "offset", centers[0]),
            "other": jattn.Operand(draw(*other, seed=2), "offset", centers[1]),
        },
    )


TABLES = {
    "clipped": lambda x: {"score_mod": tables((N, 9), (B, 1, 15), (None, 2))},
    "wider than all offsets": lambda x: {
        "score_mod": tables((4 * x.length,), (N, 90), (3 * x.length, 3)),
        "is_causal": True,
    },
    "of one entry, and out of reach": lambda x: {"score_mod": tables((N, 1), (B, N, 7), (None, 300))},
    "dead tiles": lambda x: {"score_mod": tables((11,), (N, 40)), "segment_ids": segments(x)},
    "sigmoid": lambda x: {"score_mod": tables((11,), (N, 40)), "normalizer": jattn.normalizers.sigmoid()},
}


@on_kernels("name", TABLES, triton=("of one entry, and out of reach",), tpu=("clipped",))
def test_gradients_of_offset_tables(name, kernel):
    compare(kernel, TABLES[name](kernel))


@pytest.mark.parametrize("blocks", mostly_slow([(16, 64), (64, 16)], [(16, 64)]), ids=str)
def test_gradients_of_offset_tables_in_oblong_tiles(blocks):
    sizes = {"query_slots": T, "key_slots": S, "query_block": blocks[0], "key_block": blocks[1]}
    tiles = [-(-n // block) for n, block in zip((T, S), blocks, strict=True)]
    layout = from_block_mask(random(1, N, *tiles, share=0.8), **sizes)
    on_triton({"score_mod": tables((11,), (B, N, 70)), "layout": layout})


IRREGULAR = {"positions": lambda: POSITIONS, "layout": lambda: {"layout": permuted(TRITON, *PERMS["both"](TRITON))}}


@pytest.mark.parametrize("name", mostly_slow(IRREGULAR, ["positions"]))
def test_gradients_of_offset_tables_where_offsets_are_irregular(name):
    on_triton({"score_mod": tables((11,), (N, 40)), **IRREGULAR[name]()})


def of_the_whole(b, h, i, j, aux):
    return j < (aux + 1)[b]


def by_identity(b, h, i, j, aux):
    return (j == aux) | (j >= i)


def of_a_part(b, h, i, j, aux):
    return j < aux[: T // 2].sum()


@pytest.mark.parametrize("function", [of_the_whole, by_identity, of_a_part])
def test_masks_that_do_more_than_reading_name_who_takes_them(function):
    mask = jattn.masks.mask_mod(function, np.array([5, 20]))
    with pytest.raises(NotImplementedError, match="more with its arrays than reading entries .*'blockwise' does"):
        jattn.dot_product_attention(**inputs(TRITON), mask=mask, implementation="triton")


def test_what_tpus_cannot_gather_names_who_can():
    kernel = KERNELS["tpu"]
    moved = {"layout": permuted(kernel, *PERMS["both"](kernel)), "bias": draw(1, 1, kernel.length, kernel.source)}
    with pytest.raises(NotImplementedError, match="of pairs beside a layout that permutes tokens; 'blockwise' does"):
        jattn.dot_product_attention(**inputs(kernel), **moved, implementation="tpu")
    with pytest.raises(NotImplementedError, match="a table of offsets beside explicit positions"):
        jattn.dot_product_attention(
            **inputs(kernel), **positions(kernel), score_mod=tables((11,), (N, 40)), implementation="tpu"
        )
