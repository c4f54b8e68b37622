"""Positions on grids of any number of axes: rotations that know all coordinates, and sums that decay along each axis.

    MdLrpe   angle(n_1 .. n_m) = concat_i n_i theta_{0..d-1},   theta_j = 10000^(-2j / D)
             "rope":    pairs of channels turn by it, d = D / 2m      D -> D
             "cosine":  [x cos, x sin], d = D / m                     D -> 2D
    MdTpe    y = sum_a W_a rmsnorm(o_a),   o_a,t = sum_{s<=t} lambda_a^(t-s) (q_a . k_a) x_s along axis a

Inner products of queries and keys under `MdLrpe` depend on differences of coordinates alone; all axes have the same
frequencies. `MdTpe` is applied once, to the embeddings: a Toeplitz matrix along every axis, an exponential for each
head, in linear time. Source: You Only Scan Once: Efficient Multi-dimension Sequential Modeling with LightNet (arXiv
2405.21022); the formulas from the first author's later programs (xmixers, xopes).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike

from jattn.layers.norms import make_norm
from jattn.layers.sharding import axes
from jattn.mechanisms.entry import Cost, Entry, LayerExample, Paper
from jattn.mechanisms.examples import normals
from jattn.recurrence.api import linear_recurrence

FORMS = ("rope", "cosine")


class MdLrpe(nnx.Module):
    """Rotary positions on a grid, as the position option of a layer.

    angle = concat_i n_i theta_{0..d-1} for a token at (n_1 .. n_m); "rope" turns channel pairs (c, c + D/2) by it,
    "cosine" makes [x cos, x sin] of x.

    Args:
        grid: (n_1, ..., n_m), tokens along each axis; rows are flattened with the last axis fastest.
        form: "rope" keeps D channels, "cosine" doubles them.
        num_leading: tokens before the grid, such as a class token, of angle 0.
        base: of the frequencies theta_j = base^(-2j / D).

    Raises:
        ValueError: an unknown form, or a grid that is none. When called: m does not divide D / 2 ("rope") or D
            ("cosine").

    Example:
        >>> import jax.numpy as jnp
        >>> q = k = jnp.ones((1, 6, 2, 8))
        >>> MdLrpe((2, 3)).rotate(q, k, jnp.arange(6), jnp.arange(6))[0].shape
        (1, 6, 2, 8)

    Source: You Only Scan Once: Efficient Multi-dimension Sequential Modeling with LightNet (arXiv 2405.21022); the
    frequencies from the first author's later program.
    """

    def __init__(self, grid: Sequence[int], *, form: str = "rope", num_leading: int = 0, base: float | int = 10000.0):
        self.grid = tuple(int(size) for size in grid)
        if not self.grid or min(self.grid) < 1:
            raise ValueError(f"grid must hold the number of tokens along each axis, at least 1; got {tuple(grid)}")
        if form not in FORMS:
            raise ValueError(f"form must be one of {', '.join(FORMS)}, got {form!r}")
        if num_leading < 0:
            raise ValueError(f"num_leading must be at least 0, got {num_leading}")
        self.form, self.num_leading, self.base = form, num_leading, base

    def coordinates(self, positions: ArrayLike) -> jax.Array:
        """Coordinates `[..., m]` of tokens by their number `[...]`; zeros for leading ones."""
        place = jnp.asarray(positions) - self.num_leading
        strides = np.cumprod((1, *self.grid[:0:-1]))[::-1]
        found = jnp.stack([place // int(s) % size for s, size in zip(strides, self.grid, strict=True)], axis=-1)
        return jnp.where((place >= 0)[..., None], found, 0)

    def __call__(self, x: ArrayLike, positions: ArrayLike) -> jax.Array:
        """Rotate one array.

        Args:
            x: `[B, T, N, D]`.
            positions: numbers of tokens, `[T]` or `[B, T]`, from 0.

        Returns:
            `[B, T, N, D]`, or `[B, T, N, 2D]` for "cosine", in the dtype of x; angles are float32 at least.

        Raises:
            ValueError: a shape that does not fit.
        """
        x, positions = jnp.asarray(x), jnp.asarray(positions)
        if x.ndim != 4:
            raise ValueError(f"x must be [B, T, N, D], got {list(x.shape)}")
        batch, length, _, width = x.shape
        if positions.shape not in ((length,), (1, length), (batch, length)):
            raise ValueError(f"positions must be [T] or [B, T] = {[batch, length]}, got {list(positions.shape)}")
        count, turned = len(self.grid), width // 2 if self.form == "rope" else width
        if turned % count or (self.form == "rope" and width % 2):
            raise ValueError(
                f"the {count} axes of the grid must divide the {turned} angles of {width} channels, form {self.form!r}"
            )
        frequencies = self.base ** (-2.0 * np.arange(turned // count, dtype=np.float64) / width)
        dtype = jnp.promote_types(x.dtype, jnp.float32)
        angles = self.coordinates(positions).astype(dtype)[..., None] * jnp.asarray(frequencies, dtype)
        angles = angles.reshape(*positions.shape, 1, turned)
        cos, sin, wide = jnp.cos(angles), jnp.sin(angles), x.astype(dtype)
        if self.form == "rope":
            first, second = jnp.split(wide, 2, axis=-1)
            halves = [first * cos - second * sin, first * sin + second * cos]
        else:
            halves = [wide * cos, wide * sin]
        return jnp.concatenate(halves, axis=-1).astype(x.dtype)

    def rotate(
        self, query: ArrayLike, key: ArrayLike, query_positions: ArrayLike, key_positions: ArrayLike
    ) -> tuple[jax.Array, jax.Array]:
        """Rotate queries `[B, T, N, D]` and keys `[B, S, K, D]` at their numbers in the grid."""
        return self(query, query_positions), self(key, key_positions)


class MdTpe(nnx.Module):
    """A decaying sum along each axis of a grid, as a position encoding of embeddings.

    y = sum_a W_a rmsnorm_n(o_a), o_a,t = sum_{s<=t} lambda_an^(t-s) (q_an . k_an) x_s, t and s along axis a, heads n

    Whether the embedding itself is added to y is not established: add it or not. Along each axis it is causal, for
    images too.

    Args:
        features: M, width of the embeddings.
        heads: N, which divides M; each has its own lambda = sigmoid(p), q and k.
        num_axes: m, axes of the grid.
        epsilon: of the norm of each head.
        dtype: of the computation; that of inputs and parameters if not given.
        param_dtype: of the parameters.
        rngs: for the initial values.

    Raises:
        ValueError: sizes that do not fit.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> MdTpe(8, 2, num_axes=2, rngs=nnx.Rngs(0))(jnp.ones((1, 3, 4, 8))).shape
        (1, 3, 4, 8)

    Source: You Only Scan Once: Efficient Multi-dimension Sequential Modeling with LightNet (arXiv 2405.21022); formula
    and initial values from the first author's later program.
    """

    def __init__(
        self,
        features: int,
        heads: int,
        *,
        num_axes: int = 1,
        epsilon: float | int = 1e-6,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if features % heads or num_axes < 1:
            raise ValueError(f"heads must divide features, and num_axes be at least 1; got {heads}, {num_axes}")
        self.features, self.heads, self.num_axes = features, heads, num_axes
        width = features // heads
        normal = nnx.initializers.normal(1.0)
        shapes = {"query": (num_axes, heads, width), "key": (num_axes, heads, width), "decay": (num_axes, heads)}
        for name, shape in shapes.items():
            metadata = axes(None, "heads", *("head_dim",) * (len(shape) - 2))
            setattr(self, name, nnx.Param(normal(rngs.params(), shape, param_dtype), **metadata))
        shared: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.norms = nnx.List(
            make_norm("rmsnorm", width, epsilon=epsilon, axis_name="head_dim", **shared) for _ in range(num_axes)
        )
        self.outs = nnx.List(
            nnx.Linear(features, features, use_bias=False, kernel_metadata=axes(None, "embed"), **shared)
            for _ in range(num_axes)
        )

    def summed(self, x: jax.Array, axis: int) -> jax.Array:
        """o_a `[B, n_1, ..., n_m, N, M / N]` of x `[B, n_1, ..., n_m, M]`, float32 at least: linear in x."""
        dtype = jnp.promote_types(x.dtype, jnp.float32)
        query, key, decay = (p.get_value()[axis].astype(dtype) for p in (self.query, self.key, self.decay))
        rows = jnp.moveaxis(x.astype(dtype), axis + 1, -2)
        value = rows.reshape(-1, rows.shape[-2], self.heads, self.features // self.heads)
        ones = jnp.ones((*value.shape[:3], 1), dtype)
        o = linear_recurrence(
            ones * jnp.sum(query * key, axis=-1)[:, None], ones, value, log_decay=jax.nn.log_sigmoid(decay), scale=1.0
        )
        return jnp.moveaxis(o.reshape(*rows.shape[:-1], *value.shape[2:]), -3, axis + 1)

    def __call__(self, x: ArrayLike, mask: Any = None) -> jax.Array:
        """Encode.

        Args:
            x: `[B, n_1, ..., n_m, M]`.
            mask: bool `[B, n_1, ..., n_m]`, False for padding, which counts as zeros and gives 0.

        Returns:
            y, of the shape of x.

        Raises:
            ValueError: shapes that do not fit.
        """
        x = jnp.asarray(x)
        if x.ndim != self.num_axes + 2 or x.shape[-1] != self.features:
            raise ValueError(f"x must be [B, {self.num_axes} axes, {self.features}], got {list(x.shape)}")
        if mask is not None:
            mask = jnp.asarray(mask)
            if mask.shape != x.shape[:-1] or mask.dtype != bool:
                raise ValueError(f"mask must be boolean {list(x.shape[:-1])}, got {mask.dtype}{list(mask.shape)}")
            x = jnp.where(mask[..., None], x, 0)
        y = jnp.zeros_like(x)
        for axis, (norm, out) in enumerate(zip(self.norms, self.outs, strict=True)):
            y = y + out(norm(self.summed(x, axis)).astype(x.dtype).reshape(x.shape))
        return y if mask is None else jnp.where(mask[..., None], y, 0)


def _example_lrpe(key, length):
    grid = (length // 2, 2) if length % 2 == 0 else (1, length)
    return LayerExample((grid,), {}, (*normals(key, (2, length, 2, 8)), np.arange(length)), {})


def _example_tpe(key, length):
    return LayerExample((8, 2), {"num_axes": 2}, normals(key, (2, length, 2, 8)), {})


_SHARED: dict[str, Any] = {
    "kind": "position",
    "family": "layers",
    "papers": (
        Paper(
            "You Only Scan Once: Efficient Multi-dimension Sequential Modeling with LightNet",
            "2405.21022",
            2024,
        ),
    ),
    "patterns": ("noncausal self", "causal self"),
    "cost": Cost(flops="T", memory="T"),
}

ENTRIES = (
    Entry(
        "MdLrpe",
        layer=MdLrpe,
        decode="by position",
        example=_example_lrpe,
        fidelity="inferred: the frequencies, from the first author's later program",
        **_SHARED,
    ),
    Entry(
        "MdTpe",
        layer=MdTpe,
        decode="no: it reads whole grids of embeddings",
        example=_example_tpe,
        fidelity="inferred: formula and initial values, from the first author's later program; no residual connection",
        **_SHARED,
    ),
)
