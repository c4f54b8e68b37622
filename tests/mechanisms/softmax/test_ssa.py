import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jattn
from jattn import masks
from jattn.cache import FullCache
from jattn.layers import Rope
from jattn.mechanisms.softmax import ssa as module
from jattn.mechanisms.softmax.ssa import Ssa

# Under jit everything compiles once a shape, not operation by operation.
ssa, ssa_position_only = (
    jax.jit(function, static_argnames=("is_causal", "form", "logit_soft_cap"))
    for function in (module.ssa, module.ssa_position_only)
)
attend = nnx.jit(lambda layer, *tokens, **options: layer(*tokens, **options).output)


def tensors(seed=0, length=6, source=None, dtype=jnp.float32):
    shapes = [(2, length, 4, 4), (2, source or length, 2, 4), (2, source or length, 2, 3)]
    return [normal(seed + n, *shape, dtype=dtype) for n, shape in enumerate(shapes)]


def normal(seed, *shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def make(seed=0, **options):
    """A layer whose token part is not at its start."""
    layer = Ssa(16, 4, num_kv_heads=2, alpha=options.pop("alpha", 0.7), rngs=nnx.Rngs(seed), **options)
    if layer.token == "shared":
        for n, token in enumerate((layer.query_token, layer.value_token)):
            token.set_value(normal(n + 7, *token.get_value().shape) / 2)
    return layer


@pytest.mark.parametrize("form", ["paper", "code", "no_func"])
def test_float64_with_every_gradient(form):
    gate = {"paper": jax.nn.sigmoid, "code": lambda b: jnp.exp(-jnp.exp(b)), "no_func": lambda b: b}[form]
    with jax.enable_x64(True):
        q, k, v = tensors(dtype=jnp.float64)
        rows = jnp.asarray(np.random.default_rng(5).uniform(size=(2, 2, 6)))
        alpha = jnp.array([0.3, -0.5, 0.1, 0.9])

        def definition(q, k, v, alpha, token, weight):
            tau = token[..., None] + 1 + gate(alpha) * jnp.log(jnp.arange(1.0, 7))[:, None]
            logits = jnp.einsum("btnd,bsnd->bnts", q, jnp.repeat(k, 2, 2)) / 2 * jnp.moveaxis(tau, -1, 1)[..., None]
            weights = jax.nn.softmax(jnp.where(np.tri(6, dtype=bool), logits, -jnp.inf), -1)
            return jnp.einsum("bnts,bs,bsnd->btnd", weights, weight, jnp.repeat(v, 2, 2))

        def mechanism(q, k, v, alpha, token, weight):
            own = {"alpha": alpha, "form": form, "token_temperature": token, "value_temperature": weight}
            return ssa(q, k, v, is_causal=True, **own)

        left, right = (
            jax.jit(jax.grad(lambda *a, f=f: ((f(*a) ** 2).sum(), f(*a)), tuple(range(6)), has_aux=True))(
                q, k, v, alpha, *rows
            )
            for f in (mechanism, definition)
        )
        for one, other in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
            np.testing.assert_allclose(one, other, atol=1e-11)


def test_closed_gate_is_plain_attention():
    q, k, v = tensors()
    plain = jattn.dot_product_attention(q, k, v, is_causal=True)
    for form, alpha in (("paper", -np.inf), ("code", np.inf), ("no_func", 0.0)):
        np.testing.assert_array_equal(ssa_position_only(q, k, v, is_causal=True, form=form, alpha=alpha), plain)
    ones = {"token_temperature": jnp.zeros((2, 6)), "value_temperature": jnp.ones((2, 6))}
    np.testing.assert_array_equal(ssa(q, k, v, is_causal=True, alpha=-np.inf, **ones), plain)


def test_paper_and_code_forms_meet():
    q, k, v = tensors()
    beta = 0.4
    share = np.exp(-np.exp(beta))
    alpha = np.log(share / (1 - share))
    forms = [ssa(q, k, v, alpha=a, form=f) for f, a in (("paper", alpha), ("code", beta), ("no_func", share))]
    np.testing.assert_allclose(forms[0], forms[1], atol=1e-6)
    np.testing.assert_allclose(forms[0], forms[2], atol=1e-6)
    np.testing.assert_array_equal(forms[0], ssa_position_only(q, k, v, alpha=alpha))


def test_rows_with_one_key_do_not_see_alpha():
    q, k, v = tensors()
    derivative = jax.jacfwd(lambda a: ssa(q, k, v, alpha=a, is_causal=True))(0.5)
    np.testing.assert_array_equal(derivative[:, 0], 0)
    assert np.abs(derivative[:, 1:]).max() > 1e-3


def test_temperatures_fold_into_query_and_value():
    q, k, v = tensors()
    rng = np.random.default_rng(0)
    token, weight = rng.uniform(-1, 1, (2, 6)), rng.uniform(0, 2, (2, 6))
    own = {"alpha": 0.3, "token_temperature": token, "value_temperature": weight}
    tau = token + 1 + np.log(6) / (1 + np.exp(-0.3))
    options = {"logit_soft_cap": 1.0, "sinks": jnp.ones(4)}
    folded = jattn.dot_product_attention(q * tau[..., None, None], k, v * weight[..., None, None], **options)
    np.testing.assert_allclose(ssa(q, k, v, **own, **options), folded, atol=1e-5)
    # tau_v = 0 removes a value and leaves its share of the softmax.
    gone = np.ones((2, 6))
    gone[:, 2] = 0
    one_hot = jnp.broadcast_to(jnp.eye(6)[:, None], (2, 6, 2, 6))
    whole = ssa(q, k, one_hot, alpha=0.3)
    np.testing.assert_allclose(
        ssa(q, k, one_hot, alpha=0.3, value_temperature=gone), whole.at[..., 2].set(0), atol=1e-6
    )


def test_padding_and_packing_count_keys_not_positions():
    q, k, v = tensors()
    own = {"alpha": 0.5, "is_causal": True}
    alone = ssa(q[:, 2:], k[:, 2:], v[:, 2:], **own)
    padded = ssa(q, k, v, mask=(np.arange(6) >= 2)[None, None, None], **own)
    np.testing.assert_allclose(padded[:, 2:], alone, atol=1e-6)
    packed = ssa(q, k, v, segment_ids=np.array([[0, 0, 1, 1, 1, 1]] * 2), **own)
    np.testing.assert_allclose(packed[:, 2:], alone, atol=1e-6)
    places = np.arange(6)[None]
    row = ssa(q[:, 4:5], k, v, query_positions=places[:, 4:5], key_positions=places, **own)
    np.testing.assert_allclose(row, ssa(q, k, v, **own)[:, 4:5], atol=1e-6)


def test_poisoned_padding_reaches_nothing():
    q, k, v = tensors()
    ids = np.array([[-1, 0, 0, 0, 0, -1]] * 2)
    rows = jnp.full((2, 2, 6), 0.5)

    def total(q, k, v, token, weight, alpha):
        own = {"alpha": alpha, "token_temperature": token, "value_temperature": weight}
        out = ssa(q, k, v, is_causal=True, segment_ids=ids, **own)
        return (out**2).sum(), out

    run = jax.jit(jax.grad(total, tuple(range(6)), has_aux=True))
    poisoned = [x.at[:, np.array([0, 5])].set(jnp.nan) for x in (q, k, v, *rows)]
    one, other = run(*poisoned, 0.5), run(q, k, v, *rows, 0.5)
    for left, right in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(left, right)
    np.testing.assert_array_equal(one[1][:, [0, 5]], 0)


def test_attention_to_a_needle_does_not_dilute():
    def weight_of_needle(length, alpha):
        key = jnp.zeros((1, length, 1, 1)).at[0, 0].set(4.0)
        one_hot = jnp.zeros((1, length, 1, 1)).at[0, 0].set(1.0)
        return float(ssa(jnp.ones((1, 1, 1, 1)), key, one_hot, alpha=alpha).squeeze())

    flat = [weight_of_needle(n, 5.0) for n in (16, 256)]
    diluted = [weight_of_needle(n, -np.inf) for n in (16, 256)]
    assert flat[1] > 0.95 * flat[0]
    assert diluted[1] < 0.3 * diluted[0]


@pytest.mark.parametrize("token", ["shared", "mlp", "none"])
def test_layer_starts_as_plain_attention(token):
    layer = Ssa(16, 4, num_kv_heads=2, alpha=-np.inf, token=token, rngs=nnx.Rngs(0))
    x = normal(1, 2, 5, 16)
    query, key, value = layer.query(x), layer.key(x), layer.value(x)
    plain = layer.out(jattn.dot_product_attention(query, key, value, is_causal=True))
    np.testing.assert_allclose(attend(layer, x, mask=masks.causal()), plain, atol=1e-6)


def test_layer_is_its_definition_in_cross_attention():
    layer = make(context_features=6, per_head=True)
    x, c = normal(0, 2, 3, 16), normal(1, 2, 4, 6)
    query, key, value = layer.query(x), layer.key(c), layer.value(c)
    q_hidden, v_hidden = (jax.nn.gelu(h, approximate=False) for h in (query, value))
    token = jnp.tanh(jnp.einsum("btnd,nd->bt", q_hidden, layer.query_token.get_value()))
    weight = 1 + jnp.tanh(jnp.einsum("bskd,kd->bs", v_hidden, layer.value_token.get_value()))
    assert layer.alpha.get_value().shape == (4,)
    o = ssa(query, key, value, alpha=0.7, token_temperature=token, value_temperature=weight)
    np.testing.assert_allclose(attend(layer, x, c), layer.out(o), atol=1e-6)


@pytest.mark.parametrize("token", ["shared", "mlp"])
def test_layer_gradients_reach_every_parameter(token):
    layer, x = make(token=token), normal(1, 2, 5, 16)
    gradients = nnx.jit(nnx.grad(lambda m: (m(x, mask=masks.causal()).output ** 2).sum()))(layer)
    flat = jax.tree_util.tree_leaves_with_path(gradients)
    zero = [jax.tree_util.keystr(path) for path, leaf in flat if not np.abs(leaf).max() > 0]
    # Behind a last layer of zeros the first one has no gradient yet.
    assert not [name for name in zero if token == "shared" or "_token" not in name]


def test_decoding_equals_the_whole():
    layer, x = make(position=Rope()), normal(1, 2, 6, 16)
    whole = attend(layer, x, mask=masks.causal())
    policy = FullCache(8)
    cache, rows = layer.init_cache(policy, 2), []
    step = nnx.jit(lambda m, x, cache: m(x, cache=(policy, cache))[:2])
    for t in range(6):
        row, cache = step(layer, x[:, t : t + 1], cache)
        rows.append(row)
    np.testing.assert_allclose(jnp.concatenate(rows, 1), whole, atol=1e-5)


def test_errors_name_the_argument():
    q, k, v = tensors()
    for options, name in (
        ({"form": "printed"}, "form"),
        ({"alpha": np.zeros(3)}, "alpha"),
        ({"token_temperature": np.zeros((2, 5))}, "token_temperature"),
        ({"value_temperature": np.zeros(6)}, "value_temperature"),
    ):
        with pytest.raises(ValueError, match=name):
            ssa(q, k, v, **options)
    with pytest.raises(ValueError, match="query"):
        ssa(q[0], k, v)
    for options in ({"form": "printed"}, {"token": "own"}):
        with pytest.raises(ValueError, match="must be"):
            Ssa(8, 2, rngs=nnx.Rngs(0), **options)
