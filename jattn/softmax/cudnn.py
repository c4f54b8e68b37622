"""cuDNN's fused attention on NVIDIA GPUs, through `jax.nn.dot_product_attention`: what it takes, and how it is called.

It takes plain softmax attention of float16 and bfloat16: all keys, causal, a causal window, or key lengths. What it is
given always leaves every query a key to see, and hides no key from all of them, because cuDNN promises nothing for
either: causal attention is cut to as many keys as queries, keys beyond a row's length are set to 0, and a row of length
0 sees one key and is then set to 0, so that the output and all gradients are those of the contracts.

What differs from the other implementations, since the program and its rules of differentiation are not ours:

- gradients once, in reverse; forward-mode and second derivatives raise;
- under vmap queries, keys and values are best mapped together along their first axis, without key lengths; with older
  versions of JAX anything else raises;
- two backward passes may differ in the last bits, unless XLA_FLAGS holds --xla_gpu_deterministic_ops;
- no bias: where only queries, keys and values are mapped, JAX's rule gives every one of them the sum of all gradients.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from jattn.softmax import platforms
from jattn.softmax.mask_type import Mask, _And
from jattn.softmax.masks import _LocalWindow
from jattn.softmax.normalizers import Softmax
from jattn.softmax.problem import Problem

DTYPES = ("bfloat16", "float16")


def unsupported(problem: Problem) -> str:
    """Why cuDNN cannot take a problem, with who can; empty if it can."""
    reason = _platform_reason() or _array_reason(problem) or _feature_reason(problem) or _mask_reason(problem)
    return reason and f"{reason}; 'blockwise' does"


def remark(problem: Problem) -> str:
    """What is missing or differs although the problem is taken, to be put behind a reason."""
    return "; it has no forward-mode and no second derivatives, and two backward passes may differ in the last bits"


def _platform_reason() -> str:
    platform = platforms.current()
    if platform.name != "gpu":
        return f"it runs on NVIDIA GPUs and has no interpreter, this is a {platform.name}"
    major = platform.capability.partition(".")[0]
    if not major.isdigit() or int(major) < 8:
        return f"it needs an NVIDIA GPU of compute capability 8.0 or later, this one has {platform.capability!r}"
    return ""


def _array_reason(problem: Problem) -> str:
    head_dim, value_dim = problem.query.shape[-1], problem.value.shape[-1]
    platform = platforms.current()
    # JAX asks the attached device, so what is compiled for an absent one is held to the smaller limit.
    largest = 256 if platform.attached and int(platform.capability.partition(".")[0]) >= 9 else 128
    if str(problem.query.dtype) not in DTYPES:
        return f"it does not take {problem.query.dtype}, only {' and '.join(DTYPES)}"
    if head_dim != value_dim:
        return f"it does not take values of another width ({value_dim}) than keys ({head_dim})"
    if head_dim % 8 or head_dim > largest:
        return f"it does not take head dim {head_dim}, only multiples of 8 up to {largest}"
    return ""


def _feature_reason(problem: Problem) -> str:
    features = {
        "a bias": problem.bias is not None,
        "a score mod": problem.score_mod is not None,
        "a soft cap": problem.logit_soft_cap is not None,
        "the dropout of this library": bool(problem.dropout_rate),
        "a block layout": problem.layout is not None,
        "segment ids": problem.query_segments is not None,
        "positions": problem.query_positions is not None or problem.key_positions is not None,
        "block sizes": problem.block_sizes is not None,
        f"the normalizer {type(problem.normalizer).__name__}": not isinstance(problem.normalizer, Softmax),
    }
    return next((f"it does not take {name}" for name, used in features.items() if used), "")


def _mask_reason(problem: Problem) -> str:
    _, length, source, _, _ = problem.sizes
    if len(problem.mask_arrays) > (problem.key_lengths is not None):
        return "it does not take boolean masks or query lengths"
    if problem.mask is None:
        return ""
    window = _window(problem.mask)
    if window is None or window[1] != 0:
        return "it does not take masks other than causal ones, causal windows and key lengths"
    if length > source:
        return f"it does not take causal masks with more queries ({length}) than keys ({source})"
    if window[0] is not None and problem.key_lengths is not None:
        return "it does not take a window together with key lengths"
    return ""


def _window(mask: Mask) -> tuple[int | None, int | None] | None:
    """The mask as (left, right), ends included, None where open; None if it is no window."""
    if isinstance(mask, _LocalWindow):
        return mask.left, mask.right
    if isinstance(mask, _And):
        one, other = _window(mask.left), _window(mask.right)
        if one is not None and other is not None:
            return _nearer(one[0], other[0]), _nearer(one[1], other[1])
    return None


def _nearer(one: int | None, other: int | None) -> int | None:
    return min((end for end in (one, other) if end is not None), default=None)


def attend(problem: Problem) -> jax.Array:
    """Output `[B, T, N, D]` in the query's dtype, of a problem that is supported."""
    query, key, value, lengths = problem.query, problem.key, problem.value, problem.key_lengths
    attention = functools.partial(jax.nn.dot_product_attention, scale=problem.scale, implementation="cudnn")
    if problem.mask is not None:
        window = _window(problem.mask)
        assert window is not None, problem.mask
        key, value = key[:, : query.shape[1]], value[:, : query.shape[1]]
        sides = None if window[0] is None else window
        attention = functools.partial(attention, is_causal=True, local_window_size=sides)
    if lengths is None:
        return attention(query, key, value)
    inside = (jnp.arange(key.shape[1]) < lengths[:, None])[:, :, None, None]
    key, value = jnp.where(inside, key, 0), jnp.where(inside, value, 0)
    seen = jnp.clip(lengths, 1, key.shape[1]).astype(jnp.int32)
    out = attention(query, key, value, key_value_seq_lengths=seen)
    return jnp.where((lengths > 0)[:, None, None, None], out, 0)
