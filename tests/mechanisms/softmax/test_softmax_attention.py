import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jattn
from jattn import masks
from jattn.layers import Rope, rope
from jattn.mechanisms.softmax import softmax_attention as module
from jattn.mechanisms.softmax.alibi import Alibi, alibi_slopes
from jattn.mechanisms.softmax.t5_bias import t5_bucket

# Under jit everything compiles once a shape, not operation by operation.
softmax_attention = jax.jit(
    module.softmax_attention,
    static_argnames=(
        "is_causal",
        "position",
        "t5_max_distance",
        "t5_bidirectional",
        "logit_soft_cap",
        "dropout_rate",
        "local_window_size",
        "return_residual",
    ),
)


def tensors(seed=0, length=6, source=None, heads=4, kv_heads=2, dtype=jnp.float32):
    shapes = [(2, length, heads, 4), (2, source or length, kv_heads, 4), (2, source or length, kv_heads, 3)]
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def truth(q, k, v, bias=0.0, visible=True):
    """The definition, in the precision of its inputs."""
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], 2) for x in (k, v))
    logits = jnp.einsum("btnd,bsnd->bnts", q, k) * q.shape[-1] ** -0.5 + bias
    weights = jax.nn.softmax(jnp.where(visible, logits, -jnp.inf), -1)
    return jnp.einsum("bnts,bsnd->btnd", weights, v)


def relative(t, s, causal=True):
    offset = np.arange(s)[None] - np.arange(t)[:, None]
    return offset, offset <= 0 if causal else np.ones_like(offset, bool)


def test_is_the_engine():
    q, k, v = tensors()
    options = {"mask": masks.sliding_window(3), "logit_soft_cap": 2.0, "sinks": jnp.arange(4.0)}
    np.testing.assert_array_equal(
        softmax_attention(q, k, v, **options), jattn.dot_product_attention(q, k, v, **options)
    )
    out, lse = softmax_attention(q, k, v, is_causal=True, return_residual=True, local_window_size=(2, 0))
    expected = jattn.dot_product_attention(q, k, v, mask=masks.local_window(2, 0), return_residual=True)
    np.testing.assert_allclose(out, expected[0], atol=1e-6)
    np.testing.assert_allclose(lse, expected[1], atol=1e-6)
    dropped = [
        softmax_attention(q, k, v, dropout_rate=0.5, dropout_key=jax.random.key(n), is_causal=True) for n in (0, 0, 1)
    ]
    np.testing.assert_array_equal(dropped[0], dropped[1])
    assert not np.array_equal(dropped[0], dropped[2])


@pytest.mark.parametrize("is_causal", [True, False])
def test_positions_in_float64_with_every_gradient(is_causal):
    with jax.enable_x64(True):
        q, k, v = tensors(source=7, dtype=jnp.float64)
        slopes, table = jnp.asarray(alibi_slopes(4)), jnp.asarray(np.random.default_rng(9).normal(size=(8, 4)))
        offset, visible = relative(6, 7, is_causal)
        buckets = t5_bucket(offset, num_buckets=8, max_distance=6, bidirectional=not is_causal)
        t5 = {"position": "t5", "t5_max_distance": 6, "t5_bidirectional": not is_causal}
        cases = {
            "rope": (
                lambda q, k, v: softmax_attention(q, k, v, position="rope", is_causal=is_causal),
                lambda q, k, v: truth(rope(q, np.arange(6)), rope(k, np.arange(7)), v, 0.0, visible),
                (q, k, v),
            ),
            "alibi": (
                lambda q, k, v, s: softmax_attention(q, k, v, position="alibi", alibi_slopes=s, is_causal=is_causal),
                lambda q, k, v, s: truth(q, k, v, -s[:, None, None] * abs(offset), visible),
                (q, k, v, slopes),
            ),
            "t5": (
                lambda q, k, v, t: softmax_attention(q, k, v, t5_table=t, is_causal=is_causal, **t5),
                lambda q, k, v, t: truth(q, k, v, jnp.moveaxis(t[buckets], -1, 0), visible),
                (q, k, v, table),
            ),
        }
        for got, expected, arguments in cases.values():
            every = tuple(range(len(arguments)))
            left, right = (
                jax.jit(jax.grad(lambda *a, f=f: ((f(*a) ** 2).sum(), f(*a)), every, has_aux=True))(*arguments)
                for f in (got, expected)
            )
            for one, other in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
                np.testing.assert_allclose(one, other, atol=1e-11)


