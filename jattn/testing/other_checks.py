"""Conformance of what does not attend by itself: poolings, tasks, caches.

Every check takes the `Workbench` of an entry.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jattn import tasks
from jattn.cache import CachePolicy
from jattn.tasks.base import SPLITS, summarize
from jattn.testing.compiling import quick_jit
from jattn.testing.workbench import (
    LENGTH,
    SHORT,
    Failed,
    NotApplicable,
    Workbench,
    assert_equal_bits,
    assert_same,
)

BATCH = 2


def _bag(bench: Workbench) -> str:
    """The name of the array that holds the tokens of a pooling."""
    if not bench.base.roles:
        raise Failed("its example has no array with one row a token")
    return next(iter(bench.base.roles))


def check_invariance(bench: Workbench) -> str:
    """The order of the tokens does not matter."""
    order = np.random.default_rng(5).permutation(LENGTH)
    moved = {name: a[:, order] if name in bench.base.roles else a for name, a in bench.base.arrays.items()}
    assert_same(bench.true(moved).output, bench.truth.output, "output of permuted tokens")
    return ""


def check_hidden_tokens(bench: Workbench) -> str:
    """Hidden tokens reach nothing: the result is that of the others alone, whatever stands in the hidden ones."""
    name, base = _bag(bench), bench.base
    hidden = np.zeros(base.arrays[name].shape[:2], bool)
    hidden[:, SHORT:] = True
    visible = {"mask": ~hidden}
    try:
        clean = bench.run(visible=visible)
    except TypeError as error:
        raise NotApplicable("it takes no mask") from error
    garbage = 1e4 if bench.entry.layer is not None else np.nan
    poisoned = np.where(hidden.reshape(*hidden.shape, *(1,) * (base.arrays[name].ndim - 2)), garbage, base.arrays[name])
    dirty = bench.run({**base.arrays, name: poisoned.astype(base.arrays[name].dtype)}, visible)
    assert_equal_bits(dirty.output, clean.output, "output with poison in hidden tokens")
    for array, gradient in dirty.gradients.items():
        assert_equal_bits(gradient, clean.gradients[array], f"gradient of {array} with poison in hidden tokens")
    alone = bench.call(length=SHORT)
    arrays = {n: a[:, :SHORT] if n in base.roles else a for n, a in base.arrays.items()}
    assert_same(
        bench.true_output(alone, arrays), bench.true(visible=visible).output, "output without the hidden tokens"
    )
    return ""


def check_empty_bags(bench: Workbench) -> str:
    """A bag without any visible token gives finite outputs and gradients, and takes none from the others."""
    name = _bag(bench)
    shape = bench.base.arrays[name].shape[:2]
    visible = np.ones(shape, bool)
    visible[-1] = False
    try:
        output, gradients = bench.run(visible={"mask": visible})
    except TypeError as error:
        raise NotApplicable("it takes no mask") from error
    if not np.isfinite(output).all() or not all(np.isfinite(g).all() for g in gradients.values()):
        raise Failed("a bag whose tokens are all hidden gives outputs or gradients that are not finite")
    assert_equal_bits(output[:-1], bench.run(visible={"mask": np.ones(shape, bool)}).output[:-1], "the other bags")
    return ""


def _task(bench: Workbench) -> Any:
    return tasks.get(bench.entry.name)


def check_batches(bench: Workbench) -> str:
    """Batches are a pure function of (seed, split, step), of one shape; steps, splits and seeds differ."""
    task, other = _task(bench), tasks.get(bench.entry.name, seed=1)
    seen: dict[bytes, str] = {}
    shapes = None
    for split in SPLITS:
        for step in (0, 1):
            batch, again = task.batch(split, step, 4), _task(bench).batch(split, step, 4)
            where = f"{split} batch {step}"
            if set(batch) != {"inputs", "targets", "weights"}:
                raise Failed(f"{where} holds {sorted(batch)}, expected inputs, targets, weights")
            for name in batch:
                assert_equal_bits(again[name], batch[name], f"{name} of {where}, asked for again")
            now = {name: (array.shape, array.dtype) for name, array in batch.items()}
            if shapes not in (None, now):
                raise Failed(f"{where} has shapes {now}, the others {shapes}")
            shapes = now
            content = np.asarray(batch["inputs"]).tobytes()
            if content in seen:
                raise Failed(f"{where} is the same as {seen[content]}")
            seen[content] = where
            if split != "train":
                assert_equal_bits(other.batch(split, step, 4)["inputs"], batch["inputs"], f"{where} of another seed")
    if other.batch("train", 0, 4)["inputs"].tobytes() in seen:
        raise Failed("another seed gives the same training batch")
    return f"{task.kind}, length {task.length}"


def check_loss(bench: Workbench) -> str:
    """Loss and gradient are finite, see weighted targets only, and fall where the outputs are right."""
    task = _task(bench)
    batch = task.batch("valid", 0, 4)
    shape = (*np.shape(batch["targets"]), task.num_classes)
    outputs = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    loss, gradient = jax.value_and_grad(task.loss)(jnp.asarray(outputs), batch)
    if not np.isfinite(loss) or not np.isfinite(gradient).all():
        raise Failed("loss or gradient is not finite")
    if np.asarray(gradient)[np.asarray(batch["weights"]) == 0].any():
        raise Failed("targets of weight 0 have a gradient")
    right = 20 * jax.nn.one_hot(batch["targets"], task.num_classes)
    metrics = [summarize([task.metrics(x, batch)]) for x in (jnp.asarray(outputs), right)]
    if task.primary_metric not in metrics[0]:
        raise Failed(f"metrics {sorted(metrics[0])} lack the primary one, {task.primary_metric!r}")
    wrong, best = (m[task.primary_metric] for m in metrics)
    better = best > wrong if task.higher_is_better else best < wrong
    if not better or not task.loss(right, batch) < loss:
        raise Failed(f"right outputs score {task.primary_metric} = {best:.3g}, random ones {wrong:.3g}")
    return f"{task.primary_metric} {best:.3g} at best"


def _policy(bench: Workbench) -> CachePolicy:
    assert bench.entry.example is not None
    args, kwargs = bench.entry.example(jax.random.key(0), LENGTH)
    policy = bench.entry.target(*args, **kwargs)
    if not isinstance(policy, CachePolicy):
        raise NotApplicable(f"{type(policy).__name__} is no policy of keys and values")
    return policy


def _keys(length: int = LENGTH) -> tuple[np.ndarray, np.ndarray]:
    key = np.random.default_rng(0).normal(size=(BATCH, length, 1, 4)).astype(np.float32)
    return key, key[..., :3] + 1


def _feed(policy: CachePolicy, key: Any, value: Any, chunk: int, valid: Any = None) -> tuple[Any, list[Any]]:
    """Append in chunks; the cache, and for each query the (position, visible key positions, sum of visible values)."""
    cache = policy.init(BATCH, 1, key.shape[-1], value.shape[-1], key.dtype)
    seen = []
    for start in range(0, key.shape[1], chunk):
        part = slice(start, start + chunk)
        cache, positions = policy.append(cache, key[:, part], value[:, part], None if valid is None else valid[:, part])
        mask = np.asarray(policy.mask(cache, positions))[:, 0]
        held = np.asarray(cache.key_positions)[:, 0]
        for row in range(BATCH):
            for t, position in enumerate(np.asarray(positions)[row]):
                slots = mask[row, t]
                shown = {int(p): np.asarray(cache.value[row, s, 0]) for s, p in enumerate(held[row]) if slots[s]}
                seen.append((row, int(position), shown))
        cache = policy.evict(cache, None)
    return cache, seen


def check_contents(bench: Workbench) -> str:
    """Every query sees the positions that the policy's rule names and no other, each with its own value."""
    policy = _policy(bench)
    key, value = _keys()
    for chunk in sorted({1, min(policy.max_chunk or 4, 4)}):
        for row, position, shown in _feed(policy, key, value, chunk)[1]:
            everything = np.arange(LENGTH if not policy.causal else position + 1)
            rule = np.broadcast_to(np.asarray(policy.visible(position, everything)), everything.shape)
            if policy.causal and set(shown) != set(everything[rule].tolist()):
                raise Failed(
                    f"in chunks of {chunk}, query {position} sees positions {sorted(shown)}, expected "
                    f"{everything[rule].tolist()}"
                )
            for held, stored in shown.items():
                if not np.allclose(stored, value[row, held, 0]):
                    raise Failed(f"in chunks of {chunk}, position {held} holds another token's value")
    return f"{policy.capacity} slots"


