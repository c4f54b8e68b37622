import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jattn import masks
from jattn.cache import FullCache
from jattn.layers import MultiHeadAttention, Rope
from jattn.mechanisms.heads import moh_attention as module
from jattn.mechanisms.heads.moh_attention import MohAttention

# Under jit everything compiles once a shape, not operation by operation.
moh_gates = jax.jit(module.moh_gates, static_argnames=("num_shared", "num_active", "rescale"))
moh_norm_gates = jax.jit(module.moh_norm_gates, static_argnames=("num_shared", "num_active", "straight_through"))
moh_balance_loss = jax.jit(module.moh_balance_loss)
run = nnx.jit(lambda layer, x, **options: layer(x, **options))


def normal(seed, *shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def make(features=16, heads=4, seed=0, **options):
    return MohAttention(features, heads, rngs=nnx.Rngs(seed), **options)


def zero_router(layer):
    for kernel in (layer.routed_kernel, layer.shared_kernel, layer.mix_kernel):
        if kernel is not None:
            kernel.set_value(0 * kernel.get_value())
    return layer


def plain(layer, x, **options):
    """Multi-head attention with the projections of a layer."""
    twin = MultiHeadAttention(16, 4, rngs=nnx.Rngs(9))
    for name in ("query", "key", "value", "out"):
        setattr(twin, name, getattr(layer, name))
    return run(twin, x, **options).output


def kernels(routed, shared, mixed, features=5, dtype=jnp.float32):
    sizes = (routed, shared if shared > 1 else 0, 2 if mixed else 0)
    return [normal(n, features, size, dtype=dtype) if size else None for n, size in enumerate(sizes)]


@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize(("shared", "routed", "active"), [(2, 4, 2), (1, 3, 1), (0, 4, 3), (3, 2, 0), (3, 0, 0)])
def test_gates_are_the_definition(shared, routed, active, rescale):
    x, weights = normal(7, 2, 3, 5), kernels(routed, shared, shared > 0 and active > 0)
    found = moh_gates(x, *weights, num_shared=shared, num_active=active, rescale=rescale)
    expected = np.zeros((2, 3, shared + routed))
    softmax = [None if w is None else np.asarray(jax.nn.softmax(x @ w, -1), np.float64) for w in weights]
    for at in np.ndindex(2, 3):
        a = softmax[1][at] if shared > 1 else np.ones(shared)
        c = softmax[2][at] if softmax[2] is not None else np.ones(2)
        r = np.zeros(routed)
        if active:
            chosen = np.argsort(-softmax[0][at], kind="stable")[:active]
            r[chosen] = softmax[0][at][chosen]
            if rescale:
                r *= active / r.sum()
        if rescale:
            a, c = a * shared, c * (2 if softmax[2] is not None else 1)
        expected[at] = np.concatenate([c[0] * a, c[1] * r])
    np.testing.assert_allclose(found.gates, expected, atol=1e-6)
    np.testing.assert_array_equal(found.chosen.sum(-1), active)
    if not rescale:
        assert found.gates.sum(-1).max() <= 1 + 1e-6
    elif active and not shared:
        np.testing.assert_allclose(found.gates.sum(-1), active, atol=1e-5)


def test_gradients_of_the_gates_in_float64():
    with jax.enable_x64(True):
        arguments = [normal(7, 1, 3, 5, dtype=jnp.float64), *kernels(4, 2, True, dtype=jnp.float64)]

        def f(*a):
            found = moh_gates(*a, num_shared=2, num_active=2)
            loss = moh_balance_loss(found.probabilities, found.chosen)
            return (found.gates * jnp.cos(jnp.arange(6.0))).sum() + loss

        gradients = jax.jit(jax.grad(f, (0, 1, 2, 3)))(*arguments)
        value = jax.jit(f)
        for n, gradient in enumerate(gradients):
            step = 1e-5 * normal(n + 20, *gradient.shape, dtype=jnp.float64)
            ends = [value(*(x + sign * step if m == n else x for m, x in enumerate(arguments))) for sign in (1, -1)]
            np.testing.assert_allclose((gradient * step).sum(), (ends[0] - ends[1]) / 2, rtol=1e-6)


@pytest.mark.parametrize(("shared", "active"), [(2, 2), (1, 3), (0, 4), (4, 0)])
def test_a_router_of_zeros_with_all_heads_is_multi_head_attention(shared, active):
    layer, x = zero_router(make(num_shared=shared, num_active=active)), normal(1, 2, 5, 16)
    out, _, aux = run(layer, x, mask=masks.causal())
    np.testing.assert_allclose(out, plain(layer, x, mask=masks.causal()), atol=1e-5)
    assert set(aux) == ({"balance_loss", "head_load"} if active else set())


def test_ties_choose_the_first_heads_and_open_them_fully():
    layer, x = zero_router(make(num_shared=1, num_active=2)), normal(1, 2, 5, 16)
    found = layer.route(x)
    np.testing.assert_allclose(found.gates, np.broadcast_to([1.0, 1, 1, 0], (2, 5, 4)), atol=1e-6)


def test_permuting_routed_heads_changes_nothing():
    layer, x = make(num_shared=2, num_active=1, heads=5, head_dim=4), normal(1, 2, 6, 16)
    before = run(layer, x, mask=masks.causal()).output
    order = np.array([0, 1, 4, 2, 3])
    for projection in (layer.query, layer.key, layer.value):
        projection.kernel.set_value(projection.kernel.get_value()[:, order])
    layer.out.kernel.set_value(layer.out.kernel.get_value()[order])
    layer.routed_kernel.set_value(layer.routed_kernel.get_value()[:, order[2:] - 2])
    np.testing.assert_allclose(run(layer, x, mask=masks.causal()).output, before, atol=1e-5)


def test_balance_loss():
    p, m = jax.nn.softmax(normal(0, 2, 3, 4)), normal(1, 2, 3, 4) > 0
    by_hand = 16 * np.mean(np.mean(p, (0, 1)) * np.mean(m, (0, 1)))
    np.testing.assert_allclose(moh_balance_loss(p, m), by_hand, rtol=1e-6)
    balanced = jnp.eye(4, dtype=bool)[None] | jnp.roll(jnp.eye(4, dtype=bool), 1, 1)[None]
    np.testing.assert_allclose(moh_balance_loss(jnp.full((1, 4, 4), 0.25), balanced), 2.0, rtol=1e-6)
    valid = np.array([[True, True, False], [True, False, False]])
    kept = moh_balance_loss(p.at[~valid].set(jnp.nan), m, valid)
    np.testing.assert_allclose(kept, moh_balance_loss(p[valid][None], m[valid][None]), rtol=1e-6)
    assert float(moh_balance_loss(p, m, np.zeros((2, 3), bool))) == 0


def test_padding_is_left_out_of_the_loss_and_of_every_gradient():
    layer, x = make(num_shared=2, num_active=1), normal(1, 2, 6, 16)
    ids = jnp.array([[0, 0, 0, 0, -1, -1]] * 2)

    def total(m, x):
        out, _, aux = m(x, mask=masks.causal(), segment_ids=ids)
        return (out**2).sum() + aux["balance_loss"], (out, aux)

    slope = nnx.jit(nnx.grad(total, has_aux=True))
    one, other = slope(layer, x), slope(layer, x.at[:, 4:].set(1e6))
    for left, right in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(left, right, atol=1e-6)
    np.testing.assert_array_equal(one[1][0][:, 4:], 0)
    _, _, alone = run(layer, x[:, :4], mask=masks.causal())
    for name, value in alone.items():
        np.testing.assert_allclose(one[1][1][name], value, rtol=1e-5)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(one[0]))
    poisoned = moh_gates(x.at[:, 4:].set(jnp.nan), normal(0, 16, 4), num_shared=0, num_active=1, valid=ids >= 0)
    assert np.isfinite(poisoned.gates).all()


