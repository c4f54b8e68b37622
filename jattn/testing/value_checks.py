"""Conformance of values that the softmax engine takes: masks, score mods, normalizers.

Every check takes the `Workbench` of an entry whose function returns such a value.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jattn.softmax.api import dot_product_attention
from jattn.softmax.masks import DEAD, FULL, Mask
from jattn.softmax.normalizers import Normalizer, StreamState
from jattn.softmax.score_mods import ScoreMod
from jattn.testing.compiling import quick_jit
from jattn.testing.subject import cast
from jattn.testing.workbench import LENGTH, Failed, NotApplicable, Workbench, assert_same

BATCH, HEADS = 2, 2


def _made(bench: Workbench, kind: type) -> Any:
    """What the entry's function returns for its example."""
    assert bench.entry.example is not None
    args, kwargs = bench.entry.example(jax.random.key(0), LENGTH)
    value = bench.entry.target(*args, **kwargs)
    if not isinstance(value, kind):
        raise Failed(f"the function returns {type(value).__name__}, expected a {kind.__name__}")
    return value


def _dense(mask: Mask) -> np.ndarray:
    return np.asarray(mask.to_dense(BATCH, HEADS, LENGTH, LENGTH))


def check_classification(bench: Workbench) -> str:
    """A mask calls no rectangle dead where it shows a pair, none full where it hides one; so with traced bounds."""
    mask = _made(bench, Mask)
    dense = _dense(mask)
    for rows, columns in ((4, 3), (5, 5), (1, 1), (LENGTH, LENGTH)):
        i_lo, j_lo = np.arange(0, LENGTH, rows)[:, None], np.arange(0, LENGTH, columns)[None]
        bounds = (i_lo, np.minimum(i_lo + rows, LENGTH) - 1, j_lo, np.minimum(j_lo + columns, LENGTH) - 1)
        verdicts = np.broadcast_to(np.asarray(mask.classify(*bounds)), (i_lo.size, j_lo.size))
        traced = jax.jit(lambda *b: mask.classify(*b))(*bounds)
        if not np.array_equal(np.broadcast_to(np.asarray(traced), verdicts.shape), verdicts):
            raise Failed(f"traced bounds of {rows} x {columns} tiles are classified otherwise than known ones")
        for (r, c), verdict in np.ndenumerate(verdicts):
            tile = dense[:, :, r * rows : (r + 1) * rows, c * columns : (c + 1) * columns]
            if (verdict == DEAD and tile.any()) or (verdict == FULL and not tile.all()):
                word = "dead" if verdict == DEAD else "full"
                raise Failed(f"tile ({r}, {c}) of {rows} x {columns} is called {word} but is not")
    return f"{dense.mean():.0%} visible"


def check_counts(bench: Workbench) -> str:
    """The counts of visible keys of a mask are those of its dense form."""
    mask = _made(bench, Mask)
    counts = np.asarray(mask.count(BATCH, HEADS, LENGTH, LENGTH))
    if not np.array_equal(np.broadcast_to(counts, (BATCH, HEADS, LENGTH)), _dense(mask).sum(-1)):
        raise Failed("count(...) differs from the number of visible keys of to_dense(...)")
    return ""


def check_algebra(bench: Workbench) -> str:
    """The operators of a mask do what they do to dense masks, and it survives jit as an argument."""
    mask = _made(bench, Mask)
    dense = _dense(mask)
    for word, combined, expected in (
        ("~", ~mask, ~dense),
        ("& ~", mask & ~mask, dense & ~dense),
        ("| ~", mask | ~mask, dense | ~dense),
    ):
        if not np.array_equal(_dense(combined), expected):
            raise Failed(f"combined by {word} with itself it is not what the dense masks give")
    if not np.array_equal(jax.jit(_dense_traced)(mask), dense):
        raise Failed("as an argument of a jitted function it gives another mask")
    return ""


def _dense_traced(mask: Mask) -> Any:
    return jnp.asarray(mask.to_dense(BATCH, HEADS, LENGTH, LENGTH))


