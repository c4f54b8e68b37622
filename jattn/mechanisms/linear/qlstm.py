"""qLSTM: an LSTM whose gates see the input alone, so that it is a linear recurrence with one number a channel.

    h_t = Lam_t h_{t-1} + sigmoid(i_t) x_t,   y_t = sigmoid(o_t) h_t          elementwise
    Lam = sigmoid(f),   or reversed:  Lam = sigmoid(-f)^relu(alpha) = exp(-relu(alpha) softplus(f))

The reversed form is how selective state space models parametrize their decay; alpha is one learned number. `QLstm` is
the layer: x comes from a projection to twice the width and a short convolution, the gates from a projection of x, and

    out = (gelu(gate) * y) W_out

Source: Understanding the differences in Foundation Models: Attention, State Space Models, and Recurrent Neural Networks
(arXiv 2405.15731) and its code.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jattn.cache import RecurrentState
from jattn.layers.recurrent import RecurrentLayer
from jattn.layers.sharding import axes
from jattn.layers.short_conv import ShortConv
from jattn.mechanisms.entry import Cost, Entry, LayerExample, Paper
from jattn.mechanisms.examples import normal, normals
from jattn.recurrence.diagonal import diagonal_recurrence


def qlstm_log_decay(forget: Any, alpha: Any = None) -> jax.Array:
    """log Lam of the forget gate, float32 at least.

    log sigmoid(f), or with alpha: -relu(alpha) softplus(f)

    Args:
        forget: f, any shape.
        alpha: a number, or what broadcasts; None for the plain form.

    Returns:
        The logarithm, shaped like f.

    Example:
        >>> [round(float(qlstm_log_decay(0.0, alpha)), 4) for alpha in (None, 1.0, 2.0)]
        [-0.6931, -0.6931, -1.3863]
    """
    forget = jnp.asarray(forget)
    forget = forget.astype(jnp.promote_types(forget.dtype, jnp.float32))
    if alpha is None:
        return jax.nn.log_sigmoid(forget)
    return -jax.nn.relu(jnp.asarray(alpha).astype(forget.dtype)) * jax.nn.softplus(forget)


def qlstm(
    x: Any,
    forget: Any,
    write: Any,
    read: Any,
    *,
    alpha: Any = None,
    initial_state: Any = None,
    segment_ids: Any = None,
    mode: str = "chunk",
    chunk_size: int = 64,
    return_final_state: bool = False,
) -> Any:
    """LSTM without connections from the state to its gates.

    h_t = Lam_t h_{t-1} + sigmoid(i_t) x_t, y_t = sigmoid(o_t) h_t

    Args:
        x: `[B, T, C]`.
        forget: f, `[B, T, C]`, before the sigmoid.
        write: i, likewise.
        read: o, likewise.
        alpha: of the reversed form sigmoid(-f)^relu(alpha); None for sigmoid(f).
        initial_state: `[B, C]`, what earlier tokens left behind.
        segment_ids: `[B, T]`; a run of equal ids is a document, negative = padding.
        mode: "recurrent", "chunk", "parallel" or "associative"; no effect on the result.
        chunk_size: tokens a chunk; no effect on the result.
        return_final_state: also return the state after the last token.

    Returns:
        `[B, T, C]` in the dtype of x; with `return_final_state` also the state, float32 `[B, C]`.

    Raises:
        ValueError: shapes that do not fit, or an unknown mode.

    Example:
        >>> import jax.numpy as jnp
        >>> x, open, half = jnp.ones((1, 3, 1)), jnp.full((1, 3, 1), 1e4), jnp.zeros((1, 3, 1))
        >>> qlstm(x, half, open, open).ravel().tolist()
        [1.0, 1.5, 1.75]

    Source: Understanding the differences in Foundation Models: Attention, State Space Models, and Recurrent Neural
    Networks (arXiv 2405.15731), published code.
    """
    x, forget, write, read = (jnp.asarray(a) for a in (x, forget, write, read))
    if x.ndim != 3 or not forget.shape == write.shape == read.shape == x.shape:
        shapes = [list(a.shape) for a in (x, forget, write, read)]
        raise ValueError(f"x, forget, write and read must all be [B, T, C]; got {shapes}")
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    if segment_ids is not None:
        # Gates of padding may be NaN; what they multiply is 0, but 0 * NaN is not.
        real = (jnp.broadcast_to(jnp.asarray(segment_ids), x.shape[:2]) >= 0)[..., None]
        x, forget, write, read = (jnp.where(real, a, 0) for a in (x, forget, write, read))
    h, last = diagonal_recurrence(
        jax.nn.sigmoid(write.astype(dtype)) * x.astype(dtype),
        qlstm_log_decay(forget.astype(dtype), alpha),
        initial_state=initial_state,
        segment_ids=segment_ids,
        mode=mode,
        chunk_size=chunk_size,
    )
    out = (jax.nn.sigmoid(read.astype(dtype)) * h).astype(x.dtype)
    return (out, last) if return_final_state else out


class QLstm(RecurrentLayer):
    """qLSTM with its projections, short convolution and output gate.

    [gate, x] = u W_in, x = conv(x) + b, [f, i, o] = x W_g + b_g, out = (gelu(gate) * qlstm(x, f, i, o)) W_out

    Args:
        features: M.
        num_heads: N; every channel has a state of its own, heads cut them into groups for `tap` only.
        num_kv_heads: none but N.
        head_dim: channels of a group; expansion * features / num_heads if not given.
        expansion: width of x over M.
        conv_width: of the short convolution.
        reversed_gate: whether Lam = sigmoid(-f)^relu(alpha), with one alpha that starts at 1, instead of sigmoid(f).
        position: refused: there are no queries and keys to rotate.
        chunk_size: tokens a chunk; no effect on the result.
        dtype: of the computation; that of inputs and parameters if not given.
        param_dtype: of the parameters.
        rngs: for the initial values: normal, of deviation M^-0.5 for W_in and (expansion M)^-0.5 for W_g and W_out.

    Raises:
        ValueError: sizes that do not fit, or a position.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> QLstm(16, 2, rngs=nnx.Rngs(0))(jnp.ones((1, 5, 16))).output.shape
        (1, 5, 16)

    Source: Understanding the differences in Foundation Models (arXiv 2405.15731), published code.
    """

    def __init__(
        self,
        features: int,
        num_heads: int = 1,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        expansion: int = 2,
        conv_width: int = 4,
        reversed_gate: bool = True,
        position: Any = None,
        chunk_size: int = 64,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        super().__init__(features, num_heads)
        if position is not None:
            raise ValueError("QLstm has no queries and keys, so it takes no position; its state knows the order")
        inner = expansion * features if head_dim is None else num_heads * head_dim
        if inner < 1 or inner % num_heads or num_kv_heads not in (None, num_heads):
            raise ValueError(
                f"num_heads must divide expansion * features, and num_kv_heads be the same; got {num_heads}, {inner} "
                f"and {num_kv_heads}"
            )
        self.inner, self.dtype, self.chunk_size = inner, dtype, chunk_size
        shared: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}

        def linear(source: int, target: int, *names: str, use_bias: bool = False) -> nnx.Linear:
            init = nnx.initializers.normal(source**-0.5)
            metadata = {"kernel_metadata": axes(*names), "bias_metadata": axes(names[1])}
            return nnx.Linear(source, target, use_bias=use_bias, kernel_init=init, **metadata, **shared)

        self.input = linear(features, inner, "embed", "mlp")
        self.gate = linear(features, inner, "embed", "mlp")
        self.conv = ShortConv(inner, conv_width, use_bias=True, **shared)
        self.gates = linear(inner, 3 * inner, "mlp", None, use_bias=True)
        self.alpha = nnx.Param(jnp.ones((), param_dtype), **axes()) if reversed_gate else None
        self.out = linear(inner, features, "mlp", "embed")

    def mix(
        self, x: jax.Array, *, segment_ids: Any, positions: jax.Array, state: RecurrentState | None, **options: Any
    ) -> tuple[jax.Array, RecurrentState, dict[str, Any]]:
        """See `RecurrentLayer`."""
        inner, tail = self.conv(self.input(x), segment_ids=segment_ids, cache=None if state is None else state.conv)[:2]
        forget, write, read = jnp.split(self.gates(inner), 3, axis=-1)
        groups = (x.shape[0], self.num_heads, 1, self.inner // self.num_heads)
        y, last = qlstm(
            inner,
            forget,
            write,
            read,
            alpha=None if self.alpha is None else self.alpha.get_value(),
            initial_state=None if state is None else state.state.reshape(x.shape[0], -1),
            segment_ids=segment_ids,
            chunk_size=self.chunk_size,
            return_final_state=True,
        )
        return y.reshape(*x.shape[:2], self.num_heads, -1), RecurrentState(last.reshape(groups), conv=tail), {}

    def output(self, o: jax.Array, x: jax.Array) -> jax.Array:
        """See `RecurrentLayer`."""
        return self.out(jax.nn.gelu(self.gate(x), approximate=False) * o.reshape(*o.shape[:2], -1))


def _example(key, length):
    shape = (2, length, 6)
    return normals(key, shape, shape, shape, shape), {"alpha": 0.7, "chunk_size": 4 if length < 64 else 64}


def _layer_example(key, length):
    options = {"conv_width": 3, "chunk_size": 4 if length < 64 else 64}
    return LayerExample((8, 2), options, (normal(key, 2, length, 8),), {})


_PAPER = Paper(
    "Understanding the differences in Foundation Models: Attention, State Space Models, and Recurrent Neural Networks",
    "2405.15731",
    2024,
)

ENTRIES = (
    Entry(
        name="qlstm",
        kind="recurrence",
        family="linear",
        function=qlstm,
        papers=(_PAPER,),
        patterns=("causal self",),
        cost=Cost(flops="T", memory="T"),
        decode="its state [B, C]",
        example=_example,
        fidelity="official code",
    ),
    Entry(
        name="QLstm",
        kind="recurrence",
        family="linear",
        layer=QLstm,
        papers=(_PAPER,),
        patterns=("causal self",),
        cost=Cost(flops="T", memory="T"),
        decode="a RecurrentState, with the last inputs of its convolution",
        example=_layer_example,
        fidelity="official code",
    ),
)
