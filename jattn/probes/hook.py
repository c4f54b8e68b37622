"""The hook inside one attention call: what an intervention changes and what a diagnostic observes, as one pytree.

Array fields are leaves, functions are static: a hook whose arrays change runs the program that is compiled already. A
function is a module-level one or a `functools.partial` of hashable values, and gets arrays through `params`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

INPUTS = ("query", "key", "value")
"""What a hook can observe of the call itself, as it is."""
OBSERVABLE = ("lse", "entropy", "group_mass", "col_mass", "row_weights")
"""The statistics that a hook can observe."""


def _static(default: Any) -> Any:
    return dataclasses.field(default=default, metadata={"static": True})


@dataclasses.dataclass(frozen=True)
class _Bound:
    """A `functools.partial` that equals another one of the same function and arguments."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    keywords: tuple[tuple[str, Any], ...]

    def __call__(self, *args: Any) -> Any:
        return self.function(*self.args, *args, **dict(self.keywords))


def _function(owner: str, name: str, value: Any) -> Any:
    """The function as a static field: callable, hashable, and compared by value."""
    if value is None:
        return None
    if not callable(value):
        raise ValueError(f"{owner}: {name} must be a function or None, got {type(value).__name__}")
    if isinstance(value, functools.partial):
        value = _Bound(value.func, value.args, tuple(sorted(value.keywords.items())))
    try:
        hash(value)
    except TypeError as error:
        raise ValueError(
            f"{owner}: {name} must be hashable (a module-level function, or a partial of hashable values; arrays go to "
            f"params), got {value!r}"
        ) from error
    return value


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Reweight:
    r"""A redistribution of attention weights after the normalizer and before dropout.

    w~_ij = exp(log_factor_ij) w_ij;  mass_ig, mass~_ig = sums of w, w~ over the keys j with groups_j = g;
    c = coef(mass, mass~, params);  w'_ij = c_{i, groups_j} w~_ij.  Nothing is renormalized unless coef does it.

    Args:
      log_factor: broadcasts to `[B, N, T, S]`; -inf erases a pair; None for 0. One with a query axis is applied at the
        hook's `rows` and `heads` only; unless `coef` is `renormalize`, their weights are then materialized.
      groups: integers `[B|1, N|1, S]` in 0 .. num_groups - 1, or fewer axes; None puts all keys into group 0.
      num_groups: G.
      coef: `(mass, mass~, params) -> c`, all `[B, N, T, G]`, float32 at least; None for 1. See `renormalize` and
        `redistribute`.

    Raises:
      ValueError: num_groups is not a positive int, or coef is not a hashable function.

    Example:
      >>> Reweight(groups=np.array([0, 0, 1]), num_groups=2, coef=redistribute((0,), (1,), 0.5)).num_groups
      2

    Source: own design; it holds the interventions of VAR (arXiv 2503.03321), ACT (arXiv 2406.15765) and MotionCLR
    (arXiv 2410.18977).
    """

    log_factor: Any = None
    groups: Any = None
    num_groups: int = _static(1)
    coef: Callable[..., Any] | None = _static(None)

    def __post_init__(self) -> None:
        number = self.num_groups
        if not isinstance(number, int | np.integer) or isinstance(number, bool) or number < 1:
            raise ValueError(f"Reweight: num_groups must be a positive int, got {number!r}")
        object.__setattr__(self, "coef", _function("Reweight", "coef", self.coef))

    @property
    def is_nothing(self) -> bool:
        """Whether all weights stay as they are."""
        return self.log_factor is None and self.coef is None

    @property
    def is_renormalizing(self) -> bool:
        """Whether rows sum to 1 afterwards."""
        return self.coef is renormalize

    @property
    def has_query_axis(self) -> bool:
        """Whether the factor depends on the query."""
        shape = np.shape(self.log_factor)
        return self.log_factor is not None and len(shape) >= 2 and shape[-2] != 1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttnHook:
    """Everything that can be done inside one attention call, and what is to be seen of it.

    Args:
      qkv: `(query, key, value, params) -> (query, key, value)` before the logits. It may give keys and values one head
        a query head (`per_query_head`).
      score_mod: a `ScoreMod`, chained after the call's.
      bias: added to the call's; a tuple of biases is their sum.
      mask: booleans or a `Mask`, and-ed with the call's; a tuple of masks is their intersection.
      reweight: a `Reweight`.
      weights: `(weights, params) -> weights` on the materialized `[B, heads, rows, S]`, after `reweight`.
      out: `(output, value, params) -> (output, extra)` on `[B, T, N, Dv]`, before W_o; extra that is not None becomes
        aux['out'].
      rows: int `[B|1, R]` or `[R]`, query indices (negative ones count from the end) at which `weights`, 'row_weights'
        and a reweight with a query axis apply; None for all. Distinct, and within range.
      heads: query heads of the same; None for all.
      observe: names of `INPUTS` and `OBSERVABLE`; all are taken after `qkv` and before `reweight` and `weights`.
      row_weight: `[B|1, T]` or `[T]`, weights of the query rows in 'col_mass'; None for 1.
      params: a pytree, which every function gets.

    Raises:
      ValueError: a function that is not callable or not hashable, heads that are not distinct ints >= 0, or an unknown
        name in observe.

    Example:
      >>> sorted(AttnHook(observe={"lse", "entropy"}).observe)
      ['entropy', 'lse']

    Source: own design.
    """

    qkv: Callable[..., Any] | None = _static(None)
    score_mod: Any = None
    bias: Any = None
    mask: Any = None
    reweight: Reweight | None = None
    weights: Callable[..., Any] | None = _static(None)
    out: Callable[..., Any] | None = _static(None)
    rows: Any = None
    heads: tuple[int, ...] | None = _static(None)
    observe: frozenset[str] = _static(frozenset())
    row_weight: Any = None
    params: Any = None

    def __post_init__(self) -> None:
        for name in ("qkv", "weights", "out"):
            object.__setattr__(self, name, _function("AttnHook", name, getattr(self, name)))
        if self.heads is not None:
            heads = tuple(np.ravel(self.heads).tolist())
            whole = all(isinstance(h, int) and not isinstance(h, bool) and h >= 0 for h in heads)
            if not heads or not whole or len(set(heads)) != len(heads):
                raise ValueError(f"AttnHook: heads must be distinct ints >= 0, at least one, got {self.heads!r}")
            object.__setattr__(self, "heads", heads)
        names = (self.observe,) if isinstance(self.observe, str) else self.observe
        unknown = sorted(str(name) for name in names if name not in INPUTS + OBSERVABLE)
        if unknown:
            raise ValueError(
                f"AttnHook: observe names {', '.join(unknown)}; there are: {', '.join(INPUTS + OBSERVABLE)}"
            )
        object.__setattr__(self, "observe", frozenset(names))

    @property
    def is_nothing(self) -> bool:
        """Whether a call with this hook is the call without it."""
        fields = (self.qkv, self.score_mod, self.bias, self.mask, self.weights, self.out)
        reweights = self.reweight is not None and not self.reweight.is_nothing
        return not self.observe and not reweights and all(field is None for field in fields)

    @property
    def selects(self) -> bool:
        """Whether `rows` and `heads` matter."""
        factor = self.reweight is not None and self.reweight.has_query_axis
        return factor or self.weights is not None or "row_weights" in self.observe


