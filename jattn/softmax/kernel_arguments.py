"""What a kernel of fused attention is given, made from a `Problem`: inputs of tiles, functions between products, lists.

Every backend in `pallas_kernels/flash_attention/` takes these; the adapters beside this file add what is their own.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from jattn.softmax.blockwise import schedule
from jattn.softmax.masks import FULL, PARTIAL
from jattn.softmax.normalizers import Softmax
from jattn.softmax.predicates import head_entry
from jattn.softmax.problem import Problem, drop_pairs, modify_logits
from pallas_kernels.flash_attention.pipeline import Pipeline, TileInput, TileLists


def make_inputs(problem: Problem, sources: dict[str, Any]) -> dict[str, TileInput]:
    """Everything that tiles read besides queries, keys and values."""
    arrays: dict[str, Any] = {
        "query_positions": _rows(problem.query_positions),
        "key_positions": _columns(problem.key_positions),
        "query_segments": _rows(problem.query_segments),
        "key_segments": _columns(problem.key_segments),
        "bias": sources.get("bias"),
    }
    # Booleans have no pointers.
    arrays |= {f"mask {n}": array.astype(jnp.int8) for n, array in enumerate(problem.mask_arrays)}
    if problem.dropout_rate:
        arrays |= {f"seed {n}": problem.seed[n].reshape(1, 1, 1, 1) for n in range(2)}
    inputs = {name: TileInput(jnp.asarray(array)) for name, array in arrays.items() if array is not None}
    centers = {} if problem.score_mod is None else problem.score_mod.flat_operands()
    for name, array in sources.get("operands", {}).items():
        table = array.ndim == 3
        center = centers[name].offset_center() if table else None
        inputs[f"operand {name}"] = TileInput(array[:, :, None] if table else array, center)
    if problem.layout is not None and problem.layout.predicate is not None:
        full = problem.layout.full_map()
        heads = head_entry(np.arange(problem.sizes[3]), problem.sizes[3], full.shape[1])
        full = full[:, heads] if full.shape[1] != 1 else full
        inputs["layout full"] = TileInput(jnp.asarray(full, jnp.int32), by_tile=True)
    return inputs


def _rows(array: Any) -> Any:
    return None if array is None else jnp.asarray(array, jnp.int32)[:, None, :, None]


def _columns(array: Any) -> Any:
    return None if array is None else jnp.asarray(array, jnp.int32)[:, None, None, :]


def make_pipeline(problem: Problem, has_bias: bool) -> Pipeline:
    """What happens between the two products, reading the tiles that `make_inputs` names."""
    operands = () if problem.score_mod is None else tuple(problem.score_mod.flat_operands())

    def positions(place, tiles):
        return tiles.get("query_positions", place.row), tiles.get("key_positions", place.column)

    def visible(place, tiles):
        terms = [tiles[f"mask {n}"] != 0 for n in range(len(problem.mask_arrays))]
        if problem.query_segments is not None:
            ids = tiles["query_segments"]
            terms.append((ids == tiles["key_segments"]) & (ids >= 0))
        if problem.mask is not None:
            terms.append(problem.mask(place.b, place.h, *positions(place, tiles)))
        if problem.layout is not None and problem.layout.predicate is not None:
            i, j = positions(place, tiles)
            allowed = problem.layout.predicate.at(place.b, place.h, i, j, place.row, place.column)
            terms.append((tiles["layout full"] != 0) | allowed)
        seen = jnp.ones((1, 1), bool)
        for term in terms:
            seen = seen & term
        return seen

    def modify(logits, place, tiles):
        own = {name: tiles[f"operand {name}"] for name in operands}
        return modify_logits(problem, logits, own, tiles.get("bias"), place.b, place.h, *positions(place, tiles))

    def drop(weights, place, tiles):
        seeded = dataclasses.replace(problem, seed=(tiles["seed 0"], tiles["seed 1"]))
        return drop_pairs(seeded, weights, place.b, place.h, place.row, place.column)

    modifies = problem.score_mod is not None or problem.logit_soft_cap is not None or has_bias
    return Pipeline(
        visible,
        modify if modifies else None,
        drop if problem.dropout_rate else None,
        None if isinstance(problem.normalizer, Softmax) else problem.normalizer.phi,
        schedule.find_guard(problem) != "none",
    )


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How a problem is cut: lists of both sides, and the class of every tile."""

    rows: TileLists
    columns: TileLists
    code: Any


def make_tiling(problem: Problem, block_q: int, block_k: int) -> Tiling:
    """The live tiles of a problem, from its masks and segments; a tile that is cut off at an end counts as partial."""
    _, length, source, _, _ = problem.sizes
    blocks = (min(block_q, length), min(block_k, source))
    cut = dataclasses.replace(problem, block_sizes=blocks)
    code, _ = schedule.tile_code(cut, True)
    xp = np if isinstance(code, np.ndarray) else jnp
    ragged = np.zeros(code.shape[2:], bool)
    ragged[-1:] |= bool(length % block_q)
    ragged[:, -1:] |= bool(source % block_k)
    code = xp.where((code == FULL) & ragged, np.int8(PARTIAL), code)
    return Tiling(_lists(code), _lists(code.swapaxes(2, 3)), jnp.asarray(code, jnp.int32))


def _lists(code: Any) -> TileLists:
    lists, exists = schedule.tile_lists(code)
    return TileLists(*lists, *exists)
