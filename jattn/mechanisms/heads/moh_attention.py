"""Mixture-of-Head attention: every token weighs the shared heads and chooses k of the routed ones.

N heads = N_s shared (the first) + N_r routed. For each token x, all softmaxes over heads:

    p = softmax(x W_g),  m = multi-hot(top_k(p)),  r = k p m / sum(p m)
    a = N_s softmax(x W_1),   (c1, c2) = 2 softmax(x W_0)
    gate = concat(c1 a, c2 r);   a alone if k = 0,  r alone if N_s = 0
    y = concat_n(gate_n o_n) W_O

    balance loss = N_r^2 mean_i(P_i f_i),  P_i = mean over tokens of p_i,  f_i = mean over tokens of m_i

`rescale=False` is the formula that the paper prints, (c softmax)_i without the renormalization and without the factors
k, N_s and 2. The parameter-free router (LLaMA) opens the shared heads and the k routed ones with the largest
||q_n||_2, fully. The gate looks at the query's token alone; keys and values of all heads are computed and cached.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jattn.layers.attention import MultiHeadAttention
from jattn.layers.sharding import axes
from jattn.mechanisms.entry import PATTERNS, Cost, Entry, LayerExample, Paper
from jattn.mechanisms.examples import normal
from jattn.softmax.topk import topk_mask


class Routing(NamedTuple):
    """What a head router decides for every token.

    Example:
        >>> Routing(1.0, None, None).gates
        1.0
    """

    gates: Any
    """`[B, T, N]`, shared heads first."""
    probabilities: Any
    """p `[B, T, N_r]`."""
    chosen: Any
    """m, boolean `[B, T, N_r]`."""


def moh_gates(
    x: Any,
    routed_kernel: Any = None,
    shared_kernel: Any = None,
    mix_kernel: Any = None,
    *,
    num_shared: int,
    num_active: int,
    rescale: bool = True,
    valid: Any = None,
) -> Routing:
    r"""The learned head router.

    gate = concat(c1 a, c2 r); see the module for its parts and for what is left out when k or N_s is 0.

    Args:
        x: `[B, T, M]`.
        routed_kernel: W_g `[M, N_r]`; None if all heads are shared.
        shared_kernel: W_1 `[M, N_s]`; only if N_s > 1 (a single shared head has a = 1).
        mix_kernel: W_0 `[M, 2]`; only if N_s > 0 and k > 0.
        num_shared: N_s.
        num_active: k, from 0 to N_r.
        rescale: the published code's gates; False for the paper's formula.
        valid: boolean `[B, T]`, False for padding; all true if None.

    Returns:
        `Routing(gates [B, T, N], probabilities [B, T, N_r], chosen [B, T, N_r])`, float32 at least.

    Raises:
        ValueError: kernels that do not fit N_s, k and each other, or neither shared nor active heads.

    Example:
        >>> import jax.numpy as jnp
        >>> x = jnp.ones((1, 1, 3))
        >>> moh_gates(x, jnp.zeros((3, 4)), num_shared=0, num_active=2).gates[0, 0].tolist()
        [1.0, 1.0, 0.0, 0.0]

    Source: MoH: Multi-Head Attention as Mixture-of-Head Attention (arXiv 2410.11842), published code.
    """
    x = jnp.asarray(x)
    if x.ndim != 3:
        raise ValueError(f"x must be [B, T, M], got {list(x.shape)}")
    num_routed = 0 if routed_kernel is None else jnp.shape(routed_kernel)[-1]
    _check_heads(num_shared, num_routed, num_active)
    mixed = num_shared > 0 and num_active > 0
    wanted = (
        ("routed_kernel", routed_kernel, num_routed, num_routed > 0),
        ("shared_kernel", shared_kernel, num_shared, num_shared > 1),
        ("mix_kernel", mix_kernel, 2, mixed),
    )
    for name, kernel, width, needed in wanted:
        if (kernel is not None) != needed or (needed and jnp.shape(kernel) != (x.shape[-1], width)):
            expected = f"[M, heads] = {[x.shape[-1], width]}" if needed else "None"
            got = None if kernel is None else list(jnp.shape(kernel))
            raise ValueError(
                f"{name} must be {expected} for num_shared={num_shared}, num_active={num_active}, got {got}"
            )
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    if valid is not None:
        # Padding may hold anything, NaN too; it must not reach the kernels' gradients through 0 * NaN.
        x = jnp.where(_valid(valid, x.shape[:2])[..., None], x, 0)

    def softmax(kernel: Any) -> jax.Array:
        logits = jnp.einsum("btm,mn->btn", x, jnp.asarray(kernel, x.dtype), preferred_element_type=dtype)
        return jax.nn.softmax(logits, axis=-1)

    lead = x.shape[:2]
    p, chosen = jnp.zeros((*lead, 0), dtype), jnp.zeros((*lead, 0), bool)
    if num_routed:
        p = softmax(routed_kernel)
        chosen = topk_mask(p, num_active)
    routed = jnp.where(chosen, p, 0)
    shared = softmax(shared_kernel) if num_shared > 1 else jnp.ones((*lead, num_shared), dtype)
    mix = softmax(mix_kernel) if mixed else jnp.ones((*lead, 2), dtype)
    if rescale:
        total = jnp.maximum(routed.sum(-1, keepdims=True), jnp.finfo(dtype).eps)
        routed = num_active * routed / total
        shared = shared if num_shared <= 1 else num_shared * shared
        mix = 2 * mix if mixed else mix
    return Routing(jnp.concatenate([mix[..., :1] * shared, mix[..., 1:] * routed], axis=-1), p, chosen)


def moh_norm_gates(query: Any, *, num_shared: int, num_active: int, straight_through: bool = False) -> Routing:
    r"""The parameter-free head router: the shared heads, and the k routed ones with the largest queries.

    gate_n = 1 for n < N_s and for the k largest ||q_n||_2 of the others, else 0.

    Args:
        query: `[B, T, N, D]`, before any rotation.
        num_shared: N_s.
        num_active: k, from 0 to N - N_s.
        straight_through: let gradients through: gate = m + p - stop_gradient(p), p = softmax(||q_n|| / std).

    Returns:
        `Routing(gates [B, T, N], probabilities [B, T, N_r], chosen [B, T, N_r])`, float32 at least.

    Raises:
        ValueError: a wrong shape, or head numbers that do not fit it.

    Example:
        >>> import jax.numpy as jnp
        >>> q = jnp.array([1.0, 2.0, 4.0, 3.0]).reshape(1, 1, 4, 1)
        >>> moh_norm_gates(q, num_shared=1, num_active=1).gates[0, 0].tolist()
        [1.0, 0.0, 1.0, 0.0]

    Source: MoH: Multi-Head Attention as Mixture-of-Head Attention (arXiv 2410.11842), published inference code of
    MoH-LLaMA3; the gradient is inferred.
    """
    query = jnp.asarray(query)
    if query.ndim != 4:
        raise ValueError(f"query must be [B, T, N, D], got {list(query.shape)}")
    _check_heads(num_shared, query.shape[2] - num_shared, num_active)
    routed = query[:, :, num_shared:].astype(jnp.promote_types(query.dtype, jnp.float32))
    square = jnp.sum(routed * routed, axis=-1)
    # The root has no gradient at 0, where a zero query would ask for one.
    norm = jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)
    chosen = topk_mask(norm, num_active)
    p = norm
    if norm.shape[-1]:
        centered = norm - norm.mean(-1, keepdims=True)
        variance = jnp.sum(centered**2, -1, keepdims=True) / max(norm.shape[-1] - 1, 1)
        p = jax.nn.softmax(norm / jnp.sqrt(jnp.where(variance > 0, variance, 1)), axis=-1)
    gates = chosen.astype(norm.dtype)
    if straight_through:
        gates = gates + p - jax.lax.stop_gradient(p)
    return Routing(jnp.concatenate([jnp.ones((*norm.shape[:2], num_shared), norm.dtype), gates], axis=-1), p, chosen)


def moh_balance_loss(probabilities: Any, chosen: Any, valid: Any = None) -> jax.Array:
    r"""The loss that keeps a router from using few heads only.

    N_r^2 mean_i(P_i f_i), P and f the means of p and m over the tokens that are no padding; no gradient through f. A
    balanced router has k.

    Args:
        probabilities: p `[B, T, N_r]`.
        chosen: m, boolean `[B, T, N_r]`.
        valid: boolean `[B, T]`, False for padding; all true if None.

    Returns:
        A scalar, 0 if no token is valid.

    Raises:
        ValueError: shapes that differ.

    Example:
        >>> import jax.numpy as jnp
        >>> float(moh_balance_loss(jnp.full((1, 1, 4), 0.25), jnp.array([[[True, True, False, False]]])))
        2.0

    Source: MoH: Multi-Head Attention as Mixture-of-Head Attention (arXiv 2410.11842), published code.
    """
    p, m = jnp.asarray(probabilities), jnp.asarray(chosen)
    if p.ndim != 3 or p.shape != m.shape:
        raise ValueError(f"probabilities and chosen must be [B, T, N_r], got {list(p.shape)} and {list(m.shape)}")
    mean_p, load = (_token_mean(x, valid) for x in (p, m.astype(p.dtype)))
    return p.shape[-1] * jnp.sum(mean_p * load)


def _token_mean(x: jax.Array, valid: Any) -> jax.Array:
    if valid is None:
        return x.mean((0, 1))
    valid = _valid(valid, x.shape[:2])[..., None]
    return jnp.sum(jnp.where(valid, x, 0), (0, 1)) / jnp.maximum(jnp.sum(valid, (0, 1)), 1).astype(x.dtype)


def _valid(valid: Any, shape: tuple[int, ...]) -> jax.Array:
    valid = jnp.asarray(valid)
    if valid.dtype != bool or valid.ndim != 2 or valid.shape[0] not in (1, shape[0]) or valid.shape[1] != shape[1]:
        raise ValueError(f"valid must be boolean [B, T] = {list(shape)}, got {valid.dtype}{list(valid.shape)}")
    return jnp.broadcast_to(valid, shape)


def _check_heads(num_shared: int, num_routed: int, num_active: int) -> None:
    if num_shared < 0 or num_routed < 0:
        raise ValueError(f"num_shared must be from 0 to the number of heads, got {num_shared}")
    if not 0 <= num_active <= num_routed:
        raise ValueError(f"num_active must be from 0 to the {num_routed} routed heads, got {num_active}")
    if num_shared == num_active == 0:
        raise ValueError("num_shared and num_active are both 0, which would close every head")


class MohAttention(MultiHeadAttention):
    """Multi-head attention whose heads are weighed, and mostly chosen, by each token.

    y = concat_n(gate_n(x) o_n) W_O, any attention function below it.

    aux holds `balance_loss` (times `balance_weight`, so that it can be added to the objective as it is) and `head_load`
    `[N_r]`, the share of tokens that chose each routed head; padding is left out of both.

    Args:
        features: M, width of x and of the output.
        num_heads: N.
        num_shared: N_s, the first heads; N // 2 if None.
        num_active: k of the N - N_s routed heads; half of them, at least 1, if None.
        rescale: the published code's gates; False for the paper's formula.
        router: "learned", or "norm" for the parameter-free one of MoH-LLaMA3.
        straight_through: whether the "norm" router carries gradients.
        balance_weight: factor of the balance loss.
        param_dtype: of the parameters.
        rngs: for the initial values, Xavier-uniform for the router.
        **options: of `MultiHeadAttention`.

    Raises:
        ValueError: an unknown router, or head numbers that do not fit.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> import jattn
        >>> layer = MohAttention(16, 4, rngs=nnx.Rngs(0))
        >>> output, _, aux = layer(jnp.ones((1, 5, 16)), mask=jattn.masks.causal())
        >>> output.shape, sorted(aux)
        ((1, 5, 16), ['balance_loss', 'head_load'])

    Source: MoH: Multi-Head Attention as Mixture-of-Head Attention (arXiv 2410.11842), published code.
    """

    def __init__(
        self,
        features: int,
        num_heads: int,
        *,
        num_shared: int | None = None,
        num_active: int | None = None,
        rescale: bool = True,
        router: str = "learned",
        straight_through: bool = False,
        balance_weight: float = 0.01,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        if router not in ("learned", "norm"):
            raise ValueError(f"router must be learned or norm, got {router!r}")
        super().__init__(features, num_heads, param_dtype=param_dtype, rngs=rngs, **options)
        self.num_shared = num_heads // 2 if num_shared is None else num_shared
        num_routed = num_heads - self.num_shared
        self.num_active = max(min(num_routed, 1), num_routed // 2) if num_active is None else num_active
        _check_heads(self.num_shared, num_routed, self.num_active)
        self.rescale, self.router, self.straight_through = rescale, router, straight_through
        self.balance_weight = balance_weight
        init = nnx.initializers.xavier_uniform()

        def kernel(width: int, needed: bool) -> nnx.Param | None:
            if not needed or router != "learned":
                return None
            return nnx.Param(init(rngs.params(), (features, width), param_dtype), **axes("embed", None))

        self.routed_kernel = kernel(num_routed, num_routed > 0)
        self.shared_kernel = kernel(self.num_shared, self.num_shared > 1)
        self.mix_kernel = kernel(2, self.num_shared > 0 and self.num_active > 0)

    def route(self, x: jax.Array, valid: jax.Array | None = None) -> Routing:
        """The gates of the tokens x `[B, T, features]`, with valid `[B, T]` False for padding."""
        if self.router == "norm":
            return moh_norm_gates(
                self.query(x),
                num_shared=self.num_shared,
                num_active=self.num_active,
                straight_through=self.straight_through,
            )
        kernels = (self.routed_kernel, self.shared_kernel, self.mix_kernel)
        return moh_gates(
            x,
            *(None if kernel is None else kernel.get_value() for kernel in kernels),
            num_shared=self.num_shared,
            num_active=self.num_active,
            rescale=self.rescale,
            valid=valid,
        )

    def attend(
        self, query: jax.Array, key: jax.Array, value: jax.Array, *, inputs: jax.Array, **arguments: Any
    ) -> tuple[jax.Array, dict[str, Any]]:
        """As the base class, with gated heads."""
        o, aux = super().attend(query, key, value, inputs=inputs, **arguments)
        valid, ids = None, arguments.get("segment_ids")
        if ids is not None:
            valid = jnp.asarray(ids[0] if isinstance(ids, tuple | list) else ids) >= 0
        elif "segment_ids" not in arguments and arguments.get("query_positions") is not None:
            valid = arguments["query_positions"] >= 0  # decoding on a cache: padding has position -1
        routing = self.route(inputs, valid)
        gates = routing.gates
        if valid is not None:
            gates = jnp.where(_valid(valid, gates.shape[:2])[..., None], gates, 0)
        if self.num_active:
            loss = moh_balance_loss(routing.probabilities, routing.chosen, valid)
            aux = {
                **aux,
                "balance_loss": self.balance_weight * loss,
                "head_load": _token_mean(routing.chosen.astype(loss.dtype), valid),
            }
        return (o * gates[..., None].astype(o.dtype)).astype(o.dtype), aux


def _example(key, length):
    return LayerExample(
        (16, 4), {"num_kv_heads": 2, "num_shared": 2, "num_active": 1}, (normal(key, 2, length, 16),), {}
    )


ENTRY = Entry(
    name="moh_attention",
    kind="router",
    family="heads",
    layer=MohAttention,
    papers=(Paper("MoH: Multi-Head Attention as Mixture-of-Head Attention", "2410.11842", 2024),),
    patterns=PATTERNS,
    cost=Cost(flops="T^2", memory="T"),
    decode="any KV cache: all heads' keys and values are stored, the gate needs the new token only",
    example=_example,
    fidelity="official code; inferred: the gradient of the norm router",
)