def per_query_head(query: Any, key: Any, value: Any, params: Any) -> tuple[Any, Any, Any]:
    """A `qkv` function that gives every query head its own copy of its key and value head.

    The output stays what it is; 'col_mass' becomes `[B, S, N]` instead of a sum over the heads of a group.

    Args:
      query: `[B, T, N, D]`.
      key: `[B, S, K, D]`.
      value: `[B, S, K, Dv]`.
      params: not used.

    Returns:
      The query, and key and value with N heads.

    Example:
      >>> x = jnp.zeros((1, 3, 2, 4))
      >>> per_query_head(jnp.zeros((1, 5, 6, 4)), x, x, None)[1].shape
      (1, 3, 6, 4)
    """
    group = query.shape[2] // key.shape[2]
    return query, jnp.repeat(key, group, axis=2), jnp.repeat(value, group, axis=2)


def renormalize(mass: Any, scaled_mass: Any, params: Any) -> Any:
    """The coefficient that makes every row sum to 1 again: c = 1 / sum_g mass~_g, and 0 where that sum is 0.

    Args:
      mass: `[B, N, T, G]` before the factors, not used.
      scaled_mass: `[B, N, T, G]` after them.
      params: not used.

    Returns:
      `[B, N, T, 1]`.

    Example:
      >>> renormalize(None, jnp.array([0.25, 0.25]), None).tolist()
      [2.0]
    """
    total = scaled_mass.sum(-1, keepdims=True)
    return jnp.where(total == 0, 0, 1 / jnp.where(total == 0, 1, total))


