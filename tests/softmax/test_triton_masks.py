"""Masks and layouts that hold arrays, through the Triton kernel in the interpreter, against the float64 truth."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jattn
from jattn.softmax.compilers import from_block_mask, from_mask_mod, from_token_selection, tile_bits
from tests.softmax.test_triton import POSITIONS, SEGMENTS, B, K, N, S, T, compare, draw, inputs


def random(*shape, share=0.5, seed=0):
    return np.random.default_rng(seed).random(shape) < share


def near(b, h, i, j, aux):
    return (jnp.abs(aux["at"][b, j] - i) <= aux["reach"]) | (aux["open"][h, -1] & (j == 0))


NEAR = {
    "at": np.random.default_rng(1).integers(0, T, (B, S)),
    "reach": np.int32(9),
    "open": random(N, 3, seed=2),
}

MASKS = {
    "prefix": lambda: {"mask": jattn.masks.prefix_lm_mask(np.array([5, 20]))},
    "prefix of one row": lambda: {"mask": jattn.masks.prefix(np.array([7]))},
    "prefix of no axis": lambda: {"mask": jattn.masks.prefix(np.array(7)) | jattn.masks.causal()},
    "dense": lambda: {"mask": jattn.masks.dense(random(B, N, T, S)) & jattn.masks.local_window(20, 3)},
    "dense, one head": lambda: {"mask": ~jattn.masks.dense(random(B, 1, T, S))},
    "dense by position": lambda: {"mask": jattn.masks.dense(random(1, N, 60, 60)), **POSITIONS},
    "segments": lambda: {"mask": jattn.masks.segment_mask(*SEGMENTS)},
    "function": lambda: {"mask": jattn.masks.mask_mod(near, NEAR), "bias": draw(1, 1, T, S, seed=3)},
    "sigmoid": lambda: {"mask": jattn.masks.prefix(np.array([5, 20])), "normalizer": jattn.normalizers.sigmoid()},
}
SIZES = {"query_slots": T, "key_slots": S, "query_block": 16, "key_block": 16}
LAYOUTS = {
    "selection": lambda: from_token_selection(
        random(B, K, T, 4, share=0.4, seed=4), 1, 8, jattn.masks.causal(), num_heads=N, **SIZES
    ),
    "selection of groups": lambda: from_token_selection(random(1, 1, 10, 29, share=0.3, seed=5), 4, 1, **SIZES),
    "selection and window": lambda: from_token_selection(
        random(B, N, T, 4, share=0.3), 1, 8, include=jattn.masks.local_window(3, 0), **SIZES
    ),
    "bits": lambda: from_mask_mod(
        tile_bits(jattn.masks.dense(random(B, N, T, S)), B, N, T, S, 16, 16), B, N, T, S, 16, 16
    ),
    "prefix": lambda: from_mask_mod(jattn.masks.prefix(np.array([5, 20])), B, 1, T, S, 16, 16),
}


@pytest.mark.parametrize("name", MASKS)
def test_masks_that_hold_arrays(name):
    compare(MASKS[name]())


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_whose_predicate_holds_arrays(name):
    compare({"layout": LAYOUTS[name]()})


def test_a_single_query():
    arrays = {n: x[:, :1] if n == "query" else x for n, x in inputs().items()}
    for mask in (
        jattn.masks.prefix(np.array([5, 20])),
        jattn.masks.dense(random(B, N, 1, S)),
        jattn.masks.mask_mod(near, NEAR),
    ):
        found, expected = (
            jattn.dot_product_attention(**arrays, mask=mask, implementation=name) for name in ("triton", "reference")
        )
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_vmap_over_the_arrays_of_a_mask():
    arrays, lengths = inputs(), np.array([[5, 20], [29, 1], [0, 7]])

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


def permuted(query_perm, key_perm, predicate=None):
    slots = [n if p is None else p.shape[2] for n, p in ((T, query_perm), (S, key_perm))]
    tiles = [-(-n // 16) for n in slots]
    return from_block_mask(
        random(B, K, *tiles, share=0.7, seed=6),
        predicate,
        query_slots=slots[0],
        key_slots=slots[1],
        query_block=16,
        key_block=16,
        query_perm=query_perm,
        key_perm=key_perm,
    )


def of_rows_and_columns(logit, b, h, i, j, at_query, at_key, table):
    return logit * (1 + at_query) + at_key + table


ROWS_AND_COLUMNS = jattn.ScoreMod(
    of_rows_and_columns,
    {
        "at_query": jattn.Operand(0.1 * draw(T, seed=1), "query"),
        "at_key": jattn.Operand(draw(B, 1, S, seed=2), "key"),
        "table": jattn.Operand(draw(N, seed=3), "head"),
    },
)
PERMS = {
    "both": (perm(T, 41, B, N), perm(S, 32, B, K, seed=1)),
    "queries": (perm(T, 48, 1, 1), None),
    "keys of query heads": (None, perm(S, S, 1, N)),
}
OF_PERMUTED = {
    "plain": {},
    "masks": {"is_causal": True, "segment_ids": SEGMENTS, "mask": random(B, 1, T, S)},
    "positions": {"mask": jattn.masks.prefix(np.array([9, 40])) | jattn.masks.causal(), **POSITIONS},
    "operands": {"score_mod": ROWS_AND_COLUMNS, "bias": draw(1, N, 1, S, seed=4)},
    "pair bias": {"bias": draw(1, 1, T, S, seed=5)},
    "dropout": {"dropout_rate": 0.3, "dropout_key": jax.random.key(2)},
}


@pytest.mark.parametrize("perms", PERMS)
@pytest.mark.parametrize("name", OF_PERMUTED)
def test_layouts_that_permute_tokens(name, perms):
    compare({"layout": permuted(*PERMS[perms]), **OF_PERMUTED[name]})


def test_predicates_of_permuted_layouts_see_slots_and_positions():
    for predicate in (LAYOUTS["selection"]().predicate, jattn.masks.prefix_lm_mask(np.array([5, 20]))):
        compare({"layout": permuted(*PERMS["both"], predicate)})


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
    "clipped": {"score_mod": tables((N, 9), (B, 1, 15), (None, 2))},
    "wider than all offsets": {"score_mod": tables((150,), (N, 90), (110, 3)), "is_causal": True},
    "of one entry, and out of reach": {"score_mod": tables((N, 1), (B, N, 7), (None, 100))},
    "dead tiles": {"score_mod": tables((11,), (N, 40)), "segment_ids": SEGMENTS},
    "sigmoid": {"score_mod": tables((11,), (N, 40)), "normalizer": jattn.normalizers.sigmoid()},
}


@pytest.mark.parametrize("name", TABLES)
def test_gradients_of_offset_tables(name):
    compare(TABLES[name])


@pytest.mark.parametrize("blocks", [(16, 64), (64, 16)], ids=str)
def test_gradients_of_offset_tables_in_oblong_tiles(blocks):
    sizes = {"query_slots": T, "key_slots": S, "query_block": blocks[0], "key_block": blocks[1]}
    tiles = [-(-n // block) for n, block in zip((T, S), blocks, strict=True)]
    layout = from_block_mask(random(1, N, *tiles, share=0.8), **sizes)
    compare({"score_mod": tables((11,), (B, N, 70)), "layout": layout})


def test_gradients_of_offset_tables_where_offsets_are_irregular():
    score_mod = tables((11,), (N, 40))
    compare({"score_mod": score_mod, **POSITIONS})
    compare({"score_mod": score_mod, "layout": permuted(*PERMS["both"])})


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
        jattn.dot_product_attention(**inputs(), mask=mask, implementation="triton")
