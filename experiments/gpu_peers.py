"""What the GPU benchmark runs beside one another: jattn's implementations, jax.nn, and the Pallas kernels of JAX."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

import jattn
from experiments.gpu_cases import Case
from jattn.softmax import dispatch, platforms

Variants = dict[str, Callable[..., Any]]
"""Functions of the arrays of a case by their tile sizes or what else is to be said; the fastest one counts."""
DTYPES = {"jax pallas mosaic_gpu": "float16"}
"""What is given in place of bfloat16, which does not compile there; the matrix units take both at the same speed."""


class Refusal(Exception):
    """Why an implementation does not run a case, in its own words or about its signature."""


def implementations() -> Iterator[tuple[str, Callable[[Case, bool], Variants]]]:
    """Names, and functions of a case and of whether to interpret kernels; these raise `Refusal`."""
    for name in (*(n for n, home in dispatch.KERNELS.items() if home == "gpu"), "blockwise"):
        yield f"jattn {name}", lambda case, interpret, name=name: _ours(case, name)
    for name in ("cudnn", "xla"):
        yield f"jax.nn {name}", lambda case, interpret, name=name: _jax_nn(case, name)
    yield "jax pallas triton", _pallas_triton
    yield "jax pallas mosaic_gpu", _pallas_mosaic_gpu
    yield "jax pallas decode", _pallas_decode


def _ours(case: Case, implementation: str) -> Variants:
    def run(query, key, value, bias=None):
        return jattn.dot_product_attention(query, key, value, bias, implementation=implementation, **case.arguments())

    return {"": run}


def _jax_nn(case: Case, implementation: str) -> Variants:
    arguments: dict[str, Any] = {"is_causal": case.causal, "implementation": implementation}
    if case.window is not None:
        arguments["local_window_size"] = (case.window - 1, 0)

    wider = case.head_dim - case.value_dim

    def run(query, key, value, bias=None):
        # It has no segment ids; a mask of all pairs is what it takes instead.
        ids = jnp.asarray(case.segment_ids()) if case.documents else None
        mask = None if ids is None else ids[:, None, :, None] == ids[:, None, None, :]
        value = jnp.pad(value, [(0, 0)] * 3 + [(0, wider)]) if wider > 0 else value
        out = jax.nn.dot_product_attention(query, key, value, bias, mask, **arguments)
        return out[..., : case.value_dim]

    notes = ["documents as a dense mask"] if case.documents else []
    notes += [f"values padded to {case.head_dim}"] if wider > 0 else []
    return {", ".join(notes): run}


def _same_shapes(case: Case, name: str) -> None:
    """Refuse what the fused kernels of JAX have no argument for."""
    lacks = {
        "values of another width than keys": case.head_dim != case.value_dim,
        "bias": case.bias,
        "sliding window": case.window is not None,
        "way to take a single query (decode_attention beside it has)": case.length == 1,
    }
    for what, wanted in lacks.items():
        if wanted:
            raise Refusal(f"{name} has no {what}")


def _pallas_triton(case: Case, interpret: bool) -> Variants:
    from jax.experimental.pallas.ops.gpu import attention

    _same_shapes(case, "mha")

    def variant(block_q: int, block_k: int, backward: int) -> Callable[..., Any]:
        blocks = attention.BlockSizes(block_q, block_k, backward, backward, backward, backward)

        def run(query, key, value):
            ids = jnp.asarray(case.segment_ids()) if case.documents else None
            scale = case.head_dim**-0.5
            return attention.mha(query, key, value, ids, scale, case.causal, blocks, interpret=interpret)

        return run

    sizes = [(32, 32, 16)] if interpret else [(128, 128, 32), (128, 64, 64), (64, 64, 32)]
    return {f"{q} x {k}, backward {b} x {b}": variant(q, k, b) for q, k, b in sizes}


def _pallas_mosaic_gpu(case: Case, interpret: bool) -> Variants:
    _same_shapes(case, "attention_mgpu")
    if case.documents:
        raise Refusal("attention_mgpu has no segment ids")
    if platforms.current().capability.partition(".")[0] != "9":
        raise Refusal("attention_mgpu is for Hopper GPUs")
    from jax.experimental.pallas.ops.gpu import attention_mgpu

    def variant(block_kv: int) -> Callable[..., Any]:
        backward = dict.fromkeys(("block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq"), 64)
        config = attention_mgpu.TuningConfig(64, block_kv, 2, causal=case.causal, **backward)
        # It has no scale either; leaving it out changes the values, not the time.
        return lambda query, key, value: attention_mgpu.attention(query, key, value, config)

    return {f"64 x {block_kv}, float16": variant(block_kv) for block_kv in (256, 128, 64)}


def _pallas_decode(case: Case, interpret: bool) -> Variants:
    if case.length != 1:
        raise Refusal("decode_attention takes a single query")
    from jax.experimental.pallas.ops.gpu import decode_attention

    def variant(splits: int) -> Callable[..., Any]:
        return lambda query, key, value: decode_attention.gqa(
            query[:, 0], key, value, k_splits=splits, interpret=interpret
        )

    return {f"{splits} splits": variant(splits) for splits in ((2,) if interpret else (16, 32, 64))}
