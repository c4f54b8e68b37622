import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jattn.layers.rope import Rope
from jattn.mechanisms.linear.linear_attention import linear_attention
from jattn.mechanisms.linear.normalized_attention import NormalizedAttention, normalized_attention

B, T, N, K, D, V = 2, 11, 4, 2, 3, 5


def inputs(seed=0):
    r = np.random.default_rng(seed)
    shapes = ((B, T, N, D), (B, T, K, D), (B, T, K, V), (B, T, N))
    return tuple(r.normal(size=shape) for shape in shapes)


def close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=1e-9, atol=1e-12)


DIVISORS = {"exp": np.exp, "softplus": lambda n: np.log1p(np.exp(n)), "sigmoid": lambda n: 1 / (1 + np.exp(-n))}


def truth(query, key, value, n, normalizer="exp", ids=None):
    """Token by token."""
    out = np.zeros((B, T, N, V))
    for row in range(B):
        for head in range(N):
            state, before = np.zeros((D, V)), None
            for t in range(T):
                own = 0 if ids is None else ids[row, t]
                if own < 0:
                    continue
                state, before = (state if before in (None, own) else 0 * state), own
                state = state + np.outer(key[row, t, head // 2], value[row, t, head // 2])
                out[row, t, head] = query[row, t, head] @ state / DIVISORS[normalizer](n[row, t, head])
    return out


@pytest.mark.parametrize("normalizer", list(DIVISORS))
def test_it_is_its_definition(normalizer):
    with jax.enable_x64(True):
        given = inputs()
        for size in (1, 4, 64):
            found = normalized_attention(*given, normalizer=normalizer, chunk_size=size)
            close(found, truth(*given, normalizer))


def test_documents_padding_and_the_state():
    ids = np.array([[1, 1, -1, 1, 2, 2, 1, -1, 1, 1, -1], [-1, 0, 0, 0, 0, 0, 0, 0, 0, 3, 3]])
    with jax.enable_x64(True):
        given = inputs()
        poisoned = [np.where((ids >= 0).reshape(B, T, *(1,) * (x.ndim - 2)), x, np.nan) for x in given]
        close(normalized_attention(*poisoned, segment_ids=ids, chunk_size=4), truth(*given, ids=ids))
        whole, last = normalized_attention(*given, return_final_state=True)
        first, state = normalized_attention(*(x[:, :5] for x in given), return_final_state=True)
        second, end = normalized_attention(*(x[:, 5:] for x in given), initial_state=state, return_final_state=True)
        close(np.concatenate([first, second], 1), whole)
        close(end, last)


def test_with_the_sum_of_kernels_it_is_normalized_linear_attention():
    query, key, value, _ = inputs()
    query, key = np.abs(query), np.abs(key)
    with jax.enable_x64(True):
        products = np.einsum("btnd,bsnd->bnts", query, key.repeat(N // K, 2))
        n = np.log(np.tril(products).sum(-1)).swapaxes(1, 2)
        expected = linear_attention(query, key, value, is_causal=True, feature_map="relu", eps=0.0)
        close(normalized_attention(query, key, value, n), expected)


def test_extreme_divisors_have_finite_gradients():
    query, key, value, n = inputs()
    for size in (0.0, 80.0, 1e4):
        gradients = jax.grad(lambda *x: jnp.sum(normalized_attention(*x)), (0, 1, 2, 3))(
            query, key, value, n * 0 + size
        )
        assert all(np.isfinite(g).all() for g in gradients)
    close(normalized_attention(query, key, value, n * 0 + 1e4), 0 * np.zeros((B, T, N, V)))


def test_gradients_are_those_of_the_definition():
    given = inputs()

    def dense(query, key, value, n):
        key, value = (jnp.repeat(x, N // K, axis=2) for x in (key, value))
        weights = jnp.tril(jnp.einsum("btnd,bsnd->bnts", query, key))
        return jnp.einsum("bnts,bsnv->btnv", weights, value) / jnp.exp(n)[..., None]

    with jax.enable_x64(True):
        found = (
            jax.jit(jax.grad(lambda *x, f=f: jnp.sum(jnp.sin(f(*x))), (0, 1, 2, 3)))(*given)
            for f in (normalized_attention, dense)
        )
        jax.tree.map(close, *found)


def test_the_layer_is_its_definition():
    with jax.enable_x64(True):
        layer = NormalizedAttention(
            8, N, num_kv_heads=K, head_dim=D, value_dim=V, param_dtype=jnp.float64, rngs=nnx.Rngs(0)
        )
        for part in (layer.query, layer.key, layer.value, layer.divisor, layer.out):
            part.bias[...] = np.linspace(-1, 1, part.bias.size).reshape(part.bias.shape)
        x = np.random.default_rng(3).normal(size=(B, T, 8))

        def projected(part):
            kernel, bias = np.asarray(part.kernel[...]), np.asarray(part.bias[...])
            return np.tensordot(x, kernel, 1) + bias

        o = truth(*(projected(part) for part in (layer.query, layer.key, layer.value, layer.divisor)))
        y = np.tensordot(o, np.asarray(layer.out.kernel[...]), 2) + np.asarray(layer.out.bias[...])
        close(layer(x).output, y)


def test_rotary_positions_see_differences_only():
    with jax.enable_x64(True):
        layer = NormalizedAttention(8, 2, position=Rope(), param_dtype=jnp.float64, rngs=nnx.Rngs(0))
        x = np.random.default_rng(3).normal(size=(B, T, 8))
        close(layer(x, positions=np.arange(T) + 100).output, layer(x).output)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda q, k, v, n: normalized_attention(q, k, v, n[..., :2]), "normalizer_logits must be"),
        (lambda q, k, v, n: normalized_attention(q, k, v, n, normalizer="relu"), "normalizer must be"),
        (lambda q, k, v, n: normalized_attention(q[:, :, :1], k[:, :, :1], v, n[..., :1]), "value must not have"),
        (lambda *_: NormalizedAttention(8, 3, rngs=nnx.Rngs(0)), "num_heads must divide"),
        (lambda *_: NormalizedAttention(8, 4, num_kv_heads=3, rngs=nnx.Rngs(0)), "num_kv_heads must divide"),
        (lambda *_: NormalizedAttention(8, 4, normalizer="relu", rngs=nnx.Rngs(0)), "normalizer must be"),
    ],
)
def test_errors(call, words):
    with pytest.raises(ValueError, match=words):
        call(*inputs())
