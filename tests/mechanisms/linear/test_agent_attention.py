import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jattn
from jattn.mechanisms.linear.agent_attention import AgentAttention, adaptive_average, agent_attention
from jattn.models import ViT
from jattn.models.config import TransformerConfig

T, S, N, K, D, V, AGENTS = 7, 9, 4, 2, 3, 5, 3


def arrays(agents=AGENTS, dtype=np.float64):
    random = np.random.default_rng(0)
    shapes = ((2, T, N, D), (2, agents, N, D), (2, S, K, D), (2, S, K, V))
    return tuple(random.normal(size=shape).astype(dtype) for shape in shapes)


def dense(
    query, agent, key, value, agent_bias=0.0, query_bias=0.0, mask=True, agent_scale=D**-0.5, query_scale=D**-0.5
):
    """The definition, and the implied weights of keys."""
    key, value = (x.repeat(N // K, 2) for x in (key, value))
    first = agent_scale * jnp.einsum("btnd,bsnd->bnts", agent, key) + agent_bias
    second = query_scale * jnp.einsum("btnd,bsnd->bnts", query, agent) + query_bias
    weights = jax.nn.softmax(second, -1) @ jax.nn.softmax(jnp.where(mask, first, -jnp.inf), -1)
    return jnp.einsum("bnts,bsnd->btnd", weights, value), weights


def close(actual, expected, **tolerance):
    np.testing.assert_allclose(actual, expected, **{"rtol": 1e-9, "atol": 1e-12, **tolerance})


def test_it_is_its_definition_with_all_gradients():
    with jax.enable_x64(True):
        given = tuple(map(jnp.asarray, arrays()))
        random = np.random.default_rng(1)
        biases = random.normal(size=(N, AGENTS, S)), random.normal(size=(N, T, AGENTS))
        mask = np.ones((2, 1, 1, S), bool)
        mask[0, ..., 4:] = False

        def fast(*x):
            return agent_attention(
                *x[:4], agent_bias=x[4], query_bias=x[5], mask=mask, agent_scale=0.7, query_scale=1.3
            )

        def slow(*x):
            return dense(*x, mask=mask, agent_scale=0.7, query_scale=1.3)[0]

        results = (
            jax.jit(jax.value_and_grad(lambda *x, f=f: jnp.sum(jnp.sin(f(*x))), tuple(range(6))))(*given, *biases)
            for f in (fast, slow)
        )
        jax.tree.map(close, *results)


def test_implied_weights_are_stochastic_with_the_rank_of_the_agents():
    with jax.enable_x64(True):
        query, agent, key, _ = arrays()
        one_hot = np.broadcast_to(np.eye(S)[:, None], (2, S, K, S))
        weights = np.swapaxes(agent_attention(query, agent, key, one_hot), 1, 2)
        close(weights, dense(query, agent, key, one_hot)[1])
        close(weights.sum(-1), 1.0)
        assert np.linalg.matrix_rank(weights).max() <= AGENTS


def test_one_agent_gives_every_query_what_it_gathered():
    with jax.enable_x64(True):
        query, agent, key, value = arrays(agents=1)
        gathered = jattn.dot_product_attention(agent, key, value)
        close(agent_attention(query, agent, key, value), np.broadcast_to(gathered, (2, T, N, V)))


def test_queries_as_agents_smooth_dense_attention_and_sharp_ones_are_it():
    with jax.enable_x64(True):
        query, _, key, value = arrays()
        plain = jattn.dot_product_attention(query, key, value)
        smooth = jattn.dot_product_attention(query, query, plain)
        close(agent_attention(query, query, key, value), smooth)
        unit = query / np.linalg.norm(query, axis=-1, keepdims=True)
        sharp = agent_attention(unit, unit, key, value, query_scale=1e6)
        close(sharp, jattn.dot_product_attention(unit, key, value), rtol=1e-6)


def test_the_order_of_agents_does_not_matter():
    with jax.enable_x64(True):
        query, agent, key, value = arrays()
        random = np.random.default_rng(2)
        first, second = random.normal(size=(N, AGENTS, S)), random.normal(size=(N, T, AGENTS))
        order = [2, 0, 1]
        out = agent_attention(query, agent, key, value, agent_bias=first, query_bias=second)
        moved = agent_attention(
            query, agent[:, order], key, value, agent_bias=first[:, order], query_bias=second[..., order]
        )
        close(moved, out)


def test_rows_without_keys_give_zero_and_poison_stays_hidden():
    query, agent, key, value = arrays(dtype=np.float32)
    mask = np.ones((2, 1, 1, S), bool)
    mask[0, ..., :3] = False
    mask[1] = False
    attend = jax.jit(functools.partial(agent_attention, mask=mask))
    clean = attend(query, agent, key, value)
    assert not clean[1].any()
    key[0, :3], value[0, :3], key[1], value[1] = np.nan, np.inf, np.inf, np.nan
    np.testing.assert_array_equal(attend(query, agent, key, value), clean)


@pytest.mark.parametrize(("length", "cells"), [(4, 2), (5, 2), (7, 3), (3, 5), (1, 2)])
def test_cells_average_what_the_definition_says(length, cells):
    weights = adaptive_average(length, cells)
    for i in range(cells):
        low, high = i * length // cells, -(-(i + 1) * length // cells)
        expected = np.zeros(length)
        expected[low:high] = 1 / (high - low)
        close(weights[i], expected)


@nnx.jit
def run(layer, x):
    return layer(x).output


def layer_and_input(class_token, **options):
    layer = AgentAttention(
        8, 2, grid=(3, 4), num_agents=4, class_token=class_token, use_bias=True, rngs=nnx.Rngs(0), **options
    )
    x = np.random.default_rng(3).normal(size=(2, 12 + class_token, 8)).astype(np.float32)
    return layer, x


def by_hand(layer, x, first):
    """The layer with numpy loops for pooling, resizing and convolution."""
    q, k, v = (np.asarray(p(x)) for p in (layer.query, layer.key, layer.value))
    grid_q, grid_v = (a[:, first:].reshape(2, 3, 4, 2, 4) for a in (q, v))
    agents = [grid_q[:, r0:r1, c0:c1].mean((1, 2)) for r0, r1 in ((0, 2), (1, 3)) for c0, c1 in ((0, 2), (2, 4))]
    an, na = (_bilinear(np.asarray(p.get_value()), 3, 4) for p in (layer.an_bias, layer.na_bias))
    ah, aw, ha, wa = (
        np.asarray(getattr(layer, n).get_value())[0] for n in ("ah_bias", "aw_bias", "ha_bias", "wa_bias")
    )
    agent_bias = (an + ah + aw).reshape(2, 4, 12)
    query_bias = na.reshape(2, 4, 12).swapaxes(1, 2) + (ha + wa).reshape(2, 12, 4)
    if first:
        agent_bias = np.concatenate([np.asarray(layer.ac_bias.get_value())[0], agent_bias], 2)
        query_bias = np.concatenate([np.asarray(layer.ca_bias.get_value())[0], query_bias], 1)
    out = np.array(agent_attention(q, np.stack(agents, 1), k, v, agent_bias=agent_bias, query_bias=query_bias))
    kernel, bias = np.asarray(layer.conv.kernel.get_value()), np.asarray(layer.conv.bias.get_value())
    padded = np.pad(grid_v.reshape(2, 3, 4, 8), [(0, 0), (1, 1), (1, 1), (0, 0)])
    local = bias + sum(padded[:, r : r + 3, c : c + 4] * kernel[r, c, 0] for r in range(3) for c in range(3))
    out[:, first:] += local.reshape(2, 12, 2, 4)
    return np.asarray(layer.out(jnp.asarray(out)))


def _bilinear(table, height, width):
    """Half-pixel centers, no smoothing."""

    def matrix(source, target):
        place = np.clip((np.arange(target) + 0.5) * source / target - 0.5, 0, source - 1)
        low = np.minimum(place.astype(int), source - 2)
        rows = np.zeros((target, source))
        rows[np.arange(target), low], rows[np.arange(target), low + 1] = 1 - (place - low), place - low
        return rows

    return np.einsum("hy,wx,nayx->nahw", matrix(7, height), matrix(7, width), table)


@pytest.mark.parametrize("class_token", [False, True])
def test_the_layer_is_what_the_definition_says(class_token):
    layer, x = layer_and_input(class_token)
    for _, param in nnx.iter_graph(layer):
        if isinstance(param, nnx.Param):
            random = np.random.default_rng(param.get_value().size)
            param.set_value(jnp.asarray(random.normal(size=param.get_value().shape), jnp.float32))
    np.testing.assert_allclose(run(layer, x), by_hand(layer, x, int(class_token)), rtol=2e-3, atol=1e-3)


def test_without_biases_and_convolution_the_layer_is_the_primitive():
    layer, x = layer_and_input(False)
    for name in ("an_bias", "na_bias", "ah_bias", "aw_bias", "ha_bias", "wa_bias"):
        param = getattr(layer, name)
        assert 0 < float(jnp.std(param.get_value())) < 0.03
        param.set_value(jnp.zeros_like(param.get_value()))
    layer.conv.kernel.set_value(jnp.zeros_like(layer.conv.kernel.get_value()))
    q, k, v = (p(x) for p in (layer.query, layer.key, layer.value))
    rows, columns = adaptive_average(3, 2), adaptive_average(4, 2)
    agent = jnp.einsum("ph,qw,bhwnd->bpqnd", rows, columns, q.reshape(2, 3, 4, 2, 4)).reshape(2, 4, 2, 4)
    np.testing.assert_allclose(run(layer, x), layer.out(agent_attention(q, agent, k, v)), rtol=1e-5, atol=1e-6)


def test_every_parameter_gets_a_gradient_and_dropout_acts():
    layer, x = layer_and_input(True, dropout_rate=0.5)
    gradients = nnx.jit(nnx.grad(lambda layer: jnp.sum(jnp.sin(3 * layer(x).output))))(layer)
    key_bias = {"key"}  # adding a constant to all keys changes no softmax
    for path, gradient in jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(gradients)):
        names = [str(getattr(p, "key", p)) for p in path]
        assert np.isfinite(gradient).all()
        assert np.abs(gradient).max() > 0 or (names[0] in key_bias and names[-1] == "bias"), names
    dropped = nnx.jit(lambda layer, x: layer(x, deterministic=False, rngs=nnx.Rngs(dropout=1)).output)(layer, x)
    assert not np.allclose(dropped, run(layer, x))
    with pytest.raises(ValueError, match="rngs must be given"):
        layer(x, deterministic=False)


@pytest.mark.parametrize("pooling", ["mean", "class"])
def test_a_vision_transformer_takes_it_by_name(pooling):
    model = ViT(
        TransformerConfig(features=8, num_layers=1, num_heads=2, position="learned"),
        image_size=(4, 6),
        patch_size=2,
        num_channels=1,
        num_classes=3,
        pooling=pooling,
        attention="AgentAttention",
        attention_options={"grid": (2, 3), "num_agents": 4, "class_token": pooling == "class"},
        rngs=nnx.Rngs(0),
    )
    logits = nnx.eval_shape(lambda model: model(jnp.ones((2, 4, 6, 1))).logits, model)
    assert logits.shape == (2, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_agents": 5}, "square number"),
        ({"num_agents": 0}, "square number"),
        ({"grid": None}, "grid must be"),
        ({"grid": (0, 3)}, "grid must be"),
        ({"bias_size": 0}, "bias_size"),
        ({"use_sinks": True}, "no place"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        AgentAttention(8, 2, **{"grid": (3, 4), "num_agents": 4, **options}, rngs=nnx.Rngs(0))


def test_bad_calls_are_named():
    layer, x = layer_and_input(False)
    for options, message in (
        ({"mask": jattn.masks.causal()}, "takes no is_causal"),
        ({"mask": np.ones((2, 1, 1, 12), bool)}, "takes no mask"),
        ({"segment_ids": np.zeros((2, 12), int)}, "takes no segment_ids"),
    ):
        with pytest.raises(ValueError, match=message):
            layer(x, **options)
    with pytest.raises(ValueError, match="3 \\* 4 tokens"):
        layer(x[:, :11])
    query, agent, key, value = arrays()
    with pytest.raises(ValueError, match="agent must be"):
        agent_attention(query, agent[:, :, :2], key, value)
    with pytest.raises(ValueError, match="key mask"):
        agent_attention(query, agent, key, value, mask=np.ones((2, 1, T, S), bool))
