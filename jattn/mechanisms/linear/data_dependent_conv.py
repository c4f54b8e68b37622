"""Data-dependent convolution: a kernel as long as the sequence that a small network makes from the sequence itself.

    y = (h_static + h_adapt(c)) * x                           * is circular convolution, channel by channel
    Type I, "magnitude":     F h_adapt = R(|F c|^p)           F the Fourier transform (p = 2) or the DCT (p = 1)
    Type II, "correlation":  F h_adapt = R(conj(F k) sigma(F q))

Both Fourier spectra forget where c begins: shifting c leaves the kernel as it is, so the operator follows shifts of x.
`OrchidOperator` is the layer: c (or q and k, from c) has been convolved over 3 tokens before the transform, R convolves
over 3 neighboring frequencies, each with a LayerNorm over channels after it; gates and a static convolution go around:

    [u0, u1, u2] = x W_in,   [x0, x1, x2] = ShortConv([u0, u1, u2]),   c = u2,   z = x1 x2
    out = (x0 (h * z + D z) + h_res * x + D_res x) W_out

The layer is not causal: the kernel depends on all of the row, and the convolution goes around. Source: Orchid: Flexible
and Data-Dependent Convolution for Sequence Modeling (arXiv 2402.18508) and its standalone program.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jattn.layers.attention import LayerOutput
from jattn.layers.long_conv import HyenaFilter, dct, fft_conv, idct
from jattn.layers.neighbor_conv import NeighborConv
from jattn.layers.sharding import axes
from jattn.layers.short_conv import ShortConv
from jattn.mechanisms.entry import Cost, Entry, LayerExample, Paper
from jattn.mechanisms.examples import normals
from jattn.mechanisms.linear.base_conv import check_groups

TRANSFORMS = ("fft", "dct")
SIGMAS = {"tanh": jnp.tanh, "sigmoid": jax.nn.sigmoid, "gelu": jax.nn.gelu, "softsign": jax.nn.soft_sign}


def adaptive_kernel(
    condition: Any,
    other: Any = None,
    *,
    transform: str = "fft",
    power: float | int | None = None,
    sigma: str | None = None,
    response: Callable[[jax.Array], jax.Array] | None = None,
    causal_kernel: bool = True,
) -> jax.Array:
    """The kernel that a sequence makes for itself, invariant to where the sequence begins.

    F h = R(|F c|^p), or with two sequences F h = R(conj(F k) sigma(F q))

    Args:
        condition: c, or q of Type II, `[B, T, M]`.
        other: k of Type II, `[B, T, M]`.
        transform: "fft" or "dct". The DCT of a shifted sequence is another one, so its kernels follow shifts in part
            only.
        power: p; 2 for "fft" and 1 for "dct" if None. The paper writes 1, its program squares Fourier magnitudes.
        sigma: "tanh", "sigmoid", "gelu" or "softsign", applied to the real and the imaginary part of F q; None for
            nothing, which the ablations found best.
        response: R, a function of the spectrum `[B, bins, M]`: real for Type I and for the DCT, complex otherwise. It
            returns the kernel's spectrum, real or complex. None for the identity.
        causal_kernel: transform 2 T places, the second half zeros, and keep the first T taps. This is the published
            program's flag; it cuts the kernel off, it does not make anything causal, and of the DCT it changes nothing.
            The program has no form of it for Type II with "fft" whose sizes fit; it is the same here.

    Returns:
        h, float32 at least, `[B, T, M]`.

    Raises:
        ValueError: shapes that do not fit, or an unknown word.

    Example:
        >>> import jax.numpy as jnp
        >>> c = jnp.array([1.0, 2.0, 0.0]).reshape(1, 3, 1)
        >>> adaptive_kernel(c, causal_kernel=False).ravel().round(4).tolist()  # the autocorrelation
        [5.0, 2.0, 2.0]

    Source: Orchid: Flexible and Data-Dependent Convolution for Sequence Modeling (arXiv 2402.18508).
    """
    _check_word("transform", transform, TRANSFORMS)
    if sigma is not None:
        _check_word("sigma", sigma, tuple(SIGMAS))
    condition = jnp.asarray(condition)
    other = None if other is None else jnp.asarray(other)
    if condition.ndim != 3 or not condition.shape[1] or (other is not None and other.shape != condition.shape):
        shapes = [list(x.shape) for x in (condition, other) if x is not None]
        raise ValueError(f"condition, and other if given, must be [B, T, M]; got {shapes}")
    dtype, length = jnp.promote_types(condition.dtype, jnp.float32), condition.shape[1]
    is_fft = transform == "fft"
    size = 2 * length if causal_kernel and is_fft else length

    def spectrum(x: jax.Array) -> jax.Array:
        x = x.astype(dtype)
        return jnp.fft.rfft(x, size, axis=1) if is_fft else jnp.swapaxes(dct(jnp.swapaxes(x, 1, 2)), 1, 2)

    seen = spectrum(condition)
    if other is None:
        power = (2 if is_fft else 1) if power is None else power
        seen = seen.real**2 + seen.imag**2 if is_fft and power == 2 else jnp.abs(seen) ** power
    else:
        if sigma is not None:
            f = SIGMAS[sigma]
            seen = jax.lax.complex(f(seen.real), f(seen.imag)) if is_fft else f(seen)
        seen = jnp.conj(spectrum(other)) * seen
    seen = seen if response is None else response(seen)
    if is_fft:
        return jnp.fft.irfft(seen, size, axis=1)[:, :length].astype(dtype)
    return jnp.swapaxes(idct(jnp.swapaxes(seen, 1, 2)), 1, 2)


def data_dependent_conv(
    x: Any, condition: Any, kernel: Any = None, *, other: Any = None, transform: str = "fft", **options: Any
) -> jax.Array:
    """Convolve x with a kernel that depends on a sequence, x itself or another one.

    y = (kernel + adaptive_kernel(condition, other)) * x, circular (or by DCT) over T places

    Args:
        x: `[B, T, M]`.
        condition: `[B, T, M]`.
        kernel: a static kernel `[T, M]` to add, or None.
        other: a second sequence, for Type II.
        transform: "fft" or "dct", of the kernel and of the convolution.
        **options: power, sigma, response and causal_kernel of `adaptive_kernel`.

    Returns:
        `[B, T, M]` in the dtype of x.

    Raises:
        ValueError: shapes that do not fit, or an unknown word.

    Example:
        >>> import jax.numpy as jnp
        >>> x = jnp.eye(4)[None, :, :1]
        >>> data_dependent_conv(x, 2 * x, causal_kernel=False).ravel().tolist()  # 2 x has the kernel [4, 0, 0, 0]
        [4.0, 0.0, 0.0, 0.0]

    Source: Orchid: Flexible and Data-Dependent Convolution for Sequence Modeling (arXiv 2402.18508).
    """
    x = jnp.asarray(x)
    h = adaptive_kernel(condition, other, transform=transform, **options)
    if h.shape != x.shape:
        raise ValueError(f"condition must be shaped like x, {list(x.shape)}, got {list(h.shape)}")
    if kernel is not None:
        kernel = jnp.asarray(kernel)
        if kernel.shape != x.shape[1:]:
            raise ValueError(f"kernel must be {list(x.shape[1:])}, got {list(kernel.shape)}")
        h = h + kernel.astype(h.dtype)
    return fft_conv(x, h, "circular" if transform == "fft" else "dct")


def _check_word(name: str, word: Any, words: tuple[str, ...]) -> None:
    if word not in words:
        raise ValueError(f"{name} must be one of {', '.join(words)}, got {word!r}")


class OrchidOperator(nnx.Module):
    """Orchid's mixer: a gated data-dependent convolution, and a static one beside it.

    out = (x0 (h * z + D z) + h_res * x + D_res x) W_out, z = x1 x2; see the module.

    Args:
        features: M.
        num_heads: N; every channel has a kernel of its own, heads cut the channels into groups for `tap` only.
        num_kv_heads: none but N.
        head_dim: none but M / N.
        conditioning: "magnitude" (Type I) or "correlation" (Type II).
        transform: "fft" or "dct".
        power: of the magnitudes, see `adaptive_kernel`.
        sigma: of Type II.
        causal_kernel: whether kernels are cut off; see `adaptive_kernel`. The layer is not causal either way.
        padding: at the ends of the conditioning convolution over time: "zeros", or "circular", with which, and with
            short_width=1 and causal_kernel=False, the layer follows circular shifts exactly.
        short_width: of the convolution of the three projections, which looks back.
        condition_width: of the conditioning convolutions, odd.
        max_length: over which the static kernels count places; the length of the call if None.
        emb_dim: what the static kernels know of a place.
        filter_dim: width of their network.
        filter_layers: its sine layers after the first.
        frequency: first value of its frequencies.
        residual_conv: whether there is h_res and D_res.
        use_bias: of W_in and W_out.
        position: refused: there are no queries and keys to rotate.
        dtype: of the projections; that of inputs and parameters if not given. Transforms are float32 at least.
        param_dtype: of the parameters.
        rngs: for the initial values.

    Raises:
        ValueError: sizes that do not fit, a position, or an unknown word.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> OrchidOperator(16, rngs=nnx.Rngs(0))(jnp.ones((1, 5, 16))).output.shape
        (1, 5, 16)

    Source: Orchid: Flexible and Data-Dependent Convolution for Sequence Modeling (arXiv 2402.18508), published code.
    Unlike there, convolutions are not divided by T, and in Type II both numbers of a frequency belong to one channel.
    """

    def __init__(
        self,
        features: int,
        num_heads: int = 1,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        conditioning: str = "magnitude",
        transform: str = "fft",
        power: float | int | None = None,
        sigma: str | None = None,
        causal_kernel: bool = True,
        padding: str = "zeros",
        short_width: int = 3,
        condition_width: int = 3,
        max_length: int | None = None,
        emb_dim: int = 3,
        filter_dim: int = 64,
        filter_layers: int = 2,
        frequency: float | int = 10.0,
        residual_conv: bool = True,
        use_bias: bool = True,
        position: Any = None,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        check_groups(type(self).__name__, features, num_heads, num_kv_heads, head_dim)
        _check_word("conditioning", conditioning, ("magnitude", "correlation"))
        _check_word("transform", transform, TRANSFORMS)
        if position is not None:
            raise ValueError("OrchidOperator has no queries and keys, so it takes no position; it tells places itself")
        self.features, self.num_heads, self.dtype = features, num_heads, dtype
        self.options = {"transform": transform, "power": power, "sigma": sigma, "causal_kernel": causal_kernel}
        shared: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        own: dict[str, Any] = {"param_dtype": param_dtype, "rngs": rngs}
        into = {"kernel_metadata": axes("embed", None), "bias_metadata": axes(None)}
        self.project = nnx.Linear(features, 3 * features, use_bias=use_bias, **into, **shared)
        self.short = ShortConv(3 * features, short_width, use_bias=True, **shared)
        near: dict[str, Any] = {"width": condition_width, **own}
        self.condition = NeighborConv(features, padding=padding, **near)
        is_type_2, numbers = conditioning == "correlation", 2 if transform == "fft" else 1
        self.other = NeighborConv(features, padding=padding, **near) if is_type_2 else None
        self.respond = NeighborConv(features, inputs=numbers if is_type_2 else 1, outputs=numbers, **near)
        makes: dict[str, Any] = {
            "max_length": max_length,
            "emb_dim": emb_dim,
            "hidden": filter_dim,
            "inner_layers": filter_layers,
            "frequency": frequency,
            **own,
        }
        self.kernel = HyenaFilter(features, **makes)
        self.residual_kernel = HyenaFilter(features, **makes) if residual_conv else None
        skips = nnx.initializers.normal(1.0)
        self.skip = nnx.Param(skips(rngs.params(), (features,), param_dtype), **axes("embed"))
        residual = nnx.Param(skips(rngs.params(), (features,), param_dtype), **axes("embed"))
        self.residual_skip = residual if residual_conv else None
        out = {"kernel_metadata": axes(None, "embed"), "bias_metadata": axes("embed")}
        self.out = nnx.Linear(features, features, use_bias=use_bias, **out, **shared)

    def response(self, spectrum: jax.Array) -> jax.Array:
        """R: from a spectrum to the kernel's, `[B, bins, M]` each."""
        is_complex = jnp.iscomplexobj(spectrum)
        parts = jnp.stack([spectrum.real, spectrum.imag], -1) if is_complex else spectrum[..., None]
        found = self.respond(parts)
        return jax.lax.complex(found[..., 0], found[..., 1]) if found.shape[-1] == 2 else found[..., 0]

    def __call__(
        self,
        x: Any,
        context: Any = None,
        *,
        mask: Any = None,
        positions: Any = None,
        segment_ids: Any = None,
        cache: Any = None,
        deterministic: bool = True,
        rngs: Any = None,
        tap: Callable[[str, Any], Any] | None = None,
        hook: Any = None,
    ) -> LayerOutput:
        """Mix the tokens of a row.

        Args:
            x: `[B, T, features]`.
            context: `[B, T, features]`, what the kernel is made from; x itself if not given.
            mask: refused, as are positions, segment_ids, cache and hook: every token of the row takes part.
            positions: refused.
            segment_ids: refused.
            cache: refused.
            deterministic: without effect: there is no dropout.
            rngs: likewise.
            tap: `tap("head_out", o) -> o` sees, and may replace, `[B, T, N, M / N]` before the last projection.
            hook: refused.

        Returns:
            LayerOutput(`[B, T, features]`).

        Raises:
            ValueError: shapes that do not fit, or an argument that is refused.
        """
        given = {"mask": mask, "positions": positions, "segment_ids": segment_ids, "cache": cache, "hook": hook}
        for name, value in given.items():
            if value is not None:
                raise ValueError(f"OrchidOperator takes no {name}: its kernels depend on every place of the row alike")
        x = jnp.asarray(x)
        source = x if context is None else jnp.asarray(context)
        if x.ndim != 3 or x.shape[-1] != self.features or source.shape != x.shape:
            raise ValueError(
                f"x and context must be [B, T, {self.features}]; got {list(x.shape)}, {list(source.shape)}"
            )
        length, u = x.shape[1], self.project(x)
        conditions = (u if context is None else self.project(source))[..., 2 * self.features :, None]
        first, gate, y = jnp.split(self.short(u).output, 3, axis=-1)
        wide = jnp.promote_types(y.dtype, jnp.float32)
        other = None if self.other is None else self.other(conditions)[..., 0]
        y = gate.astype(wide) * y
        mixed = data_dependent_conv(
            y,
            self.condition(conditions)[..., 0],
            self.kernel(length),
            other=other,
            response=self.response,
            **self.options,
        )
        y = (mixed + self.skip.get_value() * y) * first
        if self.residual_kernel is not None and self.residual_skip is not None:
            mode = "circular" if self.options["transform"] == "fft" else "dct"
            plain = x.astype(wide)
            y = y + fft_conv(plain, self.residual_kernel(length), mode) + self.residual_skip.get_value() * plain
        y = y.astype(u.dtype)
        if tap is not None:
            y = tap("head_out", y.reshape(*y.shape[:2], self.num_heads, -1)).reshape(y.shape)
        return LayerOutput(self.out(y))


