import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jattn.layers import Sglu


def test_it_is_the_product_of_two_projections():
    with jax.enable_x64(True):
        layer = Sglu(6, 5, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
        x = np.random.default_rng(0).normal(size=(2, 3, 6))
        first, second, third = (np.asarray(part.kernel.get_value()) for part in (layer.gate, layer.up, layer.down))
        np.testing.assert_allclose(layer(x), ((x @ first) * (x @ second)) @ third, rtol=1e-12)
        # Nothing in it is an activation or a bias: it is quadratic.
        np.testing.assert_allclose(layer(-3 * x), 9 * layer(x), rtol=1e-12)
        assert len(jax.tree.leaves(nnx.state(layer))) == 3


def test_the_hidden_width_is_that_of_gated_layers():
    assert Sglu(96, rngs=nnx.Rngs(0)).up.out_features == 256
    assert Sglu(1, rngs=nnx.Rngs(0)).up.out_features == 2
