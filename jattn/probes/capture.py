"""What a whole model shows: hooks for every layer, and everything that attention did as one pytree.

Models are anything that is called as `model(inputs, hook=..., record=...)` and returns an output with `aux`, such as
those of `jattn.models`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

from jattn.probes.hook import AttnHook


def for_layers(hook: AttnHook, num_layers: int) -> AttnHook:
    """A hook whose arrays have a leading axis of layers, each layer the same, as models take it.

    Args:
        hook: for one attention call.
        num_layers: L.

    Returns:
        The hook for all layers; change a layer's part of an array with `dataclasses.replace` and `.at[layer].set`.

    Example:
        >>> for_layers(AttnHook(rows=jnp.array([-1]), observe={"row_weights"}), 3).rows.tolist()
        [[-1], [-1], [-1]]
    """
    return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (num_layers, *jnp.shape(leaf))), hook)


def capture(
    model: Any,
    inputs: Any,
    *,
    observe: Iterable[str] = ("row_weights",),
    rows: Any = None,
    heads: Iterable[int] | None = None,
    sites: Iterable[str] = ("head_out", "resid"),
    **call: Any,
) -> dict[str, Any]:
    """Run a model and keep what its attention did.

    Args:
        model: called as `model(inputs, hook=..., record=..., **call)`; its `config` tells the number of layers.
        inputs: tokens `[B, T]`, images, or what the model takes.
        observe: of every attention call: 'row_weights' (weights after the normalizer), 'lse', 'entropy', 'col_mass'.
        rows: query rows of the weights, all if not given; negative ones count from the end.
        heads: query heads of the weights, all if not given.
        sites: of the model: 'embed', 'head_out', 'attn_out', 'mlp_out', 'resid'.
        **call: further arguments of the model.

    Returns:
        A dictionary: 'weights' `[L, B, heads, rows, S]`, 'lse' and 'entropy' `[L, B, T, N]`, 'col_mass' `[L, B, S, K]`,
        each site as the model stacks it, and 'output', the logits.

    Raises:
        ValueError: an unknown site or observation, or an attention that cannot show it.

    Example:
        >>> from flax import nnx
        >>> from jattn.models import DecoderLM, TransformerConfig
        >>> config = TransformerConfig(vocab_size=11, features=16, num_layers=2, num_heads=4)
        >>> seen = capture(DecoderLM(config, rngs=nnx.Rngs(0)), jnp.zeros((1, 5), jnp.int32))
        >>> seen["weights"].shape, seen["head_out"].shape
        ((2, 1, 4, 5, 5), (2, 1, 5, 4, 4))
    """
    observe = frozenset(observe)
    if "group_mass" in observe:
        raise ValueError("capture has no groups; give the model a hook with a Reweight to observe 'group_mass'")
    rows = None if rows is None else jnp.asarray(rows)
    hook = AttnHook(rows=rows, heads=None if heads is None else tuple(heads), observe=observe)
    given = {"hook": for_layers(hook, model.config.num_layers)} if observe else {}
    out = model(inputs, record=tuple(sites), **given, **call)
    found = dict(out.aux.get("hook", {}))
    if "row_weights" in found:
        found["weights"] = found.pop("row_weights")
    return {**found, **out.aux.get("sites", {}), "output": out.logits}
