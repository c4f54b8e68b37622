"""The same attention in other libraries, as far as they are installed: what the benchmark measures beside jattn."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from experiments.timing import Subject, compiled


def jax_nn(name: str, arrays, gradient: bool, implementation: str, **arguments: Any) -> Subject | str:
    """`jax.nn.dot_product_attention` with the given implementation, or why it does not run here."""

    def run(query, key, value):
        return jax.nn.dot_product_attention(query, key, value, implementation=implementation, **arguments)

    try:
        return compiled(name, gradient_of(run) if gradient else run, *arrays)
    except Exception as error:  # The peer decides what it refuses, and with which exception.
        return f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"


def gradient_of(run: Callable[..., Any]) -> Callable[..., Any]:
    """Forward and backward: gradients of the sum of the output in all three inputs."""
    return jax.grad(lambda *arrays: run(*arrays).sum(), argnums=(0, 1, 2))


def torch_sdpa(arrays, gradient: bool, threads: int) -> Subject | str:
    """torch's fused scaled_dot_product_attention, causal."""
    return _torch("torch SDPA", arrays, gradient, threads, flex=False)


def torch_flex(arrays, gradient: bool, threads: int) -> Subject | str:
    """torch's FlexAttention, compiled, with a causal block mask."""
    if gradient:
        return "FlexAttention has no backward pass on CPUs"
    return _torch("torch FlexAttention", arrays, gradient, threads, flex=True)


def _torch(name: str, arrays, gradient: bool, threads: int, *, flex: bool) -> Subject | str:
    try:
        import torch
    except ImportError:
        return "torch is not installed (pip install -e '.[bench]')"
    torch.set_num_threads(threads)
    query, key, value = (torch.tensor(np.asarray(x)).transpose(1, 2).contiguous() for x in arrays)
    attend = torch.nn.functional.scaled_dot_product_attention
    options: dict[str, Any] = {"is_causal": True}
    if flex:
        try:
            from torch.nn.attention.flex_attention import create_block_mask, flex_attention

            mask = create_block_mask(lambda b, h, i, j: j <= i, None, None, query.shape[2], key.shape[2], device="cpu")
            attend, options = torch.compile(flex_attention), {"block_mask": mask}
            attend(query, key, value, **options)
        except Exception as error:
            return f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"

    def forward():
        with torch.no_grad():
            attend(query, key, value, **options)

    leaves = [x.requires_grad_(gradient) for x in (query, key, value)]

    def both():
        for leaf in leaves:
            leaf.grad = None
        attend(*leaves, **options).sum().backward()

    return Subject(name, both if gradient else forward)