def _example(key, length):
    x, condition, kernel = normals(key, (2, length, 6), (2, length, 6), (1, length, 6))
    return (x, condition, kernel[0]), {}


def _layer_example(key, length):
    options = {"filter_dim": 4, "filter_layers": 1, "frequency": 1.0}
    return LayerExample((8, 2), options, normals(key, (2, length, 8)), {})


_PAPER = Paper("Orchid: Flexible and Data-Dependent Convolution for Sequence Modeling", "2402.18508", 2024)
_COST = Cost(flops="T*log(T)", memory="T")
_DECODE = "no: the kernel depends on the whole row"
_FIDELITY = "official code; inferred: causal_kernel of Type II with fft"

ENTRIES = (
    Entry(
        name="data_dependent_conv",
        kind="primitive",
        family="linear",
        function=data_dependent_conv,
        papers=(_PAPER,),
        patterns=("noncausal self",),
        cost=_COST,
        decode=_DECODE,
        example=_example,
        fidelity=_FIDELITY,
    ),
    Entry(
        name="OrchidOperator",
        kind="layer",
        family="linear",
        layer=OrchidOperator,
        papers=(_PAPER,),
        patterns=("noncausal self",),
        cost=_COST,
        decode=_DECODE,
        example=_layer_example,
        fidelity=_FIDELITY,
        exempt={"permutation": "a convolution knows the order of its tokens"},
    ),
)
