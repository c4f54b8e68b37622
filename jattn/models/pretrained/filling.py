"""Trained weights into a model that was never given random ones."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx


class WeightsDoNotFit(ValueError):
    """Trained weights are missing, left over, or of another shape than the model that was built for them."""


def fill(
    build: Callable[[Any], nnx.Module],
    weights: MutableMapping[str, np.ndarray],
    *,
    new: Callable[[str], bool] | None = None,
) -> nnx.Module:
    """Make a model whose parameters are `weights`.

    Args:
        build: makes the model from an `nnx.Rngs`; only its shapes are used, and the values that are new.
        weights: by path, such as "stack.blocks.0.attention.query.kernel"; emptied on the way, so that each array is
            held once.
        new: says of a path without weights whether it may start from its initial value, as the parameters of a
            mechanism that was not trained with the others; none may if not given.

    Returns:
        The model, parameters in the dtypes that it asks for.

    Raises:
        WeightsDoNotFit: weights that are missing, left over, or of another shape.

    Example:
        >>> import numpy as np
        >>> from flax import nnx
        >>> model = fill(lambda rngs: nnx.Linear(2, 3, rngs=rngs), {"kernel": np.ones((2, 3)), "bias": np.ones(3)})
        >>> model(np.ones((1, 2))).tolist()
        [[3.0, 3.0, 3.0]]
    """
    graphdef, state = nnx.split(nnx.eval_shape(lambda: build(_OneKey())))
    shapes = {".".join(map(str, path)): variable for path, variable in nnx.to_flat_state(state)}
    missing = [path for path in shapes if path not in weights]
    refused = [path for path in missing if new is None or not new(path)]
    if refused or (extra := weights.keys() - shapes.keys()):
        words = f"lack {_some(refused)}" if refused else f"hold {_some(sorted(extra))}, which the model does not have"
        raise WeightsDoNotFit(f"the weights {words}")

    @jax.jit
    def initial() -> dict[str, jax.Array]:
        made = {
            ".".join(map(str, path)): variable for path, variable in nnx.to_flat_state(nnx.state(build(nnx.Rngs(0))))
        }
        return {path: made[path].get_value() for path in missing}

    started = initial() if missing else {}

    def value(path: str, variable: Any) -> jax.Array:
        if path in started:
            return started[path]
        array, wanted = weights.pop(path), variable.get_value()
        if array.shape != wanted.shape:
            raise WeightsDoNotFit(
                f"the weights hold {path} of shape {list(array.shape)}; the model has {list(wanted.shape)}"
            )
        # A copy of JAX's own: a view would keep the file's whole buffer alive.
        return jnp.array(array, dtype=wanted.dtype, copy=True)

    filled = [
        (path, variable.replace(value(".".join(map(str, path)), variable)))
        for path, variable in nnx.to_flat_state(state)
    ]
    return nnx.merge(graphdef, nnx.from_flat_state(filled))


class _OneKey(nnx.Rngs):
    """An `nnx.Rngs` for where only shapes matter: its counters would be traced, which takes seconds."""

    def __init__(self) -> None:
        pass

    def __getattr__(self, stream: str) -> Callable[[], jax.Array]:
        return lambda: jax.random.key(0)


def new_in_attention(path: str) -> bool:
    """Whether a parameter belongs to an attention layer: what a swapped mechanism brings along was not trained."""
    return ".attention." in path or ".cross." in path


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
