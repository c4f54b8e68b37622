import numpy as np
import pytest

from jattn.recurrence.decay_schedules import alibi_slopes, retention_log_decay, tnl_decay_slopes


def test_slopes_of_heads_that_are_no_power_of_two():
    first = tnl_decay_slopes(6, 0, 2) / (1 + 1e-5)
    np.testing.assert_allclose(first, [1 / 4, 1 / 16, 1 / 64, 1 / 256, 1 / 2, 1 / 8])
    exponents = [*range(1, 9), 0.5, 1.5, 2.5, 3.5]
    np.testing.assert_allclose(alibi_slopes(12), 2.0 ** -np.array(exponents))


def test_the_start_and_ratio_of_the_published_code():
    for power in (1, 2, 3, 5):
        heads = 2**power
        start = 2 ** (-(2 ** -(np.log2(heads) - 3)))
        np.testing.assert_allclose(alibi_slopes(heads), start ** np.arange(1, heads + 1))


@pytest.mark.parametrize("layers", [1, 2, 7])
def test_the_first_layer_forgets_most_and_the_last_hardly(layers):
    slopes = np.stack([tnl_decay_slopes(4, layer, layers) for layer in range(layers)])
    for layer in range(layers):
        factor = 1 + 1e-5 if layers == 1 else 1 - layer / (layers - 1) + 1e-5
        np.testing.assert_allclose(slopes[layer], alibi_slopes(4) * factor)
    if layers > 1:
        np.testing.assert_allclose(slopes[-1], alibi_slopes(4) * 1e-5)


def test_the_printed_rule_is_another_one():
    np.testing.assert_allclose(tnl_decay_slopes(4, 1, 4, "paper"), [0, 1.5, 3, 4.5])
    assert tnl_decay_slopes(8, 0, 4, "paper").max() == 7
    assert tnl_decay_slopes(8, 0, 4).max() < 0.51


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ((0, 0, 1), "num_heads"),
        ((4, 2, 2), "layer"),
        ((4, -1, 2), "layer"),
        ((4, 0, 2, "linear"), "schedule"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, word):
    with pytest.raises(ValueError, match=word):
        tnl_decay_slopes(*arguments)
    with pytest.raises(ValueError, match="num_heads"):
        retention_log_decay(0)
