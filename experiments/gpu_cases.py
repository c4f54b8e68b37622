"""The shapes of the GPU benchmark: those that other libraries publish, and what they ask of the hardware."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jattn

BACKWARD_FLOPS = 2.5
"""Products of the backward pass to those of the forward pass: five, one of them the logits once more, to two."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One attention problem in bfloat16; `documents` are the lengths of packed documents, which fill `length`."""

    group: str
    name: str
    batch: int
    length: int
    heads: int
    head_dim: int
    value_dim: int
    source: int
    kv_heads: int
    causal: bool = False
    window: int | None = None
    documents: tuple[int, ...] = ()
    bias: bool = False

    @property
    def passes(self) -> tuple[str, ...]:
        """Decoding has no backward pass."""
        return ("forward",) if self.length == 1 else ("forward", "backward")

    @property
    def pairs(self) -> float:
        """Pairs of a head that count: visible ones where they are sparse, half of all for causal attention."""
        if self.documents:
            return sum(n * (n + 1) / 2 for n in self.documents)
        if self.window is not None:
            return float(np.minimum(np.arange(self.length) + 1, self.window).sum())
        return self.length * self.source * (0.5 if self.causal else 1.0)

    def flops(self, passes: str) -> float:
        """FLOPs by the convention of published figures."""
        forward = 2 * self.batch * self.heads * self.pairs * (self.head_dim + self.value_dim)
        return forward if passes == "forward" else BACKWARD_FLOPS * forward

    @property
    def cache_bytes(self) -> int:
        """Keys and values, which decoding reads once."""
        return 2 * self.batch * self.source * self.kv_heads * (self.head_dim + self.value_dim)

    def segment_ids(self) -> np.ndarray:
        """The document of each token, `[1, T]`."""
        return np.repeat(np.arange(len(self.documents), dtype=np.int32), self.documents)[None]

    def arrays(self) -> list[jax.Array]:
        """Query, key, value, and the bias `[1, N, T, S]` if there is one."""
        shapes = [
            (self.batch, self.length, self.heads, self.head_dim),
            (self.batch, self.source, self.kv_heads, self.head_dim),
            (self.batch, self.source, self.kv_heads, self.value_dim),
        ]
        shapes += [(1, self.heads, self.length, self.source)] if self.bias else []
        keys = jax.random.split(jax.random.key(0), len(shapes))
        return [jax.random.normal(key, shape, jnp.bfloat16) for key, shape in zip(keys, shapes, strict=True)]

    def arguments(self) -> dict[str, Any]:
        """What jattn is given besides the arrays."""
        found: dict[str, Any] = {"is_causal": True} if self.causal else {}
        if self.window is not None:
            found = {"mask": jattn.masks.sliding_window(self.window)}
        return found | ({"segment_ids": self.segment_ids()} if self.documents else {})


def self_attention(group, name, batch, length, heads, head_dim, value_dim=None, **more) -> Case:
    """A case with as many keys as queries and no shared heads."""
    return Case(group, name, batch, length, heads, head_dim, value_dim or head_dim, length, heads, **more)


def cut(length: int, count: int) -> tuple[int, ...]:
    """`count` documents of uneven lengths, the same ones every time, that fill `length`."""
    ends = np.sort(np.random.default_rng(0).choice(np.arange(1, length), count - 1, replace=False))
    return tuple(int(n) for n in np.diff(ends, prepend=0, append=length))


def all_cases(lengths: Sequence[int]) -> list[Case]:
    """The published shapes at the given lengths, and the others."""
    cases = []
    for head_dim in (64, 128, 256):
        for length in lengths:
            for causal in (False, True):
                name = f"D {head_dim} T {length} {'causal' if causal else 'full'}"
                cases.append(
                    self_attention(
                        "published", name, max(1, 16384 // length), length, 2048 // head_dim, head_dim, causal=causal
                    )
                )
    cases.append(self_attention("pair_bias", "128 x 2048 x 4 x 32, learned bias", 128, 2048, 4, 32, bias=True))
    cases.append(self_attention("mla", "512 x 1024 x 16 x 192/128 causal", 512, 1024, 16, 192, 128, causal=True))
    cases += sparse_cases(16384, 16, 128, (1024, 256), 16)
    return cases + [
        Case("decode", f"batch {batch}, 32768 keys", batch, 1, 32, 128, 128, 32768, 8) for batch in (1, 4, 16, 64)
    ]


def tiny_cases() -> list[Case]:
    """One of each kind, small enough for an interpreter on a CPU."""
    return [
        self_attention("published", "full", 1, 32, 2, 16),
        self_attention("published", "causal", 1, 32, 2, 16, causal=True),
        self_attention("pair_bias", "learned bias", 2, 32, 2, 16, bias=True),
        self_attention("mla", "32/16 causal", 1, 32, 2, 32, 16, causal=True),
        *sparse_cases(256, 1, 16, (32,), 4),
        Case("decode", "batch 2", 2, 1, 4, 16, 16, 64, 2),
    ]


def sparse_cases(length: int, heads: int, head_dim: int, windows: Sequence[int], documents: int) -> list[Case]:
    """Causal attention, which the others are compared with, windows, and packed documents."""
    shape = (1, length, heads, head_dim)
    return [
        self_attention("sparse", "causal", *shape, causal=True),
        *(self_attention("sparse", f"window {n}", *shape, causal=True, window=n) for n in windows),
        self_attention("sparse", f"{documents} documents", *shape, causal=True, documents=cut(length, documents)),
    ]
