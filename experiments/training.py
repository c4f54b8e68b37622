"""Training, as functions of arrays: build a model for a task, initialize it, step it, evaluate it.

Everything that changes during training is one pytree, `TrainState`; all else is fixed when the `Trainer` is made. So
several seeds train in one program by `jax.vmap` over the state, and a run can stop and go on from any state:

    trainer = Trainer(tasks.get("mqar"), ModelOptions(width=64), TrainOptions(steps=100))
    state = trainer.init(0)
    for step in range(100):
        batch = trainer.task.batch("train", step, trainer.options.batch_size)
        state, stats = trainer.step(state, batch, step_key(0, step))
    trainer.evaluate(state, "test")["accuracy"]

and with seeds 0, 1, 2 side by side:

    states = trainer.init_seeds([0, 1, 2])
    for step in range(100):
        batch = stacked_batch([dataclasses.replace(task, seed=seed) for seed in (0, 1, 2)], "train", step, size)
        states, stats = trainer.step_seeds(states, batch, step_keys([0, 1, 2], step))
    trainer.evaluate(states, "test", stacked=True)["accuracy"]      # an array of three
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jattn import tasks


@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """The model of one run: an attention mechanism by name, and the sizes of everything around it.

    Args:
        attention: name of a catalogued mechanism.
        attention_options: its hyper-parameters.
        width: features of the residual stream.
        depth: number of blocks.
        num_heads: query heads.
        num_kv_heads: key-value heads; None for as many as query heads.
        mlp_ratio: hidden width of the feed-forward part over `width`; 0 for none.
        position: how positions enter, one of `jattn.models.config.POSITIONS`. Learned absolute positions are the
            default, because they stand outside the attention and so treat all mechanisms alike.
        dropout: of embeddings and of what attention and feed-forward parts add to the stream.
        pooling: how a model that classifies pools its patches: `"mean"`, `"class"` or the name of a catalogued pooling.
        embedding_std: deviation of token and position tables at the start.
        residual_scale: factor on the start of the last projection of every attention and feed-forward part.
    """

    attention: str = "softmax_attention"
    attention_options: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)
    width: int = 64
    depth: int = 2
    num_heads: int = 2
    num_kv_heads: int | None = None
    mlp_ratio: float = 4.0
    position: str = "learned"
    dropout: float = 0.0
    pooling: str = "mean"
    embedding_std: float = 0.02
    residual_scale: float = 1.0

    def __post_init__(self) -> None:
        for name in ("width", "depth", "num_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.width % self.num_heads:
            raise ValueError(f"width must be a multiple of num_heads={self.num_heads}, got {self.width}")
        if self.mlp_ratio < 0:
            raise ValueError(f"mlp_ratio must be 0 (no feed-forward part) or positive, got {self.mlp_ratio}")


@dataclasses.dataclass(frozen=True)
class TrainOptions:
    """The budget and the optimizer of one run: AdamW with clipped gradients, warmup, then a cosine to the final rate.

    Args:
        steps: number of optimizer steps.
        batch_size: examples a step.
        learning_rate: peak of the schedule.
        warmup_fraction: share of the steps spent in linear warmup.
        final_fraction: last learning rate over the peak.
        weight_decay: decoupled decay of matrices and embeddings; vectors and scalars are not decayed.
        clip_norm: largest global gradient norm.
        beta1: decay of the first moment.
        beta2: decay of the second moment.
    """

    steps: int = 1000
    batch_size: int = 32
    learning_rate: float = 3e-3
    warmup_fraction: float = 0.1
    final_fraction: float = 0.0
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    beta1: float = 0.9
    beta2: float = 0.98

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("learning_rate", "clip_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("warmup_fraction", "final_fraction"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")


class TrainState(NamedTuple):
    """All that changes while training.

    `params` and `other` are `nnx.State`s: what is trained, and the rest of the model's variables (random streams,
    running statistics). `step` counts finished steps.
    """

    step: jax.Array
    params: Any
    other: Any
    optimizer: Any


def build_model(task: tasks.Task, options: ModelOptions, *, rngs: nnx.Rngs) -> nnx.Module:
    """The model for a task: `DecoderLM` for language modelling, `ViT` for the classification of images.

    Raises:
        ValueError: an unknown mechanism, or one that lacks the attention pattern the model needs.
    """
    from jattn import models

    config = models.TransformerConfig(
        vocab_size=task.vocab_size if task.kind == "lm" else 1,
        features=options.width,
        num_layers=options.depth,
        num_heads=options.num_heads,
        num_kv_heads=options.num_kv_heads,
        mlp="gelu" if options.mlp_ratio else "none",
        mlp_ratio=options.mlp_ratio,
        max_length=task.length,
        position=options.position,
        dropout=options.dropout,
        embedding_std=options.embedding_std,
        residual_scale=options.residual_scale,
    )
    mechanism = {"attention": options.attention, "attention_options": options.attention_options}
    if task.kind == "lm":
        return models.DecoderLM(config, **mechanism, rngs=rngs)
    return models.ViT(
        config,
        image_size=task.image_size,
        patch_size=task.patch_size,
        num_channels=task.num_channels,
        num_classes=task.num_classes,
        pooling=options.pooling,
        **mechanism,
        rngs=rngs,
    )


def learning_rate_schedule(options: TrainOptions):
    """The optax schedule of the options: linear warmup from 0, then a cosine down to `final_fraction` of the peak."""
    import optax

    warmup = min(round(options.warmup_fraction * options.steps), options.steps - 1)
    if not warmup:
        return optax.cosine_decay_schedule(options.learning_rate, options.steps, options.final_fraction)
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=options.learning_rate,
        warmup_steps=warmup,
        decay_steps=options.steps,
        end_value=options.final_fraction * options.learning_rate,
    )


def make_optimizer(options: TrainOptions):
    """AdamW on clipped gradients with the schedule of the options, as an optax transformation."""
    import optax

    return optax.chain(
        optax.clip_by_global_norm(options.clip_norm),
        optax.adamw(
            learning_rate_schedule(options),
            b1=options.beta1,
            b2=options.beta2,
            weight_decay=options.weight_decay,
            mask=lambda params: jax.tree.map(lambda leaf: leaf.ndim >= 2, params),
        ),
    )


def step_key(seed: int | jax.Array, step: int | jax.Array) -> jax.Array:
    """The random key of one training step: a function of seed and step, so a resumed run draws the same numbers."""
    return jax.random.fold_in(jax.random.key(seed), step)


def step_keys(seeds: Sequence[int], step: int) -> jax.Array:
    """`step_key` of every seed, stacked."""
    return jax.vmap(step_key, in_axes=(0, None))(jnp.asarray(seeds, jnp.uint32), step)


def stacked_batch(seeded: Sequence[tasks.Task], split: str, step: int, size: int) -> dict[str, np.ndarray]:
    """The batches of several tasks (one task under several seeds), stacked along a new first axis."""
    batches = [task.batch(split, step, size) for task in seeded]
    return {name: np.stack([batch[name] for batch in batches]) for name in batches[0]}


def auxiliary_loss(aux: Any) -> jax.Array:
    """What mechanisms add to the objective, such as a balance loss: the sum of `aux["losses"]` of a model's output."""
    return sum((jnp.sum(loss).astype(jnp.float32) for loss in aux.get("losses", {}).values()), jnp.zeros(()))


