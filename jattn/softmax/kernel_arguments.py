"""What a kernel of fused attention is given, made from a `Problem`: inputs of tiles, functions between products, lists.

Every backend in `pallas_kernels/flash_attention/` takes these; the adapters beside this file add what is their own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jattn.softmax.blockwise import schedule
from jattn.softmax.mask_type import FULL, PARTIAL, Entries, Mask
from jattn.softmax.normalizers import Softmax
from jattn.softmax.predicates import head_entry
from jattn.softmax.problem import Problem, drop_pairs, modify_logits, slot_tokens
from pallas_kernels.flash_attention.pipeline import Backward, Pipeline, TileInput, TileLists


def make_inputs(problem: Problem, sources: dict[str, Any]) -> dict[str, TileInput]:
    """Everything that tiles read besides queries, keys and values."""
    tokens = slot_tokens(problem)
    arrays: dict[str, Any] = {}
    for side, expand in (("query", _rows), ("key", _columns)):
        for what in ("positions", "segments"):
            array = getattr(problem, f"{side}_{what}")
            arrays[f"{side}_{what}"] = None if array is None else expand(jnp.asarray(array, jnp.int32)[:, None])
    arrays["bias"] = sources.get("bias")
    # Booleans have no pointers.
    arrays |= {f"mask {n}": array.astype(jnp.int8) for n, array in enumerate(problem.mask_arrays)}
    if problem.dropout_rate:
        arrays |= {f"seed {n}": problem.seed[n].reshape(1, 1, 1, 1) for n in range(2)}
    inputs = {name: _in_slots(jnp.asarray(array), tokens) for name, array in arrays.items() if array is not None}
    for side, own, expand in zip(("query", "key"), tokens, (_rows, _columns), strict=True):
        if own is not None:
            inputs[f"{side}_tokens"] = TileInput(expand(jnp.asarray(own, jnp.int32)))
            inputs.setdefault(f"{side}_positions", inputs[f"{side}_tokens"])
    centers = {} if problem.score_mod is None else problem.score_mod.flat_operands()
    for name, array in sources.get("operands", {}).items():
        table = array.ndim == 3
        inputs[f"operand {name}"] = (
            TileInput(array[:, :, None], centers[name].offset_center()) if table else _in_slots(array, tokens)
        )
    if problem.layout is not None and problem.layout.predicate is not None:
        full = problem.layout.full_map()
        heads = head_entry(np.arange(problem.sizes[3]), problem.sizes[3], full.shape[1])
        full = full[:, heads] if full.shape[1] != 1 else full
        inputs["layout full"] = TileInput(jnp.asarray(full, jnp.int32), by_tile=True)
    for n, leaf in enumerate(jax.tree.leaves(_masks(problem))):
        array = jnp.asarray(leaf, jnp.int8 if _boolean(leaf) else None)
        scalar = array.ndim == 0
        inputs[f"held {n}"] = TileInput(array.reshape(1, 1, 1, 1) if scalar else array, gathered=not scalar)
    return inputs


def _rows(array: Any) -> Any:
    return array[..., :, None]


def _columns(array: Any) -> Any:
    return array[..., None, :]


def _of_moved_pairs(shape: Sequence[int], tokens: tuple[Any, Any]) -> bool:
    """Whether `[B|1, N|1, T|1, S|1]` varies along both axes, and slots of one of them are not its tokens."""
    return min(shape[2:]) > 1 and any(own is not None for own in tokens)


def _in_slots(array: Any, tokens: tuple[Any, Any]) -> TileInput:
    """How tiles read `[B|1, N|1, T|1, S|1]`; pairs of tokens are not brought into the order of slots, but gathered."""
    return TileInput(array, gathered=True) if _of_moved_pairs(array.shape, tokens) else TileInput(_moved(array, tokens))


def _moved(array: Any, tokens: tuple[Any, Any]) -> Any:
    """What has an entry for each query or for each key, by slot; empty slots read token 0."""
    for axis, own, expand in ((2, tokens[0], _rows), (3, tokens[1], _columns)):
        if own is None or array.shape[axis] == 1:
            continue
        lead = jnp.broadcast_shapes(array.shape[:2], own.shape[:2])
        index = expand(jnp.broadcast_to(jnp.maximum(own, 0), (*lead, own.shape[2])))
        array = jnp.take_along_axis(jnp.broadcast_to(array, (*lead, *array.shape[2:])), index, axis)
    return array


def _masks(problem: Problem) -> tuple[Mask | None, Mask | None]:
    """The masks that are evaluated pair by pair: by position, and by slot of the layout."""
    return problem.mask, None if problem.layout is None else problem.layout.predicate


def _masks_in_kernel(problem: Problem, tiles: Mapping[str, Any]) -> tuple[Mask | None, Mask | None]:
    """The same masks with arrays that read what the tile holds."""
    leaves, tree = jax.tree.flatten(_masks(problem))
    return tree.unflatten([_entries(leaf, tiles[f"held {n}"]) for n, leaf in enumerate(leaves)])


def _boolean(leaf: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(leaf), jnp.bool_)


def _entries(leaf: Any, held: Any) -> Any:
    if jnp.ndim(leaf) == 0:
        return held != 0 if _boolean(leaf) else held
    return Entries(jnp.shape(leaf), jnp.result_type(leaf), (lambda *i: held(*i) != 0) if _boolean(leaf) else held)


def gathers(problem: Problem) -> bool:
    """Whether tiles read arrays by gather (`TileInput.gathered`), which a backend may not be able to."""
    held = any(jnp.ndim(leaf) > 0 for leaf in jax.tree.leaves(_masks(problem)))
    return held or gathers_pairs(problem, (problem.bias, *problem.operands.values(), *problem.mask_arrays))


def gathers_pairs(problem: Problem, arrays: Sequence[Any]) -> bool:
    """Whether one of the arrays `[B|1, N|1, T|1, S|1]` (others, and None, are none) is read by gather."""
    tokens = slot_tokens(problem)
    return any(x is not None and x.ndim == 4 and _of_moved_pairs(x.shape, tokens) for x in arrays)


def gather_reason(problem: Problem) -> str:
    """Why the arrays of masks cannot be read by gather, for a message; empty if they can."""
    if not jax.tree.leaves(_masks(problem)):
        return ""
    row, column = jnp.zeros((16, 1), jnp.int32), jnp.zeros((1, 16), jnp.int32)

    def read(dtype):
        return lambda *index: jnp.zeros(jnp.broadcast_shapes(*(x.shape for x in index)), dtype)

    def evaluate(b, h, row, column):
        tiles = {
            f"held {n}": jnp.asarray(leaf) if jnp.ndim(leaf) == 0 else read(jnp.result_type(leaf))
            for n, leaf in enumerate(jax.tree.leaves(_masks(problem)))
        }
        mask, predicate = _masks_in_kernel(problem, tiles)
        seen = [] if mask is None else [mask(b, h, row, column)]
        return seen if predicate is None else [*seen, predicate.at(b, h, row, column, row, column)]

    try:
        jax.eval_shape(evaluate, jnp.int32(0), jnp.int32(0), row, column)
    except Exception as error:  # Whatever a mask does with a thing that is no array; with arrays it may well work.
        return f"a mask that does more with its arrays than reading entries ({error})"
    return ""


def make_pipeline(problem: Problem, has_bias: bool) -> Pipeline:
    """What happens between the two products, reading the tiles that `make_inputs` names."""
    operands = () if problem.score_mod is None else tuple(problem.score_mod.flat_operands())
    permuted = tuple(side for side, own in zip(("query", "key"), slot_tokens(problem), strict=True) if own is not None)

    def tokens(place, tiles):
        return tiles.get("query_tokens", place.row), tiles.get("key_tokens", place.column)

    def positions(place, tiles):
        return tiles.get("query_positions", place.row), tiles.get("key_positions", place.column)

    def part(name, place, tiles):
        if not callable(tiles.get(name)):
            return tiles.get(name)
        return tiles[name](place.b, place.h, *(jnp.maximum(x, 0) for x in tokens(place, tiles)))

    def visible(place, tiles):
        mask, predicate = _masks_in_kernel(problem, tiles)
        terms = [part(f"mask {n}", place, tiles) != 0 for n in range(len(problem.mask_arrays))]
        terms += [tiles[f"{side}_tokens"] >= 0 for side in permuted]
        if problem.query_segments is not None:
            ids = tiles["query_segments"]
            terms.append((ids == tiles["key_segments"]) & (ids >= 0))
        if mask is not None:
            terms.append(mask(place.b, place.h, *positions(place, tiles)))
        if predicate is not None:
            i, j = positions(place, tiles)
            allowed = predicate.at(place.b, place.h, i, j, place.row, place.column)
            terms.append((tiles["layout full"] != 0) | allowed)
        seen = jnp.ones((1, 1), bool)
        for term in terms:
            seen = seen & term
        return seen

    def modify(logits, place, tiles):
        own = {name: part(f"operand {name}", place, tiles) for name in operands}
        bias = part("bias", place, tiles)
        return modify_logits(problem, logits, own, bias, place.b, place.h, *positions(place, tiles))

    def drop(weights, place, tiles):
        seeded = dataclasses.replace(problem, seed=(tiles["seed 0"], tiles["seed 1"]))
        return drop_pairs(seeded, weights, place.b, place.h, *tokens(place, tiles))

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
    """How a problem is cut: lists of both sides, and the class of every tile, numpy if it is known while tracing."""

    rows: TileLists
    columns: TileLists
    code: Any


def make_tiling(problem: Problem, block_q: int, block_k: int) -> Tiling:
    """The live tiles of a problem, from its masks and segments; a tile that is cut off at an end counts as partial."""
    layout = problem.layout
    length, source = problem.sizes[1:3] if layout is None else (layout.query_slots, layout.key_slots)
    blocks = (min(block_q, length), min(block_k, source))
    cut = dataclasses.replace(problem, block_sizes=blocks)
    code, _ = schedule.tile_code(cut, True)
    xp = np if isinstance(code, np.ndarray) else jnp
    ragged = np.zeros(code.shape[2:], bool)
    ragged[-1:] |= bool(length % block_q)
    ragged[:, -1:] |= bool(source % block_k)
    code = xp.where((code == FULL) & ragged, np.int8(PARTIAL), code)
    return Tiling(_lists(code), _lists(code.swapaxes(2, 3)), code)


def _lists(code: Any) -> TileLists:
    lists, exists = schedule.tile_lists(code)
    return TileLists(*lists, *exists)


def make_backward(
    sources: dict[str, Any], cotangents: Any, code: Any, like: dict[str, Any]
) -> tuple[Backward, list[str]]:
    """What backward kernels read besides, from cotangents of both sums; and the inputs whose cotangents are wanted."""
    weighted, total = cotangents[0], jnp.swapaxes(cotangents[1], 1, 2)
    lse = jnp.swapaxes(sources["rows"]["lse"], 1, 2) if "rows" in sources else jnp.zeros_like(total)
    wanted = [f"operand {name}" for name in like.get("operands", {})] + (["bias"] if "bias" in like else [])
    return Backward(weighted.astype(sources["value"].dtype), lse, total, code), wanted


def named_cotangents(problem: Problem, sources: dict[str, Any], found: Any, like: dict[str, Any]) -> dict[str, Any]:
    """What a backward kernel has found, under the names of the sources in `like` and in their shapes and dtypes."""
    query, key, value, inputs = found
    named: dict[str, Any] = {"query": query, "key": key, "value": value}
    if "bias" in like:
        named["bias"] = _from_slots(problem, sources["bias"], inputs["bias"])
    if "operands" in like:
        named["operands"] = {
            name: _from_slots(problem, sources["operands"][name], inputs[f"operand {name}"])
            for name in like["operands"]
        }
    return jax.tree.map(lambda x, y: x.astype(y.dtype), {n: named[n] for n in like}, like)


def _from_slots(problem: Problem, array: Any, cotangent: Any) -> Any:
    """The cotangent of a bias or operand from that of the `TileInput` which `make_inputs` has made of it."""
    if array.ndim == 3:
        return cotangent[:, :, 0]
    tokens = slot_tokens(problem)
    return jax.vjp(lambda x: _moved(x, tokens), array)[1](cotangent)[0]
