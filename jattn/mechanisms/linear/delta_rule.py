"""The delta rule: a token first takes what the state predicts for its key out, then writes its own value there.

    S_t = S_{t-1} + beta_t k_t (v_t - k_t^T S_{t-1})^T,   o_t = D^-0.5 q_t^T S_t
    q, k = l2norm(silu(conv(x W)));   v = silu(conv(x W_v));   beta = sigmoid(x W_beta)          (layer)
    y = W_o concat_n(rmsnorm(o_n) [* silu(x W_g)_n])

Linear attention only adds, so what two alike keys hold piles up; here the later value replaces the earlier one. Keys of
length 1 keep the state bounded: along k it is multiplied by 1 - beta |k|^2. Source: Parallelizing Linear Transformers
with the Delta Rule over Sequence Length (arXiv 2406.06484).
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from jattn.layers.delta import DeltaLayer
from jattn.mechanisms.entry import Cost, Entry, LayerExample, Paper
from jattn.mechanisms.examples import normal, normals
from jattn.recurrence.delta import delta_recurrence


def delta_rule(
    query: Any,
    key: Any,
    value: Any,
    beta: Any,
    *,
    scale: float | None = None,
    initial_state: Any = None,
    segment_ids: Any = None,
    mode: str = "chunk",
    implementation: str | None = None,
    chunk_size: int = 64,
    return_final_state: bool = False,
) -> Any:
    """Causal linear attention that overwrites.

    S_t = S_{t-1} + beta_t k_t (v_t - k_t^T S_{t-1})^T, o_t = scale q_t^T S_t

    Args:
        query: `[B, T, N, D]`.
        key: `[B, T, K, D]`, of length 1, or the state may grow without bound; K divides N.
        value: `[B, T, K', Dv]`, as many heads as keys, or another number that divides N or is a multiple of it.
        beta: `[B, T, H]`, how much of a key's content is replaced, 0 to 1, or to 2, where it is negated; H output heads
            or a divisor.
        scale: of the queries, D^-0.5 if None.
        initial_state: `[B, N, D, Dv]`, what earlier tokens left behind.
        segment_ids: `[B, T]`; a run of equal ids is a document, negative = padding.
        mode: of `jattn.linear_recurrence`; "associative" cannot correct.
        implementation: likewise.
        chunk_size: tokens a chunk; no effect on the result.
        return_final_state: also return the state after the last token.

    Returns:
        `[B, T, N, Dv]`; with `return_final_state` also the state, float32 `[B, N, D, Dv]`.

    Raises:
        ValueError: shapes that do not fit, mode "associative".

    Example:
        >>> import jax.numpy as jnp
        >>> key = jnp.ones((1, 3, 1, 1))
        >>> value = jnp.array([4.0, 8.0, 2.0]).reshape(1, 3, 1, 1)
        >>> delta_rule(key, key, value, jnp.full((1, 3, 1), 0.5)).ravel().tolist()
        [2.0, 5.0, 3.5]

    Source: Parallelizing Linear Transformers with the Delta Rule over Sequence Length (arXiv 2406.06484).
    """
    return delta_recurrence(
        query,
        key,
        value,
        beta,
        scale=scale,
        initial_state=initial_state,
        segment_ids=segment_ids,
        mode=mode,
        implementation=implementation,
        chunk_size=chunk_size,
        return_final_state=return_final_state,
    )


class DeltaRule(DeltaLayer):
    """DeltaNet's token mixer: short convolutions, normalized queries and keys, the delta rule, a norm of each head.

    S_t = S_{t-1} + beta_t k_t (v_t - k_t^T S_{t-1})^T; y = W_o concat_n(rmsnorm(D^-0.5 q_t^T S_t) [* silu(x W_g)])

    Args:
        features: M, width of x and of the output.
        num_heads: N.
        num_kv_heads: K, which divides N; N if not given. Values, beta and states have K heads, too.
        head_dim: D of queries and keys; features / num_heads if not given.
        value_dim: Dv; features / num_heads if not given.
        conv_width: tokens that the convolutions see, the current one included.
        conv_bias: whether the convolutions have biases.
        qk_norm: "l2": silu, then x / sqrt(|x|^2 + 1e-6); "sum": elu(x) + 1 without silu, then divided by its sum.
        allow_neg_eigval: beta = 2 sigmoid: eigenvalues of a step in [-1, 1] instead of [0, 1] (arXiv 2411.12537).
        use_gate: whether the heads are gated by silu(x W_g).
        epsilon: of the head norm.
        position: None, or an object with `rotate`, such as `Rope`, which turns the normalized queries and keys.
        chunk_size: tokens a chunk; no effect on the result.
        dtype: of the computation; that of inputs and parameters if not given.
        param_dtype: of the parameters.
        rngs: for the initial values.

    Raises:
        ValueError: sizes that do not fit, an unknown qk_norm.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> DeltaRule(16, 2, rngs=nnx.Rngs(0))(jnp.ones((1, 5, 16))).output.shape
        (1, 5, 16)

    Source: Parallelizing Linear Transformers with the Delta Rule over Sequence Length (arXiv 2406.06484), published
    code.
    """

    def __init__(
        self,
        features: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        value_dim: int | None = None,
        conv_width: int = 4,
        conv_bias: bool = False,
        qk_norm: str = "l2",
        allow_neg_eigval: bool = False,
        use_gate: bool = False,
        epsilon: float = 1e-5,
        position: Any = None,
        chunk_size: int = 64,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if features % num_heads and (head_dim is None or value_dim is None):
            raise ValueError(
                f"num_heads must divide features unless head_dim and value_dim are given, got {num_heads}, {features}"
            )
        super().__init__(
            features,
            num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=features // num_heads if head_dim is None else head_dim,
            value_dim=features // num_heads if value_dim is None else value_dim,
            qk_norm=qk_norm,
            gate="silu" if use_gate else None,
            conv_width=conv_width,
            conv_bias=conv_bias,
            allow_neg_eigval=allow_neg_eigval,
            epsilon=epsilon,
            position=position,
            chunk_size=chunk_size,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )


def _example(key, length):
    query, keys, value, beta = normals(key, (2, length, 4, 8), (2, length, 2, 8), (2, length, 2, 6), (2, length, 2))
    keys = keys / (keys**2).sum(-1, keepdims=True) ** 0.5
    return (query, keys, value, 1 / (1 + np.exp(-beta))), {"chunk_size": 4 if length < 64 else 64}


def _layer_example(key, length):
    options = {"num_kv_heads": 2, "conv_width": 3, "use_gate": True, "chunk_size": 4 if length < 64 else 64}
    return LayerExample((16, 4), options, (normal(key, 2, length, 16),), {})


_PAPER = Paper("Parallelizing Linear Transformers with the Delta Rule over Sequence Length", "2406.06484", 2024)

ENTRIES = (
    Entry(
        name="delta_rule",
        kind="recurrence",
        family="linear",
        function=delta_rule,
        papers=(_PAPER,),
        patterns=("causal self",),
        cost=Cost(flops="T", memory="T"),
        decode="its state [B, N, D, Dv]",
        example=_example,
        fidelity="official code",
    ),
    Entry(
        name="DeltaRule",
        kind="recurrence",
        family="linear",
        layer=DeltaRule,
        papers=(_PAPER,),
        patterns=("causal self",),
        cost=Cost(flops="T", memory="T"),
        decode="a RecurrentState: the state and the last inputs of the convolutions",
        example=_layer_example,
        fidelity="official code",
    ),
)
