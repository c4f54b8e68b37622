"""One query over split keys, in the interpreter of Pallas, against the reference in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jattn
from jattn.testing.compiling import quick_jit
from pallas_kernels.flash_decode.joining import join
from pallas_kernels.flash_decode.triton import choose_splits, forward

B, S, N, K, D, DV = 2, 77, 6, 2, 24, 20


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def add_all(logit, b, h, i, j, slope, at_key, pair, table):
    return logit + slope * (j - i) + at_key * pair + table


def mod():
    operands = {"slope": (draw(N, seed=1), "head"), "at_key": (draw(B, 1, S, seed=2), "key")}
    operands |= {"pair": (draw(N, 1, S, seed=3), "pair"), "table": (draw(N, 9, seed=4), "offset")}
    return jattn.ScoreMod(add_all, {n: jattn.Operand(*given) for n, given in operands.items()})


LENGTHS = np.array([5, 77])
CASES = {
    "plain": {},
    "at a position": {"is_causal": True, "query_positions": np.array([[40], [3]])},
    "ragged": {"key_value_seq_lengths": LENGTHS},
    "window": {"mask": jattn.masks.sliding_window(20, num_sinks=3), "query_positions": np.array([[70], [30]])},
    "nothing to see": {"key_value_seq_lengths": np.array([0, 77])},
    "mask by head": {"mask": np.random.default_rng(5).random((B, N, 1, S)) < 0.3},
    "bias, cap and sinks": {"bias": draw(B, N, 1, S, seed=6), "logit_soft_cap": 2.0, "sinks": draw(N, seed=7)},
    "score mod": {"score_mod": mod(), "query_positions": np.array([[40]])},
    "sigmoid": {"normalizer": jattn.normalizers.sigmoid(), "key_value_seq_lengths": LENGTHS},
    "dropout": {"dropout_rate": 0.3, "dropout_key": jax.random.key(2)},
}


@pytest.mark.parametrize("name", CASES)
def test_it_is_attention(name):
    with jax.enable_x64(True):
        arrays = {
            "query": draw(B, 1, N, D, seed=8),
            "key": draw(B, S, K, D, seed=9),
            "value": draw(B, S, K, DV, seed=10),
        }

        @quick_jit
        def both(arrays):
            return [
                jattn.dot_product_attention(
                    **arrays, **CASES[name], implementation=which, return_residual=True, block_sizes=blocks
                )
                for which, blocks in (("triton", (16, 16)), ("reference", None))
            ]

        found, expected = both(arrays)
        for got, wanted in zip(found, expected, strict=True):
            np.testing.assert_allclose(got, wanted, rtol=1e-10, atol=1e-10)


def test_gradients_of_one_query():
    with jax.enable_x64(True):
        arrays = [draw(1, 1, N, D), draw(1, S, K, D, seed=1), draw(1, S, K, DV, seed=2)]

        def gradients(which, blocks):
            def loss(*arrays):
                out = jattn.dot_product_attention(*arrays, implementation=which, block_sizes=blocks)
                return jnp.sin(out).sum()

            return quick_jit(jax.grad(loss, (0, 1, 2)))(*arrays)

        for got, wanted in zip(gradients("triton", (16, 16)), gradients("reference", None), strict=True):
            np.testing.assert_allclose(got, wanted, rtol=1e-10, atol=1e-10)


def test_hidden_keys_poison_nothing():
    arrays = {"query": draw(B, 1, N, D), "key": draw(B, S, K, D, seed=1), "value": draw(B, S, K, DV, seed=2)}
    arrays = {n: x.astype(np.float32) for n, x in arrays.items()}

    def run(arrays):
        return jattn.dot_product_attention(
            **arrays, key_value_seq_lengths=LENGTHS, implementation="triton", block_sizes=(16, 16)
        )

    clean = run(arrays)
    for name, poison in (("key", np.nan), ("value", np.inf)):
        arrays[name] = arrays[name].copy()
        arrays[name][0, 5:] = poison
    np.testing.assert_array_equal(run(arrays), clean)


def test_the_number_of_parts_changes_nothing_beyond_rounding():
    from jattn.softmax.arguments import build_problem
    from jattn.softmax.kernel_arguments import make_pipeline

    arrays = [draw(B, 1, N, D), draw(B, S, K, D, seed=1), draw(B, S, K, DV, seed=2)]
    arrays = [jnp.asarray(x, jnp.float32) for x in arrays]
    problem, _ = build_problem(*arrays)
    run = lambda parts: forward(  # noqa: E731
        *arrays,
        jnp.ones((1, 5), jnp.int32),
        {},
        make_pipeline(problem, True),
        16,
        scale=0.2,
        splits=parts,
        interpret=True,
    )
    one = run(1)
    for parts in (2, 3, 5):
        for got, wanted in zip(run(parts), one, strict=True):
            np.testing.assert_allclose(got, wanted, atol=1e-5)


def test_parts_that_see_nothing_are_joined_as_nothing():
    out, lse = jnp.ones((1, 1, 3, 2, 4)), jnp.array([[[[-jnp.inf, 0.0], [-jnp.inf, -jnp.inf], [-jnp.inf, 1.0]]]])
    joined, total = join(out.at[:, :, 1].set(0), lse, True)
    np.testing.assert_allclose(joined[0, 0], [[0] * 4, [1] * 4], atol=1e-6)
    np.testing.assert_allclose(total[0, 0], [-np.inf, np.logaddexp(0, 1)], rtol=1e-6)


@pytest.mark.parametrize(("batch", "kv_heads", "tiles"), [(1, 1, 1), (1, 8, 64), (64, 8, 64), (1, 1, 1000), (3, 5, 17)])
def test_no_part_is_empty(batch, kv_heads, tiles):
    parts = choose_splits(batch, kv_heads, tiles)
    assert 1 <= parts <= tiles
    assert (parts - 1) * -(-tiles // parts) < tiles
