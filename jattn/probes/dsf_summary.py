"""What the linear system of a head looks like: how fast it forgets, how far it looks, how its weights sum."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jattn.probes.dsf import Dsf, dsf_matrix, in_float32


class DsfSummary(NamedTuple):
    """What the linear systems of heads look like; every field is `[B, N]`."""

    eigenvalue_min: Any
    """Smallest modulus of an eigenvalue of Lam: how fast the fastest direction is forgotten."""
    eigenvalue_max: Any
    """Largest modulus: above 1 the state may grow without bound."""
    memory_length: Any
    """Mean distance at which a token looks, weighted by |Phi_ij|."""
    normalizer_spread: Any
    """Largest minus smallest log |sum_j Phi_ij|: 0 for weights that sum to the same number in every row."""


def dsf_summary(system: Dsf) -> DsfSummary:
    """Eigenvalues, effective memory length and spread of the normalizer.

    memory = mean over i of sum_j (i - j) |Phi_ij| / sum_j |Phi_ij|;   spread = max_i - min_i of log |sum_j Phi_ij|

    Transitions of padding and of first tokens, which meet no state, are left out, and so are rows of Phi that are 0.
    The last two are definitions of this library; the paper names the quantities and gives no formula.

    Args:
        system: what `to_dsf` returns.

    Returns:
        A DsfSummary. Where no token carries a state, the eigenvalues are inf and 0; where no row is left, memory and
        spread are 0.

    Example:
        >>> from jattn.probes import to_dsf
        >>> one = jnp.ones((1, 3, 1, 1))
        >>> found = dsf_summary(to_dsf(one, one, log_decay=jnp.log(0.5) * one))
        >>> [round(float(x[0, 0]), 3) for x in found]
        [0.5, 0.5, 0.302, 0.56]

    Source: Understanding the differences in Foundation Models (arXiv 2405.15731).
    """
    system = in_float32(system)
    moduli = jnp.abs(system.transition if system.is_diagonal else jnp.linalg.eigvals(system.transition))
    counted = system.carries[..., None, None]
    matrix = dsf_matrix(system)
    length = matrix.shape[-1]
    distance = (np.arange(length)[:, None] - np.arange(length)).astype(np.float32)
    weights, sums = jnp.abs(matrix), jnp.abs(matrix.sum(-1))
    mass = weights.sum(-1)
    shares = jnp.where(mass > 0, (weights * distance).sum(-1) / jnp.where(mass > 0, mass, 1), 0)
    logs = jnp.log(jnp.where(sums > 0, sums, 1))
    top, bottom = (jnp.where(sums > 0, logs, fill) for fill in (-jnp.inf, jnp.inf))
    spread = jnp.where((sums > 0).any(-1), top.max(-1) - bottom.min(-1), 0)
    return DsfSummary(
        jnp.min(jnp.where(counted, moduli, jnp.inf), axis=(1, 3)),
        jnp.max(jnp.where(counted, moduli, 0), axis=(1, 3)),
        shares.sum(-1) / jnp.maximum((mass > 0).sum(-1), 1),
        spread,
    )
