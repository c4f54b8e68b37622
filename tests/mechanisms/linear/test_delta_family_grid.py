"""The delta family in float32: chunks against single tokens, on lengths, gates and strengths that break toys.

Every row of the batch is another case, so that a length takes one program; single tokens are one program for all
lengths, with padding behind the shorter ones.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jattn.mechanisms.linear.delta_rule import delta_rule
from jattn.mechanisms.linear.gated_delta_rule import gated_delta_rule
from jattn.mechanisms.linear.kda import kda
from jattn.mechanisms.linear.rwkv7 import rwkv7
from tests.mechanisms.linear.delta_truth import both, ratio, rng, unit

LONGEST, WIDTH, V_DIM = 130, 7, 5
CASES = ("mild gates", "extreme gates", "gates of 0", "nothing written", "strength 1", "strength 2")
FUNCTIONS = {"delta_rule": delta_rule, "gated_delta_rule": gated_delta_rule, "kda": kda, "rwkv7": rwkv7}


def gates(shape):
    """Log decays of the cases."""
    made = -0.3 * np.abs(rng(3).normal(size=shape))
    # Among mild ones, so that they stand near each other in a chunk, and 0 for a head.
    made[1, 2::11], made[1, 4::17], made[1, 5::23], made[1, 3::7, :1] = -1e4, -3e4, -50, 0
    made[2] = 0
    return made


def strengths(shape):
    """Betas, or rates, of the cases."""
    made = rng(4).uniform(0.05, 0.95, size=shape)
    made[3], made[4], made[5] = 0, 1, 2
    return made


def inputs(name):
    """Arguments for all cases; the delta rules have more heads of values than of keys."""
    r, rows = rng(2), (len(CASES), LONGEST)
    made = {
        "query": r.normal(size=(*rows, 2, WIDTH)),
        "key": unit(r.normal(size=(*rows, 2, WIDTH))),
        "value": r.normal(size=(*rows, 2 if name == "rwkv7" else 4, V_DIM)),
    }
    made["initial_state"] = r.normal(size=(len(CASES), made["value"].shape[2], WIDTH, V_DIM))
    channels = (*rows, 2, WIDTH)
    if name == "rwkv7":
        made |= {"removal_key": unit(r.normal(size=channels)), "rate": strengths(channels)}
    else:
        made["beta"] = strengths((*rows, 4))
    if name != "delta_rule":
        made["log_decay"] = gates((*rows, 4) if name == "gated_delta_rule" else channels)
    return {name: x.astype(np.float32) for name, x in made.items()}


def cut(arrays, length):
    return {name: x if name == "initial_state" else x[:, :length] for name, x in arrays.items()}


def weights(name):
    heads = 2 if name == "rwkv7" else 4
    r = rng(9)
    shapes = ((len(CASES), LONGEST, heads, V_DIM), (len(CASES), heads, WIDTH, V_DIM))
    return tuple(r.normal(size=shape).astype(np.float32) for shape in shapes)


@functools.cache
def single_tokens(name):
    def run(segment_ids, **arrays):
        ids = jax.lax.stop_gradient(segment_ids).astype(jnp.int32)
        return FUNCTIONS[name](**arrays, segment_ids=ids, mode="recurrent", return_final_state=True)

    return both(run)


def grid():
    for name in FUNCTIONS:
        for length in (1, 7, 63, 65, 130):
            # Decays a channel make the largest programs.
            takes_long = name in ("kda", "rwkv7") and length > 7 and (name, length) != ("kda", 65)
            yield pytest.param(name, length, marks=[pytest.mark.slow] if takes_long else [])


@pytest.mark.parametrize(("name", "length"), list(grid()))
def test_chunks_are_single_tokens(name, length):
    given, (for_out, for_state) = inputs(name), weights(name)
    ids = np.where(np.arange(LONGEST) < length, 0.0, -1.0).astype(np.float32)
    (out, state), slopes = single_tokens(name)(
        {**given, "segment_ids": np.tile(ids, (len(CASES), 1))}, (for_out, for_state)
    )
    expected = {"out": out[:, :length], "state": state, **cut(slopes, length)}
    chunks = both(lambda **arrays: FUNCTIONS[name](**arrays, return_final_state=True))
    (out, state), found = chunks(cut(given, length), (for_out[:, :length], for_state))
    for part, x in {"out": out, "state": state, **found}.items():
        assert np.isfinite(x).all()
        for case, mine, truth in zip(CASES, x, expected[part], strict=True):
            assert ratio(mine, truth) < 1e-5, (part, case, ratio(mine, truth))