def test_the_norm_router_opens_the_largest_queries():
    layer = make(num_shared=1, num_active=2, router="norm", position=Rope())
    x = normal(1, 2, 5, 16)
    found = layer.route(x)
    norms = np.linalg.norm(np.asarray(layer.query(x)), axis=-1)[:, :, 1:]
    expected = np.argsort(np.argsort(-norms, -1), -1) < 2
    np.testing.assert_array_equal(found.gates, np.concatenate([np.ones((2, 5, 1)), expected], -1))
    assert layer.routed_kernel is None
    hard = jax.jit(jax.grad(lambda q: moh_norm_gates(q, num_shared=1, num_active=2).gates[..., 2].sum()))
    soft = jax.grad(lambda q: moh_norm_gates(q, num_shared=1, num_active=2, straight_through=True).gates[..., 2].sum())
    np.testing.assert_array_equal(hard(layer.query(x)), 0)
    assert np.abs(soft(layer.query(x))).max() > 0
    assert np.isfinite(soft(jnp.zeros((1, 2, 4, 3)))).all()
    own = make(num_shared=2, num_active=2, router="norm")
    np.testing.assert_allclose(run(own, x).output, plain(own, x), atol=1e-5)


@pytest.mark.parametrize("router", ["learned", "norm"])
def test_decoding_equals_the_whole(router):
    layer = make(num_shared=2, num_active=1, num_kv_heads=2, router=router, position=Rope())
    x = normal(1, 2, 6, 16)
    whole = run(layer, x, mask=masks.causal()).output
    policy = FullCache(8)
    cache, rows = layer.init_cache(policy, 2), []
    step = nnx.jit(lambda m, x, cache: m(x, cache=(policy, cache))[:2])
    for t in range(6):
        row, cache = step(layer, x[:, t : t + 1], cache)
        rows.append(row)
    np.testing.assert_allclose(jnp.concatenate(rows, 1), whole, atol=1e-5)


def test_defaults_and_errors():
    layer = make(heads=8)
    assert (layer.num_shared, layer.num_active) == (4, 2)
    assert make(heads=1).num_active == 1
    x = normal(0, 1, 2, 5)
    for options in ({"num_shared": 5}, {"num_active": 3}, {"num_shared": 0, "num_active": 0}, {"router": "hash"}):
        with pytest.raises(ValueError, match=r"num_shared|num_active|router"):
            make(**options)
    for weights, name in (
        (kernels(4, 3, True), "shared_kernel"),
        (kernels(4, 2, False), "mix_kernel"),
        ([normal(0, 6, 4), *kernels(4, 2, True)[1:]], "routed_kernel"),
    ):
        with pytest.raises(ValueError, match=name):
            moh_gates(x, *weights, num_shared=2, num_active=2)
    with pytest.raises(ValueError, match="valid"):
        moh_gates(x, normal(0, 5, 4), num_shared=0, num_active=2, valid=np.ones((1, 3), bool))
