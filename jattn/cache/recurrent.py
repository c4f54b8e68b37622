"""The cache of recurrences: a state of fixed size instead of keys and values.

A row of the batch takes K F Dv + K F numbers, however many tokens it has seen.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RecurrentState:
    """What a recurrence has kept of the tokens that it has seen.

    A state is a pytree of static shape. `jattn.cache.reorder` and `jattn.cache.nbytes` work on it as on any cache.

    Args:
        state: `[B, K, F, Dv]`, float32 at least whatever the inputs are.
        aux: pytree of what goes beside it, batch axis first: a normalizer `[B, K, F]`, a log-sum-exp, a momentum.
        conv: pytree of the last inputs of short convolutions, batch axis first.
        next: int32 `[B]`, the number of tokens seen, which is the position of the next one.

    Example:
        >>> RecurrentState.init(2, 4, 8, 16, has_normalizer=True).aux.shape
        (2, 4, 8)
    """

    state: Any
    aux: Any = ()
    conv: Any = ()
    next: Any = None

    @classmethod
    def init(
        cls,
        batch: int,
        kv_heads: int,
        key_features: int,
        v_dim: int,
        dtype: Any = jnp.float32,
        *,
        has_normalizer: bool = False,
    ) -> RecurrentState:
        """The state before any token: zeros.

        Args:
            batch: B.
            kv_heads: K.
            key_features: F, features of a key.
            v_dim: Dv.
            dtype: of the state, float32 or float64.
            has_normalizer: whether `aux` holds the sum of the keys' features.

        Returns:
            The state.

        Raises:
            ValueError: a size is not positive, or a dtype in which sums over many tokens lose their digits.
        """
        sizes = {"batch": batch, "kv_heads": kv_heads, "key_features": key_features, "v_dim": v_dim}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"RecurrentState.init: {name} must be at least 1, got {size}")
        if jnp.dtype(dtype) not in (jnp.dtype("float32"), jnp.dtype("float64")):
            raise ValueError(f"RecurrentState.init: dtype must be float32 or float64, got {jnp.dtype(dtype)}")
        return cls(
            state=jnp.zeros((batch, kv_heads, key_features, v_dim), dtype),
            aux=jnp.zeros((batch, kv_heads, key_features), dtype) if has_normalizer else (),
            next=jnp.zeros((batch,), jnp.int32),
        )

    def truncate(self, length: Any) -> RecurrentState:
        """Refuse to go back: a sum does not know its terms.

        Raises:
            ValueError: always; keep the earlier state, or use `FullCache` with an attention over keys.
        """
        raise ValueError(
            f"truncate to {length} tokens: a recurrent state cannot forget single tokens; keep the state of that moment"
        )


def state_before(last_state: Callable[[jax.Array], RecurrentState], batch: int) -> RecurrentState:
    """The state before any token, found by reading one token of padding, which leaves it as it is.

    Args:
        last_state: segment ids `[B, 1]` -> the state after them.
        batch: B.

    Returns:
        The state, with `next` 0.
    """
    found = last_state(jnp.full((batch, 1), -1, jnp.int32))
    return RecurrentState(found.state, found.aux, found.conv, jnp.zeros((batch,), jnp.int32))
