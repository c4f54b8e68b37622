import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jattn.cache import FullCache
from jattn.layers.lrpe import Lrpe
from jattn.layers.rope import Rope
from jattn.mechanisms.linear.transnormer_block import TransNormerBlock
from jattn.recurrence.decay_schedules import tnl_decay_slopes

T, M, N, D = 9, 10, 2, 5


def make(**options):
    options = {"num_layers": 3, "hidden": 7, "chunk_size": 4} | options
    return TransNormerBlock(M, N, param_dtype=jnp.float64, rngs=nnx.Rngs(0), **options)


def tokens():
    return np.random.default_rng(5).normal(size=(2, T, M))


def silu(x):
    return x / (1 + np.exp(-x))


def rms(x):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)


def by_hand(block, x, slopes, theta=None):
    """The block in numpy, all pairs at once."""
    weights = {"/".join(map(str, path)): np.asarray(v.get_value()) for path, v in nnx.to_flat_state(nnx.state(block))}
    is_tnl, y, length = "gate/down/kernel" in weights, rms(x), x.shape[1]
    query, key, value = (np.einsum("btm,mnd->btnd", y, weights[f"{w}/kernel"]) for w in ("query", "key", "value"))
    query, key, value = silu(query), silu(key), silu(value) if is_tnl else value
    distance = np.subtract.outer(np.arange(length), np.arange(length))
    turned = np.ones((N, length, length, D)) if theta is None else np.cos(theta[:, None, None] * distance[..., None])
    decay = np.where(distance >= 0, np.exp(-slopes[:, None, None] * np.maximum(distance, 0)), 0)
    scores = np.einsum("btnd,bsnd,ntsd,nts->bnts", query, key, turned, decay)
    o = np.einsum("bnts,bsnd->btnd", scores, value).reshape(2, length, N * D)
    if is_tnl:
        gate = 1 / (1 + np.exp(-(y @ weights["gate/down/kernel"] @ weights["gate/up/kernel"])))
        o = (o - o.mean(-1, keepdims=True)) / np.sqrt(o.var(-1, keepdims=True) + 1e-5)
        o = o * weights["head_norm/scale"] + weights["head_norm/bias"]
    else:
        gate = np.einsum("btm,mnd->btnd", y, weights["gate/kernel"]).reshape(o.shape)
        o = rms(o)
    h = x + (gate * o) @ weights["out/kernel"].reshape(N * D, M)
    y = rms(h)
    return h + (y @ weights["mlp/gate/kernel"] * (y @ weights["mlp/up/kernel"])) @ weights["mlp/down/kernel"]


def close(actual, expected, rtol=1e-9, atol=1e-9):
    np.testing.assert_allclose(actual, expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("mixer", ["gla", "tnl"])
def test_it_is_its_definition(mixer):
    with jax.enable_x64(True):
        x, theta = tokens(), 10000.0 ** (-2 * np.arange(N * D) / (N * D)).reshape(N, D)
        first = make(mixer=mixer)
        close(first(x).output, by_hand(first, x, tnl_decay_slopes(N, 0, 3), theta))
        later = make(mixer=mixer, layer=2)
        close(later(x).output, by_hand(later, x, tnl_decay_slopes(N, 2, 3)))


def test_schedules_and_positions_are_options():
    with jax.enable_x64(True):
        x = tokens()
        for schedule, slopes in (("paper", tnl_decay_slopes(N, 1, 3, "paper")), (None, np.zeros(N))):
            block = make(layer=1, schedule=schedule)
            close(block(x).output, by_hand(block, x, slopes))
        assert isinstance(make().position, Lrpe)
        assert isinstance(make(layer=1, use_lrpe=True).position, Lrpe)
        assert make(layer=1).position is make(use_lrpe=False).position is None
        assert isinstance(make(position=Rope(rotary_dim=2)).position, Rope)


def test_a_factor_on_the_values_changes_nothing():
    with jax.enable_x64(True):
        block, x = make(epsilon=1e-14), tokens()
        expected = block(x).output
        block.value.kernel[...] = 7 * block.value.kernel[...]
        close(block(x).output, expected, 1e-7, 1e-8)


def test_positions_may_start_anywhere():
    with jax.enable_x64(True):
        block, x = make(), tokens()
        close(block(x, positions=np.arange(T) + 500).output, block(x).output)


@pytest.mark.parametrize("mixer", ["gla", "tnl"])
def test_blocks_decode_from_their_states(mixer):
    with jax.enable_x64(True):
        blocks = [make(layer=layer, mixer=mixer) for layer in range(2)]
        x, policy = tokens(), FullCache(T)
        expected = blocks[1](blocks[0](x).output).output
        caches = [block.init_cache(policy, 2, jnp.float64) for block in blocks]
        found = []
        for start, stop in ((0, 4), (4, 5), (5, T)):
            y = np.concatenate([x[:, start:stop], np.full((2, 1, M), np.nan)], 1)
            ids = np.array([[0] * (stop - start) + [-1]] * 2)
            for layer, block in enumerate(blocks):
                y, caches[layer], _ = block(y, cache=(policy, caches[layer]), segment_ids=ids)
            assert not y[:, -1].any()
            found.append(y[:, :-1])
        close(np.concatenate(found, 1), expected)
        assert caches[0].state.shape == (2, N, 2 * D, D)
        assert caches[1].state.shape == (2, N, D, D)


def test_padding_reaches_no_gradient():
    with jax.enable_x64(True):
        graph, state = nnx.split(make())
        x = tokens()
        x[:, 3] = np.nan
        ids = np.array([[0] * 3 + [-1] + [0] * 5] * 2)
        loss = jax.jit(jax.grad(lambda state: jnp.sum(nnx.merge(graph, state)(x, segment_ids=ids).output ** 2)))
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(loss(state)))


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"num_kv_heads": 1}, "num_kv_heads"),
        ({"mixer": "mha"}, "mixer"),
        ({"layer": 3}, "layer"),
        ({"schedule": "linear"}, "schedule"),
        ({"position": Rope(), "use_lrpe": True}, "use_lrpe"),
    ],
)
def test_what_does_not_fit_is_refused(options, word):
    with pytest.raises(ValueError, match=word):
        make(**options)
    with pytest.raises(ValueError, match="divide features"):
        TransNormerBlock(9, 2, rngs=nnx.Rngs(0))
