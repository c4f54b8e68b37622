"""One tile of the backward pass, which all backward kernels for Triton share."""

from __future__ import annotations

from collections.abc import Sequence

from pallas_kernels.flash_attention.triton_tiles import (
    Static,
    dot,
    load_numbers,
    load_rows,
    load_tiles,
    make_place,
    visible_pairs,
    without_unseen,
)


def row_side(static: Static, refs, lead, h, i):
    """Queries, output cotangents, lse and total cotangents of a tile of rows."""
    query_ref, output_ref, lse_ref, total_ref = refs
    sizes, (_, length, _, _, _, head_dim, value_dim) = static.sizes, static.shape
    start = i * sizes.block_q
    query = load_rows(query_ref, lead, h, start, sizes.block_q, length, head_dim)
    output = load_rows(output_ref, lead, h, start, sizes.block_q, length, value_dim)
    lse, total = (load_numbers(ref, lead, h, start, sizes.block_q, length)[:, None] for ref in (lse_ref, total_ref))
    return query, output, lse, total


def tile_pull(static: Static, key_refs, input_refs, lead, side, place_of, partial: bool, wanted: Sequence[str]):
    """One tile of the backward pass: rows, keys, weights, and the cotangents of products and wanted inputs."""
    sizes, (_, _, source, _, _, head_dim, value_dim) = static.sizes, static.shape
    query, output, lse, total = side
    b, h, i, j = place_of
    place, starts = make_place(static, b, h, i, j)
    tiles = load_tiles(static, input_refs, lead, place, starts)
    visible = visible_pairs(static, place, tiles) if partial else None
    key = load_rows(key_refs[0], lead, h // static.group, starts[1], sizes.block_k, source, head_dim)
    value = load_rows(key_refs[1], lead, h // static.group, starts[1], sizes.block_k, source, value_dim)
    key, value = without_unseen(static, visible, 0, key, value)
    query, output, total = without_unseen(static, visible, 1, query, output, total)
    products = dot(static, query, key, trans_b=True)
    weighted_ct = dot(static, output, value, trans_b=True)
    lse = lse if static.pipeline.phi is None else None
    cotangents = (weighted_ct, total)
    pulled = static.pipeline.pull(products, static.scale, visible, place, tiles, lse, cotangents, wanted)
    return query, output, key, *pulled
