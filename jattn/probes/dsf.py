"""Recurrences, state space models and attention as one linear system, written out: an oracle and a microscope.

    h_i = Lam_i h_{i-1} + B_i u_i,   y_i = C_i h_i + D_i u_i,   h_{-1} = 0
    y = Phi u,   Phi_ij = C_i (Lam_i .. Lam_{j+1}) B_j for j <= i,  + D_i for j = i

Every column of the values goes through the same system, so h is [D, Dv] and Phi is one matrix T x T a head. What the
recurrence engine takes says what the system is:

    Lam = Diag(exp g) + b a^T,   B = k,   C = scale q
    and with a normalizer eta:   Lam eta_{i-1} / eta_i,   B / eta_i

Nothing of the engine is used here, and no product is formed in the log domain or by chunks: this is the definition, in
T^2 D (or T^2 D^2) steps. Source: Understanding the differences in Foundation Models: Attention, State Space Models, and
Recurrent Neural Networks (arXiv 2405.15731).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jattn.mechanisms.entry import Cost, Entry, Paper
from jattn.mechanisms.examples import normals

HIGHEST = jax.lax.Precision.HIGHEST


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Dsf:
    """A linear system a head; `to_dsf` makes it.

    Args:
        transition: Lam, `[B, T, N, D]` for diagonal matrices, `[B, T, N, D, D]` for full ones.
        write: B, `[B, T, N, D]`.
        read: C, `[B, T, N, D]`.
        skip: D, `[B, T, N]`, or None.
        real: bool `[B, T]`, what is no padding.
        carries: bool `[B, T]`, the tokens whose Lam meets a state: neither padding nor the first of their document.
        reads_before: whether y_i reads h_{i-1} instead of h_i.

    Example:
        >>> one = jnp.ones((1, 3, 1, 1))
        >>> to_dsf(one, one, log_decay=jnp.log(0.5) * one).transition.ravel().tolist()
        [0.5, 0.5, 0.5]
    """

    transition: Any
    write: Any
    read: Any
    skip: Any = None
    real: Any = None
    carries: Any = None
    reads_before: bool = dataclasses.field(default=False, metadata={"static": True})

    @property
    def is_diagonal(self) -> bool:
        """Whether Lam is stored as its diagonal."""
        return self.transition.ndim == 4


def to_dsf(
    query: Any,
    key: Any,
    *,
    log_decay: Any = None,
    a: Any = None,
    b: Any = None,
    scale: Any = None,
    read: str = "post",
    bonus: Any = None,
    skip: Any = None,
    normalizer: Any = None,
    segment_ids: Any = None,
) -> Dsf:
    """The system of a front end, from the arguments that it gives to `jattn.linear_recurrence`.

    Lam_i = Diag(exp g_i) + b_i a_i^T, B_i = k_i, C_i = scale q_i; the inputs u are the values

    linear attention: features phi(q), phi(k), scale 1, `normalizer` phi(q_i) . sum_{j <= i} phi(k_j); softmax: the same
    with `taylor_features`. Normalized attention: scale 1, `normalizer` exp(n). GLA, retention, TNL: `log_decay`. SSD:
    query C, key dt B, log_decay dt A, scale 1, skip D. Delta rules: key and b beta k, a -exp(g) k. RWKV-7: a -kk, b
    kk rate, scale 1. qLSTM: channels are heads with D = 1: query sigmoid(o), key sigmoid(i), log_decay log Lam, all
    `[B, T, C, 1]`, scale 1.

    Args:
        query: `[B, T, N, D]`.
        key: `[B, T, K, D]`; what has fewer heads than another is repeated for groups of heads.
        log_decay: None, `[N]`, `[B, T, N]` or `[B, T, N, D]`.
        a: `[B, T, N, D]`; with b Lam is a full matrix.
        b: likewise.
        scale: of the queries, D^-0.5 if None.
        read: "post", or "pre" for outputs that do not see their own token.
        bonus: `[N, D]`, for "pre": D_i = scale sum_d q_id bonus_d k_id.
        skip: what is added to D, `[N]` or `[B, T, N]`.
        normalizer: eta, `[B, T, N]`, never 0; what outputs are divided by, moved into the system: the states are
            divided by it, too. Its first ratio meets h_{-1} = 0; it is 1.
        segment_ids: integers `[B, T]`; a run of equal ids is a document, negative = padding.

    Returns:
        The system, float32 at least.

    Raises:
        ValueError: shapes that do not fit, or arguments that exclude each other.

    Example:
        >>> one = jnp.ones((1, 3, 1, 1))
        >>> count = jnp.arange(1.0, 4.0).reshape(1, 3, 1)
        >>> dsf_matrix(to_dsf(one, one, scale=1.0, normalizer=count))[0, 0, :2].tolist()
        [[1.0, 0.0, 0.0], [0.5, 0.5, 0.0]]

    Source: Understanding the differences in Foundation Models: Attention, State Space Models, and Recurrent Neural
    Networks (arXiv 2405.15731).
    """
    query, key = jnp.asarray(query), jnp.asarray(key)
    if query.ndim != 4 or key.ndim != 4 or query.shape[:2] != key.shape[:2] or query.shape[3] != key.shape[3]:
        raise ValueError(f"query must be [B, T, N, D] and key [B, T, K, D]; got {list(query.shape)}, {list(key.shape)}")
    if (a is None) != (b is None):
        raise ValueError("a and b must be given both or not at all")
    if read not in ("post", "pre") or (bonus is not None and read == "post"):
        raise ValueError(f"read must be post or pre, and bonus belongs to pre; got {read!r}")
    if normalizer is not None and read == "pre":
        raise ValueError("normalizer divides what the own token has been added to; it goes with read='post'")
    batch, length, _, width = query.shape
    dtype = jnp.promote_types(jnp.promote_types(query.dtype, key.dtype), jnp.float32)
    gates = None if log_decay is None else jnp.asarray(log_decay, dtype)
    given = {"query": (query, 2), "key": (key, 2), "a": (a, 2), "b": (b, 2), "normalizer": (normalizer, 2)}
    given["log_decay"] = (gates, 0 if jnp.ndim(gates) == 1 else 2) if gates is not None else (None, 0)
    counts = [jnp.shape(x)[axis] for x, axis in given.values() if x is not None]
    heads = math.lcm(*counts)

    def spread(name: str, shapes: tuple[tuple[int, ...], ...]) -> Any:
        x, axis = given[name]
        if x is None:
            return None
        x = jnp.asarray(x, dtype)
        if heads % x.shape[axis] == 0:
            x = jnp.repeat(x, heads // x.shape[axis], axis=axis)
        if x.shape not in shapes:
            raise ValueError(f"{name} must be one of {[list(s) for s in shapes]}, got {list(x.shape)} after repetition")
        return x

    vectors, numbers = (batch, length, heads, width), (batch, length, heads)
    query, key, a, b = (spread(name, (vectors,)) for name in ("query", "key", "a", "b"))
    gates, eta = spread("log_decay", ((heads,), numbers, vectors)), spread("normalizer", (numbers,))
    factor = width**-0.5 if scale is None else scale
    decay = jnp.ones((), dtype) if gates is None else jnp.exp(gates)
    decay = jnp.broadcast_to(decay[..., None] if decay.ndim in (1, 3) else decay, vectors)
    transition = decay
    if a is not None:
        transition = decay[..., None] * jnp.eye(width, dtype=dtype) + b[..., :, None] * a[..., None, :]
    real, begins, before = _documents(segment_ids, batch, length)
    carries = before >= 0
    write, reads = key, factor * query
    if eta is not None:
        last = jnp.take_along_axis(eta, jnp.maximum(before, 0)[..., None], axis=1)
        ratio = jnp.where(carries[..., None], last / eta, 1)
        transition, write = transition * _wide(ratio, transition), key / eta[..., None]
    through: Any = None
    if bonus is not None:
        through = jnp.einsum("btnd,nd,btnd->btn", reads, jnp.asarray(bonus, dtype), key, precision=HIGHEST)
    if skip is not None:
        own = jnp.broadcast_to(jnp.asarray(skip, dtype), numbers)
        through = own if through is None else through + own
    if segment_ids is not None:
        # Padding leaves the state alone, a document begins with none; NaN in padding goes nowhere.
        same = jnp.ones((), dtype) if transition.ndim == 4 else jnp.eye(width, dtype=dtype)
        transition = jnp.where(_wide(real, transition), transition, same)
        transition = jnp.where(_wide(begins, transition), 0, transition)
        write, reads = (jnp.where(_wide(real, x), x, 0) for x in (write, reads))
        reads = jnp.where(_wide(begins, reads), 0, reads) if read == "pre" else reads
        through = None if through is None else jnp.where(real[..., None], through, 0)
    return Dsf(transition, write, reads, through, real, carries, read == "pre")


def _documents(segment_ids: Any, batch: int, length: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What is real, what begins a document after another one, and the place of the token before in it, or -1."""
    places = jnp.broadcast_to(jnp.arange(length), (batch, length))
    if segment_ids is None:
        return jnp.ones((batch, length), bool), jnp.zeros((batch, length), bool), places - 1
    ids = jnp.asarray(segment_ids)
    if ids.shape not in ((length,), (1, length), (batch, length)) or not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(f"segment_ids must be integers {[batch, length]}, got {ids.dtype}{list(ids.shape)}")
    ids = jnp.broadcast_to(ids, (batch, length))
    real = ids >= 0
    latest = jax.lax.cummax(jnp.where(real, places, -1), axis=1)
    before = jnp.concatenate([jnp.full((batch, 1), -1, latest.dtype), latest[:, :-1]], 1)
    same = jnp.take_along_axis(ids, jnp.maximum(before, 0), axis=1) == ids
    return real, real & (before >= 0) & ~same, jnp.where(real & same, before, -1)


