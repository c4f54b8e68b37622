"""Two hooks as one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jattn.probes.hook import AttnHook


@dataclasses.dataclass(frozen=True)
class _Part:
    """A function that reads its own hook's part of the params."""

    function: Callable[..., Any]
    index: int

    def __call__(self, *args: Any) -> Any:
        return self.function(*args[:-1], args[-1][self.index])


@dataclasses.dataclass(frozen=True)
class _QkvChain:
    first: _Part
    second: _Part

    def __call__(self, query: Any, key: Any, value: Any, params: Any) -> Any:
        return self.second(*self.first(query, key, value, params), params)


@dataclasses.dataclass(frozen=True)
class _OutChain:
    first: _Part
    second: _Part

    def __call__(self, output: Any, value: Any, params: Any) -> Any:
        output, one = self.first(output, value, params)
        output, two = self.second(output, value, params)
        return output, None if one is None and two is None else (one, two)


def _terms(first: Any, second: Any) -> Any:
    """Both, one or none of two terms, each of which may be a tuple of terms."""
    terms = sum((term if isinstance(term, tuple) else (term,) for term in (first, second) if term is not None), ())
    return None if not terms else terms[0] if len(terms) == 1 else terms


def _same(first: Any, second: Any) -> bool:
    if first is None or second is None or first is second:
        return first is second
    traced = any(isinstance(x, jax.core.Tracer) for x in (first, second))
    return not traced and np.array_equal(first, second)


def _shared(first: AttnHook, second: AttnHook, names: tuple[str, ...], uses: tuple[bool, bool], why: str) -> list[Any]:
    """Fields that must agree where both hooks use them, else those of the hook that does."""
    if all(uses):
        for name in names:
            if not _same(getattr(first, name), getattr(second, name)):
                raise ValueError(f"compose: both hooks {why}, with {name} that differ (or cannot be compared)")
    return [getattr(second if uses[1] and not uses[0] else first, name) for name in names]


def compose(first: AttnHook, second: AttnHook) -> AttnHook:
    """One hook that does what two do: `first`, then `second`.

    qkv, score_mod and out chain, biases add, masks intersect, observations unite. Each function sees the params of its
    own hook. If both have `out`, aux['out'] is the pair of what they give (None if neither gives anything).

    Args:
      first: an `AttnHook`.
      second: an `AttnHook`.

    Returns:
      The hook; its params are the pair of both.

    Raises:
      ValueError: both have `reweight`, or both `weights`; or both use rows and heads, or row_weight, and these differ.

    Example:
      >>> import jax.numpy as jnp
      >>> hook = compose(AttnHook(bias=jnp.zeros(3)), AttnHook(observe="lse"))
      >>> hook.bias.shape, sorted(hook.observe)
      ((3,), ['lse'])

    Source: own design.
    """
    for name, hook in (("first", first), ("second", second)):
        if not isinstance(hook, AttnHook):
            raise ValueError(f"compose: {name} must be an AttnHook, got {type(hook).__name__}")
    for name in ("reweight", "weights"):
        if getattr(first, name) is not None and getattr(second, name) is not None:
            raise ValueError(f"compose: both hooks have {name}; at most one may, for the order would matter")
    rows, heads = _shared(first, second, ("rows", "heads"), (first.selects, second.selects), "select rows and heads")
    sums = tuple("col_mass" in hook.observe for hook in (first, second))
    (row_weight,) = _shared(first, second, ("row_weight",), (sums[0], sums[1]), "observe 'col_mass'")

    def joined(name: str, chain: Any = None) -> Any:
        parts = [
            _Part(getattr(hook, name), index)
            for index, hook in enumerate((first, second))
            if getattr(hook, name) is not None
        ]
        return None if not parts else parts[0] if len(parts) == 1 else chain(*parts)

    reweight, index = (first.reweight, 0) if first.reweight is not None else (second.reweight, 1)
    if reweight is not None and reweight.coef is not None:
        # What is recognized by its identity stays what it is; it reads no params.
        own = reweight.coef if reweight.is_renormalizing else _Part(reweight.coef, index)
        reweight = dataclasses.replace(reweight, coef=own)
    score_mods = [hook.score_mod for hook in (first, second) if hook.score_mod is not None]
    return AttnHook(
        qkv=joined("qkv", _QkvChain),
        score_mod=None if not score_mods else score_mods[0] if len(score_mods) == 1 else score_mods[0] >> score_mods[1],
        bias=_terms(first.bias, second.bias),
        mask=_terms(first.mask, second.mask),
        reweight=reweight,
        weights=joined("weights"),
        out=joined("out", _OutChain),
        rows=rows,
        heads=heads,
        observe=first.observe | second.observe,
        row_weight=row_weight,
        params=(first.params, second.params),
    )
