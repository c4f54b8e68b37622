"""Score mods: every kind of operand in every form, against dense biases, with gradients, on both implementations."""

import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jattn
from jattn import Operand, ScoreMod
from jattn.testing.workbench import quick_jit

IMPLEMENTATIONS = ("reference", "blockwise")
B, T, S, N, K, D, R = 2, 9, 7, 4, 2, 4, 5
TAILS = {"scalar": (), "head": (), "query": (T,), "key": (S,), "pair": (T, S), "offset": (R,)}
LEADS = ((), (1,), (N,), (1, 1), (1, N), (B, 1), (B, N))
pytestmark = pytest.mark.usefixtures("x64")


def add(logit, b, h, i, j, term):
    return logit + term


def multiply(logit, b, h, i, j, factor):
    return logit * factor


def arrays(seed=0):
    rng = np.random.default_rng(seed)
    return tuple(rng.normal(size=s) for s in ((B, T, N, D), (B, S, K, D), (B, S, K, D)))


def spread(array, kind, i=None, j=None, center=(R - 1) // 2):
    """An operand as a bias [B, N, T, S], with gradients."""
    if kind == "offset":
        i, j = np.arange(T)[None] if i is None else i, np.arange(S)[None] if j is None else j
        index = np.clip(j[:, None, None, :] - i[:, None, :, None] + center, 0, R - 1)
        array = array.reshape((1,) * (3 - array.ndim) + array.shape)
        array = jnp.broadcast_to(array, (B, N, R))
        return array[np.arange(B)[:, None, None, None], np.arange(N)[:, None, None], index]
    tail = {"query": (T, 1), "key": (1, S), "pair": (T, S)}.get(kind, (1, 1))
    lead = array.shape[: array.ndim - len(TAILS[kind])]
    return jnp.broadcast_to(array.reshape((1,) * (2 - len(lead)) + lead + tail), (B, N, T, S))


def gradients(call):
    """(out, gradients) of call(query, key, value, operand), compiled without optimization."""

    def loss(*x):
        out = call(*x)
        return jnp.sin(out * jnp.arange(1, D + 1)).sum(), out

    return quick_jit(lambda *x: jax.value_and_grad(loss, (0, 1, 2, 3), has_aux=True)(*x))


def attend(implementation, *qkv, **arguments):
    return jattn.dot_product_attention(*qkv, implementation=implementation, block_sizes=(4, 4), **arguments)


def compare(found, expected):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-11), found, expected)


@pytest.mark.parametrize("kind", list(TAILS))
def test_every_form_is_the_bias_it_stands_for(kind):
    """A chain of one operand for each form of leading axes, so that one program tells about all of them."""
    rng = np.random.default_rng(1)
    leads = [lead for lead in LEADS if kind != "head" or lead]
    operands = [rng.normal(size=lead + TAILS[kind]) for lead in leads]

    def chained(implementation):
        def call(query, key, value, operands):
            mods = [ScoreMod(add, {"term": Operand(x, kind)}) for x in operands]
            mod = functools.reduce(operator.rshift, mods)
            return attend(implementation, query, key, value, is_causal=True, score_mod=mod)

        return gradients(call)

    def biased(query, key, value, operands):
        bias = sum(spread(x, kind) for x in operands)
        return attend("reference", query, key, value, bias=bias, is_causal=True)

    expected = gradients(biased)(*arrays(), operands)
    for implementation in IMPLEMENTATIONS:
        compare(chained(implementation)(*arrays(), operands), expected)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("center", [None, 0, 40])
def test_offsets_are_clipped_and_follow_positions(implementation, center):
    rng = np.random.default_rng(2)
    i, j = rng.permuted(np.tile(np.arange(T) * 3, (B, 1)), axis=1), rng.integers(0, 20, (1, S))
    table = rng.normal(size=(B, N, R))
    middle = (R - 1) // 2 if center is None else center
    expected = gradients(lambda q, k, v, x: attend("reference", q, k, v, bias=spread(x, "offset", i, j, middle)))
    found = gradients(
        lambda q, k, v, x: attend(
            implementation, q, k, v, query_positions=i, key_positions=j,
            score_mod=ScoreMod(add, {"term": Operand(x, "offset", center)}),
        )
    )  # fmt: skip
    compare(found(*arrays(), table), expected(*arrays(), table))


def distance(logit, b, h, i, j, slope):
    return logit - slope * jnp.abs(i - j)


def test_alibi_is_a_bias_and_its_slopes_learn():
    slopes = np.array([0.5, 0.25, 0.125, 0.0625])
    far = np.abs(np.arange(T)[:, None] - np.arange(S))
    expected = gradients(lambda q, k, v, x: attend("reference", q, k, v, bias=-x[None, :, None, None] * far))
    expected = expected(*arrays(), slopes)
    assert np.abs(expected[1][3]).min() > 1e-3
    for implementation in IMPLEMENTATIONS:
        found = gradients(
            lambda q, k, v, x, implementation=implementation: attend(
                implementation, q, k, v, score_mod=ScoreMod(distance, {"slope": Operand(x, "head")})
            )
        )
        compare(found(*arrays(), slopes), expected)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_chains_run_first_to_last(implementation):
    """(logit + term) * factor differs from logit * factor + term; a name may come back in another step."""
    query, key, value = arrays()
    term, factor = np.random.default_rng(3).normal(size=(T, S)), np.array([0.5, 2.0, 1.5, -1.0])
    first = ScoreMod(add, {"term": Operand(term, "pair")})
    second = ScoreMod(multiply, {"factor": Operand(factor, "head")})
    third = ScoreMod(add, {"term": Operand(-1.0 * term, "pair")})
    chained = (first >> second) >> third
    assert [f.__name__ for f, _ in chained.steps] == ["add", "multiply", "add"]
    assert list(chained.flat_operands()) == ["0/term", "1/factor", "2/term"]
    scale = D**-0.5
    # The same by hand: scale and factor go into the query, the rest into the bias.
    bias = factor[:, None, None] * term - term
    expected = attend("reference", query * (scale * factor[:, None]), key, value, bias=bias, scale=1.0)
    for mod in (chained, first >> (second >> third)):
        found = quick_jit(lambda mod: attend(implementation, query, key, value, score_mod=mod))(mod)
        np.testing.assert_allclose(found, expected, atol=1e-12)


