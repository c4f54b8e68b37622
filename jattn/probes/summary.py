"""What heads do, as one number a head: sinks, entropy, induction; and how long the vectors of the stream are.

sink = mean over queries i >= i0 of a_i,c;   entropy = mean over the same queries of -sum_j a_ij ln a_ij
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jattn.probes.attention_entropy import attention_entropy
from jattn.probes.capture import capture
from jattn.probes.induction_score import induction_score


def weights_by_rows(
    model: Any, inputs: Any, length: int, *, max_bytes: int = 2**25, dtype: Any = np.float32, **call: Any
) -> np.ndarray:
    """The weights of all layers and heads on the host, some query rows at a time.

    A capture of all rows at once holds the weights of each layer and the stack of them, twice their size. Here the
    model runs once for as many rows as fit into max_bytes: SmolLM2 on 512 tokens (30 layers of 9 heads) gives 283 MB,
    or half of that as float16, in nine runs of at most 34 MB each.

    Args:
        model: as `capture` takes it, with `num_layers` and `num_heads` in its config; self attention.
        inputs: what the model takes, B of them.
        length: T, tokens that the model's attention sees.
        max_bytes: of the weights of one run, at 4 bytes each; at least one row is taken.
        dtype: of what is kept; float16 keeps three digits, and weights above 6e-8.
        **call: further arguments of `capture`.

    Returns:
        `[L, B, N, T, T]`, a numpy array.

    Raises:
        ValueError: an attention that cannot show its weights, or another length than the model's.

    Example:
        >>> from flax import nnx
        >>> from jattn.models import DecoderLM, TransformerConfig
        >>> config = TransformerConfig(vocab_size=11, features=16, num_layers=2, num_heads=4)
        >>> model = DecoderLM(config, rngs=nnx.Rngs(0))
        >>> weights_by_rows(model, np.zeros((1, 5), np.int32), 5, max_bytes=400).shape
        (2, 1, 4, 5, 5)
    """
    layers, heads, batch = model.config.num_layers, model.config.num_heads, np.shape(inputs)[0]
    step = max(1, max_bytes // (4 * layers * batch * heads * length))
    found = np.empty((layers, batch, heads, length, length), dtype)
    for start in range(0, length, step):
        rows = np.arange(start, min(start + step, length))
        seen = capture(model, inputs, **{"sites": (), **call}, rows=rows)["weights"]
        if seen.shape[-1] != length:
            raise ValueError(f"weights_by_rows: length is {length}, the model's attention sees {seen.shape[-1]} tokens")
        found[..., rows, :] = seen
    return found


def sink_mass(weights: Any, column: int = 0, from_row: int = 8) -> Any:
    """Mean attention that one key draws from the later queries, for every head.

    sink = mean over samples and queries i >= from_row of w[i, column]

    A causal query that sees few keys gives each of them much, whatever the head does; the first queries are left out.

    Args:
        weights: `[..., B, N, T, S]`, such as the `[L, B, N, T, S]` of `capture`.
        column: c, the key; negative ones count from the end.
        from_row: i0, the first query that counts.

    Returns:
        `[..., N]`, float32 at least.

    Raises:
        ValueError: weights of fewer than four axes, a key that they do not hold, or no query left.

    Example:
        >>> weights = np.broadcast_to([0.75, 0.25], (2, 1, 3, 9, 2))  # [L, B, N, T, S]
        >>> sink_mass(weights).tolist()
        [[0.75, 0.75, 0.75], [0.75, 0.75, 0.75]]

    Source: Efficient Streaming Language Models with Attention Sinks (arXiv 2309.17453).
    """
    weights = _checked("sink_mass", weights, from_row)
    keys = weights.shape[-1]
    if not -keys <= column < keys:
        raise ValueError(f"sink_mass: column is {column}, the weights have {keys} keys")
    drawn = jnp.asarray(weights[..., from_row:, column])
    return drawn.astype(jnp.promote_types(drawn.dtype, jnp.float32)).mean((-3, -1))


def mean_entropy(weights: Any, from_row: int = 8) -> Any:
    """Mean entropy of the later rows in nats, for every head of every layer.

    entropy = mean over samples and queries i >= from_row of -sum_j w_ij ln w_ij

    Layers are taken one after the other; weights that are numpy arrays stay on the host but for one layer.

    Args:
        weights: `[L, B, N, T, S]`.
        from_row: the first query that counts.

    Returns:
        `[L, N]`, float32 at least.

    Raises:
        ValueError: weights of another rank than five, or no query left.

    Example:
        >>> mean_entropy(np.full((1, 1, 2, 9, 4), 0.25)).round(3).tolist()
        [[1.386..., 1.386...]]
    """
    weights = _checked("mean_entropy", weights, from_row)
    if weights.ndim != 5:
        raise ValueError(f"mean_entropy: weights must be [L, B, N, T, S], got {list(weights.shape)}")
    return jnp.stack([attention_entropy(layer[:, :, from_row:]).mean((0, 2)) for layer in weights])


def residual_norms(resid: Any) -> dict[str, Any]:
    """How long the vectors of the stream are after each layer.

    A first vector far longer than the median is the mark of an attention sink in a decoder.

    Args:
        resid: `[L, B, T, M]`, the site 'resid'.

    Returns:
        Euclidean norms `[L]`: 'first' (of the first token, mean over samples), 'median' and 'largest' of all tokens.

    Raises:
        ValueError: another rank than four.

    Example:
        >>> norms = residual_norms(np.array([[[[3.0, 4.0], [0.0, 1.0], [0.0, 2.0]]]]))
        >>> {name: value.tolist() for name, value in norms.items()}
        {'first': [5.0], 'median': [2.0], 'largest': [5.0]}

    Source: Massive Activations in Large Language Models (arXiv 2402.17762).
    """
    if np.ndim(resid) != 4:
        raise ValueError(f"residual_norms: resid must be [L, B, T, M], got {list(np.shape(resid))}")
    resid = jnp.asarray(resid)
    norms = jnp.linalg.norm(resid.astype(jnp.promote_types(resid.dtype, jnp.float32)), axis=-1)
    return {"first": norms[:, :, 0].mean(1), "median": jnp.median(norms, (1, 2)), "largest": norms.max((1, 2))}


def heads_summary(
    seen: Mapping[str, Any],
    *,
    repeated: Mapping[str, Any] | None = None,
    period: int | None = None,
    rows: Any = None,
    column: int = 0,
    from_row: int = 8,
) -> dict[str, Any]:
    """Everything that is known about the heads of a model, from what `capture` kept.

    Args:
        seen: holds 'weights' `[L, B, N, T, S]`, with 'resid' `[L, B, T, M]` or without.
        repeated: of a random sequence that stands there twice, 'weights' `[L, B, N, R, S]`; without it, no induction.
        period: length of the random sequence.
        rows: the R query rows that the repeated weights hold, all of them if not given; `induction_rows(period)` are
            enough, and need the least memory.
        column: the key whose mass counts as that of a sink.
        from_row: the first query that counts for sink and entropy.

    Returns:
        'sink_mass' and 'entropy' `[L, N]`; 'induction' `[L, N]` with `repeated`; 'resid_norms' with 'resid', see
        `residual_norms`.

    Raises:
        ValueError: shapes that do not fit, no query left, or a repeated sequence without its period.

    Example:
        >>> uniform = np.full((2, 1, 3, 10, 10), 0.1)
        >>> found = heads_summary({"weights": uniform}, repeated={"weights": uniform}, period=5)
        >>> {name: value.shape for name, value in found.items()}
        {'sink_mass': (2, 3), 'entropy': (2, 3), 'induction': (2, 3)}
    """
    found = {
        "sink_mass": sink_mass(seen["weights"], column, from_row),
        "entropy": mean_entropy(seen["weights"], from_row),
    }
    if (repeated is None) != (period is None):
        raise ValueError("heads_summary: repeated weights and their period belong together, one of them is missing")
    if repeated is not None and period is not None:
        found["induction"] = induction_score(repeated["weights"], period, rows=rows).mean(1)
    if "resid" in seen:
        found["resid_norms"] = residual_norms(seen["resid"])
    return found


def top_heads(values: Any, count: int = 5, *, smallest: bool = False) -> list[tuple[int, int, float]]:
    """The heads with the largest values, first the largest.

    Args:
        values: `[L, N]`.
        count: how many at most.
        smallest: the smallest ones instead.

    Returns:
        (layer, head, value), counted from 0; of equal values the lower layer and head come first.

    Raises:
        ValueError: values of another rank.

    Example:
        >>> top_heads(np.array([[0.0, 0.5], [0.75, 0.25]]), 2)
        [(1, 0, 0.75), (0, 1, 0.5)]
    """
    values = np.asarray(values)
    if values.ndim != 2:
        raise ValueError(f"top_heads: values must be [L, N], got {list(values.shape)}")
    order = np.argsort(values.ravel() if smallest else -values.ravel(), kind="stable")[:count]
    places = np.stack(np.unravel_index(order, values.shape), 1).tolist()
    return [(layer, head, float(values[layer, head])) for layer, head in places]


def _checked(name: str, weights: Any, from_row: int) -> Any:
    shape = np.shape(weights)
    if len(shape) < 4:
        raise ValueError(f"{name}: weights must be [..., B, N, T, S], got {list(shape)}")
    if not 0 <= from_row < shape[-2]:
        raise ValueError(f"{name}: from_row is {from_row}, the weights have {shape[-2]} queries")
    return weights if isinstance(weights, jax.Array) else np.asarray(weights)