def check_padding(bench: Workbench) -> str:
    """Invalid tokens write nothing and do not count."""
    policy = _policy(bench)
    key, value = _keys(2 * SHORT)
    valid = np.tile(np.arange(2 * SHORT) % 2 == 1, (BATCH, 1))
    key, value = (np.where(valid[..., None, None], x, np.nan) for x in (key, value))
    chunk = min(policy.max_chunk or 2, 2)
    padded, seen = _feed(policy, key, value, chunk, valid)
    alone, expected = _feed(policy, key[:, 1::2], value[:, 1::2], 1)
    for leaf, other in zip(jax.tree.leaves(padded), jax.tree.leaves(alone), strict=True):
        assert_equal_bits(leaf, other, "cache of padded tokens")
    if [s for s in seen if s[1] < 0 and s[2]]:
        raise Failed("an invalid token sees something")
    if {(r, p): set(s) for r, p, s in seen if p >= 0} != {(r, p): set(s) for r, p, s in expected}:
        raise Failed("queries among padding see other positions than without it")
    return ""


def check_static(bench: Workbench) -> str:
    """Appending keeps shapes and dtypes, so that it can be scanned; under jit it gives the same cache."""
    policy = _policy(bench)
    key, value = _keys()
    cache = policy.init(BATCH, 1, 4, 3)

    def scan(cache: Any, key: Any, value: Any) -> Any:
        def step(cache: Any, token: Any) -> Any:
            cache, positions = policy.append(cache, *(x[:, None] for x in token))
            return policy.evict(cache, None), positions

        return jax.lax.scan(step, cache, (jnp.swapaxes(key, 0, 1), jnp.swapaxes(value, 0, 1)))[0]

    scanned, fed = quick_jit(scan)(cache, key, value), _feed(policy, key, value, 1)[0]
    for leaf, other in zip(jax.tree.leaves(scanned), jax.tree.leaves(fed), strict=True):
        assert_equal_bits(leaf, other, "cache after a scan")
    return ""


POOLING = (check_invariance, check_hidden_tokens, check_empty_bags)
TASK = (check_batches, check_loss)
CACHE = (check_contents, check_padding, check_static)
