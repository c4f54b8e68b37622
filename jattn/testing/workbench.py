"""The compiled programs and the data that the checks of one mechanism share, made when the first check asks for them.

Compiling is what conformance costs. One program, output and all gradients under one cotangent, serves most checks:
tokens are hidden, poisoned and changed in its arguments, and in float64 it is the truth. Everything is compiled at
optimization level 0; only where memory is measured are programs compiled as users compile them.

Two ways to the same result (a shorter sequence, a permutation, decoding) are compared in float64, where they must agree
to the resolution of float32: far above rounding, far below any mistake.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jattn.mechanisms.entry import Entry
from jattn.testing.compiling import quick_jit
from jattn.testing.subject import Arrays, Call, attends, build, cast

LENGTH = 13
"""T of most checks: a prime, and no multiple of anything."""
SHORT = 7
KEYS = 11
"""S of cross attention: unlike T, and shorter, so that the two cannot be confused without a shape error."""


class NotApplicable(Exception):
    """A check has nothing to say about this entry; the message says why."""


class Failed(AssertionError):
    """A check found a fault; the message says which."""


class Result(NamedTuple):
    """An output, and the gradients of its product with the cotangent."""

    output: Any
    gradients: Arrays


def to_numpy(tree: Any) -> Any:
    """A tree of arrays on the host."""
    return jax.tree.map(np.asarray, tree)


def differentiate(call: Callable[..., Any]) -> Callable[..., Result]:
    """`f(arrays, visible, cotangent) -> Result`, with gradients in every float array."""

    def objective(arrays: Arrays, visible: Mapping[str, Any], cotangent: Any) -> Any:
        output = call(arrays, visible)
        wide = jnp.promote_types(output.dtype, jnp.float32)
        return jnp.sum(output.astype(wide) * cotangent.astype(wide)), output

    def run(arrays: Arrays, visible: Mapping[str, Any], cotangent: Any) -> Result:
        (_, output), gradients = jax.value_and_grad(objective, has_aux=True)(arrays, visible, cotangent)
        return Result(output, gradients)

    return run


def assert_same(candidate: Any, expected: Any, what: str) -> None:
    """Fail unless two float64 results agree to the resolution of float32."""
    candidate, expected = np.asarray(candidate), np.asarray(expected)
    if candidate.shape != expected.shape:
        raise Failed(f"{what}: shape {candidate.shape}, expected {expected.shape}")
    if not np.isfinite(candidate).all():
        raise Failed(f"{what}: not finite")
    largest = np.abs(expected).max(initial=0.0)
    error = np.abs(candidate - expected).max(initial=0.0)
    if error > np.finfo(np.float32).eps * max(largest, np.finfo(np.float32).tiny):
        raise Failed(f"{what}: differs by {error:.3g} in float64, where values reach {largest:.3g}")


def assert_equal_bits(candidate: Any, expected: Any, what: str) -> None:
    """Fail unless two arrays are equal bit for bit."""
    candidate, expected = np.asarray(candidate), np.asarray(expected)
    if candidate.tobytes() != expected.tobytes() and not np.array_equal(candidate, expected):
        with np.errstate(invalid="ignore"):
            error = np.abs(candidate.astype(np.float64) - expected.astype(np.float64)).max()
        raise Failed(f"{what}: not equal bit for bit, largest difference {error:.3g}")


class Workbench:
    """Everything that the checks of one attention mechanism share.

    Args:
        entry: the mechanism.
    """

    def __init__(self, entry: Entry):
        self.entry = entry
        self._made: dict[Any, Any] = {}

    def once(self, name: Any, make: Callable[[], Any]) -> Any:
        """What `make` gives, made when it is asked for the first time."""
        if name not in self._made:
            self._made[name] = make()
        return self._made[name]

    @property
    def pattern(self) -> str:
        """The pattern that most checks run under: causal self attention where the mechanism has it."""
        if not attends(self.entry):
            return ""
        return "causal self" if "causal self" in self.entry.patterns else self.entry.patterns[0]

    def call(self, pattern: str | None = None, length: int = LENGTH, seed: int = 0, dtype: Any = None) -> Call:
        """A call of the entry, with `KEYS` keys in cross attention."""
        pattern = self.pattern if pattern is None else pattern
        name = ("call", pattern, length, seed, dtype)
        return self.once(name, lambda: build(self.entry, pattern, length, key_length=KEYS, seed=seed, dtype=dtype))

    @property
    def base(self) -> Call:
        """The call that most checks run."""
        return self.call()

    @functools.cached_property
    def cotangent(self) -> np.ndarray:
        """A fixed random cotangent of the base call's output."""
        shape = jax.eval_shape(self.base, self.base.arrays).shape
        return np.random.default_rng(7).normal(size=shape).astype(np.float32)

    @functools.cached_property
    def program(self) -> Callable[..., Result]:
        """The main program, `f(arrays, visible, cotangent)`: output and gradients of the base call."""
        return quick_jit(differentiate(self.base.function))

    def run(self, arrays: Arrays | None = None, visible: Any = None, cotangent: Any = None) -> Result:
        """Run the main program on the base call's data, or on what is given instead."""
        return to_numpy(
            self.program(
                self.base.arrays if arrays is None else arrays,
                self.base.all_visible() if visible is None else visible,
                self.cotangent if cotangent is None else cotangent,
            )
        )

    @functools.cached_property
    def result(self) -> Result:
        """Output and gradients of the base call."""
        return self.run()

    def true(self, arrays: Arrays | None = None, visible: Any = None) -> Result:
        """The same in float64."""
        with jax.enable_x64(True):
            return to_numpy(
                self.program(
                    cast(self.base.arrays if arrays is None else arrays, np.float64),
                    self.base.all_visible() if visible is None else visible,
                    self.cotangent.astype(np.float64),
                )
            )

    @functools.cached_property
    def truth(self) -> Result:
        """Output and gradients of the base call in float64."""
        return self.true()

    def forward(self, call: Call) -> Callable[..., Any]:
        """The compiled forward program of a call, `f(arrays, visible)`."""
        return self.once(("forward", id(call)), lambda: quick_jit(call.function))

    def true_output(self, call: Call, arrays: Arrays | None = None) -> np.ndarray:
        """Output of a call in float64."""
        with jax.enable_x64(True):
            arrays = cast(call.arrays if arrays is None else arrays, np.float64)
            return np.asarray(self.forward(call)(arrays, call.all_visible()))

    @property
    def attends_to(self) -> list[str]:
        """Names of the base call's arrays that hold keys or values."""
        names = sorted(name for name, role in self.base.roles.items() if role in ("key", "both"))
        if self.entry.layer is None:
            # In self attention the query shares its tokens' lengths with the keys, but is not looked at by others.
            names = [name for name in names if name in ("key", "value") or self.base.roles[name] == "key"]
        return names

    def slice_tokens(self, call: Call, length: int, arrays: Arrays) -> Arrays:
        """The first `length` tokens of the arrays: of queries in cross attention, of everything in self attention."""
        roles = ("query", "both")
        return {name: a[:, :length] if call.roles.get(name) in roles else a for name, a in arrays.items()}
