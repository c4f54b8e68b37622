"""Generation: prefill, then one token at a time; greedy or sampled; a pure function of its random key."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike

from jattn.cache import CachePolicy, FullCache
from jattn.models.decoder import DecodeCache, DecoderLM


class Generated(NamedTuple):
    """What `generate` returns.

    Example:
        >>> Generated(tokens=1, lengths=2).lengths
        2
    """

    tokens: Any
    """int32 `[B, max_new_tokens]`; after a stop token comes padding."""
    lengths: Any
    """int32 `[B]`, generated tokens of each row, the stop token included."""


def filter_logits(logits: ArrayLike, *, top_k: int | None = None, top_p: Any = None) -> jax.Array:
    """Hide the tokens that sampling may not choose.

    top_k keeps the k largest logits; top_p then keeps the smallest set of most probable tokens whose probability
    reaches p (the token that crosses p included). Of equal logits the smaller index wins.

    Args:
        logits: `[..., V]`.
        top_k: k >= 1, or None.
        top_p: p in (0, 1], or None.

    Returns:
        `[..., V]` in float32 at least, -inf for what is hidden.

    Raises:
        ValueError: k or p out of range.

    Example:
        >>> import jax.numpy as jnp
        >>> filter_logits(jnp.array([1.0, 4.0, 3.0]), top_p=0.8).tolist()
        [-inf, 4.0, 3.0]

    Source: Hierarchical Neural Story Generation (arXiv 1805.04833); The Curious Case of Neural Text Degeneration
    (arXiv 1904.09751).
    """
    logits = jnp.asarray(logits)
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    if top_p is not None and not isinstance(top_p, jax.core.Tracer) and not 0.0 < float(top_p) <= 1.0:
        raise ValueError(f"top_p must be in (0, 1], got {top_p}")
    if top_k is None and top_p is None:
        return logits
    order = jnp.argsort(-logits, axis=-1, stable=True)
    ranked = jnp.take_along_axis(logits, order, axis=-1)
    if top_k is not None:
        ranked = jnp.where(jnp.arange(logits.shape[-1]) < top_k, ranked, -jnp.inf)
    if top_p is not None:
        shares = jax.nn.softmax(ranked, axis=-1)
        before = jnp.cumsum(shares, axis=-1) - shares
        # The first is always kept: rounding must not be able to hide every token.
        ranked = jnp.where((before < top_p) | (jnp.arange(logits.shape[-1]) == 0), ranked, -jnp.inf)
    return jnp.take_along_axis(ranked, jnp.argsort(order, axis=-1), axis=-1)


def sample(
    rng: Any, logits: ArrayLike, *, temperature: Any = 1.0, top_k: int | None = None, top_p: Any = None
) -> jax.Array:
    """Draw a token from the filtered distribution of logits / temperature.

    Args:
        rng: a key.
        logits: `[..., V]`.
        temperature: positive; 0 takes the largest logit.
        top_k: see `filter_logits`.
        top_p: see `filter_logits`.

    Returns:
        int32 `[...]`.

    Raises:
        ValueError: an argument out of range.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> int(sample(jax.random.key(0), jnp.array([0.0, 9.0, 1.0]), top_k=1))
        1
    """
    logits = jnp.asarray(logits)
    if not isinstance(temperature, jax.core.Tracer):
        if temperature < 0:
            raise ValueError(f"temperature must not be negative, got {temperature}")
        if temperature == 0:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    scaled = logits.astype(jnp.promote_types(logits.dtype, jnp.float32)) / temperature
    return jax.random.categorical(rng, filter_logits(scaled, top_k=top_k, top_p=top_p), axis=-1).astype(jnp.int32)


@dataclasses.dataclass(frozen=True)
class _Plan:
    max_new_tokens: int
    policies: tuple[CachePolicy, ...] | None
    greedy: bool
    top_k: int | None
    stop_token: int | None
    pad_token: int


def generate(
    model: DecoderLM,
    prompt: ArrayLike,
    *,
    max_new_tokens: int,
    rng: Any = None,
    valid: ArrayLike | None = None,
    temperature: float | int = 1.0,
    top_k: int | None = None,
    top_p: float | int | None = None,
    stop_token: int | None = None,
    pad_token: int = 0,
    policy: CachePolicy | Sequence[CachePolicy] | str | None = "full",
) -> Generated:
    """Continue prompts.

    token_t ~ softmax(filter(logits_t / temperature)); the prompt is read in chunks that the cache policy can take, then
    one token follows the other, in one compiled program.

    Args:
        model: a decoder.
        prompt: integers `[B, P]`.
        max_new_tokens: how many tokens at most.
        rng: a key; not needed for temperature 0.
        valid: bool `[B, P]`, false for padding, on whichever side it stands; all true if not given. Every row needs at
            least one valid token.
        temperature: 0 is greedy.
        top_k: see `filter_logits`.
        top_p: see `filter_logits`.
        stop_token: ends a row; it is part of the result.
        pad_token: what follows a stop token.
        policy: of the KV cache, one or one a layer; `"full"` keeps every token; None computes the whole row again
            for every token, which also serves mechanisms that have no KV cache.

    Returns:
        Generated(tokens `[B, max_new_tokens]`, lengths `[B]`).

    Raises:
        ValueError: an argument that does not fit.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from jattn.models import TransformerConfig
        >>> config = TransformerConfig(vocab_size=11, features=16, num_layers=1, num_heads=2)
        >>> model = DecoderLM(config, rngs=nnx.Rngs(0))
        >>> generate(model, jnp.array([[1, 2, 3]]), max_new_tokens=4, temperature=0).tokens.shape
        (1, 4)
    """
    prompt = jnp.asarray(prompt)
    if prompt.ndim != 2 or not prompt.shape[1] or not jnp.issubdtype(prompt.dtype, jnp.integer):
        raise ValueError(f"prompt must be integers [B, P] with P >= 1, got {prompt.dtype}{list(prompt.shape)}")
    shown = jnp.ones(prompt.shape, bool) if valid is None else jnp.asarray(valid)
    if shown.shape != prompt.shape or shown.dtype != bool:
        raise ValueError(f"valid must be boolean {list(prompt.shape)}, got {shown.dtype}{list(shown.shape)}")
    if not isinstance(shown, jax.core.Tracer) and not np.asarray(shown).any(axis=1).all():
        raise ValueError("valid leaves a row of prompt without any token")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if temperature < 0:
        raise ValueError(f"temperature must not be negative, got {temperature}")
    if rng is None and temperature > 0:
        raise ValueError("rng must be given unless temperature is 0")
    filter_logits(jnp.zeros((1, 1)), top_k=top_k, top_p=top_p)  # Refuses bad numbers before anything is compiled.
    if isinstance(policy, str):
        if policy != "full":
            raise ValueError(f"policy must be a cache policy, a sequence of them, 'full' or None, got {policy!r}")
        policy = FullCache(prompt.shape[1] + max_new_tokens)
    if isinstance(policy, CachePolicy):
        policy = (policy,) * model.config.num_layers
    plan = _Plan(
        max_new_tokens, None if policy is None else tuple(policy), temperature == 0, top_k, stop_token, pad_token
    )
    graphdef, state = nnx.split(model)
    rng = jax.random.key(0) if rng is None else rng
    return _generate(graphdef, state, prompt.astype(jnp.int32), shown, rng, temperature, top_p, plan=plan)


@functools.partial(jax.jit, static_argnums=(0,), static_argnames=("plan",))
def _generate(
    graphdef: Any, state: Any, prompt: Any, valid: Any, rng: Any, temperature: Any, top_p: Any, *, plan: _Plan
) -> Generated:
    model = nnx.merge(graphdef, state)
    batch, length = prompt.shape
    # Tokens to the left, padding to the right: then a row's tokens stand at their positions.
    order = jnp.argsort(~valid, axis=1, stable=True)
    prompt, valid = (jnp.take_along_axis(x, order, axis=1) for x in (prompt, valid))
    counts = jnp.sum(valid, axis=1, dtype=jnp.int32)
    rows = jnp.arange(batch)

    if plan.policies is None:
        memory = jnp.concatenate([prompt, jnp.zeros((batch, plan.max_new_tokens), jnp.int32)], axis=1)
        logits = model(memory, logits_at=counts[:, None] - 1).logits[:, 0]
    else:
        memory = model.init_cache(plan.policies, batch)
        memory, logits = prefill(model, memory, prompt, valid)

    def choose(step: Any, logits: Any) -> Any:
        if plan.greedy:
            return sample(rng, logits, temperature=0)
        return sample(jax.random.fold_in(rng, step), logits, temperature=temperature, top_k=plan.top_k, top_p=top_p)

    def advance(memory: Any, token: Any, places: Any, done: Any) -> tuple[Any, Any]:
        if plan.policies is None:
            memory = memory.at[rows, places].set(token)
            return memory, model(memory, logits_at=places[:, None]).logits[:, 0]
        out = model(token[:, None], cache=memory, segment_ids=jnp.where(done, -1, 0)[:, None])
        return out.cache, out.logits[:, 0]

    def unfinished(carry: Any) -> Any:
        step, *_, done = carry
        return (step < plan.max_new_tokens) & ~jnp.all(done)

    def one(carry: Any) -> Any:
        step, memory, logits, tokens, lengths, done = carry
        token = jnp.where(done, plan.pad_token, choose(step, logits))
        tokens = jax.lax.dynamic_update_index_in_dim(tokens, token, step, axis=1)
        places, lengths = counts + lengths, lengths + ~done
        if plan.stop_token is not None:
            done = done | (token == plan.stop_token)
        memory, logits = advance(memory, token, places, done)
        return step + 1, memory, logits, tokens, lengths, done

    tokens = jnp.full((batch, plan.max_new_tokens), plan.pad_token, jnp.int32)
    start = (0, memory, logits, tokens, jnp.zeros((batch,), jnp.int32), jnp.zeros((batch,), bool))
    _, _, _, tokens, lengths, _ = jax.lax.while_loop(unfinished, one, start)
    return Generated(tokens, lengths)


def prefill(model: DecoderLM, cache: DecodeCache, prompt: Any, valid: Any) -> tuple[DecodeCache, Any]:
    """Feed prompts into a cache, in chunks that its policies can take.

    Args:
        model: a decoder.
        cache: what `init_cache` made.
        prompt: int32 `[B, P]`.
        valid: bool `[B, P]`, false for padding, which stands to the right.

    Returns:
        The cache, and the logits `[B, V]` after each row's last valid token.
    """
    batch, length = prompt.shape
    limits = [policy.max_chunk for policy in cache.policies if policy.max_chunk is not None]
    chunk = min([length, *limits])
    count = -(-length // chunk)
    pad = ((0, 0), (0, count * chunk - length))
    chunks, shown = (jnp.swapaxes(jnp.pad(x, pad).reshape(batch, count, chunk), 0, 1) for x in (prompt, valid))

    def feed(carry: Any, part: Any) -> tuple[Any, None]:
        cache, last = carry
        tokens, shown = part
        index = jnp.sum(shown, axis=1) - 1
        places = jnp.maximum(index, 0)[:, None]
        out = model(tokens, cache=cache, segment_ids=jnp.where(shown, 0, -1), logits_at=places)
        return (out.cache, jnp.where((index >= 0)[:, None], out.logits[:, 0], last)), None

    dtype = jax.eval_shape(lambda: model(chunks[0][:, :1]).logits).dtype
    last = jnp.zeros((batch, model.config.vocab_size), dtype)
    (cache, last), _ = jax.lax.scan(feed, (cache, last), (chunks, shown))
    return cache, last