@dataclasses.dataclass(frozen=True)
class _Redistribute:
    source: tuple[int, ...]
    target: tuple[int, ...]
    keep: float | None

    def __call__(self, mass: Any, scaled_mass: Any, params: Any) -> Any:
        groups = mass.shape[-1]
        if max(self.source + self.target) >= groups:
            raise ValueError(
                f"redistribute: source {self.source} and target {self.target} need more than {groups} groups"
            )
        keep = params["keep"] if self.keep is None else self.keep
        names = np.arange(groups)
        is_source, is_target = np.isin(names, self.source), np.isin(names, self.target)
        given = mass[..., list(self.source)].sum(-1, keepdims=True)
        taken = mass[..., list(self.target)].sum(-1, keepdims=True)
        alone = taken == 0
        gain = 1 + (1 - keep) * given / jnp.where(alone, 1, taken)
        return jnp.where(alone, 1, jnp.where(is_source, keep, jnp.where(is_target, gain, 1)))


def redistribute(source: Any, target: Any, keep: float | None = None) -> Callable[..., Any]:
    r"""The coefficient that moves a share of the attention on some groups of keys to others.

    c_source = keep;  c_target = 1 + (1 - keep) * mass_source / mass_target;  1 elsewhere, where mass_source and
    mass_target are sums over the listed groups, before log_factor.  sum_g c_g mass_g = sum_g mass_g.  A row whose
    mass_target is 0 is left alone.

    Args:
      source: group ids to take from.
      target: group ids to give to.
      keep: the share that the sources keep; None reads `params["keep"]`, which may be traced and carry a gradient.

    Returns:
      A `coef` for `Reweight`; two of equal arguments are equal.

    Raises:
      ValueError: no group, a negative id, a group that is source and target, or keep that is no number.

    Example:
      >>> redistribute((0,), (1,), 0.5)(jnp.array([0.5, 0.25, 0.25]), None, None).tolist()
      [0.5, 2.0, 1.0]

    Source: See What You Are Told: Visual Attention Sink in Large Multimodal Models (arXiv 2503.03321); Unveiling and
    Harnessing Hidden Attention Sinks (arXiv 2406.15765).
    """
    groups = [tuple(int(g) for g in np.ravel(side)) for side in (source, target)]
    for name, side in zip(("source", "target"), groups, strict=True):
        if not side or min(side) < 0:
            raise ValueError(f"redistribute: {name} must hold group ids >= 0, at least one, got {side}")
    if set(groups[0]) & set(groups[1]):
        raise ValueError(f"redistribute: source {groups[0]} and target {groups[1]} share a group")
    if keep is not None and not isinstance(keep, int | float | np.number):
        raise ValueError(f"redistribute: keep must be a number, or None for params['keep'], got {type(keep).__name__}")
    return _Redistribute(groups[0], groups[1], None if keep is None else float(keep))
