"""Each error of the hook names the field."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

import jattn
from jattn.probes import AttnHook, attention


def plain(query, key, value, *, mask=None, is_causal=False):
    """A function of (query, key, value) form that is not the engine."""
    return jattn.dot_product_attention(query, key, value, mask=mask, is_causal=is_causal)


def halve(weights, params):
    return weights / 2


def double(weights, params, factor):
    return weights * factor


def overwrite(weights, params):
    return params


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"qkv": 3}, "qkv"),
        ({"out": functools.partial(double, factor=np.ones(2))}, "out must be hashable"),
        ({"heads": (0, 0)}, "heads"),
        ({"heads": (-1,)}, "heads"),
        ({"heads": ()}, "heads"),
        ({"observe": {"lse", "losses"}}, "observe names losses"),
    ],
)
def test_errors_of_the_hook(fields, named):
    with pytest.raises(ValueError, match=named):
        AttnHook(**fields)


@pytest.mark.parametrize(
    ("hook", "named"),
    [
        (AttnHook(weights=halve, heads=(4,)), "heads"),
        (AttnHook(weights=halve, rows=np.array([5])), "rows"),
        (AttnHook(weights=halve, rows=np.array([4, -1])), "rows must be distinct"),
        (AttnHook(weights=halve, rows=np.array([0.5])), "rows"),
        (AttnHook(weights=halve, rows=np.zeros((3, 1), int)), "rows"),
        (AttnHook(observe="group_mass"), "group_mass"),
        (AttnHook(observe="col_mass", row_weight=np.ones(4)), "row_weight"),
        (AttnHook(weights=overwrite, params=jnp.ones(3)), "weights returned"),
        (AttnHook(qkv=lambda query, key, value, params: query), "qkv must return"),
        (AttnHook(qkv=lambda query, key, value, params: (query[:, :1], key, value)), "qkv returned a query"),
        (AttnHook(out=lambda output, value, params: output), "out must return"),
        (AttnHook(mask=np.ones(7)), "mask"),
        (AttnHook(bias=np.ones(6)), "bias"),
    ],
)
def test_errors_of_a_request(arrays, hook, named):
    with pytest.raises(ValueError, match=named):
        attention(**arrays, hook=hook)


def test_errors_of_another_function(arrays):
    with pytest.raises(ValueError, match="return_residual"):
        attention(**arrays, attention_fn=plain, hook=AttnHook(observe="lse"))
    with pytest.raises(ValueError, match="bias"):
        attention(**arrays, attention_fn=plain, hook=AttnHook(bias=np.ones(7)))


def test_errors_of_the_call(arrays):
    with pytest.raises(ValueError, match="observe"):
        attention(**arrays, return_residual=True)
    with pytest.raises(ValueError, match="hook"):
        attention(**arrays, hook={"bias": 1})
    with pytest.raises(ValueError, match="query as"):
        attention(*(x[0] for x in arrays.values()), hook=AttnHook(observe="lse"))
