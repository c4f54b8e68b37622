"""Efficient probing: M learned queries pool a bag of frozen tokens, each into its own slice of the output.

    A_ms = softmax_s(u_m . x_s / sqrt(D)),   v_s = x_s W_v in M slices of width D / (r M),
    y^m = sum_s A_ms v_s^m,   output = concat_m y^m

The keys are the tokens themselves: there is no W_Q and no W_K, and the scale is that of one head of width D. Because
pooling is linear in the values, the bag is pooled first and projected after: y^m = (sum_s A_ms x_s) W_v^m, which needs
M D numbers instead of S D / r. Only u, W_v and the classifier on top are trained.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jattn.layers.sharding import axes
from jattn.mechanisms.entry import Cost, Entry, LayerExample, Paper
from jattn.mechanisms.examples import normal
from jattn.softmax.api import dot_product_attention


def efficient_probing(x: Any, queries: Any, value_kernel: Any, *, mask: Any = None) -> jax.Array:
    r"""Pool tokens with learned queries that share one value projection by slices.

    output^m = sum_s softmax_s(u_m . x_s / sqrt(D)) (x_s W_v)^m, m = 1 .. M.

    Args:
        x: tokens `[B, S, D]`.
        queries: u `[M, D]`, shared by the batch.
        value_kernel: W_v `[D, D / r]`, M divides D / r.
        mask: booleans `[B, S]`, True for tokens that take part; all if None.

    Returns:
        `[B, D / r]` in the dtype of x; 0 for a bag without valid tokens.

    Raises:
        ValueError: shapes that do not fit.

    Example:
        >>> import jax.numpy as jnp
        >>> x = jnp.arange(6.0).reshape(1, 3, 2)
        >>> efficient_probing(x, jnp.zeros((2, 2)), jnp.eye(2)).tolist()
        [[2.0, 3.0]]

    Source: Attention, Please! Revisiting Attentive Probing for Masked Image Modeling (arXiv 2506.10178), published
    code.
    """
    x, queries, value_kernel = jnp.asarray(x), jnp.asarray(queries), jnp.asarray(value_kernel)
    if x.ndim != 3:
        raise ValueError(f"x must be [B, S, D], got {list(x.shape)}")
    batch, length, features = x.shape
    if queries.ndim != 2 or queries.shape[1] != features:
        raise ValueError(f"queries must be [M, D] with D = {features}, got {list(queries.shape)}")
    num_queries = queries.shape[0]
    if value_kernel.ndim != 2 or value_kernel.shape[0] != features or value_kernel.shape[1] % num_queries:
        raise ValueError(
            f"value_kernel must be [D, D / r] with D = {features} and {num_queries} queries dividing D / r, "
            f"got {list(value_kernel.shape)}"
        )
    if mask is not None:
        mask = jnp.asarray(mask)
        if mask.shape != (batch, length) or mask.dtype != bool:
            raise ValueError(f"mask must be boolean [B, S] = {[batch, length]}, got {mask.dtype}{list(mask.shape)}")
        mask = mask[:, None, None, :]
    query = jnp.broadcast_to(queries.astype(x.dtype)[:, None], (batch, num_queries, 1, features))
    tokens = x[:, :, None]
    pooled = dot_product_attention(query, tokens, tokens, mask=mask)[:, :, 0]
    slices = value_kernel.astype(x.dtype).reshape(features, num_queries, -1)
    return jnp.einsum("bmd,dme->bme", pooled, slices).reshape(batch, -1)


class EfficientProbing(nnx.Module):
    """Learned-query pooling of frozen features, optionally with the classifier of linear probing on top.

    output = concat_m sum_s softmax_s(u_m . x_s / sqrt(D)) (x_s W_v)^m; with `num_classes`, logits =
    BatchNorm(output) W + b, the norm without affine parameters as in the linear probing of masked autoencoders.

    Args:
        features: D, width of the tokens.
        num_queries: M.
        reduction: r, the output has D / r channels.
        num_classes: of the classifier; none if None.
        dtype: of the computation; that of inputs and parameters if None.
        param_dtype: of the parameters.
        rngs: for the initial values; queries are normal with deviation 0.02.

    Raises:
        ValueError: D is no multiple of r M.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> pool = EfficientProbing(16, num_queries=4, reduction=2, rngs=nnx.Rngs(0))
        >>> pool(jnp.ones((3, 5, 16))).shape
        (3, 8)

    Source: Attention, Please! Revisiting Attentive Probing for Masked Image Modeling (arXiv 2506.10178).
    """

    def __init__(
        self,
        features: int,
        *,
        num_queries: int = 32,
        reduction: int = 1,
        num_classes: int | None = None,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if num_queries < 1 or reduction < 1 or features % (num_queries * reduction):
            raise ValueError(
                f"features must be a multiple of num_queries * reduction = {num_queries} * {reduction}, got {features}"
            )
        width = features // reduction
        self.features, self.dtype = features, dtype
        self.queries = nnx.Param(
            0.02 * jax.random.normal(rngs.params(), (num_queries, features), param_dtype), **axes(None, "embed")
        )
        init = nnx.initializers.lecun_normal()
        self.value_kernel = nnx.Param(init(rngs.params(), (features, width), param_dtype), **axes("embed", None))
        has_head = num_classes is not None
        plain = {"momentum": 0.9, "epsilon": 1e-6, "use_bias": False, "use_scale": False, "dtype": dtype}
        self.norm = nnx.BatchNorm(width, **plain, rngs=rngs) if has_head else None
        own = {"dtype": dtype, "param_dtype": param_dtype}
        self.classifier = nnx.Linear(width, num_classes, **own, rngs=rngs) if has_head else None

    def __call__(self, x: Any, *, mask: Any = None, deterministic: bool = True) -> jax.Array:
        """Pool, and classify if there is a classifier.

        Args:
            x: tokens `[B, S, features]`.
            mask: booleans `[B, S]`, True for tokens that take part.
            deterministic: use the running statistics of the norm; False in training.

        Returns:
            `[B, features / r]`, or logits `[B, num_classes]`.

        Raises:
            ValueError: shapes that do not fit.
        """
        x = jnp.asarray(x)
        if x.ndim != 3 or x.shape[-1] != self.features:
            raise ValueError(f"x must be [B, S, {self.features}], got {list(x.shape)}")
        x = x if self.dtype is None else x.astype(self.dtype)
        pooled = efficient_probing(x, self.queries.get_value(), self.value_kernel.get_value(), mask=mask)
        if self.norm is None or self.classifier is None:
            return pooled
        return self.classifier(self.norm(pooled, use_running_average=deterministic))


def _example(key, length):
    return LayerExample((16,), {"num_queries": 4, "reduction": 2}, (normal(key, 2, length, 16),), {})


ENTRY = Entry(
    name="efficient_probing",
    kind="pooling",
    family="pooling",
    layer=EfficientProbing,
    papers=(Paper("Attention, Please! Revisiting Attentive Probing for Masked Image Modeling", "2506.10178", 2025),),
    patterns=("noncausal cross",),
    cost=Cost(flops="T", memory="T"),
    decode="no: it pools a finished bag",
    example=_example,
    fidelity="official code",
)
