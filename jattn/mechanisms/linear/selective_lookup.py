"""Input-dependent sparse attention: what a convolution cannot recall, attention looks up, for a few tokens only.

    s = sigmoid(x w)                                  in [0, 1], one a token
    training:    y = x + s * attention(x),            loss: 0.001 relu(mean(s) - k / T)
    evaluation:  y_t = x_t + s_t attention(x)_t       for the k tokens of largest s; y_t = x_t for the others

k is ceil(sqrt(T)) unless given (sqrt(T) in the loss); of equal s the earlier token is taken. Evaluation computes
attention for k queries, so k T products instead of T^2. It is causal in training, but not at evaluation: which tokens
are looked up depends on the scores of all of them. Source: Zoology: Measuring and Improving Recall in Efficient
Language Models (arXiv 2312.04927) and its code.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jattn.layers.attention import LayerOutput, MultiHeadAttention
from jattn.layers.sharding import axes
from jattn.mechanisms.entry import Cost, Entry, LayerExample, Paper
from jattn.mechanisms.examples import normal
from jattn.recurrence.segments import runs_of
from jattn.softmax import masks
from jattn.softmax.masks import Mask
from jattn.softmax.topk import topk_mask

SELECTORS = ("sigmoid", "softmax", "two_way")


def seen_before(tokens: Any, *, segment_ids: Any = None) -> jax.Array:
    """Mark the tokens that stood earlier in their document: where a bigram may repeat, and a lookup may pay.

    Args:
        tokens: integers `[B, T]`.
        segment_ids: `[B, T]`; a run of equal ids is a document, negative = padding, which is never marked.

    Returns:
        bool `[B, T]`.

    Raises:
        ValueError: tokens that are no integers `[B, T]`.

    Example:
        >>> seen_before(jnp.array([[4, 7, 4, 4, 9]])).astype(int).tolist()
        [[0, 0, 1, 1, 0]]

    Source: Zoology: Measuring and Improving Recall in Efficient Language Models (arXiv 2312.04927), programmatic
    selection; the rule is inferred from its description.
    """
    tokens = jnp.asarray(tokens)
    if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(f"tokens must be integers [B, T], got {tokens.dtype}{list(tokens.shape)}")
    ids = jnp.zeros_like(tokens) if segment_ids is None else jnp.broadcast_to(jnp.asarray(segment_ids), tokens.shape)
    owner = jnp.where(ids >= 0, runs_of(ids), -1)
    order = jnp.lexsort((tokens, owner), axis=-1)  # stable: equal tokens stay in order
    sorted_tokens, sorted_owner = (jnp.take_along_axis(x, order, axis=1) for x in (tokens, owner))
    repeats = (
        jnp.zeros(tokens.shape, bool)
        .at[:, 1:]
        .set((sorted_tokens[:, 1:] == sorted_tokens[:, :-1]) & (sorted_owner[:, 1:] == sorted_owner[:, :-1]))
    )
    return jnp.take_along_axis(repeats, jnp.argsort(order, axis=1), axis=1) & (ids >= 0)


class SelectiveLookup(MultiHeadAttention):
    """Causal attention added to selected tokens only, with its own residual: y = x + s * attention(x).

    Args:
        features: M.
        num_heads: N.
        selector: where s comes from. "sigmoid": sigmoid(x w). "softmax": softmax over the row of x w + b, which is not
            causal even in training. "two_way": the second entry of softmax((x W + b) / tau), tau learned.
        num_lookups: k; ceil(sqrt(T)) if not given.
        penalty: factor of the loss, of "sigmoid" alone.
        use_bias: of the projections.
        rngs: for the initial values.
        **options: num_kv_heads, head_dim, attention_fn, position, qk_norm, scale, logit_soft_cap, use_sinks,
            dropout_rate, value_dim, kernel_init, dtype and param_dtype of `MultiHeadAttention`.

    Raises:
        ValueError: an unknown selector, a k below 1, or sizes that do not fit.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> layer = SelectiveLookup(16, 2, rngs=nnx.Rngs(0))
        >>> found = layer(jnp.ones((1, 9, 16)), deterministic=False)
        >>> found.output.shape, sorted(found.aux)
        ((1, 9, 16), ['lookup_loss', 'selection'])

    Source: Zoology: Measuring and Improving Recall in Efficient Language Models (arXiv 2312.04927), published code.
    """

    def __init__(
        self,
        features: int,
        num_heads: int,
        *,
        selector: str = "sigmoid",
        num_lookups: int | None = None,
        penalty: float | int = 0.001,
        use_bias: bool = True,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        super().__init__(features, num_heads, use_bias=use_bias, rngs=rngs, **options)
        if selector not in SELECTORS:
            raise ValueError(f"selector must be one of {', '.join(SELECTORS)}, got {selector!r}")
        if num_lookups is not None and num_lookups < 1:
            raise ValueError(f"num_lookups must be at least 1, got {num_lookups}")
        self.selector, self.num_lookups, self.penalty = selector, num_lookups, penalty
        param_dtype = self.query.kernel.get_value().dtype
        self.select = nnx.Linear(
            features,
            2 if selector == "two_way" else 1,
            use_bias=selector != "sigmoid",
            dtype=self.dtype,
            param_dtype=param_dtype,
            kernel_metadata=axes("embed", None),
            bias_metadata=axes(None),
            rngs=rngs,
        )
        first = jnp.asarray(0.3 * math.sqrt(features), param_dtype)
        self.temperature = nnx.Param(first, **axes()) if selector == "two_way" else None

    def selection(self, x: jax.Array, real: jax.Array | None = None) -> jax.Array:
        """s `[B, T]`, float32 at least, 0 at padding.

        Args:
            x: `[B, T, M]`.
            real: bool `[B, T]`, False at padding.
        """
        logits = self.select(x)
        logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
        if self.temperature is not None:
            s = jax.nn.softmax(logits / self.temperature.get_value().astype(logits.dtype), axis=-1)[..., 1]
        elif self.selector == "sigmoid":
            s = jax.nn.sigmoid(logits[..., 0])
        else:
            scores = logits[..., 0] if real is None else jnp.where(real, logits[..., 0], jnp.finfo(logits.dtype).min)
            s = jax.nn.softmax(scores, axis=1)
        return s if real is None else jnp.where(real, s, 0)

    def init_cache(self, policy: Any, batch: int, dtype: Any = None) -> Any:
        """Refuse to decode.

        Raises:
            ValueError: always.
        """
        raise ValueError("SelectiveLookup chooses its lookups among all tokens of a sequence; it cannot decode")

    def __call__(
        self,
        x: Any,
        context: Any = None,
        *,
        mask: Any = None,
        positions: Any = None,
        segment_ids: Any = None,
        selected: Any = None,
        cache: Any = None,
        deterministic: bool = True,
        rngs: Any = None,
        tap: Any = None,
        hook: Any = None,
    ) -> LayerOutput:
        """Look up, and add.

        Args:
            x: `[B, T, features]`.
            context: refused.
            mask: None or `masks.causal()`; the layer is causal either way.
            positions: of x, `[T]` or `[B, T]`.
            segment_ids: `[B, T]`; negative = padding, which outputs 0 and is not looked up.
            selected: bool `[B, T]`, the tokens to look up, such as `seen_before`; s is 1 for them, 0 for the others, in
                training as at evaluation, and the layer is causal if they are.
            cache: refused.
            deterministic: False for training (all tokens, weighted); True for evaluation (k tokens).
            rngs: for dropout.
            tap: `tap("head_out", o) -> o`; at evaluation of the k selected tokens.
            hook: as in `MultiHeadAttention`; of the k selected queries at evaluation.

        Returns:
            LayerOutput. aux: "selection", the mean of s; "lookup_loss" in training with the selector "sigmoid".

        Raises:
            ValueError: shapes that do not fit, a context, another mask or a cache.
        """
        x = jnp.asarray(x)
        if context is not None or cache is not None:
            raise ValueError("SelectiveLookup reads one whole sequence: it takes no context and no cache")
        if mask is not None and not (isinstance(mask, Mask) and mask == masks.causal()):
            raise ValueError("SelectiveLookup takes no mask but causal(); hide padding with segment_ids")
        if x.ndim != 3 or x.shape[-1] != self.features:
            raise ValueError(f"x must be [B, T, {self.features}], got {list(x.shape)}")
        ids, real = None, None
        if segment_ids is not None:
            ids = jnp.asarray(segment_ids)
            if ids.ndim != 2 or ids.shape[1] != x.shape[1] or ids.shape[0] not in (1, x.shape[0]):
                raise ValueError(f"segment_ids must be {list(x.shape[:2])}, got {list(ids.shape)}")
            ids = jnp.broadcast_to(ids, x.shape[:2])
            real = ids >= 0
            x = jnp.where(real[..., None], x, 0)
        if selected is not None:
            selected = jnp.asarray(selected)
            if selected.shape != x.shape[:2] or selected.dtype != bool:
                raise ValueError(f"selected must be booleans {list(x.shape[:2])}, got {list(selected.shape)}")
            s = (selected if real is None else selected & real).astype(jnp.promote_types(x.dtype, jnp.float32))
        else:
            s = self.selection(x, real)
        if deterministic and selected is None:
            added, aux = self._few(x, s, real, ids, positions, tap, hook)
        else:
            call = {"deterministic": deterministic, "rngs": rngs, "tap": tap, "hook": hook}
            found = super().__call__(x, mask=masks.causal(), positions=positions, segment_ids=ids, **call)
            added, aux = s[..., None] * found.output, found.aux
        dtype = self.dtype or jnp.promote_types(x.dtype, self.out.kernel.get_value().dtype)
        y = (x + added).astype(dtype)
        y = y if real is None else jnp.where(real[..., None], y, 0)
        mean = jnp.sum(s) / (s.size if real is None else jnp.maximum(jnp.sum(real), 1))
        aux = {**aux, "selection": mean}
        if not deterministic and selected is None and self.selector == "sigmoid":
            length = x.shape[1]
            lookups = math.sqrt(length) if self.num_lookups is None else self.num_lookups
            aux["lookup_loss"] = self.penalty * jax.nn.relu(mean - lookups / length)
        return LayerOutput(y, None, aux)

    def _few(
        self, x: jax.Array, s: jax.Array, real: Any, ids: Any, positions: Any, tap: Any, hook: Any
    ) -> tuple[jax.Array, dict[str, Any]]:
        """s * attention(x) at the k tokens of largest s, 0 elsewhere."""
        batch, length = s.shape
        k = min(math.ceil(math.sqrt(length)) if self.num_lookups is None else self.num_lookups, length)
        chosen = topk_mask(s, k, allowed=real)
        rows = jnp.argsort(~chosen, axis=1, stable=True)[:, :k]

        def at_rows(array: jax.Array) -> jax.Array:
            return jnp.take_along_axis(array, rows.reshape(*rows.shape, *(1,) * (array.ndim - 2)), axis=1)

        places = jnp.arange(length)[None] if positions is None else jnp.atleast_2d(jnp.asarray(positions))
        places = jnp.broadcast_to(places, (batch, length))
        few = at_rows(x)
        query, key, value = self.project(few, x)
        pair = None if ids is None else (at_rows(ids), ids)
        arguments = self._arguments(query, key, masks.causal(), at_rows(places), pair, is_cross=True)
        arguments["key_positions"] = places
        query, key = self._rotate(query, key, arguments)
        if hook is not None:
            arguments["hook"] = hook
        o, aux = self.attend(query, key, value, inputs=few, **arguments)
        o = o if tap is None else tap("head_out", o)
        added = jnp.where(at_rows(chosen)[..., None], at_rows(s)[..., None] * self.output(o), 0)
        nothing = jnp.zeros((batch, length, self.features), added.dtype)
        return nothing.at[jnp.arange(batch)[:, None], rows].add(added), aux


def _example(key, length):
    # The form of training: at evaluation the chosen tokens depend on the whole sequence.
    return LayerExample((8, 2), {"num_kv_heads": 1}, (normal(key, 2, length, 8),), {"deterministic": False})


ENTRY = Entry(
    name="SelectiveLookup",
    kind="layer",
    family="linear",
    layer=SelectiveLookup,
    papers=(Paper("Zoology: Measuring and Improving Recall in Efficient Language Models", "2312.04927", 2023),),
    patterns=("causal self",),
    cost=Cost(flops="T^2", memory="T"),
    decode="no: at evaluation the tokens to look up are chosen among all of the sequence",
    example=_example,
    fidelity="official code",
)