def _wide(x: jax.Array, like: jax.Array) -> jax.Array:
    return x.reshape(*x.shape, *(1,) * (like.ndim - x.ndim))


def dsf_matrix(system: Dsf) -> jax.Array:
    """Phi, the matrix by which a system mixes tokens.

    Phi_ij = C_i (Lam_i .. Lam_{j+1}) B_j for j <= i, + D_i for j = i; 0 above the diagonal

    Args:
        system: what `to_dsf` returns.

    Returns:
        `[B, N, T, T]`, float32 at least. `Phi @ values` is the output of the recurrence.

    Example:
        >>> one = jnp.ones((1, 3, 1, 1))
        >>> dsf_matrix(to_dsf(one, one, log_decay=jnp.log(0.5) * one))[0, 0].tolist()
        [[1.0, 0.0, 0.0], [0.5, 1.0, 0.0], [0.25, 0.5, 1.0]]

    Source: Understanding the differences in Foundation Models (arXiv 2405.15731).
    """
    system = in_float32(system)
    batch, length, heads, width = system.write.shape
    turned = [jnp.moveaxis(x, 1, 0) for x in (system.transition, system.write, system.read)]
    # What remains of every input, [B, T, N, D], token by token.
    start = jnp.zeros((batch, length, heads, width), system.write.dtype)

    def step(remains: jax.Array, token: Any) -> tuple[jax.Array, jax.Array]:
        transition, write, read, place = token
        passed = _apply(transition[:, None], remains)
        new = jnp.where((jnp.arange(length) == place)[:, None, None], write[:, None], passed)
        seen = remains if system.reads_before else new
        return new, jnp.einsum("bsnd,bnd->bns", seen, read, precision=HIGHEST)

    rows = jax.lax.scan(step, start, (*turned, jnp.arange(length)))[1]
    matrix = jnp.moveaxis(rows, 0, 2)
    if system.skip is None:
        return matrix
    return matrix + jnp.swapaxes(system.skip, 1, 2)[..., None] * jnp.eye(length, dtype=matrix.dtype)


