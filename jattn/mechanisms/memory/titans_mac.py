"""Memory as context (Titans MAC): attention within segments that is also shown what a memory of earlier ones answers.

    h_j = M(s_j; W),   y = attention([P ; h ; s]),   o_i = gate(y_i, M(y_i; W_i)),   W_i: the memory after y_1 .. y_i
    gate(y, m) = rmsnorm(y; w_y) * sigmoid(rmsnorm(m; w_m))

for the tokens s_1 .. s_C of a segment; W is the memory after all earlier segments. Token i sees all learned tokens P,
h_j for j <= i and s_j for j <= i. There is no official code, and this reading is chosen here: the paper's own, with a
triangular mask over [P ; h ; s] and W_C read by every token, lets a token see later ones of its segment. `causal=False`
computes that one; both are the same for C = 1. Source: Titans: Learning to Memorize at Test Time (arXiv 2501.00663).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jattn.cache import RecurrentState
from jattn.mechanisms.entry import Cost, Entry, LayerExample, Paper
from jattn.mechanisms.examples import normal
from jattn.mechanisms.memory.neural_memory import memory_state
from jattn.mechanisms.memory.titans_parts import BranchGate, TitansLayer
from jattn.recurrence.learning_memory import MemoryState
from jattn.recurrence.memory_blocks import Phases, Rows, choose, in_blocks
from jattn.recurrence.problem import varying_like


class Block(NamedTuple):
    """Tokens of a block, `[B, c, ...]`."""

    x: Any
    asked: Any
    """Queries to the memory."""
    query: Any
    key: Any
    value: Any


class Segment(NamedTuple):
    """What is kept of the segment under way."""

    weights: Any
    """W, the memory at its start."""
    kept: Any
    """Keys and values of its h, and of its tokens, each `[B, C, K, D]`."""
    filled: Any
    """How many of the C are there, int32 `[B]`."""


class TitansMAC(TitansLayer):
    """Attention within segments over persistent tokens, answers of a memory of earlier segments, and the segment.

    h_j = M(s_j; W), y = attention([P ; h ; s]), o_i = rmsnorm(y_i; w_y) * sigmoid(rmsnorm(M(y_i; W_i); w_m)), W_i after
    y_1 .. y_i

    Args:
        features: M, width of x and of the output.
        num_heads: N, heads of the attention and of the memory.
        num_kv_heads: K of the attention; N if not given.
        head_dim: D; features / num_heads if not given.
        segment: C, a multiple of the memory's chunk_size. Segments are counted from the start of a document.
        num_persistent: Np; they are seen by the attention alone.
        chunk_size: b of the memory.
        memory_options: other arguments of `NeuralMemory`, by name.
        causal: False for the paper's own reading, in which a token sees later ones of its segment, through h and
            through the memory after the whole segment. It cannot be packed, padded or decoded.
        position: None, or an object with `rotate`, for the attention: P stands at 0 .. Np - 1, h_j at Np + j, s_j at
            Np + C + j, counted from 0 in every segment.
        epsilon: of the norms.
        dtype: of the computation; that of inputs and parameters if not given.
        param_dtype: of the parameters.
        rngs: for the initial values.

    Raises:
        ValueError: sizes that do not fit.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> TitansMAC(16, 2, segment=4, chunk_size=2, rngs=nnx.Rngs(0))(jnp.ones((1, 5, 16))).output.shape
        (1, 5, 16)

    Source: Titans: Learning to Memorize at Test Time (arXiv 2501.00663).
    """

    def __init__(
        self,
        features: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        segment: int = 128,
        num_persistent: int = 16,
        chunk_size: int = 16,
        memory_options: Mapping[str, Any] | None = None,
        causal: bool = True,
        position: Any = None,
        epsilon: float = 1e-5,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        super().__init__(
            features,
            num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            num_persistent=num_persistent,
            chunk_size=chunk_size,
            memory_options=memory_options,
            position=position,
            epsilon=epsilon,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        if segment < 1 or segment % self.memory.chunk_size:
            raise ValueError(
                f"segment must be a positive multiple of chunk_size = {self.memory.chunk_size}, got {segment}"
            )
        self.segment, self.causal = segment, causal
        self.gate = BranchGate(features, epsilon=epsilon, dtype=dtype, param_dtype=param_dtype, rngs=rngs)

    def mix(
        self, x: jax.Array, *, segment_ids: Any, positions: jax.Array, state: RecurrentState | None, **options: Any
    ) -> tuple[jax.Array, RecurrentState, dict[str, Any]]:
        """See `RecurrentLayer`; the heads of the memory stand behind those of the attention."""
        batch, length = x.shape[:2]
        if not self.causal and (segment_ids is not None or state is not None):
            raise ValueError("TitansMAC with causal=False takes neither segment_ids nor a cache; causal=True does")
        rows = Rows.of(segment_ids, None if state is None else state.aux[1].filled, batch, length)
        asked, asked_tail = self.memory.queries(
            x, segment_ids=segment_ids, tail=None if state is None else state.conv[0]
        )
        query, key, value = self.attention.project(x, x)
        query, key = self.rotated(query, key, self._places(rows) + self.segment)
        fresh, tails = self.memory.start(batch, asked.dtype)
        if state is None:
            memory, nothing = fresh, jnp.zeros((batch, self.segment, *key.shape[2:]), key.dtype)
            part = Segment(fresh.weights, (nothing,) * 4, jnp.zeros(batch, jnp.int32))
        else:
            memory, part = memory_state(RecurrentState(state.state, state.aux[0])), state.aux[1]
            tails = state.conv[1:]
        run = jnp.zeros(batch, jnp.int32)
        carry = jax.tree.map(lambda y: varying_like(y, x, rows.seen), (memory, tails, part, run, run))
        size, lead = min(self.segment, length), self._lead(x)
        several, is_plain = segment_ids is not None and state is None, segment_ids is None and state is None

        def step(carry: Any, block: Any) -> Any:
            if is_plain:
                return self._whole(lead, carry, *block)
            return self._in_phases(lead, fresh if several else None, carry, *block)

        blocks = Block(*(in_blocks(y, size) for y in (x, asked, query, key, value))), rows.cut(size)
        (memory, tails, part, *_), out = jax.lax.scan(jax.checkpoint(step, prevent_cse=False), carry, blocks)
        out = out.swapaxes(0, 1).reshape(batch, -1, *out.shape[3:])[:, :length]
        aux = (memory.held, memory.momentum, memory.means, memory.position)
        return out, RecurrentState(memory.weights, (aux, part), (asked_tail, *tails)), {}

    def output(self, o: jax.Array, x: jax.Array) -> jax.Array:
        """See `RecurrentLayer`."""
        attended, remembered = jnp.split(o, 2, axis=2)
        y = self.attention.output(attended)
        return self.gate(y, self.memory.output(remembered, y))

    def _places(self, rows: Rows) -> jax.Array:
        """Where h_j stands in [P ; h ; s]; s_j stands C further."""
        return self.num_persistent + (rows.seen - 1) % self.segment

    def _lead(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Keys and values of the persistent tokens."""
        prefix = self.prefix(x)
        _, key, value = self.attention.project(prefix, prefix)
        key = self.rotated(key, key, jnp.arange(self.num_persistent)[None])[1]
        return tuple(jnp.broadcast_to(y, (x.shape[0], *y.shape[1:])) for y in (key, value))

    def _answers(self, block: Block, rows: Rows, weights: Any) -> tuple[jax.Array, jax.Array]:
        """Keys and values of h."""
        h = self.memory.rounded(self.memory.read(block.asked, weights), block.x)
        h = self.memory.output(h, block.x)
        key, value = self.attention.key(h), self.attention.value(h)
        return self.rotated(key, key, self._places(rows))[1], value

    def _attended(self, block: Block, pairs: Any, mask: Any) -> tuple[jax.Array, jax.Array]:
        """Per-head outputs of the attention over pairs of keys and values and the block, and y."""
        key, value = (jnp.concatenate(part, 1) for part in zip(*pairs, (block.key, block.value), strict=True))
        o, _ = self.attention.attend(block.query, key, value, inputs=block.x, mask=mask)
        return o, self.attention.output(o)

    def _written(
        self, y: jax.Array, tails: Any, memory: MemoryState, row_ids: Any, **options: Any
    ) -> tuple[jax.Array, jax.Array, MemoryState, Any]:
        """Queries that y makes, answers to them while y is written, and the memory and tails after that."""
        asked, tail = self.memory.queries(y, segment_ids=row_ids, tail=tails[0])
        inputs, rest = self.memory.inputs(y, segment_ids=row_ids, tails=tails[1:])
        o, memory = self.memory.write_and_read(asked, inputs, state=memory, **options)
        return asked, self.memory.rounded(o, y), memory, (tail, *rest)

    def _whole(self, lead: Any, carry: Any, block: Block, rows: Rows) -> tuple[Any, jax.Array]:
        """A whole segment, the last one perhaps filled up with padding."""
        memory, tails, *rest = carry
        size = block.x.shape[1]
        triangle: Any = np.tri(size, dtype=bool)
        answers = triangle if self.causal else jnp.broadcast_to(rows.real[0], (size, size))
        mask = jnp.concatenate([np.ones((size, self.num_persistent), bool), answers, triangle], 1)[None, None]
        heads, y = self._attended(block, [lead, self._answers(block, rows, memory.weights)], mask)
        ids = jnp.where(rows.real, 0, -1)
        border = {"at_border": True, "one_run": True, "padding_last": True}
        asked, answered, memory, tails = self._written(y, tails, memory, None, segment_ids=ids, **border)
        if not self.causal:
            answered = self.memory.rounded(self.memory.read(asked, memory.weights), y)
        return (memory, tails, *rest), jnp.concatenate([heads, answered], 2)

    def _in_phases(self, lead: Any, fresh: Any, carry: Any, block: Block, rows: Rows) -> tuple[Any, jax.Array]:
        """A block in which segments and documents may end; `fresh` is the memory of a new document, if there may be."""
        memory, tails, part, run, number = carry
        size, last, several = self.segment, rows.runs[:, -1], fresh is not None
        phases = Phases.of(rows, run, number, size, several)
        place, count = (rows.seen - 1) % size, (rows.seen - 1) // size
        alike = (rows.runs[:, :, None] == rows.runs[:, None]) & (count[:, :, None] == count[:, None])
        own = np.tri(place.shape[1], dtype=bool) & alike & rows.real[:, None]
        past = (rows.runs == run[:, None]) & (count == number[:, None])
        past = past[..., None] & (np.arange(size) < part.filled[:, None])[:, None]
        first = jnp.ones((*place.shape, self.num_persistent), bool)
        mask = jnp.concatenate([first, past, past, own, own], -1)[:, None]
        # The tails are those of the run under way, which may have ended with the block before.
        goes_on = (rows.real & (rows.runs == run[:, None])).any(1) | ~rows.real.any(1)
        tails = choose(goes_on, tails, jax.tree.map(jnp.zeros_like, tails))
        row_ids = jnp.where(rows.real, rows.runs, -1)
        empty = [jnp.zeros_like(block.key), jnp.zeros_like(block.value)]
        heads = jnp.zeros_like(block.query, shape=(*place.shape, 2 * self.num_heads, block.query.shape[-1]))
        start = (memory, part.weights, tails, empty, jnp.zeros_like(block.x, dtype=block.query.dtype), heads)

        def phase(before: Any, which: Any) -> tuple[Any, None]:
            member, is_new = which
            same = phases.same_in(is_new)
            memory, weights, _, answers, y, o = before
            if several:
                memory, weights = jax.tree.map(
                    lambda x, y: jnp.where(is_new, x, y), (fresh, fresh.weights), (memory, weights)
                )
            found = self._answers(block, rows, weights)
            heads, new = self._attended(block, [lead, part.kept[:2], part.kept[2:], found], mask)
            y = jnp.where(member[..., None], new, y)
            _, answered, after, tails_after = self._written(
                y, tails, memory, row_ids, segment_ids=jnp.where(member, rows.runs, -1), one_run=not several
            )
            done = member & (rows.seen % size == 0)
            weights = choose((done if same is None else done & same[:, -1]).any(1), after.weights, weights)
            if several:
                after, weights = choose(~is_new | (last > run), (after, weights), before[:2])
            found, o = jax.tree.map(
                lambda x, y: jnp.where(member[..., None, None], x, y),
                (list(found), jnp.concatenate([heads, answered], 2)),
                (answers, o),
            )
            return (after, weights, tails_after, found, y, o), None

        start = jax.tree.map(lambda y: varying_like(y, block.x, rows.seen), start)
        (memory, weights, tails, answers, _, o), _ = jax.lax.scan(phase, start, (phases.members, phases.is_new))
        now = rows.seen[:, -1]
        slots = jnp.where(rows.real & (rows.runs == last[:, None]) & (count == (now // size)[:, None]), place, size)
        kept = tuple(
            jax.vmap(lambda old, slot, new: old.at[slot].set(new, mode="drop"))(x, slots, y)
            for x, y in zip(part.kept, (*answers, block.key, block.value), strict=True)
        )
        return (memory, tails, Segment(weights, kept, now % size), last, now // size), o


def _example(key, length):
    size = 2 if length < 64 else 32
    # In bfloat16 a LayerNorm over very few channels, three layers deep, is all rounding: heads have 8.
    options = {"num_kv_heads": 1, "head_dim": 8, "segment": 2 * size, "num_persistent": 2, "chunk_size": size}
    return LayerExample((16, 2), {**options, "memory_options": {"expansion": 2}}, (normal(key, 2, length, 16),), {})


ENTRY = Entry(
    name="TitansMAC",
    kind="block",
    family="memory",
    layer=TitansMAC,
    papers=(Paper("Titans: Learning to Memorize at Test Time", "2501.00663", 2024),),
    patterns=("causal self",),
    cost=Cost(flops="T", memory="T"),
    decode="the state of its NeuralMemory, W at the segment's start, keys and values of the unfinished segment",
    example=_example,
    fidelity="inferred: the causal reading within a segment, the gate's non-linearity, how the memory's gates are made",
)