class Trainer:
    """One model on one task under one budget.

    Args:
        task: where batches, loss and metrics come from.
        model: the model's options.
        options: the budget and the optimizer.

    `init`, `train_step` and `eval_step` are pure and may be vmapped, jitted, lowered; `step`, `step_seeds`,
    `init_seeds` and `evaluate` are their compiled forms.
    """

    def __init__(self, task: tasks.Task, model: ModelOptions, options: TrainOptions) -> None:
        self.task = task
        self.model = model
        self.options = options
        self.optimizer = make_optimizer(options)
        self.schedule = learning_rate_schedule(options)
        abstract = nnx.eval_shape(lambda: build_model(task, model, rngs=nnx.Rngs(0)))
        self.graphdef, params, _ = nnx.split(abstract, nnx.Param, ...)
        self.num_params = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params))

    def init(self, seed: int | jax.Array) -> TrainState:
        """The state before the first step. Pure: `jax.vmap(trainer.init)(seeds)` gives a stacked state."""
        model = build_model(self.task, self.model, rngs=nnx.Rngs(jax.random.key(seed)))
        _, params, other = nnx.split(model, nnx.Param, ...)
        return TrainState(jnp.zeros((), jnp.int32), params, other, self.optimizer.init(params))

    def forward(self, params: Any, other: Any, inputs: jax.Array, key: jax.Array | None = None) -> tuple[Any, Any]:
        """Apply the model: `(output, other)`. With a key it runs as in training (dropout), else deterministically."""
        # copy=True: variables that change (random streams, running statistics) must belong to this trace.
        model = nnx.merge(self.graphdef, params, other, copy=True)
        if key is None:
            output = model(inputs)
        else:
            output = model(inputs, deterministic=False, rngs=nnx.Rngs(key))
        return output, nnx.split(model, nnx.Param, ...)[2]

    def train_step(
        self, state: TrainState, batch: Mapping[str, Any], key: jax.Array
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        """One optimizer step: `(new state, {"loss", "auxiliary_loss", "gradient_norm", "learning_rate"})`. Pure."""
        import optax

        def objective(params: Any) -> tuple[jax.Array, Any]:
            output, other = self.forward(params, state.other, batch["inputs"], key)
            loss, auxiliary = self.task.loss(output, batch), auxiliary_loss(output.aux)
            return loss + auxiliary, (loss, auxiliary, other)

        gradients, (loss, auxiliary, other) = jax.grad(objective, has_aux=True)(state.params)
        updates, optimizer = self.optimizer.update(gradients, state.optimizer, state.params)
        stats = {
            "loss": loss,
            "auxiliary_loss": auxiliary,
            "gradient_norm": jnp.sqrt(sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(gradients))),
            "learning_rate": jnp.asarray(self.schedule(state.step), jnp.float32),
        }
        return TrainState(state.step + 1, optax.apply_updates(state.params, updates), other, optimizer), stats

    def eval_step(self, state: TrainState, batch: Mapping[str, Any]) -> dict[str, tasks.Mean]:
        """The metrics of one batch as totals and counts, which add up over batches. Pure."""
        output, _ = self.forward(state.params, state.other, batch["inputs"])
        return self.task.metrics(output, batch)

    @functools.cached_property
    def step(self):
        """`train_step`, compiled. The state given is consumed: its buffers are reused for the new one."""
        return jax.jit(self.train_step, donate_argnums=0)

    @functools.cached_property
    def step_seeds(self):
        """`train_step` over stacked states, batches and keys, compiled. The states given are consumed."""
        return jax.jit(jax.vmap(self.train_step), donate_argnums=0)

    def init_seeds(self, seeds: Sequence[int]) -> TrainState:
        """`init` for several seeds, stacked along a new first axis of every leaf."""
        return jax.jit(jax.vmap(self.init))(jnp.asarray(seeds, jnp.uint32))

    @functools.cached_property
    def _evaluators(self):
        return {False: jax.jit(self.eval_step), True: jax.jit(jax.vmap(self.eval_step, in_axes=(0, None)))}

    def evaluate(
        self,
        state: TrainState,
        split: str,
        *,
        batch_size: int | None = None,
        max_batches: int | None = None,
        stacked: bool = False,
    ) -> dict[str, Any]:
        """Metrics over a split: numbers, or with `stacked` arrays with one number for each seed of a stacked state.

        Args:
            state: a state of `init`, or a stacked one.
            split: `"valid"` or `"test"`.
            batch_size: examples a batch; the training batch size if None. It changes no result beyond rounding.
            max_batches: stop after so many batches; None walks the whole split.
            stacked: whether the state is stacked.
        """
        size = batch_size or self.options.batch_size
        batches = self.task.num_batches(split, size)
        batches = batches if max_batches is None else min(batches, max_batches)
        evaluator = self._evaluators[stacked]
        return tasks.summarize([evaluator(state, self.task.batch(split, step, size)) for step in range(batches)])
