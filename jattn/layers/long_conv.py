"""Long convolutions: a kernel as long as the sequence, applied by fast transforms, and the networks that make kernels.

    causal:    y_t = sum_{s <= t} h_{t - s} u_s
    circular:  y_t = sum_s h_{(t - s) mod T} u_s
    dct:       y = C^T (C h * C u), C the orthonormal DCT-II

One transform of size 2 T would compute the causal form, but rounding would carry every token into those before it, and
a single NaN would reach the whole row. So the sequence is cut into blocks of blocks: what a part of a block adds to the
later parts is one transform, in which all inputs are earlier than all outputs. That takes T log(T)^2 steps, is causal
bit for bit, and keeps documents of a packed row apart, because only one of them can cross the border of two parts.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jattn.layers.sharding import axes
from jattn.layers.short_conv import pack

MODES = ("causal", "circular", "dct")
DIRECT = 64
"""Up to so many tokens a kernel is multiplied out, which is faster than transforming it."""
DIRECT_PACKED = 8
"""The same where documents are packed: then the products depend on the row as well."""
PARTS = 8
"""How many parts a block has."""
HIGHEST = jax.lax.Precision.HIGHEST


def fft_conv(u: Any, h: Any, mode: str = "causal", *, segment_ids: Any = None) -> jax.Array:
    """Convolve every channel with a kernel of any length.

    causal: y_t = sum_{s <= t} h_{t-s} u_s; circular: y_t = sum_s h_{(t-s) mod T} u_s; dct: y = C^T (C h * C u)

    Args:
        u: `[B, T, M]`.
        h: `[L, M]`, or `[B, L, M]` with a kernel for each row. Missing taps are 0; those that are too many for the
            causal form are never reached.
        mode: "causal", "circular" or "dct".
        segment_ids: integers `[B, T]`, for the causal form; a run of equal ids sees itself only, negative = padding,
            which outputs 0 and is not there for others.

    Returns:
        `[B, T, M]` in the dtype of u, computed in float32 at least.

    Raises:
        ValueError: shapes that do not fit, an unknown mode, or segments with a transform that mixes the whole row.

    Example:
        >>> import jax.numpy as jnp
        >>> u = jnp.array([1.0, 0.0, 2.0]).reshape(1, 3, 1)
        >>> h = jnp.array([[1.0], [0.5], [0.25]])
        >>> fft_conv(u, h).ravel().tolist(), fft_conv(u, h, "circular").ravel().round(4).tolist()
        ([1.0, 0.5, 2.25], [2.0, 1.0, 2.25])

    Source: as in Zoology (arXiv 2312.04927) and Orchid (arXiv 2402.18508).
    """
    u, h = jnp.asarray(u), jnp.asarray(h)
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    fits = u.ndim == 3 and h.ndim in (2, 3) and h.shape[-1] == u.shape[-1] and h.shape[-2] and u.shape[1]
    if not fits or (h.ndim == 3 and h.shape[0] != u.shape[0]):
        raise ValueError(f"u must be [B, T, M] and h [L, M] or [B, L, M]; got {list(u.shape)} and {list(h.shape)}")
    if mode != "causal" and (segment_ids is not None or h.shape[-2] > u.shape[1]):
        raise ValueError(
            f"mode={mode!r} mixes the whole row: it takes no segment_ids and at most {u.shape[1]} taps, got "
            f"{h.shape[-2]}; mode='causal' takes both"
        )
    dtype = jnp.promote_types(jnp.promote_types(u.dtype, h.dtype), jnp.float32)
    x, taps = u.astype(dtype), h.astype(dtype)
    if mode == "causal":
        row = None if segment_ids is None else pack(x, x[:, :0], segment_ids)
        y = _causal(x, taps, None) if row is None else row.unpack(_causal(row.tokens, taps, row.runs))
        return y.astype(u.dtype)
    x, taps = jnp.swapaxes(x, 1, 2), jnp.swapaxes(taps, -1, -2)
    taps = jnp.pad(taps, [(0, 0)] * (taps.ndim - 1) + [(0, x.shape[2] - taps.shape[-1])])
    if mode == "circular":
        y = jnp.fft.irfft(jnp.fft.rfft(x) * jnp.fft.rfft(taps), x.shape[2])
    else:
        y = idct(dct(x) * dct(taps))
    return jnp.swapaxes(y, 1, 2).astype(u.dtype)


def dct(x: jax.Array) -> jax.Array:
    """Orthonormal DCT-II over the last axis."""
    return jax.scipy.fft.dct(x, type=2, norm="ortho")


def idct(x: jax.Array) -> jax.Array:
    """The inverse of `dct`."""
    return jax.scipy.fft.idct(x, type=2, norm="ortho")


def causal_long_conv(x: Any, kernel: Any, *, segment_ids: Any = None, tail: Any = None) -> tuple[jax.Array, jax.Array]:
    """A causal convolution with a long kernel that goes on where an earlier call stopped.

    y_t = sum_{w < L} h_w x_{t - w}

    Args:
        x: `[B, T, M]`.
        kernel: h `[L, M]`; its first entry meets the token itself.
        segment_ids: as in `fft_conv`.
        tail: `[B, L - 1, M]`, the inputs before the first token; zeros if None. They belong to the first run.

    Returns:
        `[B, T, M]`, and the tail for the tokens to come. A kernel of L taps looks at L inputs, so this is all that an
        exact continuation needs, and nothing less will do.

    Raises:
        ValueError: shapes that do not fit.

    Example:
        >>> import jax.numpy as jnp
        >>> x, h = jnp.arange(4.0).reshape(1, 4, 1), jnp.array([[1.0], [0.5], [0.25]])
        >>> y, tail = causal_long_conv(x[:, :3], h)
        >>> causal_long_conv(x[:, 3:], h, tail=tail)[0].ravel().tolist(), fft_conv(x, h).ravel().tolist()
        ([4.25], [0.0, 1.0, 2.5, 4.25])

    Source: as `fft_conv`.
    """
    x, kernel = jnp.asarray(x), jnp.asarray(kernel)
    if x.ndim != 3 or kernel.ndim != 2 or kernel.shape[1] != x.shape[2] or not kernel.shape[0]:
        raise ValueError(f"x must be [B, T, M] and kernel [L, M]; got {list(x.shape)} and {list(kernel.shape)}")
    (batch, length, channels), before = x.shape, kernel.shape[0] - 1
    past = jnp.zeros_like(x, shape=(batch, before, channels)) if tail is None else jnp.asarray(tail)
    if past.shape != (batch, before, channels):
        raise ValueError(f"tail must be {[batch, before, channels]}, got {list(past.shape)}")
    dtype = jnp.promote_types(jnp.promote_types(x.dtype, kernel.dtype), jnp.float32)
    row = None if segment_ids is None else pack(x, past, segment_ids)
    tokens = jnp.concatenate([past.astype(x.dtype), x], 1) if row is None else row.tokens
    runs = None if row is None else row.runs
    start = before if tail is None else 0
    if length == 1 and tail is not None:
        seen = tokens if runs is None else jnp.where((runs == runs[:, -1:])[..., None], tokens, 0)
        taps = jnp.flip(kernel, 0).astype(dtype)
        y = jnp.einsum("blm,lm->bm", seen.astype(dtype), taps, precision=HIGHEST)[:, None]
    else:
        y = _causal(tokens[:, start:].astype(dtype), kernel.astype(dtype), None if runs is None else runs[:, start:])
        y = y[:, before - start :]
    y = y.astype(x.dtype)
    return (y, tokens[:, length:]) if row is None else (row.unpack(y), row.tail(before))


def _causal(u: jax.Array, h: jax.Array, runs: jax.Array | None) -> jax.Array:
    """The causal form of `[B, T, M]` and `[(B,) L, M]`; `runs` `[B, T]` tells documents apart."""
    length = u.shape[1]
    size = 1 << (length - 1).bit_length()
    x = jnp.pad(jnp.swapaxes(u, 1, 2), [(0, 0), (0, 0), (0, size - length)])
    taps = jnp.swapaxes(h, -1, -2)[..., :size]
    taps = jnp.pad(taps, [(0, 0)] * (taps.ndim - 1) + [(0, size - taps.shape[-1])])
    owner = None if runs is None else jnp.pad(runs, [(0, 0), (0, size - length)], mode="edge")
    part = min(DIRECT if owner is None else DIRECT_PACKED, size)
    y = _inside(x, taps, owner, part)
    while part < size:
        parts = min(PARTS, size // part)
        y = y + _across(x, taps, owner, part, parts).reshape(y.shape)
        part *= parts
    return jnp.swapaxes(y[..., :length], 1, 2)


def _inside(x: jax.Array, taps: jax.Array, owner: jax.Array | None, size: int) -> jax.Array:
    """What tokens `[B, M, T]` add to the later ones of their block of `size` tokens, multiplied out."""
    blocks = x.reshape(*x.shape[:2], -1, size)
    distance = np.arange(size)[:, None] - np.arange(size)
    weights = jnp.where(distance >= 0, taps[..., np.maximum(distance, 0)], 0)
    if owner is None:
        rows = "bmij" if taps.ndim == 3 else "mij"
        return jnp.einsum(f"bmpj,{rows}->bmpi", blocks, weights, precision=HIGHEST).reshape(x.shape)
    own = owner.reshape(x.shape[0], 1, -1, size)
    same = own[..., :, None] == own[..., None, :]
    products = weights[..., None, :, :] * blocks[..., None, :]
    return jnp.sum(jnp.where(same, products, 0), -1).reshape(x.shape)


def _across(x: jax.Array, taps: jax.Array, owner: jax.Array | None, size: int, parts: int) -> jax.Array:
    """What the parts of a block, `size` tokens each, add to the later parts of that block."""
    blocks = x.reshape(*x.shape[:2], -1, parts, size)
    left, crosses, reaches = blocks[..., :-1, :], None, None
    if owner is not None:
        own = owner.reshape(x.shape[0], 1, -1, parts, size)
        last = own[..., :-1, -1:]  # the run that goes on into the next part
        left = jnp.where(own[..., :-1, :] == last, left, 0)
        crosses, reaches = own[..., 1:, :] == last, last
    # Twice the size: what wraps around falls on the first half, which is not read.
    seen = jnp.fft.rfft(left, 2 * size)
    total = jnp.zeros_like(seen)
    for ahead in range(1, parts):
        spectrum = jnp.fft.rfft(taps[..., (ahead - 1) * size : (ahead + 1) * size])[..., None, None, :]
        added = seen[..., : parts - ahead, :] * spectrum
        if reaches is not None:
            added = jnp.where(reaches[..., : parts - ahead, :] == reaches[..., ahead - 1 :, :], added, 0)
        total = total.at[..., ahead - 1 :, :].add(added)
    right = jnp.fft.irfft(total, 2 * size)[..., size:]
    right = right if crosses is None else jnp.where(crosses, right, 0)
    return jnp.concatenate([jnp.zeros_like(blocks[..., :1, :]), right], -2)


def filter_features(length: int, emb_dim: int, max_length: int | None = None) -> np.ndarray:
    """What an implicit filter knows of a place: its time and a few waves.

    [t, cos(f w), -sin(f w)],  t = n / (L - 1),  w = 2 pi n / L,  f = linspace(1e-4, bands - 1, bands)

    Args:
        length: T, places 0 .. T-1.
        emb_dim: 1 + 2 bands, odd, at least 3. With 3 the only frequency is 1e-4, and t alone varies.
        max_length: L, T if None.

    Returns:
        float64 `[T, emb_dim]`.

    Raises:
        ValueError: an even emb_dim, or places beyond L.

    Example:
        >>> filter_features(3, 3).round(4).tolist()
        [[0.0, 1.0, -0.0], [0.5, 1.0, -0.0002], [1.0, 1.0, -0.0004]]

    Source: Hyena (arXiv 2302.10866), published code, as Zoology and Orchid use it.
    """
    whole = length if max_length is None else max_length
    if emb_dim < 3 or emb_dim % 2 == 0 or length > whole:
        raise ValueError(
            f"emb_dim must be odd and at least 3, length at most {whole}; got emb_dim={emb_dim}, length={length}"
        )
    bands = (emb_dim - 1) // 2
    places = np.arange(length)[:, None]
    waves = 2 * math.pi * places / whole * np.linspace(1e-4, bands - 1, bands)
    return np.concatenate([places / max(whole - 1, 1), np.cos(waves), -np.sin(waves)], 1)


class ImplicitFilterRelu(nnx.Module):
    """A kernel made by a small network from its places: Linear, ReLU, Linear.

    h_n = W_2 relu(W_1 [t, cos(f w), -sin(f w)]_n + b_1) + b_2

    Args:
        features: M, channels.
        max_length: L, over which places are counted; taps beyond do not exist. The length asked for if None.
        emb_dim: features of a place.
        hidden: width of the network.
        param_dtype: of the parameters.
        rngs: for the initial values.

    Raises:
        ValueError: an even emb_dim.

    Example:
        >>> from flax import nnx
        >>> ImplicitFilterRelu(8, max_length=32, rngs=nnx.Rngs(0))(20).shape
        (20, 8)

    Source: Zoology: Measuring and Improving Recall in Efficient Language Models (arXiv 2312.04927), published code.
    """

    def __init__(
        self,
        features: int,
        *,
        max_length: int | None = None,
        emb_dim: int = 3,
        hidden: int = 16,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        filter_features(1, emb_dim)
        self.max_length, self.emb_dim = max_length, emb_dim
        shared: dict[str, Any] = {"param_dtype": param_dtype, "rngs": rngs}
        self.up = nnx.Linear(emb_dim, hidden, kernel_metadata=axes(None, None), bias_metadata=axes(None), **shared)
        self.down = nnx.Linear(
            hidden, features, kernel_metadata=axes(None, "embed"), bias_metadata=axes("embed"), **shared
        )

    def __call__(self, length: int) -> jax.Array:
        """The first taps, `[length, M]`, float32 at least."""
        return self.down(jax.nn.relu(self.up(_places(length, self.emb_dim, self.max_length, self.up))))


class HyenaFilter(nnx.Module):
    """A kernel made by a network of sines from its places, under a window that fades at a rate of its own a channel.

    h_nc = (W_k sin(w * (.. sin(w * (W_1 z_n + b_1)) ..)))_c exp(-t_n delta_c)

    w is one trainable vector that all sine layers share; delta goes from |log 0.01| / 1.5 to |log 0.01| / 0.3, so that
    the first channel falls to 1 % after 1.5 lengths and the last one after 0.3.

    Args:
        features: M, channels.
        max_length: L, over which places are counted; the length asked for if None.
        emb_dim: features of a place, see `filter_features`.
        hidden: width of the network.
        inner_layers: sine layers after the first.
        frequency: first value of w.
        window: whether there is the window.
        param_dtype: of the parameters.
        rngs: for the initial values.

    Raises:
        ValueError: an even emb_dim.

    Example:
        >>> from flax import nnx
        >>> HyenaFilter(8, rngs=nnx.Rngs(0))(20).shape
        (20, 8)

    Source: Hyena (arXiv 2302.10866) and Orchid (arXiv 2402.18508), published code.
    """

    def __init__(
        self,
        features: int,
        *,
        max_length: int | None = None,
        emb_dim: int = 3,
        hidden: int = 64,
        inner_layers: int = 2,
        frequency: float | int = 10.0,
        window: bool = True,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        filter_features(1, emb_dim)
        self.max_length, self.emb_dim = max_length, emb_dim
        low = -math.log(0.01)
        self.rates = tuple(np.linspace(low / 1.5, low / 0.3, features).tolist()) if window else None
        shared: dict[str, Any] = {"param_dtype": param_dtype, "rngs": rngs}
        widths = [emb_dim] + [hidden] * (1 + inner_layers)
        inner = {"kernel_metadata": axes(None, None), "bias_metadata": axes(None)}
        self.layers = nnx.List([nnx.Linear(a, b, **inner, **shared) for a, b in zip(widths, widths[1:], strict=False)])
        self.frequency = nnx.Param(jnp.full((hidden,), frequency, param_dtype), **axes(None))
        self.down = nnx.Linear(hidden, features, use_bias=False, kernel_metadata=axes(None, "embed"), **shared)

    def __call__(self, length: int) -> jax.Array:
        """The first taps, `[length, M]`, float32 at least."""
        z = _places(length, self.emb_dim, self.max_length, self.down)
        y = z
        for layer in self.layers:
            y = jnp.sin(self.frequency.get_value().astype(z.dtype) * layer(y))
        y = self.down(y)
        return y if self.rates is None else y * jnp.exp(-z[:, :1] * jnp.asarray(self.rates, z.dtype))


def _places(length: int, emb_dim: int, max_length: int | None, layer: Any) -> jax.Array:
    dtype = jnp.promote_types(layer.kernel.get_value().dtype, jnp.float32)
    return jnp.asarray(filter_features(length, emb_dim, max_length), dtype)
