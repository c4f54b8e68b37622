"""Sites: the named places of a model whose values can be recorded and replaced.

'embed' [B, T, M];   'head_out' [L, B, T, N, Dv] (before W_o), 'attn_out', 'mlp_out', 'resid' [L, B, T, M];
with cross attention also 'cross_head_out' and 'cross_out', of the shapes of 'head_out' and 'attn_out'

replace[site] = (mask, value):   x <- where(mask, value, x), both broadcastable to the site's shape
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp

SITES = ("embed", "head_out", "attn_out", "mlp_out", "resid")
CROSS_SITES = (*SITES, "cross_head_out", "cross_out")
RANKS = {"embed": 3, "head_out": 5, "attn_out": 4, "mlp_out": 4, "resid": 4, "cross_head_out": 5, "cross_out": 4}


class Sites:
    """Collects and replaces the values of one forward pass.

    Args:
        record: names of the sites to record.
        replace: (mask, value) by name of site.
        num_layers: L.
        known: the sites that the model has.

    Raises:
        ValueError: an unknown site, or a mask or value of too many axes or of a wrong number of layers.

    Example:
        >>> sites = Sites(("embed",), {}, 2)
        >>> _ = sites.visit("embed", jnp.zeros((1, 3, 4)))
        >>> sites.recorded()["embed"].shape
        (1, 3, 4)
    """

    def __init__(
        self, record: Iterable[str], replace: Mapping[str, Any], num_layers: int, known: Sequence[str] = SITES
    ):
        for name, sites in (("record", record), ("replace", replace)):
            unknown = [site for site in sites if site not in known]
            if unknown:
                raise ValueError(f"{name} names unknown sites {', '.join(unknown)}; sites are {', '.join(known)}")
        self.wanted = {*record, *replace}
        self._record = frozenset(record)
        self._values: dict[str, list[Any]] = {site: [] for site in record}
        self._replace = {}
        for site, pair in replace.items():
            if not isinstance(pair, tuple | list) or len(pair) != 2:
                raise ValueError(f"replace[{site!r}] must be (mask, value), got {type(pair).__name__}")
            mask, value = (jnp.asarray(part) for part in pair)
            for what, part in (("mask", mask), ("value", value)):
                full = part.ndim == RANKS[site] and site != "embed"
                if part.ndim > RANKS[site] or (full and part.shape[0] not in (1, num_layers)):
                    raise ValueError(
                        f"the {what} of replace[{site!r}] must broadcast to the site's {RANKS[site]} axes"
                        f"{'' if site == 'embed' else f', the first of {num_layers} layers'}, got {list(part.shape)}"
                    )
            self._replace[site] = (mask, value)

    def visit(self, site: str, x: Any, layer: int = 0) -> Any:
        """Replace what is to be replaced, record the result, return it."""
        if site in self._replace:
            mask, value = (self._of_layer(part, site, layer) for part in self._replace[site])
            x = jnp.where(mask, value.astype(x.dtype), x)
        if site in self._record:
            self._values[site].append(x)
        return x

    def _of_layer(self, part: Any, site: str, layer: int) -> Any:
        if site == "embed" or part.ndim < RANKS[site]:
            return part
        return part[layer if part.shape[0] > 1 else 0]

    def recorded(self) -> dict[str, Any]:
        """Recorded values by site, those of layers stacked."""
        return {
            site: values[0] if site == "embed" else jnp.stack(values) for site, values in self._values.items() if values
        }