def test_rotation_depends_on_differences_and_takes_objects():
    q, k, v = tensors()
    plain = softmax_attention(q, k, v, position="rope")
    far = np.arange(6)[None] + 50
    shifted = softmax_attention(q, k, v, position="rope", query_positions=far, key_positions=far)
    np.testing.assert_allclose(plain, shifted, atol=2e-5)
    np.testing.assert_array_equal(plain, softmax_attention(q, k, v, position=Rope()))
    assert not np.allclose(plain, softmax_attention(q, k, v, position=Rope(base=10.0)), atol=1e-3)
    flat = softmax_attention(q[0], k[0], v[0], position="rope")
    np.testing.assert_allclose(flat, plain[0], atol=1e-6)
    still = np.zeros(6, int)[None]
    unturned = softmax_attention(q, k, v, position="rope", query_positions=still, key_positions=still)
    np.testing.assert_allclose(unturned, softmax_attention(q, k, v), atol=1e-6)
    np.testing.assert_array_equal(
        softmax_attention(q, k, v, position="alibi"), softmax_attention(q, k, v, position=Alibi())
    )


@pytest.mark.parametrize("position", ["none", "rope", "alibi", "t5"])
def test_one_row_of_decoding_is_the_row_of_the_whole(position):
    q, k, v = tensors()
    options = {"position": position, "t5_table": jnp.ones((4, 4)).at[0].set(2.0) if position == "t5" else None}
    whole = softmax_attention(q, k, v, is_causal=True, **options)
    row = softmax_attention(q[:, 4:5], k, v, is_causal=True, query_positions=np.array([[4]]), **options)
    np.testing.assert_allclose(row[:, 0], whole[:, 4], atol=1e-6)


def test_limits_and_order():
    q, k, v = tensors()
    plain = softmax_attention(q, k, v, is_causal=True)
    for options in (
        {"position": "alibi", "alibi_slopes": np.zeros(4)},
        {"position": "t5", "t5_table": np.zeros((8, 4))},
    ):
        np.testing.assert_allclose(softmax_attention(q, k, v, is_causal=True, **options), plain, atol=1e-6)
    # The position bias comes after the score mod, which therefore does not double it.
    double = jattn.ScoreMod(_double)
    bias = jnp.asarray(-alibi_slopes(4)[:, None, None] * abs(relative(6, 6)[0]), jnp.float32)
    got = softmax_attention(q, k, v, position="alibi", score_mod=double)
    np.testing.assert_allclose(got, softmax_attention(2 * q, k, v, bias=bias), atol=1e-6)


def _double(logit, b, h, i, j):
    return 2 * logit


def test_packed_documents_restart_their_positions():
    q, k, v = tensors()
    ids, places = np.array([[0, 0, 0, 1, 1, -1]] * 2), np.array([[0, 1, 2, 0, 1, 0]] * 2)
    packed = {"segment_ids": ids, "query_positions": places, "key_positions": places}
    out = softmax_attention(q, k, v, is_causal=True, position="rope", **packed)
    for part in (slice(0, 3), slice(3, 5)):
        alone = softmax_attention(q[:, part], k[:, part], v[:, part], is_causal=True, position="rope")
        np.testing.assert_allclose(out[:, part], alone, atol=1e-6)
    np.testing.assert_array_equal(out[:, 5], 0)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"position": "rotary"}, "position"),
        ({"position": 3}, "position"),
        ({"position": "t5"}, "t5_table"),
        ({"position": "t5", "t5_table": np.zeros((8, 3))}, "t5_table"),
        ({"alibi_slopes": np.zeros(4)}, "alibi_slopes"),
        ({"position": "alibi", "alibi_slopes": np.zeros(3)}, "slopes"),
        ({"position": "rope", "query_positions": np.zeros(5, int)}, "positions"),
        ({"mask": np.zeros((3, 6), bool)}, "mask"),
    ],
)
def test_errors_name_the_argument(options, name):
    with pytest.raises(ValueError, match=name):
        softmax_attention(*tensors(), **options)
