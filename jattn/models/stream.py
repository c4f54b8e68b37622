"""Generation token by token, for whoever wants to read along: a conversation with a decoder that keeps its cache."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike

from jattn.cache import CachePolicy, FullCache
from jattn.models.decoder import DecoderLM
from jattn.models.generate import filter_logits, prefill, sample


class Stream:
    """One row of tokens that a decoder reads and continues, step by step.

    token_t ~ softmax(filter(logits_t / temperature)), as in `generate`. What has been read stays in the cache, so that
    a conversation costs its new tokens only. Two programs are compiled: one that reads `chunk` tokens, one that takes
    one step.

    Args:
        model: a decoder.
        policy: of the cache, such as `SinkWindowCache(1020, num_sinks=4, chunk=64)`; a number of tokens keeps all up to
            that many.
        rng: a key; not needed for temperature 0.
        temperature: 0 is greedy.
        top_k: see `filter_logits`.
        top_p: see `filter_logits`.
        chunk: how many tokens are read at once.

    Raises:
        ValueError: an argument that does not fit.

    Example:
        >>> from flax import nnx
        >>> from jattn.models import TransformerConfig
        >>> config = TransformerConfig(vocab_size=11, features=16, num_layers=1, num_heads=2)
        >>> stream = Stream(DecoderLM(config, rngs=nnx.Rngs(0)), 32, temperature=0)
        >>> stream.read([1, 2, 3])
        >>> len(list(stream.tokens(4)))
        4
    """

    def __init__(
        self,
        model: DecoderLM,
        policy: CachePolicy | int = 2048,
        *,
        rng: Any = None,
        temperature: float | int = 1.0,
        top_k: int | None = None,
        top_p: float | int | None = None,
        chunk: int = 64,
    ):
        if rng is None and temperature > 0:
            raise ValueError("rng must be given unless temperature is 0")
        if temperature < 0:
            raise ValueError(f"temperature must not be negative, got {temperature}")
        if chunk < 1:
            raise ValueError(f"chunk must be at least 1, got {chunk}")
        filter_logits(jnp.zeros((1, 1)), top_k=top_k, top_p=top_p)  # Refuses bad numbers before anything is compiled.
        self._policy = FullCache(policy) if isinstance(policy, int) else policy
        self._chunk = chunk
        self._model = nnx.split(model)
        self._cache = model.init_cache(self._policy, 1)
        self._rng = jax.random.key(0) if rng is None else rng
        self._choice: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        self._logits: Any = None
        self.position = 0
        """Tokens that stand in the cache, or have been there."""

    @property
    def room(self) -> int | None:
        """How many tokens fit yet; None where old ones make room."""
        return None if self._policy.forgets else self._policy.capacity - self.position

    def read(self, tokens: ArrayLike | Sequence[int]) -> None:
        """Put tokens behind what has been read.

        Args:
            tokens: integers `[P]`.

        Raises:
            ValueError: no tokens, or more than there is room for.
        """
        tokens = np.asarray(tokens)
        if tokens.ndim != 1 or not len(tokens):
            raise ValueError(f"tokens must be integers [P] with P >= 1, got {list(tokens.shape)}")
        self._take(len(tokens))
        for start in range(0, len(tokens), self._chunk):
            part = tokens[start : start + self._chunk]
            row = np.zeros((1, self._chunk), np.int32)
            row[0, : len(part)] = part
            valid = np.arange(self._chunk)[None] < len(part)
            self._cache, self._logits = _read(*self._model, self._cache, row, valid)

    def tokens(self, count: int, stop_token: int | None = None) -> Iterator[int]:
        """Generate.

        Args:
            count: how many tokens at most.
            stop_token: ends the row; it is read, but not given.

        Yields:
            One token after the other, each as soon as it is chosen.

        Raises:
            ValueError: nothing has been read yet, or there is no room left.
        """
        if self._logits is None:
            raise ValueError("read a prompt first; there is nothing to continue")
        for _ in range(count):
            key = jax.random.fold_in(self._rng, self.position)
            token = int(sample(key, self._logits, **self._choice)[0])
            self._take(1)
            if token == stop_token:
                self._cache, self._logits = _step(*self._model, self._cache, np.asarray([[token]], np.int32))
                return
            yield token
            self._cache, self._logits = _step(*self._model, self._cache, np.asarray([[token]], np.int32))

    def _take(self, count: int) -> None:
        if self.room is not None and count > self.room:
            raise ValueError(
                f"{count} more tokens do not fit into the cache of {self._policy.capacity}, of which {self.position} "
                "are taken; make the stream with a larger one, or with a policy that forgets"
            )
        self.position += count


@functools.partial(jax.jit, static_argnums=(0,), donate_argnums=(2,))
def _read(graphdef: Any, state: Any, cache: Any, tokens: Any, valid: Any) -> tuple[Any, Any]:
    return prefill(nnx.merge(graphdef, state), cache, tokens, valid)


@functools.partial(jax.jit, static_argnums=(0,), donate_argnums=(2,))
def _step(graphdef: Any, state: Any, cache: Any, token: Any) -> tuple[Any, Any]:
    out = nnx.merge(graphdef, state)(token, cache=cache)
    return out.cache, out.logits[:, 0]
