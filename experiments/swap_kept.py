"""Kept attention mass: how much of full attention stands on the pairs that a mechanism keeps, on real queries and keys.

    share_i = sum_{j kept} w_ij,   w = the softmax of the unswapped model, row i of one head of one layer

Every layer is given what it gets in the unswapped model, so errors of the layers below do not enter. Where a mechanism
is one call of the softmax engine under masks and layouts, the pairs are those that these leave, and

    share_i = exp(lse_i(kept) - lse_i(all))

over all rows. Where it is something else, its weights are read from one-hot values, on a shorter text and some rows;
pairs of a weight other than 0 are kept. Rows of the first half see little, so only rows of the second half count.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.measures import recorded_problems
from jattn import masks
from jattn.probes import AttnHook, attention, capture, kept_mass, kept_mass_of_lse
from jattn.softmax.api import dot_product_attention
from jattn.softmax.normalizers import Softmax
from jattn.softmax.problem import dense_visibility

SHORT = 1024
"""Tokens of which weights are read through one-hot values; their work grows with the cube."""
ROWS = 32
"""Rows that are looked at there."""
AGREEMENT = 1e-3
"""How far the share by masks and the share by weights may lie apart before the weights are believed."""


class Seen(NamedTuple):
    """What the layers of the unswapped model were given, and what they saw; NumPy arrays."""

    streams: np.ndarray
    """`[L, T, M]`, what enters the block."""
    queries: np.ndarray
    """`[L, T, N, D]`, after positions, as `jattn.tasks.real_qkv` gives them."""
    keys: np.ndarray
    """`[L, T, K, D]`."""
    lse: np.ndarray
    """`[L, T, N]`."""


def see(model: nnx.Module, tokens: np.ndarray) -> Seen:
    """Run the unswapped model on tokens `[1, T]`."""
    graphdef, state = nnx.split(model)

    @jax.jit
    def run(state: Any) -> Seen:
        names = ("query", "key", "lse")
        found = capture(nnx.merge(graphdef, state), tokens, observe=names, sites=("embed", "resid"))
        streams = jnp.concatenate([found["embed"], found["resid"][:-1, 0]])
        return Seen(streams, *(found[name][:, 0] for name in names))

    return Seen(*(np.asarray(x) for x in run(state)))


def kept(
    model: nnx.Module, base: nnx.Module, seen: Seen, layers: Sequence[int], heads: Sequence[int]
) -> dict[str, Any]:
    """Kept mass and visited share of a swapped model.

    Args:
        model: swapped.
        base: the unswapped model.
        seen: what `see` found there.
        layers: the swapped ones.
        heads: the swapped ones.

    Returns:
        `kept_mass` and `visited_share`, means over the swapped layers and heads (and rows of the second half);
        `kept_by_layer`, one number for each of the layers; `kept_how`, in words. What is missing is not known, or
        every pair is kept.
    """
    heads = np.asarray(heads)
    parts = [_Layer(model, base, seen, layer) for layer in layers]
    first, short = parts[0], min(SHORT, seen.lse.shape[1])
    rows = np.unique(np.linspace(short // 2, short - 1, ROWS).round().astype(int))
    try:
        by_weights = first.by_weights(short, rows)
    except Exception as error:  # What attends in its own way need not take a hook; its reason is told.
        by_weights, why = None, f"{type(error).__name__}: {error}".split("\n")[0][:200]
    visible = first.visible()
    if visible is not None and by_weights is not None:
        by_mask = _share(first.full_weights(short, rows), first.visible(short)[:, rows])
        if np.abs(by_mask - by_weights)[heads].max() > AGREEMENT:
            visible = None  # There is more to the mechanism than what the engine was asked.
    if visible is not None:
        length, pairs, found = seen.lse.shape[1], [], []
        for part in parts:
            visible = part.visible()
            pairs.append(np.broadcast_to(visible, (seen.lse.shape[2], length, length))[heads].mean())
            found.append(part.by_lse(visible)[length // 2 :, heads].mean())
        how, share = f"lse under the mask, {length} tokens", float(np.mean(pairs))
    elif by_weights is not None:
        found, share = [part.by_weights(short, rows)[heads].mean() for part in parts], None
        how = f"weights on one-hot values, {len(rows)} rows of {short} tokens"
    else:
        return {"kept_how": f"n/a: {why}"}
    mean = float(np.mean(found))
    if mean > 1 - 1e-5:
        return {"visited_share": share, "kept_how": "n/a: keeps every pair"}
    return {"kept_mass": mean, "kept_by_layer": list(map(float, found)), "kept_how": how, "visited_share": share}


class _Layer:
    """A layer of the swapped model, on what the same layer of the unswapped one was given."""

    def __init__(self, model: Any, base: Any, seen: Seen, layer: int) -> None:
        self._layer = nnx.split(model.stack.blocks[layer].attention)
        stream, self._queries, self._keys, self._lse = (x[layer][None] for x in seen)
        self._inputs = base.stack.blocks[layer].attention_norm(jnp.asarray(stream))

    def visible(self, length: int | None = None) -> np.ndarray | None:
        """Pairs that masks and layouts leave, `[1 or N, T, T]`; None where the layer is no softmax under such."""
        found = _visible(*self._layer, self._inputs[:, :length])
        return None if found is None else np.asarray(found[0])

    def by_lse(self, visible: np.ndarray) -> np.ndarray:
        """Share of every row `[T, N]`."""
        return np.asarray(_by_lse(self._queries, self._keys, self._lse, visible[None])[0])

    def by_weights(self, length: int, rows: np.ndarray) -> np.ndarray:
        """Mean share of some rows, `[N]`."""
        weights = _weights(*self._layer, self._inputs[:, :length], rows)
        return _share(self.full_weights(length, rows), weights[0] != 0)

    def full_weights(self, length: int, rows: np.ndarray) -> jax.Array:
        """Of full attention, `[N, R, S]`."""
        return _full_weights(self._queries[:, :length], self._keys[:, :length], rows)[0]


def _share(weights: Any, support: Any) -> np.ndarray:
    return np.asarray(kept_mass(weights, support))


@functools.partial(jax.jit, static_argnums=0)
def _visible(graphdef: Any, state: Any, inputs: Any) -> Any:
    with recorded_problems() as problems:
        nnx.merge(graphdef, state)(inputs, mask=masks.causal())
    length = inputs.shape[1]
    if len(problems) != 1 or not isinstance(problems[0].normalizer, Softmax):
        return None
    batch, rows, columns, _, _ = problems[0].sizes
    visible = dense_visibility(problems[0])
    if (batch, rows, columns) != (1, length, length) or visible is None:
        return None
    return jnp.asarray(visible)


@jax.jit
def _by_lse(query: Any, key: Any, full: Any, visible: Any) -> Any:
    _, lse = dot_product_attention(query, key, key, mask=visible, return_residual=True)
    return kept_mass_of_lse(lse, full)


@functools.partial(jax.jit, static_argnums=0)
def _weights(graphdef: Any, state: Any, inputs: Any, rows: Any) -> Any:
    hook = AttnHook(rows=rows, observe={"row_weights"})
    return nnx.merge(graphdef, state)(inputs, mask=masks.causal(), hook=hook).aux["hook"]["row_weights"]


@jax.jit
def _full_weights(query: Any, key: Any, rows: Any) -> Any:
    hook = AttnHook(rows=rows, observe={"row_weights"})
    return attention(query, key, key, is_causal=True, hook=hook)[1]["row_weights"]
