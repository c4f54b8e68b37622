"""Logical axis names on parameters, from which a mesh's partition specs are derived.

Names say what an axis is ("embed", "heads", "kv_heads", "head_dim", "mlp", "vocab", "positions"); rules say which mesh
axis it goes to. Parameters are created unsharded, with or without a mesh: laying them out is one call of the user's,
`jax.device_put(state, named_shardings(state, mesh, rules))` or the same as `out_shardings` of a jitted init.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

TENSOR_PARALLEL: Mapping[str, str | None] = {"heads": "model", "kv_heads": "model", "mlp": "model", "vocab": "model"}
"""Rules for a mesh with an axis "model": heads, hidden units and vocabulary are split, everything else replicated."""


def axes(*names: str | None) -> dict[str, Any]:
    """Metadata of a parameter whose axes have these logical names.

    Example:
        >>> axes("embed", "heads")["out_sharding"]
        ('embed', 'heads')
    """
    return {"out_sharding": names, "eager_sharding": False}


def named_shardings(state: Any, mesh: Mesh, rules: Mapping[str, str | None] = TENSOR_PARALLEL) -> Any:
    """Shardings of a model's state on a mesh.

    Args:
        state: an `nnx.State` (values or shapes), such as `nnx.state(model)`.
        mesh: the devices.
        rules: mesh axis of each logical axis; one that is not named is replicated.

    Returns:
        A tree like `state` with a `NamedSharding` for every parameter.

    Example:
        >>> import jax
        >>> from flax import nnx
        >>> from jattn.layers import MultiHeadAttention
        >>> state = nnx.state(MultiHeadAttention(8, 2, rngs=nnx.Rngs(0)))
        >>> mesh = jax.make_mesh((1,), ("model",))
        >>> tuple(named_shardings(state, mesh)["query"]["kernel"].get_value().spec)
        (None, 'model', None)
    """

    def place(variable: Any) -> Any:
        names = variable.get_metadata().get("out_sharding") or ()
        spec = PartitionSpec(*(rules.get(name) if name is not None else None for name in names))
        return variable.replace(NamedSharding(mesh, spec))

    return jax.tree.map(place, state, is_leaf=lambda x: isinstance(x, nnx.Variable))
