"""Which implementation runs, and why not the others."""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

import jax

from jattn.softmax.platforms import current
from jattn.softmax.problem import Problem

IMPLEMENTATIONS = ("reference", "blockwise", "mosaic_gpu", "triton", "tpu", "cudnn")
KERNELS = {"mosaic_gpu": "gpu", "triton": "gpu", "tpu": "tpu", "cudnn": "gpu"}
"""Platform of each kernel; of those of one platform the first is preferred."""
WITHOUT_LSE = frozenset({"cudnn"})
"""Kernels that give no differentiable log-sum-exp: no residual and no sinks; each has an `attend(problem)`."""
VERIFIED: frozenset[str] = frozenset()
"""Kernels whose tests have passed on such a device, compiled and not interpreted; only these are chosen unasked."""
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


def kernel_module(implementation: str) -> Any:
    """The module behind a kernel's name, None for other implementations."""
    # Pallas takes as long to import as the rest of the library, and most programs on CPUs never need it.
    return importlib.import_module(f"jattn.softmax.{implementation}") if implementation in KERNELS else None


def _refusal(name: str, problem: Problem, residual: bool) -> str:
    """Why a kernel cannot run a problem at all, with who can; empty if it can."""
    if residual and name in WITHOUT_LSE:
        return "it gives no residual and takes no sinks, which need a differentiable lse; 'blockwise' does"
    return kernel_module(name).unsupported(problem)


def _why_not(name: str, problem: Problem, residual: bool) -> str:
    """Why a kernel is not chosen on its own platform, unless it is asked for; empty if it is."""
    if name not in VERIFIED:
        return f"no run on hardware has verified it yet; implementation={name!r} asks for it"
    if jax.device_count() > 1:
        return f"XLA would gather sharded arrays for a kernel; under shard_map, implementation={name!r} asks for it"
    return _refusal(name, problem, residual)


def choose(problem: Problem, implementation: str | None, residual: bool = False) -> Explanation:
    """The implementation for a problem; `residual` says that its log-sum-exp is wanted too.

    Raises:
      ValueError: an unknown name.
      NotImplementedError: a kernel was asked for that does not take the problem; the message says who does.
    """
    _, length, source, _, _ = problem.sizes
    platform = current().name
    if implementation not in (None, "xla", *IMPLEMENTATIONS):
        raise ValueError(
            f"dot_product_attention: unknown implementation {implementation!r}; this version has "
            f"{', '.join(IMPLEMENTATIONS)}, 'xla' for the better of the two, and None to choose by platform and shape"
        )
    others, remark = {}, ""
    if implementation in KERNELS:
        reason = _refusal(implementation, problem, residual)
        if reason:
            raise NotImplementedError(f"dot_product_attention: implementation {implementation!r}: {reason}")
        remark = kernel_module(implementation).remark(problem)
    if implementation in IMPLEMENTATIONS:
        others = {name: "another one was asked for" for name in IMPLEMENTATIONS if name != implementation}
        return Explanation(implementation, f"asked for{remark}", others)
    for name, home in KERNELS.items():
        others[name] = f"it runs on a {home}, this is a {platform}" if implementation is None else "'xla' was asked for"
        if platform == home and implementation is None:
            others[name] = _why_not(name, problem, residual)
        if not others[name]:
            rest = dict.fromkeys((n for n in IMPLEMENTATIONS if n != name), f"{name} is faster on a {home}")
            refused = {n: why for n, why in others.items() if why}
            return Explanation(name, f"one fused kernel on {platform}", rest | refused)
    if length * source <= _SMALL_PAIRS:
        why = f"{length} x {source} pairs a head are few enough for one quadratic program on {platform}"
        return Explanation("reference", why, {"blockwise": "its loop pays off beyond 512 x 512 pairs", **others})
    why = f"{length} x {source} pairs a head: tiles keep the memory linear and skip what no query sees"
    return Explanation("blockwise", why, {"reference": f"it would hold {length} x {source} logits a head", **others})