def dsf_scan(system: Dsf, value: Any, *, initial_state: Any = None) -> jax.Array:
    """Run a system on its inputs, as an associative scan over pairs (Lam, B u).

    h_i = Lam_i h_{i-1} + B_i u_i, y_i = C_i h_i + D_i u_i

    Args:
        system: what `to_dsf` returns.
        value: u, `[B, T, K, Dv]`; the heads of system and value are repeated to fit each other.
        initial_state: h_{-1}, `[B, N, D, Dv]`, zeros if None; where states are normalized, divided by the first eta.

    Returns:
        y, `[B, T, N, Dv]`, float32 at least.

    Raises:
        ValueError: shapes that do not fit.

    Example:
        >>> one = jnp.ones((1, 3, 1, 1))
        >>> dsf_scan(to_dsf(one, one, log_decay=jnp.log(0.5) * one), one).ravel().tolist()
        [1.0, 1.5, 1.75]

    Source: Understanding the differences in Foundation Models (arXiv 2405.15731).
    """
    system, value = in_float32(system), jnp.asarray(value)
    batch, length, heads, width = system.write.shape
    if value.ndim != 4 or value.shape[:2] != (batch, length) or max(heads, value.shape[2]) % min(heads, value.shape[2]):
        raise ValueError(f"value must be [{batch}, {length}, K, Dv] for {heads} heads, got {list(value.shape)}")
    count = max(heads, value.shape[2])
    value = jnp.where(_wide(system.real, value), value, 0)
    value = jnp.repeat(value.astype(system.write.dtype), count // value.shape[2], axis=2)

    def of_heads(x: Any) -> Any:
        return None if x is None else jnp.repeat(x, count // heads, axis=2)

    transition, write, read, skip = map(of_heads, (system.transition, system.write, system.read, system.skip))
    shape = (batch, count, width, value.shape[3])
    state = jnp.zeros(shape, value.dtype) if initial_state is None else jnp.asarray(initial_state, value.dtype)
    if state.shape != shape:
        raise ValueError(f"initial_state must be {list(shape)}, got {list(state.shape)}")
    # A state counts as one more token, the first, whose own transition meets nothing.
    first = jnp.concatenate([transition[:, :1], transition], 1)
    inputs = jnp.concatenate([state[:, None], write[..., None] * value[..., None, :]], 1)

    def then(left: Any, right: Any) -> Any:
        passed = _apply(right[0], left[0]) if system.is_diagonal else _product(right[0], left[0])
        moved = right[0][..., None] * left[1] if system.is_diagonal else _product(right[0], left[1])
        return passed, moved + right[1]

    states = jax.lax.associative_scan(then, (first, inputs), axis=1)[1]
    states = states[:, :-1] if system.reads_before else states[:, 1:]
    y = jnp.einsum("btnd,btndv->btnv", read, states, precision=HIGHEST)
    return y if skip is None else y + skip[..., None] * value


def _apply(transition: jax.Array, h: jax.Array) -> jax.Array:
    """Lam h of vectors `[..., D]`; Lam is a diagonal `[..., D]` or a matrix `[..., D, D]`."""
    if transition.ndim == h.ndim:
        return transition * h
    return jnp.einsum("...de,...e->...d", transition, h, precision=HIGHEST)


def _product(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.matmul(x, y, precision=HIGHEST)


def in_float32(system: Dsf) -> Dsf:
    """The system in float32 at least."""

    def wide(x: Any) -> Any:
        return x.astype(jnp.promote_types(x.dtype, jnp.float32)) if jnp.issubdtype(x.dtype, jnp.floating) else x

    return jax.tree.map(wide, jax.tree.map(jnp.asarray, system))


def taylor_features(x: Any, degree: int) -> jax.Array:
    """Features of finitely many dimensions whose kernel is the exponential's Taylor polynomial.

    phi(x) . phi(y) = sum_{p <= degree} (x . y)^p / p!, so with x / D^0.25 it tends to exp(q . k / sqrt(D))

    Args:
        x: `[..., D]`.
        degree: p.

    Returns:
        `[..., binom(D + p, p)]`: the monomials x^m / sqrt(m!) of multi-indices |m| <= p.

    Raises:
        ValueError: a negative degree.

    Example:
        >>> x, y = jnp.array([1.0, 2.0]), jnp.array([0.5, -1.0])
        >>> round(float(taylor_features(x, 2) @ taylor_features(y, 2)), 5)  # 1 - 1.5 + 1.5^2 / 2
        0.625
        >>> taylor_features(x, 3).shape
        (10,)

    Source: Understanding the differences in Foundation Models (arXiv 2405.15731), softmax attention as a limit.
    """
    if degree < 0:
        raise ValueError(f"degree must not be negative, got {degree}")
    x = jnp.asarray(x)
    width = x.shape[-1]
    # A monomial picks its factors among the entries of x and a one.
    picks = list(itertools.combinations_with_replacement(range(width + 1), degree))
    factorials = [math.prod(math.factorial(pick.count(i)) for i in range(width)) for pick in picks]
    index = np.array(picks, np.int32).reshape(len(picks), degree)
    monomials = jnp.prod(jnp.concatenate([x, jnp.ones_like(x[..., :1])], -1)[..., index], axis=-1)
    return monomials * jnp.asarray(np.array(factorials) ** -0.5, x.dtype)


def _example(key: Any, length: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    query, write, gates = normals(key, (2, length, 2, 4), (2, length, 2, 4), (2, length, 2, 4))
    real, carries = np.ones((2, length), bool), np.ones((2, length), bool)
    carries[:, 0] = False
    return (Dsf(np.exp(-np.abs(gates)), write, query, None, real, carries),), {}


ENTRY = Entry(
    name="dsf",
    kind="probe",
    family="probes",
    function=dsf_matrix,
    papers=(
        Paper(
            "Understanding the differences in Foundation Models: Attention, State Space Models, and Recurrent Neural "
            "Networks",
            "2405.15731",
            2024,
        ),
    ),
    patterns=("causal self",),
    cost=Cost(flops="T^2", memory="T^2"),
    decode="no: it shows what all tokens do to each other",
    example=_example,
    fidelity="inferred: the normalizer inside the state, and both statistics of dsf_summary",
)
