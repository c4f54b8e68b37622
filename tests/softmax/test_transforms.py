"""Contract 6: every transformation of JAX on both implementations; the reference is differentiated by JAX alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import jattn

B, T, S, N, K, D, DV = 2, 13, 11, 4, 2, 4, 3


def attend(implementation, query, key, value, bias):
    blocks = (4, 4) if implementation == "blockwise" else None
    return jattn.dot_product_attention(
        query, key, value, bias, is_causal=True, implementation=implementation, block_sizes=blocks, return_residual=True
    )


def loss(implementation, arrays):
    out, lse = attend(implementation, *arrays)
    return jnp.sin(out).sum() + jnp.cos(lse).sum()


def arrays():
    rng = np.random.default_rng(0)
    shapes = ((B, T, N, D), (B, S, K, D), (B, S, K, DV), (1, N, T, S))
    return tuple(jnp.asarray(rng.standard_normal(shape)) for shape in shapes)


def direction(tree):
    return jax.tree.map(lambda x: jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape), tree)


def hessian_vector_product(f, x, t):
    return jax.jvp(jax.grad(f), (x,), (t,))[1]


def reverse_over_reverse(f, x, t):
    return jax.grad(lambda x: sum((g * d).sum() for g, d in zip(jax.grad(f)(x), t, strict=True)))(x)


def third_derivative(f, x, t):
    return jax.jvp(lambda x: hessian_vector_product(f, x, t), (x,), (t,))[1]


DERIVATIVES = {
    "jvp": lambda f, x, t: jax.jvp(f, (x,), (t,)),
    "linearize": lambda f, x, t: jax.linearize(f, x)[1](t),
    "forward over reverse": hessian_vector_product,
    "reverse over reverse": reverse_over_reverse,
    "reverse over forward": lambda f, x, t: jax.grad(lambda x: jax.jvp(f, (x,), (t,))[1])(x),
    "third derivative": third_derivative,
    "checkpoint": lambda f, x, t: jax.grad(jax.checkpoint(f))(x),
}


def agree(actual, expected, atol=1e-11):
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, atol=atol)


@pytest.mark.parametrize("name", list(DERIVATIVES))
def test_derivatives(name, x64):
    x = arrays()
    run = [
        jax.jit(functools.partial(DERIVATIVES[name], functools.partial(loss, i))) for i in ("blockwise", "reference")
    ]
    agree(*(f(x, direction(x)) for f in run))


def batched_cotangents(implementation, x):
    out, pull = jax.vjp(functools.partial(attend, implementation), *x)
    return jax.vmap(pull)(jax.tree.map(lambda y: jnp.stack([y, jnp.cos(y)]), out))


BATCHING = {
    "gradient, query only": lambda i, x: jax.vmap(
        jax.grad(functools.partial(loss, i)), in_axes=((0, None, None, None),)
    )((jnp.stack([x[0], 2 * x[0], x[0] - 1]), *x[1:])),
    "nested, odd axes": lambda i, x: jax.vmap(
        jax.vmap(lambda q, k: attend(i, q, k, *x[2:])[0], in_axes=(0, None)), in_axes=(None, -1), out_axes=1
    )(jnp.stack([x[0], -x[0]]), jnp.stack([x[1], 0.5 * x[1]], -1)),
    "cotangents only": batched_cotangents,
    "jacobian": lambda i, x: jax.jacrev(lambda q: attend(i, q, *x[1:])[0][:1, :2, :2])(x[0]),
    "forward jacobian": lambda i, x: jax.jacfwd(lambda b: attend(i, *x[:3], b)[0].sum(0)[:2])(x[3]),
}


@pytest.mark.parametrize("name", list(BATCHING))
def test_batching(name, x64):
    x = arrays()
    agree(*(jax.jit(functools.partial(BATCHING[name], i))(x) for i in ("blockwise", "reference")))


@pytest.mark.parametrize("implementation", ["blockwise", "reference"])
@pytest.mark.parametrize("symbolic", [False, True], ids=["concrete", "symbolic batch"])
def test_export(implementation, symbolic, x64):
    pytest.importorskip("flatbuffers", reason="jax.export serializes with flatbuffers: pip install jattn[export]")
    x = arrays()
    gradient = jax.jit(jax.grad(functools.partial(loss, implementation)))
    (batch,) = export.symbolic_shape("b") if symbolic else (B,)
    types = tuple(jax.ShapeDtypeStruct((batch if y.shape[0] == B else 1, *y.shape[1:]), y.dtype) for y in x)
    again = export.deserialize(export.export(gradient)(types).serialize())
    agree(again.call(x), gradient(x))


SHARDED = """
    import re
    import jax, jax.numpy as jnp, numpy as np
    from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
    import jattn

    def attend(implementation, query, key, value, ids):
        blocks = (8, 8) if implementation == "blockwise" else None
        return jattn.dot_product_attention(
            query, key, value, is_causal=True, segment_ids=ids, implementation=implementation, block_sizes=blocks,
            return_residual=True)

    def loss(implementation, arrays, ids):
        out, lse = attend(implementation, *arrays, ids)
        return jnp.sin(out).sum() + jnp.cos(lse).sum()

    rng = np.random.default_rng(0)
    arrays = tuple(jnp.asarray(rng.standard_normal((4, 20, 4, 4)), jnp.float32) for _ in range(3))
    ids = jnp.array([[0] * 9 + [1] * 11] * 4)
    dots = jax.tree.map(jnp.ones_like, arrays)
    expected = jax.jit(jax.grad(lambda x: loss("reference", x, ids)))(arrays)
    curved = jax.jit(lambda x: jax.jvp(jax.grad(lambda x: loss("reference", x, ids)), (x,), (dots,))[1])(arrays)

    def check(name, actual, wanted=expected):
        error = max(float(jnp.abs(np.asarray(x) - np.asarray(y)).max()) for x, y in zip(actual, wanted))
        assert error < 1e-4, (name, error)
        print(name, error)
