"""The suite finds defects in masks, score mods, normalizers, poolings, caches and tasks."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jattn import tasks
from jattn.cache import FullCache
from jattn.mechanisms.entry import PATTERNS, Cost, Entry
from jattn.softmax import masks
from jattn.softmax.masks import DEAD, FULL, Mask
from jattn.softmax.normalizers import Softmax
from jattn.softmax.score_mods import Operand, ScoreMod
from jattn.testing.conformance import FAILED, NOT_APPLICABLE, PASSED, check_mechanism


def entry(kind, function, example=lambda key, length: ((), {}), **changes):
    settings = {"name": "toy", "kind": kind, "family": "softmax", "function": function, "example": example}
    return Entry(**{**settings, "patterns": ("causal self",), "cost": Cost("T", "T"), **changes})


def statuses(entry, only=None):
    return {result.check: result.status for result in check_mechanism(entry, only)}


def failures(entry, only=None):
    return {result.check for result in check_mechanism(entry, only) if result.status == FAILED}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Band(Mask):
    """Keys i - 2 .. i, with an optional defect."""

    defect: str = dataclasses.field(default="", metadata={"static": True})

    def __call__(self, b, h, i, j):
        if self.defect == "counts rows":
            i = np.arange(np.shape(i)[-2])[:, None]
        return (j <= i + (self.defect == "acausal")) & (j > i - 3)

    def classify(self, i_lo, i_hi, j_lo, j_hi):
        xp = jnp if isinstance(i_lo, jax.Array) else np
        dead = (j_lo > i_hi + (self.defect == "acausal")) | (j_hi <= i_lo - 3)
        full = (j_hi <= i_lo) & (j_lo > i_hi - 3)
        if self.defect == "too dead":
            dead = j_hi <= i_lo - 2
        if self.defect == "too full" and xp is np:
            full = j_hi <= i_hi
        if self.defect == "traced otherwise" and xp is jnp:
            full = full & False
        return xp.where(dead, DEAD, xp.where(full, FULL, 1))

    def count(self, batch, num_heads, query_length, key_length, **positions):
        return super().count(batch, num_heads, query_length, key_length, **positions) + (self.defect == "miscounts")

    def __invert__(self):
        return self if self.defect == "not" else super().__invert__()


@pytest.mark.parametrize("mask", [masks.causal, masks.full, lambda: masks.sliding_window(3, 1), Band])
def test_sound_masks_pass(mask):
    patterns = PATTERNS[:2] if mask is masks.full else ("causal self",)
    assert failures(entry("mask", mask, patterns=patterns)) == set()


@pytest.mark.parametrize(
    ("defect", "check"),
    [
        ("too dead", "classification"),
        ("too full", "classification"),
        ("traced otherwise", "classification"),
        ("miscounts", "counts"),
        ("not", "algebra"),
        ("counts rows", "positions"),
        ("acausal", "mask_patterns"),
    ],
)
def test_a_defective_mask_fails(defect, check):
    assert check in failures(entry("mask", lambda: Band(defect)))


def test_a_function_that_returns_something_else_fails():
    (result,) = check_mechanism(entry("mask", lambda: 3), ["counts"])
    assert "returns int, expected a Mask" in result.detail


def _sound(logit, b, h, i, j, table):
    return logit + table


def _reads_shape(logit, b, h, i, j, table):
    return logit + table * logit.shape[-1]


def _divides(logit, b, h, i, j, table):
    return logit / (i - j)


def _nothing(logit, b, h, i, j, table):
    return logit


@pytest.mark.parametrize(
    ("function", "failed"),
    [(_sound, set()), (_reads_shape, {"tiles"}), (_divides, {"tiles", "effect"}), (_nothing, {"effect"})],
)
def test_score_mods(function, failed):
    def make(key, length):
        return (np.random.default_rng(0).normal(size=(2, 5)).astype(np.float32),), {}

    toy = entry("score_mod", lambda table: ScoreMod(function, {"table": Operand(table, "offset")}), make)
    assert failures(toy) == failed


@dataclasses.dataclass(frozen=True)
class Bent(Softmax):
    """The softmax, with an optional defect."""

    defect: str = ""

    def weights(self, logits, visible, count):
        if self.defect == "hidden":
            visible = visible | (jnp.arange(logits.shape[-1]) == 5)
        weights = super().weights(logits, visible, count)
        return weights * (1 + jnp.arange(weights.shape[-1])) if self.defect == "order" else weights

    def merge(self, left, right):
        return right if self.defect == "merge" else super().merge(left, right)


@pytest.mark.parametrize(
    ("defect", "failed"), [("", set()), ("hidden", {"weights"}), ("order", {"weights"}), ("merge", {"streaming"})]
)
def test_normalizers(defect, failed):
    assert failed <= failures(entry("normalizer", lambda: Bent(defect=defect)))
    assert bool(failed) == bool(failures(entry("normalizer", lambda: Bent(defect=defect))))


def pool(x, *, mask=None, defect=""):
    """The mean of the visible tokens."""
    weights = jnp.ones(x.shape[:2], x.dtype) if mask is None else mask.astype(x.dtype)
    if mask is not None and defect != "leak":
        x = jnp.where(mask[..., None], x, 0)
    if defect == "order":
        weights = weights * (1 + jnp.arange(x.shape[1]))
    if defect == "empty softmax":
        weights = jax.nn.softmax(jnp.where(weights > 0, 0.0, -jnp.inf))
    total = weights.sum(1, keepdims=True)
    total = jnp.where(total == 0, 1, total)
    return jnp.einsum("bs,bsm->bm", weights / total, x).astype(x.dtype)


@pytest.mark.parametrize(
    ("defect", "failed"),
    [("", set()), ("leak", {"hidden_tokens"}), ("order", {"invariance"}), ("empty softmax", {"empty_bags"})],
)
def test_poolings(defect, failed):
    def make(key, length):
        return (np.random.default_rng(0).normal(size=(2, length, 4)).astype(np.float32),), {}

    toy = entry("pooling", lambda x, *, mask=None: pool(x, mask=mask, defect=defect), make)
    assert failures(toy, ["invariance", "hidden_tokens", "empty_bags"]) == failed
    if not defect:
        assert failures(toy) == set()


def test_a_pooling_without_a_mask_says_so():
    def make(key, length):
        return (np.ones((2, length, 4), np.float32),), {}

    toy = entry("pooling", lambda x: x.mean(1), make)
    assert statuses(toy, ["hidden_tokens", "empty_bags"]) == dict.fromkeys(
        ["hidden_tokens", "empty_bags"], NOT_APPLICABLE
    )


@dataclasses.dataclass(frozen=True)
class OffByOne(FullCache):
    """A cache that hides the token itself."""

    def mask(self, cache, query_positions):
        return super().mask(cache, query_positions) & (
            cache.key_positions[:, :, None] < np.asarray(query_positions)[:, None, :, None]
        )


@dataclasses.dataclass(frozen=True)
class Overwrites(FullCache):
    """A cache that writes every token into two slots."""

    def slot_of(self, positions):
        return positions // 2


@dataclasses.dataclass(frozen=True)
class Padded(FullCache):
    """A cache that counts invalid tokens."""

    def append(self, cache, key, value, valid=None):
        return super().append(cache, key, value, None)


@pytest.mark.parametrize(
    ("policy", "failed"),
    [(FullCache, set()), (OffByOne, {"contents"}), (Overwrites, {"contents"}), (Padded, {"padding"})],
)
def test_caches(policy, failed):
    found = failures(entry("cache", lambda: policy(16)), ["contents", "padding"])
    assert failed <= found
    assert bool(failed) == bool(found)


class Copying:
    """A language-modelling task, with an optional defect."""

    kind, length, num_classes, primary_metric, higher_is_better = "lm", 6, 5, "accuracy", True

    def __init__(self, defect="", seed=0):
        self.defect, self.seed = defect, seed

    def batch(self, split, step, size):
        seed = [("train", "valid", "test").index(split), step, self.seed if split == "train" else 0]
        if self.defect == "seedless":
            seed[2] = 0
        if self.defect == "stuck":
            seed[1] = 0
        random = np.random.default_rng(None if self.defect == "impure" else seed)
        inputs = random.integers(5, size=(size, 6))
        return {"inputs": inputs, "targets": inputs, "weights": np.tile(np.arange(6) % 2, (size, 1)).astype(np.float32)}

    def loss(self, outputs, batch):
        nll = -jnp.take_along_axis(jax.nn.log_softmax(outputs), batch["targets"][..., None], -1)[..., 0]
        return (nll if self.defect == "unweighted" else nll * batch["weights"]).sum()

    def metrics(self, outputs, batch):
        right = (outputs.argmax(-1) == batch["targets"]) * batch["weights"]
        name = "acc" if self.defect == "renamed" else "accuracy"
        return {
            name: tasks.base.Mean(-right.sum() if self.defect == "upside down" else right.sum(), batch["weights"].sum())
        }


@pytest.mark.parametrize(
    ("defect", "failed"),
    [
        ("", set()),
        ("impure", {"batches"}),
        ("stuck", {"batches"}),
        ("seedless", {"batches"}),
        ("unweighted", {"loss"}),
        ("renamed", {"loss"}),
        ("upside down", {"loss"}),
    ],
)
def test_tasks(defect, failed, monkeypatch):
    monkeypatch.setattr(tasks, "get", lambda name, **options: Copying(defect, **options))
    assert failures(entry("task", Copying)) == failed


def test_what_does_not_attend_faces_the_checks_of_any_function():
    def example(key, length):
        return (np.ones((2, length, 4), np.float32),), {}

    toy = entry("feature_map", lambda x: x + jnp.exp(x), example)
    found = statuses(toy, ["gradients", "derivative", "vmap", "work"])
    assert set(found.values()) == {PASSED}
