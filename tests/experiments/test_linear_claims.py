"""Claims about linear attention and recurrences: judged by their stated rules, and run in a few steps."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.claims import (
    dsf_normalization,
    flowformer_vs_linear,
    hedgehog_conversion,
    lightnet_one_scan,
    mqar_state_size,
    registry,
    titans_recall,
)
from jattn.mechanisms.linear.attention_distill_loss import attention_distill_loss


def test_verdicts_of_state_sizes():
    found = dict.fromkeys(mqar_state_size.MIXERS, 0.5) | {"softmax_attention": 0.99, "SelectiveLookup": 0.9}
    assert mqar_state_size.judge(found | dict.fromkeys(mqar_state_size.DELTA, 0.8)) == ("reproduced", [])
    verdict, failed = mqar_state_size.judge(found)
    assert verdict == "partly"
    assert len(failed) == 1
    assert "delta" in failed[0]
    assert mqar_state_size.judge(dict.fromkeys(mqar_state_size.MIXERS, 1.0))[0] == "not reproduced"


def test_the_state_of_a_row_is_counted_as_decoding_keeps_it():
    # BaseConv of width 3 keeps two inputs of 64 channels.
    assert mqar_state_size.state_size("softmax_attention") == 2 * 64 + 2 * 64 * 64
    assert mqar_state_size.state_size("SelectiveLookup") == mqar_state_size.state_size("softmax_attention")
    # S and z of two heads.
    assert mqar_state_size.state_size("linear_attention") == 2 * 64 + 2 * (32 * 32 + 32)
    assert mqar_state_size.state_size("BaseConv") == 2 * 64 + 63 * 64


@pytest.mark.parametrize(
    ("teacher", "kl", "tuned", "verdict"),
    [
        (0.99, 0.1, 0.98, "reproduced"),
        (0.99, 0.1, 0.80, "partly"),
        (0.99, 0.6, 0.98, "partly"),
        (0.99, 0.6, 0.80, "not reproduced"),
        (0.50, 0.1, 0.98, "not reproduced"),
    ],
)
def test_verdicts_of_conversion(teacher, kl, tuned, verdict):
    found = {name: {"kl": 0.5, "accuracy": [0.2, 0.9]} for name in ("elu1", "relu")}
    found["hedgehog"] = {"kl": kl, "accuracy": [0.5, tuned]}
    assert hedgehog_conversion.judge(teacher, found)[0] == verdict


def test_weights_of_conversion_are_those_that_the_models_attend_with():
    rng = np.random.default_rng(0)
    query, key = rng.standard_normal((2, 2, 5, 3, 4))
    query_features, key_features = rng.uniform(0.1, 1, (2, 2, 5, 3, 6))
    soft = hedgehog_conversion.weights(None, query, key)
    linear = hedgehog_conversion.weights((lambda x: query_features, lambda x: key_features), query, key)
    loss = attention_distill_loss(query, key, query_features, key_features, is_causal=True)
    found = hedgehog_conversion.divergence(soft, linear) + hedgehog_conversion.entropy(soft)
    np.testing.assert_allclose(found, loss, rtol=1e-5)


@pytest.mark.parametrize(
    ("flow", "verdict"),
    [([0.9, 0.92, 0.91], "reproduced"), ([0.9, 0.71, 0.7], "partly"), ([0.6, 0.7, 0.7], "not reproduced")],
)
def test_verdicts_of_flow(flow, verdict):
    assert flowformer_vs_linear.judge(flow, [0.7, 0.7, 0.7])[0] == verdict


@pytest.mark.parametrize(
    ("learnt", "plain", "verdict"),
    [(0.9, 0.3, "reproduced"), (0.5, 0.3, "partly"), (0.32, 0.3, "not reproduced"), (0.9, 0.88, "not reproduced")],
)
def test_verdicts_of_the_learnt_divisor(learnt, plain, verdict):
    values = 1.0, 0.3, plain, learnt
    assert dsf_normalization.judge(dict(zip(dsf_normalization.MECHANISMS, values, strict=True)))[0] == verdict


def test_verdicts_of_one_scan():
    names = [f"{orders} scans, decay a channel" for orders in (2, 4)]
    accuracy = {"one pass": 1.0, "one scan": 0.5, "two scans": 1.0}
    good = lightnet_one_scan.Found(dict(zip(names, (1.5, 3.0), strict=True)), dict.fromkeys(names, 2.0), accuracy)
    assert lightnet_one_scan.judge(good) == "reproduced"
    assert lightnet_one_scan.judge(dataclasses.replace(good, accuracy=accuracy | {"one pass": 0.9})) == "partly"
    slow = dict(zip(names, (0.9, 3.0), strict=True))
    assert lightnet_one_scan.judge(dataclasses.replace(good, times=slow)) == "not reproduced"


def test_scans_in_four_orders_reach_every_pair_of_places():
    def mix(x):
        return jnp.cumsum(x, 1)

    grid = jax.nn.one_hot(4, 9)[None, :, None]
    seen = [np.asarray(lightnet_one_scan.scanned(mix, orders, 3, grid))[0, :, 0] > 0 for orders in (1, 2, 4)]
    assert [int(places.sum()) for places in seen] == [5, 9, 9]
    both_ways = lightnet_one_scan.scanned(mix, 4, 3, grid)[0, :, 0].tolist()
    # The place itself comes four times; right of it, it is before in both orders.
    assert both_ways == [2.0, 2.0, 2.0, 2.0, 4.0, 2.0, 2.0, 2.0, 2.0]


def test_titans_are_judged_beyond_the_window_by_where_values_lie():
    inside, outside = titans_recall.task(16, 1.0, 0, 7), titans_recall.task(16, 1.0, 8, 16)
    whole, near, far = (task.examples("test", np.arange(64)) for task in (titans_recall.task(16, 1.0), inside, outside))
    np.testing.assert_array_equal(near["weights"] + far["weights"], whole["weights"])
    assert near["weights"].any()
    assert far["weights"].any()
    for row, place in zip(*np.nonzero(far["weights"]), strict=True):
        values = whole["inputs"][row, 1:8:2].tolist()
        assert place - (2 * values.index(whole["targets"][row, place]) + 1) >= 8


@pytest.mark.parametrize(
    ("titans", "verdict"),
    [((0.9, 0.8, 0.7), "reproduced"), ((0.9, 0.1, 0.1), "partly"), ((0.4, 0.4, 0.4), "not reproduced")],
)
def test_verdicts_of_titans(titans, verdict):
    assert titans_recall.judge({"window": 0.1} | dict(zip(titans_recall.TITANS, titans, strict=True))) == verdict


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dsf_normalization", "hedgehog_conversion"])
def test_claims_of_the_linear_family_run(name, tmp_path):
    result = registry.run(registry.find(name), tmp_path, True, lambda text: None)
    assert result["verdict"] in registry.VERDICTS
    assert result["numbers"]
