"""Lightning attention's time per token at any length, beside softmax attention's, which grows with the length."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jattn
from experiments import timing
from experiments.claims.registry import Claim, Outcome
from jattn.mechanisms.entry import Paper
from jattn.mechanisms.linear.lightning_attention import lightning_attention
from jattn.recurrence.decay_schedules import tnl_decay_slopes

HEADS, WIDTH, LAYERS, CHUNK = 8, 64, 24, 64
LENGTHS = {
    "lightning_attention": (512, 1024, 2048, 4096, 8192, 16384, 32768, 65536),
    "softmax_attention": (512, 1024, 2048, 4096, 8192, 16384),
}
DECODED = (512, 4096, 32768)
"""How much a decoded token looks back upon."""
STEADY_FROM = 2048
TOLERANCES = (0.2, 0.5)
"""How much more a token may cost than another one: reproduced, and partly."""
ROUNDS = 5
SECONDS = 0.2
"""What a short program fills with repeated calls before anything is waited for."""


def arrays(length: int) -> list[jax.Array]:
    """Query, key and value."""
    return [jax.random.normal(jax.random.key(seed), (1, length, HEADS, WIDTH)) for seed in range(3)]


def slopes() -> jax.Array:
    """The published decays of the first layer of `LAYERS`, where they are strongest."""
    return -jnp.asarray(tnl_decay_slopes(HEADS, 0, LAYERS), jnp.float32)


def forward(name: str, query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """Causal self attention of all tokens."""
    if name == "softmax_attention":
        return jattn.dot_product_attention(query, key, value, is_causal=True, implementation="blockwise")
    return lightning_attention(query, key, value, log_decay=slopes(), chunk_size=CHUNK)


def decoding(name: str, length: int) -> timing.Subject:
    """One more token after `length` of them: from the state, or from all keys and values."""
    token = arrays(1)
    query, key, value = arrays(length)
    if name == "softmax_attention":
        return timing.compiled(name, jattn.dot_product_attention, token[0], key, value)
    _, state = lightning_attention(query, key, value, log_decay=slopes(), chunk_size=CHUNK, return_final_state=True)
    decay = slopes()

    def step(query: jax.Array, key: jax.Array, value: jax.Array, state: jax.Array) -> Any:
        return jattn.linear_recurrence_step(query, key, value, state, log_decay=decay, scale=1.0)

    return timing.compiled(name, step, *token, state)


def measured(
    make: Callable[[str, int], timing.Subject], lengths: Mapping[str, Sequence[int]], rounds: int
) -> dict[str, dict[int, timing.Subject]]:
    """All programs of `make`, by mechanism and length, run in turn."""
    found = {name: {length: make(name, length) for length in chosen} for name, chosen in lengths.items()}
    subjects = [subject for by_length in found.values() for subject in by_length.values()]
    for subject in subjects:
        subject.measure()
    timing.calibrate(subjects, SECONDS)
    timing.interleave(subjects, rounds, warm=False)
    return found


def growth(per_token: Mapping[int, float]) -> float:
    """The most that a token costs at one length over the least at another one, from `STEADY_FROM` on.

    Example:
        >>> growth({512: 9.0, 2048: 1.0, 4096: 1.5})
        1.5
    """
    steady = [seconds for length, seconds in per_token.items() if length >= STEADY_FROM]
    return max(steady) / min(steady)


def judge(lightning: Mapping[int, float], softmax: Mapping[int, float]) -> str:
    """The verdict from the seconds per token of each length."""
    last = max(softmax)
    if softmax[last] < 2 * softmax[STEADY_FROM]:
        return "not reproduced"
    for tolerance, verdict in zip(TOLERANCES, ("reproduced", "partly"), strict=True):
        if growth(lightning) <= 1 + tolerance:
            return verdict
    return "not reproduced"


def run(quick: bool, report: Callable[[str], None]) -> Outcome:
    short = (2048, 4096)
    lengths = dict.fromkeys(LENGTHS, short) if quick else LENGTHS
    rounds = 1 if quick else ROUNDS

    def whole(name: str, length: int) -> timing.Subject:
        report(f"compiling {name} for {length} tokens")
        return timing.compiled(name, lambda *given: forward(name, *given), *arrays(length))

    found = measured(whole, lengths, rounds)
    steps = measured(decoding, dict.fromkeys(LENGTHS, DECODED[:2] if quick else DECODED), rounds)
    per_token = {
        name: {length: timing.spread(np.asarray(subject.times) / length) for length, subject in by_length.items()}
        for name, by_length in found.items()
    }
    decode = {
        name: {length: timing.spread(subject.times) for length, subject in by_length.items()}
        for name, by_length in steps.items()
    }
    medians = {name: {n: figures["median"] for n, figures in rows.items()} for name, rows in per_token.items()}
    lightning, softmax = medians["lightning_attention"], medians["softmax_attention"]
    common = max(softmax)
    faster = timing.ratio(found["softmax_attention"][common], found["lightning_attention"][common])
    waits = {name: ", ".join(f"{1e6 * row['median']:.0f}" for row in rows.values()) for name, rows in decode.items()}
    reason = (
        f"microseconds a token from {STEADY_FROM} to {max(lightning)} tokens: lightning attention "
        f"{1e6 * lightning[STEADY_FROM]:.1f} to {1e6 * lightning[max(lightning)]:.1f}, largest over smallest median "
        f"{growth(lightning):.2f}; softmax {1e6 * softmax[STEADY_FROM]:.1f} to {1e6 * softmax[common]:.1f} at {common} "
        f"tokens, where lightning attention is {faster['median']:.1f} times faster; microseconds of a decoding step "
        f"after {', '.join(map(str, steps['lightning_attention']))} tokens: lightning attention "
        f"{waits['lightning_attention']}, softmax {waits['softmax_attention']}"
    )
    memory = {name: {n: subject.temp_bytes for n, subject in rows.items()} for name, rows in found.items()}

    def draw(figure: Any) -> None:
        left, right = figure.subplots(1, 2)
        for axis, rows in ((left, per_token), (right, decode)):
            for name, by_length in rows.items():
                middle = np.asarray([row["median"] for row in by_length.values()])
                low, high = (np.asarray([row[end] for row in by_length.values()]) for end in ("q25", "q75"))
                bars = 1e6 * np.stack([middle - low, high - middle])
                axis.errorbar(list(by_length), 1e6 * middle, yerr=bars, marker="o", capsize=3, label=name)
            axis.set(xscale="log", yscale="log", xlabel="tokens")
            axis.grid(alpha=0.3, which="both")
        left.set(ylabel="microseconds a token, forward")
        right.set(ylabel="microseconds of one decoding step", xlabel="tokens before it")
        left.legend()

    numbers = {
        "seconds_per_token": per_token,
        "seconds_per_decoding_step": decode,
        "temp_bytes": memory,
        "largest_over_smallest": {"lightning_attention": growth(lightning), "softmax_attention": growth(softmax)},
        "softmax_over_lightning": {"tokens": common, **faster},
        "rounds": rounds,
    }
    return Outcome(judge(lightning, softmax), reason, numbers, draw)


CLAIM = Claim(
    name="lightning_constant_speed",
    paper=Paper(
        "Various Lengths, Constant Speed: Efficient Language Modeling with Lightning Attention", "2405.17381", 2024
    ),
    claim="Lightning attention spends the same time on a token whatever the length of its sequence, while softmax "
    "attention slows down.",
    setting=f"Forward pass in float32 on a CPU, one row, {HEADS} heads of {WIDTH}, the published decays of the first "
    f"layer, chunks of {CHUNK}, 512 to 65,536 tokens; blockwise softmax attention up to 16,384 tokens beside it (the "
    "paper: training of whole models with 1K to 128K tokens on GPUs). Programs run in turn, medians of five rounds; "
    "decoding steps after 512 to 32,768 tokens apart from them.",
    expected="From 2,048 to 65,536 tokens no median time per token is more than 20 % above another one, and softmax "
    "attention's at least doubles from 2,048 to 16,384: reproduced. Up to 50 % with the same growth of softmax "
    "attention: partly. How much faster lightning attention is at 16,384 tokens, and the decoding steps, are reported "
    "and not judged.",
    run=run,
)