def everything(logit, b, h, i, j, rows, columns, table):
    return logit + rows * columns + jnp.tanh(table) + 0.1 * b - 0.2 * h


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_batch_row_head_and_several_operands(implementation):
    rng = np.random.default_rng(4)
    rows, columns, table = rng.normal(size=(B, N, T)), rng.normal(size=(1, N, S)), rng.normal(size=(N, R))

    def bias(rows):
        lead = 0.1 * np.arange(B)[:, None, None, None] - 0.2 * np.arange(N)[:, None, None]
        return rows[..., None] * columns[:, :, None] + jnp.tanh(spread(table, "offset")) + lead

    def mod(rows):
        kinds = {"rows": (rows, "query"), "columns": (columns, "key"), "table": (table, "offset")}
        return ScoreMod(everything, {n: Operand(*x) for n, x in kinds.items()})

    expected = gradients(lambda q, k, v, x: attend("reference", q, k, v, bias=bias(x), is_causal=True))
    found = gradients(lambda q, k, v, x: attend(implementation, q, k, v, score_mod=mod(x), is_causal=True))
    compare(found(*arrays(), rows), expected(*arrays(), rows))


def pick(logit, b, h, i, j, kinds):
    return jnp.where(kinds > 0, logit, -logit)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_integer_operands_carry_no_gradient(implementation):
    query, key, value = arrays()
    kinds = np.array([0, 1, 1, 0])
    mod = ScoreMod(pick, {"kinds": Operand(kinds, "head")})
    found = gradients(lambda q, k, v, x: attend(implementation, q, k, v, score_mod=mod))
    expected = gradients(lambda q, k, v, x: attend("reference", q * np.where(kinds, 1, -1)[:, None], k, v))
    compare(found(query, key, value, 0.0), expected(query, key, value, 0.0))


def test_operands_keep_their_dtype_in_gradients():
    query, key, value = (jnp.asarray(x, jnp.bfloat16) for x in arrays())
    term = jnp.zeros((N, T, S), jnp.bfloat16)

    def loss(term, implementation):
        mod = ScoreMod(add, {"term": Operand(term, "pair")})
        return attend(implementation, query, key, value, score_mod=mod).astype(jnp.float32)[..., 0].sum()

    found = [jax.jit(jax.grad(loss), static_argnums=1)(term, n) for n in IMPLEMENTATIONS]
    assert [x.dtype for x in found] == [jnp.bfloat16] * 2
    np.testing.assert_allclose(*(np.asarray(x, np.float32) for x in found), atol=0.02)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_operands_under_vmap(implementation):
    query, key, value = arrays()
    terms = np.random.default_rng(5).normal(size=(3, N, R))

    def loss(term):
        mod = ScoreMod(add, {"term": Operand(term, "offset")})
        return jnp.sin(attend(implementation, query, key, value, score_mod=mod)).sum()

    found = quick_jit(jax.vmap(jax.grad(loss)))(terms)
    one = quick_jit(jax.grad(loss))
    np.testing.assert_allclose(found, np.stack([one(term) for term in terms]), atol=1e-12)


def call(**operands):
    return attend("reference", *arrays(), score_mod=ScoreMod(add, operands))


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        ("scalar", (3,)),
        ("scalar", (1, 1, 1)),
        ("head", ()),
        ("head", (K,)),
        ("query", (S,)),
        ("query", (1,)),
        ("key", (B, T)),
        ("pair", (T,)),
        ("pair", (S, T)),
        ("pair", (3, N, T, S)),
        ("offset", ()),
        ("offset", (0,)),
        ("offset", (K, R)),
    ],
)
def test_shapes_that_do_not_fit_are_named(kind, shape):
    with pytest.raises(ValueError) as error:
        call(term=Operand(np.zeros(shape), kind))
    for part in ("operand '0/term'", f"kind '{kind}'", f"shape {shape}", "expected [", f"T={T}, S={S}"):
        assert part in str(error.value)


def test_other_errors():
    with pytest.raises(ValueError, match="kind must be one of scalar, head, .*, got 'row'"):
        Operand(np.zeros(3), "row")
    with pytest.raises(ValueError, match="center belongs to kind 'offset'"):
        Operand(np.zeros(3), "head", 1)
    with pytest.raises(TypeError, match="score_mod operand '0/term' is ndarray; expected an Operand"):
        call(term=np.zeros(N))
    with pytest.raises(TypeError, match="score_mod is function; expected a ScoreMod"):
        attend("reference", *arrays(), score_mod=add)
    with pytest.raises(TypeError, match="score mods chain with score mods, got function"):
        ScoreMod(add) >> add
    with pytest.raises(ValueError, match="2 functions need as many mappings"):
        attend("reference", *arrays(), score_mod=ScoreMod((add, add), ({},)))
    with pytest.raises(ValueError, match="operands must map names to Operands, got list"):
        attend("reference", *arrays(), score_mod=ScoreMod(add, []))
