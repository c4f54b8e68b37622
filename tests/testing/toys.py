"""Small attention functions in plain jax.numpy: a sound one, and one defect each for the suite to find."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jattn.mechanisms.entry import PATTERNS, Cost, Entry


def visibility(query, key, mask, is_causal, segment_ids):
    """Booleans [B, 1, T, S]."""
    i, j = np.arange(query.shape[1]), np.arange(key.shape[1])
    visible = jnp.broadcast_to(j[None] <= i[:, None] if is_causal else True, (query.shape[0], 1, i.size, j.size))
    if segment_ids is not None:
        query_ids, key_ids = segment_ids if isinstance(segment_ids, tuple) else (segment_ids, segment_ids)
        query_ids, key_ids = jnp.asarray(query_ids)[:, None, :, None], jnp.asarray(key_ids)[:, None, None, :]
        visible = visible & (query_ids == key_ids) & (query_ids >= 0)
    return visible if mask is None else visible & mask


def attention(
    query,
    key,
    value,
    *,
    mask=None,
    is_causal=False,
    segment_ids=None,
    query_positions=None,
    key_positions=None,
    defect="",
):
    """Softmax attention with an optional defect."""
    logits_dtype = query.dtype if defect == "narrow logits" else jnp.promote_types(query.dtype, jnp.float32)
    if query_positions is not None:
        mask = (key_positions[:, None, None, :] <= query_positions[:, None, :, None]) & (True if mask is None else mask)
        is_causal = False
    visible = visibility(query, key, mask, is_causal and defect != "acausal", segment_ids)
    seen = jnp.swapaxes(visible.any(2), 1, 2)[..., None]
    if defect not in ("leak", "mean of nothing"):
        key, value = jnp.where(seen, key, 0), jnp.where(seen, value, 0)
    if defect == "peek":  # a pooled token: every query sees a little of every key
        value = value + 1e-6 * jnp.where(seen, value, 0).mean(1, keepdims=True)
    if defect == "order":
        value = value * (1 + jnp.arange(value.shape[1], dtype=value.dtype))[:, None, None]
    if defect == "counts queries":
        query = query * query.shape[1]
    logits = jnp.einsum("btnd,bsnd->bnts", query, key, preferred_element_type=logits_dtype) * query.shape[-1] ** -0.5
    if defect == "coarse logits" and query.dtype == jnp.bfloat16:
        logits = logits.astype(jnp.float8_e4m3fn).astype(jnp.float32)
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    masked = jnp.where(visible, logits, -1e9 if defect == "mean of nothing" else -jnp.inf)
    top = jax.lax.stop_gradient(jnp.max(masked, -1, keepdims=True))
    weights = jnp.exp(masked - jnp.where(jnp.isfinite(top), top, 0))
    total = weights.sum(-1, keepdims=True)
    weights = weights / (total if defect == "0 / 0" else jnp.where(total == 0, 1, total))
    if defect == "wrong gradient":
        weights = jax.lax.stop_gradient(weights)
    if defect == "noise":
        weights = weights * (
            1 + jax.pure_callback(_noise, jax.ShapeDtypeStruct((), jnp.float32), vmap_method="sequential")
        )
    if defect == "needs values":
        float(weights[0, 0, 0, 0])
    if defect == "no forward mode":
        weights = _backward_only(weights)
    if defect == "eager differs" and not isinstance(query, jax.core.Tracer):
        weights = weights * 1.001
    if defect == "across examples":
        scalar = jax.ShapeDtypeStruct((), jnp.float32)
        seen = jax.pure_callback(_batch_axes, scalar, jax.lax.stop_gradient(weights), vmap_method="broadcast_all")
        weights = weights * (1 + seen)
    out = jnp.einsum("bnts,bsnd->btnd", weights.astype(value.dtype), value)
    if defect == "quadratic memory":
        out = out + 0 * jnp.sort(jnp.sort(weights @ jnp.swapaxes(weights, -1, -2), -1), -2).sum()
    return out.astype(jnp.float32 if defect == "float32 out" else query.dtype)


_ROUNDS = iter(range(10**9))


def _noise():
    return np.float32(next(_ROUNDS) * 1e-6)


@jax.custom_vjp
def _backward_only(x):
    return x


_backward_only.defvjp(lambda x: (x, None), lambda _, g: (g,))


def _batch_axes(weights):
    return np.full(weights.shape[:-4], weights.ndim - 4, np.float32)


def linear(query, key, value, *, is_causal=False, defect=""):
    """Attention of linear cost; causal or not, it takes nothing that hides tokens."""
    dtype = query.dtype if defect == "narrow state" else jnp.promote_types(query.dtype, jnp.float32)
    outer = jnp.einsum("bsnd,bsne->bsnde", key, value, preferred_element_type=dtype)
    if is_causal:
        state = jax.lax.associative_scan(jnp.add, outer, axis=1)
        return jnp.einsum("btnd,btnde->btne", query, state).astype(query.dtype)
    return jnp.einsum("btnd,bnde->btne", query, outer.sum(1)).astype(query.dtype)


def example(key, length):
    query, k, value = jax.random.normal(key, (3, 2, length, 2, 4))
    return (query, k, value), {}


def entry(defect="", function=attention, **changes):
    """An entry of a toy, with a defect."""

    @functools.wraps(function or attention)
    def toy(*args, **kwargs):
        return function(*args, **kwargs, **({"defect": defect} if defect else {}))

    settings = {
        "name": "toy",
        "kind": "primitive",
        "family": "softmax",
        "function": None if function is None else toy,
        "patterns": PATTERNS,
        "cost": Cost("T^2", "T^2"),
        "decode": "any KV cache",
        "example": example,
    }
    return Entry(**{**settings, **changes})
