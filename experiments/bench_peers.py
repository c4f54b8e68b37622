"""What the benchmark runs: one attention problem as a program of each library.

A program is compiled when it is made, so that its compile time is known and no call pays for it. jax.nn stands for its
XLA implementation; its cuDNN implementation runs on GPUs. PyTorch is used if it is installed.
"""

import dataclasses
import functools
import importlib.util
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jattn

KINDS = ("causal", "full", "padding", "window", "documents", "gna")
PASSES = ("forward", "backward")
"""`"backward"` means forward and backward: outputs and the gradients of query, key and value."""
DENSE = ("jax.nn", "reference")
"""Programs that hold the whole score matrix."""


class Unavailable(Exception):
    """A program that cannot be had here, with the reason."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One attention problem.

    Args:
        kind: `"causal"`; `"full"`; `"padding"` (every key is seen but a tenth, hidden by an array mask); `"window"`
            (causal, `window` keys back); `"documents"` (causal inside packed documents, `window` to 3 `window` tokens
            long); `"gna"` (a neighborhood of `window` tokens on a square grid).
        length: T, queries and keys.
        batch: B.
        heads: N.
        kv_heads: K.
        dim: D.
        dtype: of query, key and value.
        window: see `kind`.
    """

    kind: str
    length: int
    batch: int = 1
    heads: int = 8
    kv_heads: int = 8
    dim: int = 64
    dtype: str = "float32"
    window: int = 256

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {self.kind!r}")

    @property
    def name(self) -> str:
        """What is measured, without the length."""
        return f"{self.kind} {self.window}" if self.kind in ("window", "documents", "gna") else self.kind

    @functools.cached_property
    def arrays(self) -> tuple[np.ndarray, ...]:
        """Query, key, value and the cotangent of the output."""
        rng = np.random.default_rng(0)
        heads = (self.heads, self.kv_heads, self.kv_heads, self.heads)
        return tuple(rng.standard_normal((self.batch, self.length, n, self.dim), np.float32) for n in heads)

    @functools.cached_property
    def key_mask(self) -> np.ndarray:
        """The visible keys of `"padding"`, `[1, 1, 1, S]`."""
        return (np.arange(self.length) < self.length - self.length // 10)[None, None, None]

    @functools.cached_property
    def segment_ids(self) -> np.ndarray:
        """The documents of `"documents"`, `[B, T]`."""
        lengths = np.random.default_rng(1).integers(self.window, 3 * self.window + 1, self.length // self.window + 1)
        ids = np.repeat(np.arange(len(lengths)), lengths)[: self.length].astype(np.int32)
        return np.broadcast_to(ids, (self.batch, self.length))

    @property
    def grid(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Grid and neighborhood of `"gna"`.

        Raises:
            Unavailable: the length or the window is no square number.
        """
        sides = tuple(round(size**0.5) for size in (self.length, self.window))
        if sides[0] ** 2 != self.length or sides[1] ** 2 != self.window or sides[1] > sides[0]:
            raise Unavailable(f"a square grid needs square numbers, got {self.length} tokens, {self.window} neighbors")
        return (sides[0],) * 2, (sides[1],) * 2

    @functools.cached_property
    def pairs(self) -> int:
        """Visible (query, key) pairs of a row and head."""
        if self.kind == "gna":
            # A window is shifted at the edge of the grid, never cut.
            return self.length * self.window
        if self.kind == "padding":
            return self.length * int(self.key_mask.sum())
        reach = np.arange(1, self.length + 1, dtype=np.int64)
        if self.kind == "full":
            return self.length**2
        if self.kind == "window":
            reach = np.minimum(reach, self.window)
        if self.kind == "documents":
            starts = np.concatenate([[True], np.diff(self.segment_ids[0]) != 0])
            reach = reach - np.maximum.accumulate(np.where(starts, reach, 0)) + 1
        return int(reach.sum())


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program: `run()` returns when the result is there."""

    run: Callable[[], Any]
    compile_s: float | None = None
    temp_bytes: int | None = None


def make(name: str, case: Case, which: str) -> Program:
    """Compile one implementation of a case.

    Args:
        name: one of `names()`.
        case: the problem.
        which: one of `PASSES`.

    Raises:
        Unavailable: it cannot run here, or has no form of this case.
    """
    if name.startswith("torch"):
        return _torch_program(name, case, which)
    function = _jax_nn(name, case) if name.startswith("jax.nn") else _jattn(name, case)
    return _jax_program(function, case, which)


def names() -> list[str]:
    """All implementations that this machine may have."""
    found = ["blockwise", "reference", "jax.nn"]
    if jax.default_backend() == "gpu":
        found.append("jax.nn cudnn")
    if importlib.util.find_spec("torch") is not None:
        found += ["torch sdpa", "torch flex"]
    return found


def _jattn(name: str, case: Case) -> Callable[..., Any]:
    options: dict[str, Any] = {} if name == "jattn" else {"implementation": name}
    if case.kind == "gna":
        grid, window = case.grid
        return functools.partial(jattn.get("gna_attention"), grid=grid, window=window, **options)
    options |= {
        "causal": {"is_causal": True},
        "full": {},
        "padding": {"mask": case.key_mask} if case.kind == "padding" else {},
        "window": {"mask": jattn.masks.sliding_window(case.window)},
        "documents": {"is_causal": True, "segment_ids": case.segment_ids} if case.kind == "documents" else {},
    }[case.kind]
    return functools.partial(jattn.dot_product_attention, **options)


def _dense_mask(case: Case) -> np.ndarray:
    if case.kind == "padding":
        return case.key_mask
    if case.kind == "gna":
        grid, window = case.grid
        mask = jattn.get("gna_mask")(grid, window)
        return np.asarray(mask.to_dense(1, 1, case.length, case.length))
    i, j = np.arange(case.length)[:, None], np.arange(case.length)
    mask = j <= i
    if case.kind == "window":
        mask &= i - j < case.window
    if case.kind == "documents":
        mask = mask & (case.segment_ids[:, :, None] == case.segment_ids[:, None])
        return mask[:, None]
    return mask[None, None]


def _jax_nn(name: str, case: Case) -> Callable[..., Any]:
    options: dict[str, Any] = {"implementation": "cudnn" if "cudnn" in name else "xla"}
    if case.kind == "causal":
        options["is_causal"] = True
    elif case.kind == "window":
        options |= {"is_causal": True, "local_window_size": (case.window - 1, 0)}
    elif case.kind != "full":
        options["mask"] = _dense_mask(case)
    return functools.partial(jax.nn.dot_product_attention, **options)


def _jax_program(function: Callable[..., Any], case: Case, which: str) -> Program:
    *inputs, cotangent = (jnp.asarray(array, case.dtype) for array in case.arrays)

    def backward(query: Any, key: Any, value: Any, cotangent: Any) -> Any:
        out, pull = jax.vjp(function, query, key, value)
        return out, pull(cotangent)

    program, arguments = (function, inputs) if which == "forward" else (backward, [*inputs, cotangent])
    started = time.perf_counter()
    compiled = jax.jit(program).lower(*arguments).compile()
    compile_s = time.perf_counter() - started
    analysis = compiled.memory_analysis()
    temporary = None if analysis is None else int(analysis.temp_size_in_bytes)
    return Program(lambda: jax.block_until_ready(compiled(*arguments)), compile_s, temporary)


def _torch_program(name: str, case: Case, which: str) -> Program:
    try:
        import torch
    except ImportError as error:
        raise Unavailable("torch is not installed") from error
    on_gpu = jax.default_backend() == "gpu"
    if on_gpu and not torch.cuda.is_available():
        raise Unavailable("this torch has no CUDA")
    device, dtype = "cuda" if on_gpu else "cpu", getattr(torch, case.dtype)
    query, key, value, cotangent = (
        torch.tensor(array, device=device, dtype=dtype).transpose(1, 2) for array in case.arrays
    )
    attend = (_torch_flex if name == "torch flex" else _torch_sdpa)(torch, case, device)
    inputs = [query, key, value]

    def forward() -> None:
        with torch.no_grad():
            attend(*inputs)
        if on_gpu:
            torch.cuda.synchronize()

    def backward() -> None:
        leaves = [array.detach().requires_grad_() for array in inputs]
        torch.autograd.grad(attend(*leaves), leaves, cotangent)
        if on_gpu:
            torch.cuda.synchronize()

    run, compile_s = forward if which == "forward" else backward, None
    if name == "torch flex":
        started = time.perf_counter()
        try:
            run()
        except Exception as error:
            raise Unavailable(f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}") from error
        compile_s = time.perf_counter() - started
    return Program(run, compile_s)


def _torch_sdpa(torch: Any, case: Case, device: str) -> Callable[..., Any]:
    attend = torch.nn.functional.scaled_dot_product_attention
    options: dict[str, Any] = {"enable_gqa": True} if case.kv_heads != case.heads else {}
    if case.kind == "causal":
        options["is_causal"] = True
    elif case.kind != "full":
        options["attn_mask"] = torch.tensor(_dense_mask(case), device=device)
    return functools.partial(attend, **options)


def _torch_flex(torch: Any, case: Case, device: str) -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if case.kind in ("padding", "gna"):
        raise Unavailable(f"no mask_mod is written for {case.kind} here")
    options: dict[str, Any] = {"enable_gqa": True} if case.kv_heads != case.heads else {}
    ids = torch.tensor(np.array(case.segment_ids), device=device) if case.kind == "documents" else None

    def visible(b: Any, h: Any, i: Any, j: Any) -> Any:
        seen = j <= i
        if case.kind == "window":
            seen = seen & (i - j < case.window)
        return seen if ids is None else seen & (ids[b, i] == ids[b, j])

    if case.kind != "full":
        size = (case.batch if ids is not None else None, None, case.length, case.length)
        options["block_mask"] = create_block_mask(visible, *size, device=device)
    # One compiled function of all lengths would be recompiled with symbolic shapes, which are slower.
    torch._dynamo.reset()
    return functools.partial(torch.compile(flex_attention, dynamic=False), **options)
