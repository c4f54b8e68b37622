"""The conformance suite finds what it is there to find: a sound mechanism passes, each defect fails its own check."""

import importlib.util
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jattn.layers.attention import MultiHeadAttention
from jattn.mechanisms.entry import PATTERNS, Cost, LayerExample
from jattn.testing import conformance
from jattn.testing.conformance import EXEMPT, FAILED, NOT_APPLICABLE, PASSED, assert_conforms, check_mechanism

spec = importlib.util.spec_from_file_location("conformance_toys", pathlib.Path(__file__).parent / "toys.py")
toys = sys.modules["conformance_toys"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(toys)


def verdicts(entry, only=None):
    return {result.check: result for result in check_mechanism(entry, only)}


@pytest.mark.slow
def test_a_sound_mechanism_passes_every_check():
    results = verdicts(toys.entry())
    assert {name: str(r) for name, r in results.items() if r.status != PASSED} == {}
    assert len(results) == len(conformance.ATTENTION)


@pytest.mark.parametrize(
    ("defect", "check", "message"),
    [
        ("float32 out", "shapes", "expected the dtype of query, bfloat16"),
        ("0 / 0", "empty_rows", "not finite"),
        ("mean of nothing", "empty_rows", "expected 0"),
        ("leak", "poison", "not equal bit for bit"),
        ("wrong gradient", "derivative", "the gradients say"),
        ("noise", "determinism", "not equal bit for bit"),
        ("acausal", "causality", "outputs before token 1"),
        ("acausal", "patterns", "give the same output"),
        ("peek", "causality", "not equal bit for bit"),
        ("peek", "lengths", "differs by"),
        ("counts queries", "truncation", "differs by"),
        ("order", "permutation", "differs by"),
        ("eager differs", "jit", "RMS error"),
        ("needs values", "gradients", "ConcretizationTypeError"),
        ("across examples", "vmap", "differs by"),
        ("noise", "export", ""),
        ("no forward mode", "forward_mode", "the jvp is refused"),
        ("narrow logits", "precision", "logits in less than float32"),
        ("coarse logits", "precision", "RMS error"),
        ("counts queries", "decode", "differs by"),
    ],
)
def test_a_defect_fails_its_check(defect, check, message):
    result = verdicts(toys.entry(defect), only=[check])[check]
    assert result.status == FAILED, str(result)
    assert message in result.detail


def test_narrow_states_fail_the_precision_check():
    linear = {"function": toys.linear, "patterns": PATTERNS[:2]}
    sound = verdicts(toys.entry(**linear), only=["precision", "empty_rows", "truncation"])
    assert sound["precision"].status == PASSED, str(sound["precision"])
    assert sound["empty_rows"].status == NOT_APPLICABLE
    assert sound["truncation"].status == NOT_APPLICABLE
    narrow = verdicts(toys.entry("narrow state", **linear), only=["precision"])["precision"]
    assert narrow.status == FAILED, str(narrow)


@pytest.mark.parametrize(
    ("changes", "check", "status"),
    [
        ({"cost": Cost("T", "T^2")}, "work", FAILED),
        ({"cost": Cost("T^2", "T^2")}, "work", PASSED),
        ({"cost": Cost("T^2", "T")}, "memory", FAILED),
        ({"cost": None}, "memory", NOT_APPLICABLE),
        ({"function": toys.linear, "patterns": PATTERNS[:2], "cost": Cost("T", "T")}, "work", PASSED),
        ({"function": toys.linear, "patterns": PATTERNS[:2], "cost": Cost("T^2", "T")}, "work", FAILED),
        ({"function": toys.linear, "patterns": PATTERNS[:2], "cost": Cost("T", "T")}, "memory", PASSED),
        ({"decode": "no: it is a toy"}, "decode", NOT_APPLICABLE),
    ],
)
def test_declared_costs_are_held_to(changes, check, status):
    result = verdicts(toys.entry(**changes), only=[check])[check]
    assert result.status == status, str(result)


def test_an_exemption_is_honored_and_printed():
    result = verdicts(toys.entry("order", exempt={"permutation": "values carry positions"}), ["permutation"])[
        "permutation"
    ]
    assert result.status == EXEMPT
    assert str(result) == "toy permutation: exempt (values carry positions)"


def test_an_exemption_from_a_check_that_does_not_exist_fails():
    results = check_mechanism(toys.entry(exempt={"permutaton": "a slip"}), only=[])
    assert [str(r) for r in results] == [
        "toy permutaton: failed (exempt names a check that a primitive does not have; did you mean permutation?)"
    ]


def test_unknown_checks_are_named():
    with pytest.raises(ValueError, match="unknown check 'shape' for a primitive; there are: shapes, gradients"):
        check_mechanism(toys.entry(), only=["shape"])


def test_assert_conforms_names_every_failure():
    with pytest.raises(AssertionError, match=r"toy poison: failed .*"):
        assert_conforms(toys.entry("leak"), only=["shapes", "poison"])
    assert [r.status for r in assert_conforms(toys.entry(), only=["shapes"])] == [PASSED]


def test_a_missing_example_is_said():
    result = check_mechanism(toys.entry(example=None), only=["gradients"])[0]
    assert result.status == FAILED
    assert "has no example(key, length)" in result.detail


def test_both_patterns_without_a_switch_are_refused():
    def fixed(query, key, value):
        return value

    result = check_mechanism(toys.entry(function=fixed), only=["gradients"])[0]
    assert "neither" in result.detail or "no is_causal" in result.detail


class Leaky(MultiHeadAttention):
    """A layer whose gate, closed at first, lets the mean of all tokens through."""

    def __init__(self, *args, rngs, **kwargs):
        super().__init__(*args, rngs=rngs, **kwargs)
        self.gate = nnx.Param(jnp.zeros(()))

    def attend(self, query, key, value, *, inputs, **arguments):
        o, aux = super().attend(query, key, value, inputs=inputs, **arguments)
        return o + self.gate.get_value().astype(o.dtype) * value.mean(1, keepdims=True), aux


def layer_entry(layer, **changes):
    def layer_example(key, length):
        return LayerExample((8, 2), {}, (jax.random.normal(key, (2, length, 8)),))

    return toys.entry(function=None, kind="layer", layer=layer, example=layer_example, **changes)


@pytest.mark.slow
def test_a_sound_layer_passes_every_check():
    results = verdicts(layer_entry(MultiHeadAttention, cost=Cost("T^2", "T")))
    assert {name for name, r in results.items() if r.status != PASSED} == {"jit"}, list(map(str, results.values()))


def test_a_fault_behind_a_closed_gate_is_found():
    results = verdicts(layer_entry(Leaky), only=["causality", "decode", "poison"])
    assert [r.status for r in results.values()] == [FAILED] * 3


def test_arguments_of_both_batch_and_length_are_tokens_too():
    def gated(query, key, value, gate, *, is_causal=False):
        return toys.attention(query, key, value, is_causal=is_causal) * gate[..., None, None]

    def gated_example(key, length):
        return (*toys.example(key, length)[0], jax.random.normal(key, (2, length))), {}

    def acausal(query, key, value, gate, *, is_causal=False):
        return gated(query, key, value, gate, is_causal=is_causal) * jnp.cos(gate.sum())

    settings = {"example": gated_example, "patterns": PATTERNS[:2]}
    only = ["shapes", "lengths", "causality", "permutation"]
    assert_conforms(toys.entry(function=gated, **settings), only)
    assert verdicts(toys.entry(function=acausal, **settings), only)["causality"].status == FAILED


def test_counted_work_follows_loops_and_branches():
    from jattn.testing.jaxprs import count_work

    x = jnp.ones((8, 8))

    def loops(n, x):
        def body(i, x):
            return jax.lax.cond(i % 2 == 0, lambda x: x @ x, lambda x: x, x)

        return jax.lax.fori_loop(0, n, body, jax.lax.scan(lambda c, _: (c @ c, None), x, length=3)[0])

    product = 2 * 8**3
    assert count_work(jax.jit(loops), 4, x) == product * (3 + 2)
    assert count_work(jax.checkpoint(lambda x: x @ x), x) == product
    assert count_work(jax.nn.relu, x) == 64
    image, kernel = jnp.ones((1, 6, 6, 3)), jnp.ones((2, 2, 3, 5))
    convolve = jax.lax.conv_general_dilated
    work = count_work(
        lambda i, k: convolve(i, k, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")), image, kernel
    )
    assert work == 2 * 25 * 5 * (2 * 2 * 3)
    assert np.isfinite(count_work(jnp.sort, x))
