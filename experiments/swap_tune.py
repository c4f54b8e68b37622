"""A short distillation of a swapped model towards the unswapped one.

Trained are the attention layers that were swapped, whole: their four projections and what the mechanism brings along.
Everything else stays. Teacher and student read the same tokens, and

    loss = KL(teacher || student) of the next token, mean over tokens
         + weight * mean over swapped layers of |a - a'|^2 / |a'|^2,   a, a' = what attention adds to the stream

The text is prose of Python's language reference and code of its standard library, half each, without the articles that
models are judged on.
"""

import dataclasses
import importlib
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.training import TrainOptions, make_optimizer
from jattn.tasks.char_lm import code_text
from jattn.tasks.real_qkv import articles

CHARACTERS = 8
"""Characters of text drawn for each token wanted; what is too much is cut off."""
SHARED = 60
"""A line of so many characters that also stands in the articles takes its whole topic out."""


@dataclasses.dataclass(frozen=True)
class TuneOptions:
    """How long, on how much, and what for.

    Args:
        steps: optimizer steps.
        above: only what has a perplexity of more than so many times that of full attention is tuned.
        batch: texts a step.
        length: tokens a text.
        learning_rate: peak of the schedule.
        weight: of the second term of the loss.
        seed: of the choice of texts.
    """

    steps: int
    above: float = 1.05
    batch: int = 2
    length: int = 256
    learning_rate: float = 1e-3
    weight: float = 1.0
    seed: int = 0


class Tuned(NamedTuple):
    """The outcome: the state of the whole model, and what is told of how it came about."""

    state: Any
    record: dict[str, Any]


def texts() -> tuple[str, str]:
    """Prose and code to train on, neither of which holds anything of the articles for judging."""
    topics = importlib.import_module("pydoc_data.topics")
    judged = _long_lines(articles())
    prose = [text for name, text in sorted(topics.topics.items()) if not judged & _long_lines(text)]
    own = pathlib.Path(topics.__file__).read_text(encoding="utf-8")
    return "\n".join(prose), code_text().replace(own, "")


def _long_lines(text: str) -> set[str]:
    return {line.strip() for line in text.splitlines() if len(line.strip()) >= SHARED}


def batches(encode: Callable[[str], np.ndarray], options: TuneOptions) -> np.ndarray:
    """Tokens `[steps, B, T]`: pieces from random places, in turn of prose and of code."""
    rng, sources = np.random.default_rng(options.seed), texts()
    size, count = CHARACTERS * options.length, options.steps * options.batch
    rows: list[np.ndarray] = []
    while len(rows) < count:
        source = sources[len(rows) % len(sources)]
        start = int(rng.integers(0, len(source) - size))
        tokens = encode(source[start : start + size])[: options.length]
        if len(tokens) == options.length:
            rows.append(tokens)
    return np.stack(rows).reshape(options.steps, options.batch, options.length)


def tune(
    model: nnx.Module,
    teacher: Any,
    layers: Sequence[int],
    options: TuneOptions,
    report: Callable[[str], None] = lambda text: None,
) -> Tuned:
    """Distill.

    Args:
        model: swapped; it is left as it is.
        teacher: an object with the unswapped `model` and `encode`.
        layers: the swapped ones.
        options: of the training.
        report: is told the losses.
    """
    import optax

    began, index = time.perf_counter(), np.asarray(layers)

    def is_trained(path: Sequence[Any], leaf: Any) -> bool:
        return (
            isinstance(leaf, nnx.Param)
            and path[:2] == ("stack", "blocks")
            and path[2] in layers
            and "attention" in path
        )

    graphdef, params, rest = nnx.split(model, is_trained, ...)
    if not jax.tree.leaves(params):
        raise ValueError("there is nothing to train in the swapped layers")
    teacher_graph, teacher_state = nnx.split(teacher.model)
    optimizer = make_optimizer(
        TrainOptions(options.steps, options.batch, options.learning_rate, weight_decay=0.0, beta2=0.95)
    )

    def run(model: Any, tokens: Any) -> tuple[Any, Any]:
        out = model(tokens, record=("attn_out",))
        return jax.nn.log_softmax(out.logits.astype(jnp.float32)), out.aux["sites"]["attn_out"][index]

    @jax.jit
    def step(params: Any, optimizer_state: Any, rest: Any, teacher_state: Any, tokens: Any) -> Any:
        goal, wanted = run(nnx.merge(teacher_graph, teacher_state), tokens)

        def objective(params: Any) -> tuple[Any, Any]:
            found, added = run(nnx.merge(graphdef, params, rest, copy=True), tokens)
            divergence = jnp.sum(jnp.exp(goal) * (goal - found), -1).mean()
            error = jnp.square(added - wanted).mean((1, 2, 3)) / jnp.square(wanted).mean((1, 2, 3))
            return divergence + options.weight * error.mean(), (divergence, error.mean())

        gradients, losses = jax.grad(objective, has_aux=True)(params)
        updates, optimizer_state = optimizer.update(gradients, optimizer_state, params)
        return optax.apply_updates(params, updates), optimizer_state, losses

    optimizer_state, losses = optimizer.init(params), []
    for number, tokens in enumerate(batches(teacher.encode, options), 1):
        params, optimizer_state, found = step(params, optimizer_state, rest, teacher_state, tokens)
        losses.append([float(loss) for loss in found])
        report(f"tuning {number}/{options.steps}, divergence {losses[-1][0]:.3f}, error {losses[-1][1]:.3f}")
    record = {
        "steps": options.steps,
        "seconds": time.perf_counter() - began,
        "trained_params": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "divergence": [losses[0][0], losses[-1][0]],
        "error": [losses[0][1], losses[-1][1]],
    }
    return Tuned(nnx.state(nnx.merge(graphdef, params, rest)), record)
