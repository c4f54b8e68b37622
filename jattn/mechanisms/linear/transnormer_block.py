"""A block of TransNormerLLM: gated lightning attention and a gated linear unit, each added to the stream.

    h = x + mixer(norm(x)),   y = h + sglu(norm(h)),   norm(x) = x / sqrt(mean(x^2) + 1e-6)

    gla:  q, k, v, u = silu(x W_q), silu(x W_k), x W_v, x W_u
          mixer = (u * norm(concat_n lightning(q, k, v)_n)) W_o
    tnl:  q, k, v, u = silu(x W_q), silu(x W_k), silu(x W_v), sigmoid((x W_1) W_2)
          mixer = (u * layernorm(concat_n lightning(q, k, v)_n)) W_o

The norm is over all heads together. Every layer forgets, at slopes that depend on head and layer; the first one also
knows relative positions (LRPE-d, on the activated q and k). A model around such blocks multiplies embeddings by sqrt(M)
and ends in the same norm. Sources: Scaling TransNormer to 175 Billion Parameters (arXiv 2307.14995) for gla, Various
Lengths, Constant Speed (arXiv 2405.17381) with its published code for tnl.
"""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from jattn.cache import RecurrentState
from jattn.layers.lrpe import Lrpe
from jattn.layers.norms import make_norm
from jattn.layers.recurrent import HeadProjection, LowRank, RecurrentLayer
from jattn.layers.sglu import Sglu
from jattn.layers.sharding import axes
from jattn.layers.simple_rms_norm import SimpleRMSNorm, simple_rms_norm
from jattn.mechanisms.entry import Cost, Entry, LayerExample, Paper
from jattn.mechanisms.examples import normal
from jattn.mechanisms.linear.lightning_attention import lightning_attention
from jattn.recurrence.decay_schedules import tnl_decay_slopes

MIXERS = ("gla", "tnl")