def check_positions(bench: Workbench) -> str:
    """A mask looks at positions: later queries alone get the rows that they have among all."""
    mask = _made(bench, Mask)
    rows = np.arange(LENGTH // 2, LENGTH)
    later = np.asarray(mask.to_dense(BATCH, HEADS, rows.size, LENGTH, query_positions=rows[None]))
    if not np.array_equal(later, _dense(mask)[:, :, rows]):
        raise Failed(f"queries at positions {rows[0]}..{rows[-1]} alone see other keys than within the whole sequence")
    return ""


def check_mask_patterns(bench: Workbench) -> str:
    """A mask that declares causal self attention alone shows no later key."""
    if set(bench.entry.patterns) != {"causal self"}:
        raise NotApplicable("it does not declare 'causal self' alone")
    later = np.triu(_dense(_made(bench, Mask)), 1)
    if later.any():
        raise Failed(f"it shows {int(later.sum())} later keys")
    return ""


def _score_mod_call(bench: Workbench) -> tuple[ScoreMod, dict[str, Any]]:
    mod = _made(bench, ScoreMod)
    heads = 1
    for operand in mod.flat_operands().values():
        core = {"query": 1, "key": 1, "pair": 2, "offset": 1}.get(operand.kind, 0)
        lead = np.shape(operand.array)[: np.ndim(operand.array) - core]
        heads = max([heads, *lead[-1:]])
    random = np.random.default_rng(0)
    names = ("query", "key", "value")
    return mod, {name: random.normal(size=(1, LENGTH, heads, 4)).astype(np.float32) for name in names}


def _causal(bench: Workbench) -> bool:
    return all(pattern.startswith("causal") for pattern in bench.entry.patterns)


def check_tiles(bench: Workbench) -> str:
    """A score mod read tile by tile gives outputs and gradients of operands as on all pairs at once."""
    mod, inputs = _score_mod_call(bench)

    def run(implementation: str) -> Any:
        blocks = (4, 4) if implementation == "blockwise" else None

        def total(mod: ScoreMod, inputs: dict[str, Any]) -> Any:
            out = dot_product_attention(
                **inputs,
                score_mod=mod,
                is_causal=_causal(bench),
                implementation=implementation,
                block_sizes=blocks,
            )
            return jnp.sum(out * jnp.cos(jnp.arange(out.size, dtype=out.dtype)).reshape(out.shape)), out

        return quick_jit(jax.value_and_grad(total, has_aux=True, allow_int=True))

    with jax.enable_x64(True):
        wide = jax.tree.map(
            lambda a: jnp.asarray(a, jnp.float64) if jnp.issubdtype(jnp.result_type(a), jnp.floating) else a, mod
        )
        results = {name: run(name)(wide, cast(inputs, np.float64)) for name in ("reference", "blockwise")}
        ((_, expected), plain), ((_, out), tiled) = results["reference"], results["blockwise"]
        assert_same(out, expected, "output tile by tile")
        for got, want in zip(jax.tree.leaves(tiled), jax.tree.leaves(plain), strict=True):
            if jnp.issubdtype(want.dtype, jnp.floating):
                assert_same(got, want, "gradient of an operand tile by tile")
    return f"{len(mod.flat_operands())} operands"


def check_effect(bench: Workbench) -> str:
    """A score mod changes the output, which stays finite and keeps the query's dtype."""
    mod, inputs = _score_mod_call(bench)

    @quick_jit
    def run(inputs: dict[str, Any], mod: ScoreMod | None) -> Any:
        return dot_product_attention(**inputs, score_mod=mod, is_causal=_causal(bench))

    for dtype in (jnp.float32, jnp.bfloat16):
        out = np.asarray(run(cast(inputs, dtype), mod))
        finite = bool(np.isfinite(out.astype(np.float32)).all())
        if out.dtype != dtype or not finite:
            raise Failed(f"with {jnp.dtype(dtype)} inputs the output is {out.dtype}, finite: {finite}")
    if np.array_equal(out, run(cast(inputs, jnp.bfloat16), None)):
        raise Failed("the output is the same without it")
    return ""


def _logits() -> tuple[Any, Any]:
    random = np.random.default_rng(0)
    logits = 3 * random.normal(size=(5, LENGTH))
    visible = random.random((5, LENGTH)) < 0.7
    visible[2] = False
    logits[0, 3], visible[0, 3] = -np.inf, True
    return logits, visible


def check_weights(bench: Workbench) -> str:
    """A normalizer gives finite weights, 0 where a key is hidden or its logit is -inf, in every row alike."""
    normalizer = _made(bench, Normalizer)
    logits, visible = _logits()
    count = visible.sum(-1, keepdims=True)
    with jax.enable_x64(True):
        weights = np.asarray(normalizer.weights(jnp.asarray(logits), visible, count))
        order = np.random.default_rng(1).permutation(LENGTH)
        moved = np.asarray(normalizer.weights(jnp.asarray(logits[:, order]), visible[:, order], count))
    if not np.isfinite(weights).all():
        raise Failed("weights are not finite")
    if weights[~visible].any() or weights[0, 3] != 0:
        raise Failed("a hidden key, or one with logit -inf, has a weight other than 0")
    assert_same(moved, weights[:, order], "weights of permuted keys")
    return ""


def check_streaming(bench: Workbench) -> str:
    """A normalizer that streams gives tile by tile, and merged from halves, what its dense weights give."""
    normalizer = _made(bench, Normalizer)
    if normalizer.passes != 1:
        raise NotApplicable(f"it needs {normalizer.passes} passes")
    logits, visible = _logits()
    count = visible.sum(-1, keepdims=True)
    value = np.random.default_rng(2).normal(size=(LENGTH, 3))
    with jax.enable_x64(True):
        logits, value = jnp.asarray(logits), jnp.asarray(value)
        expected = normalizer.weights(logits, visible, count) @ value

        def stream(tiles: list[slice]) -> StreamState:
            state = normalizer.init(len(logits), 3, jnp.float64)
            for tile in tiles:
                state = normalizer.update(state, logits[:, tile], visible[:, tile], value[tile])
            return state

        one = stream([slice(0, 4), slice(4, 9), slice(9, LENGTH)])
        two = normalizer.merge(stream([slice(0, 4)]), stream([slice(4, 9), slice(9, LENGTH)]))
        for word, state in (("tile by tile", one), ("merged", two)):
            assert_same(normalizer.finish(state, count[:, 0]), expected, f"output {word}")
    return ""


MASK = (check_classification, check_counts, check_algebra, check_positions, check_mask_patterns)
SCORE_MOD = (check_tiles, check_effect)
NORMALIZER = (check_weights, check_streaming)
