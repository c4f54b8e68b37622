"""Agent attention: a few agents first gather from all keys, then all queries read from the agents.

    VA  = softmax_S(scale_a A K^T + bias_ak) V        n agents attend to S keys
    out = softmax_n(scale_q Q A^T + bias_qa) VA       T queries attend to n agents

Two ordinary attentions, so the work is (T + S) n: a generalized linear attention phi_q(Q) phi_k(K)^T V with phi_q(Q)
= softmax(Q A^T) and phi_k(K) = softmax(A K^T)^T. `AgentAttention` is the layer for images: agents are pooled from the
queries, biases know the places of the grid, and a depthwise convolution of the values adds back what n agents blur.
Source: arXiv 2312.08874 and its program for DeiT and Swin.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jattn.layers.attention import MultiHeadAttention
from jattn.layers.sharding import axes
from jattn.mechanisms.entry import Cost, Entry, LayerExample, Paper
from jattn.mechanisms.examples import normals
from jattn.softmax.api import dot_product_attention


def agent_attention(
    query: Any,
    agent: Any,
    key: Any,
    value: Any,
    *,
    agent_scale: float | None = None,
    query_scale: float | None = None,
    agent_bias: Any = None,
    query_bias: Any = None,
    mask: Any = None,
    dropout_rate: float = 0.0,
    dropout_key: Any = None,
    implementation: str | None = None,
) -> jax.Array:
    """Attention of agents to the keys, and of queries to the agents.

    out = softmax_n(query_scale Q A^T + query_bias) softmax_S(agent_scale A K^T + agent_bias) V.

    Args:
        query: `[B, T, N, D]`.
        agent: `[B, n, N, D]`.
        key: `[B, S, K, D]`; K divides N.
        value: `[B, S, K, Dv]`.
        agent_scale: of the agents' logits, D^-0.5 if None.
        query_scale: of the queries' logits, D^-0.5 if None.
        agent_bias: broadcasts to `[B, N, n, S]`, such as `[N, n, S]`.
        query_bias: broadcasts to `[B, N, T, n]`, such as `[N, T, n]`.
        mask: which keys are visible, booleans that broadcast to `[B, 1, 1, S]`; without any the output is 0.
        dropout_rate: of both softmaxes' weights.
        dropout_key: a key of jax.random, needed for a rate above 0.
        implementation: of both, as in `jattn.dot_product_attention`.

    Returns:
        `[B, T, N, Dv]` in the query's dtype.

    Raises:
        ValueError: shapes that do not fit, or a mask that is not of keys.

    Example:
        >>> import jax.numpy as jnp
        >>> x = jnp.ones((1, 9, 2, 4))
        >>> agent_attention(x, x[:, :3], x, x).shape
        (1, 9, 2, 4)

    Source: Agent Attention: On the Integration of Softmax and Linear Attention (arXiv 2312.08874).
    """
    query, agent, key, value = (jnp.asarray(x) for x in (query, agent, key, value))
    expected = (*query.shape[:1], "n", *query.shape[2:])
    if query.ndim != 4 or agent.ndim != 4 or agent.shape[:1] + agent.shape[2:] != query.shape[:1] + query.shape[2:]:
        raise ValueError(f"agent must be {list(expected)} for query {list(query.shape)}; got {list(agent.shape)}")
    if mask is not None:
        mask = jnp.asarray(mask)
        shape = (1,) * (4 - mask.ndim) + mask.shape
        fits = len(shape) == 4 and shape[0] in (1, query.shape[0]) and shape[1:3] == (1, 1)
        if mask.dtype != bool or not fits or shape[3] not in (1, *key.shape[1:2]):
            raise ValueError(
                f"mask must be a key mask, booleans that broadcast to {[query.shape[0], 1, 1, *key.shape[1:2]]}; got "
                f"{mask.dtype}{list(mask.shape)}. softmax_attention takes any mask"
            )
    keys = (None, None) if dropout_key is None else jax.random.split(dropout_key)
    dropout = [{"dropout_rate": dropout_rate, "dropout_key": k, "implementation": implementation} for k in keys]
    # What the agents have gathered is an intermediate result: in bfloat16 it would be rounded once more.
    dtype = jnp.promote_types(query.dtype, jnp.float32)
    wide, agent, key, value = (x.astype(dtype) for x in (query, agent, key, value))
    gathered = dot_product_attention(agent, key, value, agent_bias, mask, scale=agent_scale, **dropout[0])
    out = dot_product_attention(wide, agent, gathered, query_bias, scale=query_scale, **dropout[1])
    return out.astype(query.dtype)


def adaptive_average(length: int, cells: int) -> np.ndarray:
    """Weights of adaptive average pooling: cell i is the mean of entries floor(i L / p) .. ceil((i + 1) L / p) - 1.

    Example:
        >>> adaptive_average(5, 2).round(2).tolist()
        [[0.33, 0.33, 0.33, 0.0, 0.0], [0.0, 0.0, 0.33, 0.33, 0.33]]
    """
    cell, entry = np.arange(cells)[:, None], np.arange(length)
    inside = (entry >= cell * length // cells) & (entry < -(-(cell + 1) * length // cells))
    return inside / inside.sum(1, keepdims=True)


class AgentAttention(MultiHeadAttention):
    """Agent attention on images: pooled queries as agents, biases of the grid, a depthwise convolution of the values.

    y = (agent_attention(q, A, k, v) + DWC(v)) W_o, A = adaptive average of q over p x p cells, n = p^2.

    Args:
        features: M.
        num_heads: N.
        grid: (h, w), tokens of an image row by row.
        num_agents: n, a square number.
        class_token: whether a token that is no part of the image stands first; it has biases of its own, is not pooled
            and not convolved.
        bias_size: side of the bias tables that are resized to the grid.
        rngs: for the initial values.
        **options: num_kv_heads, head_dim, position, qk_norm, scale, dropout_rate, use_bias, value_dim, kernel_init,
            dtype and param_dtype of `MultiHeadAttention`.

    Raises:
        ValueError: a grid or a number of agents that is none, or an option that it has no place for.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> layer = AgentAttention(8, 2, grid=(4, 6), num_agents=4, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((1, 24, 8))).output.shape
        (1, 24, 8)

    Source: Agent Attention: On the Integration of Softmax and Linear Attention (arXiv 2312.08874).
    """

    def __init__(
        self,
        features: int,
        num_heads: int,
        *,
        grid: tuple[int, int] | None = None,
        num_agents: int = 49,
        class_token: bool = False,
        bias_size: int = 7,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        super().__init__(features, num_heads, rngs=rngs, **options)
        self.pool_size = math.isqrt(max(num_agents, 0))
        if self.pool_size**2 != num_agents or num_agents < 1:
            raise ValueError(f"num_agents must be a square number such as 9 or 49, got {num_agents}")
        if grid is None or len(grid) != 2 or min(grid) < 1:
            raise ValueError(f"grid must be (h, w), the image in tokens, got {grid}")
        if bias_size < 1:
            raise ValueError(f"bias_size must be at least 1, got {bias_size}")
        if hasattr(self.position, "score_mod") or self.logit_soft_cap is not None or self.sinks is not None:
            raise ValueError("AgentAttention has no place for a relative position, logit_soft_cap or sinks")
        self.grid, self.class_token = (int(grid[0]), int(grid[1])), class_token
        (h, w), n, heads = self.grid, num_agents, num_heads
        shapes = {
            "an_bias": (heads, n, bias_size, bias_size),
            "na_bias": (heads, n, bias_size, bias_size),
            "ah_bias": (1, heads, n, h, 1),
            "aw_bias": (1, heads, n, 1, w),
            "ha_bias": (1, heads, h, 1, n),
            "wa_bias": (1, heads, 1, w, n),
        }
        if class_token:
            shapes |= {"ac_bias": (1, heads, n, 1), "ca_bias": (1, heads, 1, n)}
        init = nnx.initializers.truncated_normal(0.02)
        param_dtype = self.query.kernel.get_value().dtype
        for name, shape in shapes.items():
            names: list[str | None] = [None] * len(shape)
            names[0 if name in ("an_bias", "na_bias") else 1] = "heads"
            setattr(self, name, nnx.Param(init(rngs.params(), shape, param_dtype), **axes(*names)))
        channels = num_heads * self.value_dim
        self.conv = nnx.Conv(
            channels,
            channels,
            (3, 3),
            padding=1,
            feature_group_count=channels,
            dtype=self.dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )

    def biases(self) -> tuple[jax.Array, jax.Array]:
        """The biases of agents `[N, n, tokens]` and of queries `[N, tokens, n]`, class token first."""
        (h, w), n = self.grid, self.pool_size**2
        heads = self.num_heads

        def resized(table: Any) -> jax.Array:
            return jax.image.resize(table.get_value(), (heads, n, h, w), "bilinear", antialias=False)

        agents = resized(self.an_bias).reshape(heads, n, h * w)
        agents = agents + (self.ah_bias + self.aw_bias).reshape(heads, n, h * w)
        queries = jnp.swapaxes(resized(self.na_bias).reshape(heads, n, h * w), 1, 2)
        queries = queries + (self.ha_bias + self.wa_bias).reshape(heads, h * w, n)
        if self.class_token:
            agents = jnp.concatenate([self.ac_bias.get_value()[0], agents], axis=2)
            queries = jnp.concatenate([self.ca_bias.get_value()[0], queries], axis=1)
        return agents, queries

    def attend(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        *,
        inputs: jax.Array,
        deterministic: bool = True,
        rngs: Any = None,
        **arguments: Any,
    ) -> tuple[jax.Array, dict[str, Any]]:
        """Per-head outputs `[B, tokens, N, Dv]`; see `MultiHeadAttention.attend`."""
        for name in ("mask", "is_causal", "segment_ids", "bias", "hook"):
            if arguments.get(name) is not None and arguments[name] is not False:
                raise ValueError(f"AgentAttention takes no {name}: its agents are averages over the whole image")
        (h, w), first = self.grid, int(self.class_token)
        batch, tokens = query.shape[:2]
        if tokens != h * w + first or key.shape[1] != tokens:
            word = f"{first} + {h} * {w}" if first else f"{h} * {w}"
            raise ValueError(f"x must have {word} tokens in self attention, got {tokens} and {key.shape[1]} keys")
        image = query[:, first:].reshape(batch, h, w, *query.shape[2:])
        rows, columns = (jnp.asarray(adaptive_average(size, self.pool_size), jnp.float32) for size in (h, w))
        wide = jnp.promote_types(query.dtype, jnp.float32)
        agent = jnp.einsum("ph,qw,bhwnd->bpqnd", rows.astype(wide), columns.astype(wide), image.astype(wide))
        agent = agent.reshape(batch, -1, *query.shape[2:]).astype(query.dtype)
        agent_bias, query_bias = self.biases()
        options: dict[str, Any] = {}
        if self.dropout_rate and not deterministic:
            if rngs is None:
                raise ValueError("rngs must be given when dropout_rate > 0 and deterministic=False")
            options["dropout_key"] = rngs if isinstance(rngs, jax.Array) else rngs.dropout()
            options["dropout_rate"] = self.dropout_rate
        out = agent_attention(
            query,
            agent,
            key,
            value,
            agent_scale=self.scale,
            query_scale=self.scale,
            agent_bias=agent_bias,
            query_bias=query_bias,
            **options,
        )
        values = jnp.repeat(value[:, first:], self.num_heads // self.num_kv_heads, axis=2)
        local = self.conv(values.reshape(batch, h, w, -1)).reshape(batch, h * w, *out.shape[2:])
        return out + jnp.pad(local, [(0, 0), (first, 0), (0, 0), (0, 0)]).astype(out.dtype), {}


def _example(key, length, query_length=None):
    shapes = ((2, query_length or length, 4, 8), (2, 3, 4, 8), (2, length, 2, 8), (2, length, 2, 8))
    return normals(key, *shapes), {}


def _layer_example(key, length):
    h = math.isqrt(length) if math.isqrt(length) ** 2 == length else 1
    options = {"grid": (h, length // h), "num_agents": 4, "bias_size": 3}
    return LayerExample((8, 2), options, normals(key, (2, length, 8)))


_PAPER = Paper("Agent Attention: On the Integration of Softmax and Linear Attention", "2312.08874", 2023)

ENTRIES = (
    Entry(
        name="agent_attention",
        kind="primitive",
        family="linear",
        function=agent_attention,
        papers=(_PAPER,),
        patterns=("noncausal self", "noncausal cross"),
        cost=Cost(flops="T", memory="T"),
        decode="no: agents are made of all queries",
        example=_example,
        fidelity="official code",
    ),
    Entry(
        name="AgentAttention",
        kind="layer",
        family="linear",
        layer=AgentAttention,
        papers=(_PAPER,),
        patterns=("noncausal self",),
        cost=Cost(flops="T", memory="T"),
        decode="no: agents are made of all queries",
        example=_layer_example,
        fidelity="official code",
        exempt={"permutation": "its pooling, its biases and its convolution know the places of the image"},
    ),
)