"""

AUTO_AND_EXPLICIT = """
    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh = jax.make_mesh((4, 2), ("data", "heads"), axis_types=(kind, kind))
        for spec in (P("data", None, "heads"), P("data"), P(None, None, "heads")):
            with jax.set_mesh(mesh):
                x = tuple(jax.device_put(a, NamedSharding(mesh, spec)) for a in arrays)
                split = jax.device_put(ids, NamedSharding(mesh, P(spec[0])))
                def parts(x, split):
                    out, pull = jax.vjp(lambda *x: attend("blockwise", *x, split)[0], *x)
                    return pull(out)
                program = jax.jit(parts).lower(x, split).compile().as_text()
                found = re.findall("all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter", program)
                assert not found, (kind, spec, found)
                check((kind, spec), jax.jit(jax.grad(lambda x, s: loss("blockwise", x, s)))(x, split))
"""

SHARD_MAP = """
    mesh = jax.make_mesh((4, 2), ("data", "heads"), axis_types=(AxisType.Auto, AxisType.Auto))
    split = P("data", None, "heads")
    for implementation in ("reference", "blockwise"):
        inner = jax.shard_map(
            lambda q, k, v, ids: attend(implementation, q, k, v, ids), mesh=mesh,
            in_specs=(split, split, split, P("data")), out_specs=(split, split))
        def outer(x):
            out, lse = inner(*x, ids)
            return jnp.sin(out).sum() + jnp.cos(lse).sum()
        check(implementation, jax.jit(jax.grad(outer))(arrays))
        check("hvp", jax.jit(lambda x: jax.jvp(jax.grad(outer), (x,), (dots,))[1])(arrays), curved)
        # Keys that all devices of an axis share: their gradient is summed over it.
        shared = jax.shard_map(
            lambda q, k, v: jax.grad(lambda k: attend(implementation, q, k, v, None)[0].sum())(k), mesh=mesh,
            in_specs=(split, P(None, None, "heads"), P(None, None, "heads")), out_specs=P(None, None, "heads"))
        q, k, v = arrays[0], arrays[1][:1], arrays[2][:1]
        tile = lambda x: jnp.tile(x, (4, 1, 1, 1))
        plain = jax.grad(lambda k: attend("reference", q, tile(k), tile(v), None)[0].sum())(k)
        check("shared keys", [jax.jit(shared)(q, k, v)], [plain])
"""


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(AUTO_AND_EXPLICIT, marks=pytest.mark.slow, id="auto and explicit"),
        pytest.param(SHARD_MAP, id="shard_map"),
    ],
)
def test_sharding(body, run_with_devices):
    """No collective that the mathematics does not ask for; shard_map under its default check_vma."""
    print(run_with_devices(8, SHARDED + body))
