"""Tile sizes fit the shared memory of every device, and sizes that do not are refused with a choice that works."""

import pytest

from pallas_kernels.flash_attention import sizes
from pallas_kernels.flash_attention.sizes import TileSizes


@pytest.mark.parametrize("capability", sorted(sizes.SHARED_MEMORY))
@pytest.mark.parametrize(("head_dim", "value_dim"), [(32, 32), (64, 64), (96, 96), (128, 128), (192, 128), (256, 256)])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("backward", [False, True])
def test_the_choice_fits(capability, head_dim, value_dim, itemsize, backward):
    chosen = sizes.choose(head_dim, value_dim, itemsize, backward, capability)
    asked = sizes.shared_bytes(chosen, head_dim, value_dim, itemsize, backward)
    assert asked <= sizes.SHARED_MEMORY[capability]
    sizes.check(chosen, head_dim, value_dim, itemsize, backward, capability)


def test_what_does_not_fit_is_refused_with_a_choice_that_does():
    with pytest.raises(ValueError, match=r"ask for \d+ bytes .* has 101376; TileSizes\(.*\) fits"):
        sizes.check(TileSizes(128, 128, 8, 4), 256, 256, 2, True, "8.9")
    with pytest.raises(ValueError, match="block_q must be a power of two"):
        sizes.check(TileSizes(48, 64), 64, 64, 2, False, "8.0")


def test_unknown_devices_get_the_smallest_memory():
    assert sizes.choose(128, 128, 2, True, "99.0") == sizes.choose(128, 128, 2, True, "8.9")


@pytest.mark.parametrize(("width", "power"), [(1, 16), (16, 16), (17, 32), (96, 128), (192, 256)])
def test_widths_are_filled_up_to_powers_of_two(width, power):
    assert sizes.padded(width) == power
