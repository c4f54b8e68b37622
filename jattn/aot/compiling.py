"""Compile a function for a target, and say what came of it."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jattn.aot import targets
from jattn.softmax.platforms import compiling_for


@dataclasses.dataclass(frozen=True)
class Report:
    """What a compilation has shown.

    Args:
        target: name of the target.
        error: why it failed, in the compiler's words; empty if it compiled.
        temp_bytes: memory that the program takes besides arguments and results, on one device.
        argument_bytes: of the arguments.
        output_bytes: of the results.
        seconds: that tracing and compiling took.
    """

    target: str
    error: str = ""
    temp_bytes: int = 0
    argument_bytes: int = 0
    output_bytes: int = 0
    seconds: float = 0.0

    @property
    def compiles(self) -> bool:
        """Whether there is a program."""
        return not self.error

    def __str__(self) -> str:
        if self.error:
            return f"{self.target}: does not compile: {self.error}"
        sizes = f"{self.temp_bytes / 1e6:.1f} MB beside {self.argument_bytes / 1e6:.1f} MB of arguments"
        return f"{self.target}: compiles in {self.seconds:.1f} s, takes {sizes}"


def _lowering_for(device: Any) -> contextlib.AbstractContextManager:
    """JAX lowers some operations of TPU kernels by the kind of chip and asks the mesh for it: here is one."""
    if device.platform != "tpu":
        return contextlib.nullcontext()
    auto = (jax.sharding.AxisType.Auto,)
    return jax.sharding.use_abstract_mesh(
        jax.sharding.Mesh(np.array([device]), ("chip",), axis_types=auto).abstract_mesh
    )


def compile_for(function: Callable[..., Any], *arguments: Any, target: str = "h100") -> Report:
    """Compile a function for a device that is not attached.

    Inside, `dot_product_attention` chooses its implementation as on that device. Nothing is run.

    Args:
        function: of arrays; it is jitted.
        *arguments: pytrees of arrays or of `jax.ShapeDtypeStruct`; only shapes and dtypes matter.
        target: one of `jattn.aot.TARGETS`.

    Returns:
        The report; a program that does not compile is a result, not an exception.

    Raises:
        ValueError: an unknown target.
        RuntimeError: the compiler for the target is not installed.

    Example:
        >>> import jattn.aot
        >>> jattn.aot.find_target("a100").title
        'NVIDIA A100-SXM4-80GB'
        >>> str(jattn.aot.Report("a100", temp_bytes=2_000_000, argument_bytes=500_000, seconds=1.25))
        'a100: compiles in 1.2 s, takes 2.0 MB beside 0.5 MB of arguments'
    """
    found = targets.find_target(target)
    device = targets.devices(found)[0]
    sharding = jax.sharding.SingleDeviceSharding(device)

    def shaped(leaf: Any) -> jax.ShapeDtypeStruct:
        aval = leaf if hasattr(leaf, "shape") else jax.numpy.asarray(leaf)
        return jax.ShapeDtypeStruct(aval.shape, aval.dtype, sharding=sharding)

    started = time.perf_counter()
    try:
        platform = "cuda" if found.platform == "gpu" else found.platform
        # Backward passes are traced only when the program is lowered.
        kind = found.title if found.platform == "gpu" else ""
        with compiling_for(found.platform, found.capability, kind), _lowering_for(device):
            traced = jax.jit(lambda *given: function(*given)).trace(*jax.tree.map(shaped, arguments))
            compiled = traced.lower(lowering_platforms=(platform,)).compile()
    except Exception as error:  # The compiler's own classes, and whatever the function raises.
        lines = [line for line in str(error).splitlines() if line.strip()]
        return Report(target, f"{type(error).__name__}: {lines[0][:300] if lines else ''}")
    memory = compiled.memory_analysis()
    return Report(
        target,
        "",
        int(memory.temp_size_in_bytes),
        int(memory.argument_size_in_bytes),
        int(memory.output_size_in_bytes),
        time.perf_counter() - started,
    )
