"""How tiles are found, and how partial ones are told what nobody may see."""

import jax.numpy as jnp
import pytest

import jattn
from jattn.softmax.arguments import build_problem
from jattn.softmax.blockwise.schedule import make_schedule

QUERY = jnp.zeros((1, 24, 2, 4))
IDS = jnp.arange(24)[None] // 7


@pytest.mark.parametrize(
    ("guard", "arguments"),
    [
        ("none", {"is_causal": True}),
        ("segments", {"is_causal": True, "segment_ids": IDS}),
        ("tile", {"is_causal": True, "segment_ids": (IDS, IDS)}),
        ("tile", {"segment_ids": IDS, "mask": ~jattn.masks.causal()}),
        ("tile", {"mask": jnp.ones((24, 24), bool)}),
    ],
)
def test_the_cheapest_sufficient_guard_is_taken(guard, arguments):
    problem, _ = build_problem(QUERY, QUERY, QUERY, block_sizes=(8, 8), **arguments)
    assert make_schedule(problem, True).guard == guard


def test_only_tiles_with_visible_pairs_are_listed():
    problem, _ = build_problem(QUERY, QUERY, QUERY, block_sizes=(8, 8), mask=jattn.masks.sliding_window(3))
    schedule = make_schedule(problem, True)
    assert schedule.full_count.sum() == 0
    assert schedule.partial_count[0, 0].tolist() == [1, 2, 2]