class TransNormerBlock(RecurrentLayer):
    """Norm, gated lightning attention, norm, gated linear unit.

    h = x + mixer(norm(x)); y = h + sglu(norm(h))

    Args:
        features: M, width of x and of the output.
        num_heads: N.
        num_kv_heads: N; heads do not share keys here.
        head_dim: D; features / num_heads if not given.
        layer: l, which block of the model this is, from 0.
        num_layers: L.
        schedule: of the decay, see `tnl_decay_slopes`; None for no decay.
        mixer: "gla" (TransNormerLLM) or "tnl" (the one published with lightning attention), see the module.
        use_lrpe: whether q and k know positions through `Lrpe`; in layer 0 only if None and no position is given.
        hidden: width inside the gated linear unit; that of `Sglu` if not given.
        epsilon: of the norms without parameters; the layer norm of "tnl" has 1e-5.
        position: None, or an object with `rotate` in place of Lrpe.
        chunk_size: tokens a chunk; no effect on the result.
        dtype: of the computation; that of inputs and parameters if not given.
        param_dtype: of the parameters.
        rngs: for the initial values.

    Raises:
        ValueError: sizes that do not fit, an unknown mixer or schedule, a position together with use_lrpe=True.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> blocks = [TransNormerBlock(16, 2, layer=l, num_layers=2, rngs=nnx.Rngs(l)) for l in range(2)]
        >>> blocks[1](blocks[0](jnp.ones((1, 5, 16))).output).output.shape
        (1, 5, 16)

    Source: Scaling TransNormer to 175 Billion Parameters (arXiv 2307.14995), published code; Various Lengths, Constant
    Speed: Efficient Language Modeling with Lightning Attention (arXiv 2405.17381), published code.
    """

    has_mlp: ClassVar[bool] = True
    """It is a whole block, which cannot stand in another one's attention."""

    def __init__(
        self,
        features: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        layer: int = 0,
        num_layers: int = 1,
        schedule: str | None = "alibi",
        mixer: str = "gla",
        use_lrpe: bool | None = None,
        hidden: int | None = None,
        epsilon: float | int = 1e-6,
        position: Any = None,
        chunk_size: int = 256,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if num_kv_heads not in (None, num_heads):
            raise ValueError(f"num_kv_heads must be num_heads = {num_heads} or None, got {num_kv_heads}")
        if head_dim is None and features % num_heads:
            raise ValueError(f"num_heads must divide features unless head_dim is given, got {num_heads}, {features}")
        if mixer not in MIXERS:
            raise ValueError(f"mixer must be one of {', '.join(MIXERS)}, got {mixer!r}")
        if position is not None and use_lrpe:
            raise ValueError("position cannot be given together with use_lrpe=True")
        head_dim = features // num_heads if head_dim is None else head_dim
        slopes = tnl_decay_slopes(num_heads, layer, num_layers, "alibi" if schedule is None else schedule)
        if position is None and (layer == 0 if use_lrpe is None else use_lrpe):
            position = Lrpe(num_heads, head_dim, param_dtype=param_dtype)
        super().__init__(features, num_heads, position=position)
        self.slopes = None if schedule is None else tuple(slopes.tolist())
        self.mixer, self.epsilon, self.chunk_size, self.dtype = mixer, epsilon, chunk_size, dtype
        shared: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        width = num_heads * head_dim
        self.query = HeadProjection(features, num_heads, head_dim, **shared)
        self.key = HeadProjection(features, num_heads, head_dim, **shared)
        self.value = HeadProjection(features, num_heads, head_dim, **shared)
        is_tnl = mixer == "tnl"
        self.gate: nnx.Module = (
            LowRank(features, head_dim, width, use_bias=False, **shared)
            if is_tnl
            else HeadProjection(features, num_heads, head_dim, **shared)
        )
        self.head_norm = make_norm("layernorm", width, epsilon=1e-5, axis_name="heads", **shared) if is_tnl else None
        self.out = nnx.LinearGeneral(
            (num_heads, head_dim),
            features,
            axis=(-2, -1),
            use_bias=False,
            kernel_metadata=axes("heads", "head_dim", "embed"),
            **shared,
        )
        self.norm = SimpleRMSNorm(epsilon=epsilon)
        self.mlp = Sglu(features, hidden, **shared)

    def mix(
        self, x: jax.Array, *, segment_ids: Any, positions: jax.Array, state: RecurrentState | None, **options: Any
    ) -> tuple[jax.Array, RecurrentState, dict[str, Any]]:
        """See `RecurrentLayer`."""
        y = self.norm(x)
        query, key, value = jax.nn.silu(self.query(y)), jax.nn.silu(self.key(y)), self.value(y)
        query, key = self.rotated(query, key, positions)
        wide = jnp.promote_types(query.dtype, jnp.float32)
        o, last = lightning_attention(
            query,
            key,
            jax.nn.silu(value) if self.mixer == "tnl" else value,
            log_decay=None if self.slopes is None else -jnp.asarray(self.slopes, wide),
            initial_state=None if state is None else state.state,
            segment_ids=segment_ids,
            chunk_size=self.chunk_size,
            return_final_state=True,
        )
        return o, RecurrentState(last), {}

    def output(self, o: jax.Array, x: jax.Array) -> jax.Array:
        """From per-head outputs and the input of the block to its output."""
        gate, heads = self.gate(self.norm(x)), o.reshape(*o.shape[:2], -1)
        if self.head_norm is None:
            heads = gate.reshape(heads.shape) * simple_rms_norm(heads, self.epsilon)
        else:
            heads = jax.nn.sigmoid(gate) * self.head_norm(heads)
        h = x + self.out(heads.reshape(o.shape))
        return h + self.mlp(self.norm(h))


def _example(key, length):
    options = {"num_layers": 2, "hidden": 12, "chunk_size": 4 if length < 64 else 64}
    return LayerExample((16, 4), options, (normal(key, 2, length, 16),), {})


ENTRY = Entry(
    name="TransNormerBlock",
    kind="block",
    family="linear",
    layer=TransNormerBlock,
    papers=(
        Paper("Scaling TransNormer to 175 Billion Parameters", "2307.14995", 2023),
        Paper(
            "Various Lengths, Constant Speed: Efficient Language Modeling with Lightning Attention", "2405.17381", 2024
        ),
    ),
    patterns=("causal self",),
    cost=Cost(flops="T", memory="T"),
    decode="a RecurrentState",
    example=_example,
    fidelity="official code",
)
