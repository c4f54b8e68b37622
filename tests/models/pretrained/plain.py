"""The layers of a plain transformer, straight from the formulas: in float64 the truth, below it the scale of errors."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special


class Plain(NamedTuple):
    """Formulas in one precision; norms and logits are computed in `wide`."""

    np: Any
    dtype: Any
    wide: Any
    erf: Callable

    def array(self, x):
        return self.np.asarray(x, dtype=self.dtype)

    def linear(self, x, weight, bias):
        """`weight` as torch has it, [outputs, inputs]."""
        return x @ self.array(weight).T + self.array(bias)

    def norm(self, x, scale, bias, epsilon):
        x = self.np.asarray(x, dtype=self.wide)
        centered = x - x.mean(-1, keepdims=True)
        normed = centered / self.np.sqrt((centered**2).mean(-1, keepdims=True) + epsilon)
        return self.array(normed * self.np.asarray(scale, self.wide) + self.np.asarray(bias, self.wide))

    def gelu(self, x):
        return self.array(x * 0.5 * (1 + self.erf(x / self.array(np.sqrt(2)))))

    def rms_norm(self, x, scale, epsilon):
        x = self.np.asarray(x, dtype=self.wide)
        return self.array(
            x / self.np.sqrt((x**2).mean(-1, keepdims=True) + epsilon) * self.np.asarray(scale, self.wide)
        )

    def attention(self, query, key, value, num_heads, *, is_causal=False):
        """From [T, M] and [S, M'] to weights [N, T, S] and outputs [T, M]; heads of keys are shared by equal groups."""
        width = query.shape[1] // num_heads
        q, k, v = (x.reshape(len(x), -1, width).transpose(1, 0, 2) for x in (query, key, value))
        k, v = (self.np.repeat(x, num_heads // len(k), axis=0) for x in (k, v))
        logits = self.np.asarray(q @ k.transpose(0, 2, 1), dtype=self.wide) / np.sqrt(width)
        if is_causal:
            logits = self.np.where(np.tri(len(query), len(key), dtype=bool), logits, -np.inf)
        weights = self.np.exp(logits - logits.max(-1, keepdims=True))
        weights = weights / weights.sum(-1, keepdims=True)
        return weights, (self.array(weights) @ v).transpose(1, 0, 2).reshape(query.shape)


TRUTH = Plain(np, np.float64, np.float64, scipy.special.erf)


def in_precision(dtype) -> Plain:
    return Plain(jnp, dtype, jnp.float32, jax.scipy.special.erf)


def bert_layer(plain: Plain, x, tensors, names, num_heads, epsilon):
    """A layer with norms after; `names` are those of query, key, value, out, its norm, up, down and its norm."""

    def linear(name, x):
        return plain.linear(x, tensors[f"{name}.weight"], tensors[f"{name}.bias"])

    def norm(name, x):
        return plain.norm(x, tensors[f"{name}.weight"], tensors[f"{name}.bias"], epsilon)

    query, key, value, out, out_norm, up, down, down_norm = names
    weights, mixed = plain.attention(linear(query, x), linear(key, x), linear(value, x), num_heads)
    x = norm(out_norm, x + linear(out, mixed))
    return weights, norm(down_norm, x + linear(down, plain.gelu(linear(up, x))))
