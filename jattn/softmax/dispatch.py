"""Which implementation runs, and why not the others."""

from __future__ import annotations

import dataclasses

import jax

from jattn.softmax.problem import Problem

IMPLEMENTATIONS = ("reference", "blockwise")
# Below this many pairs a head, one fused quadratic program beats a loop over tiles (measured with
# `python -m experiments.benchmark`), and its memory does not matter yet.
_SMALL_PAIRS = 512 * 512


@dataclasses.dataclass(frozen=True)
class Explanation:
    """The choice for one call: `chosen`, the reason, and for every other implementation why it was not taken."""

    chosen: str
    reason: str
    others: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{self.chosen}: {self.reason}"]
        return "\n".join(lines + [f"  not {name}: {why}" for name, why in self.others.items()])


def choose(problem: Problem, implementation: str | None) -> Explanation:
    """The implementation for a problem.

    Raises:
      ValueError: an unknown name.
    """
    _, length, source, _, _ = problem.sizes
    platform = jax.default_backend()
    if implementation not in (None, "xla", *IMPLEMENTATIONS):
        raise ValueError(
            f"dot_product_attention: unknown implementation {implementation!r}; this version has "
            f"{', '.join(IMPLEMENTATIONS)}, 'xla' for the better of the two, and None to choose by platform and shape"
        )
    others = {}
    if implementation in IMPLEMENTATIONS:
        others = {name: "another one was asked for" for name in IMPLEMENTATIONS if name != implementation}
        return Explanation(implementation, "asked for", others)
    if length * source <= _SMALL_PAIRS:
        why = f"{length} x {source} pairs a head are few enough for one quadratic program on {platform}"
        return Explanation("reference", why, {"blockwise": "its loop over tiles pays off beyond 512 x 512 pairs"})
    why = f"{length} x {source} pairs a head: tiles keep the memory linear and skip what no query sees"
    return Explanation("blockwise", why, {"reference": f"it would hold {length} x {source} logits for every head"})
