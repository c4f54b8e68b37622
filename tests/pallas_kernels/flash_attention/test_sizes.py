"""Tile sizes fit the shared memory of every device, and sizes that do not are refused with a choice that works."""

import json

import pytest

from pallas_kernels.flash_attention import sizes
from pallas_kernels.flash_attention.sizes import TileSizes


@pytest.mark.parametrize("capability", sorted(sizes.SHARED_MEMORY))
@pytest.mark.parametrize(("head_dim", "value_dim"), [(32, 32), (64, 64), (96, 96), (128, 128), (192, 128), (256, 256)])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("backward", [False, True])
def test_the_choice_fits(capability, head_dim, value_dim, itemsize, backward):
    chosen = sizes.choose(head_dim, value_dim, itemsize, backward, capability)
    asked = sizes.shared_bytes(chosen, head_dim, value_dim, itemsize, backward, capability)
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


KIND = "Some GPU"


def table_text(schema=sizes.SCHEMA, capability="9.0", **changes):
    entry = {"pass": "forward", "itemsize": 2, "head_dim": 128, "value_dim": 128}
    entry |= {"block_q": 64, "block_k": 128, "num_warps": 4, "num_stages": 2, **changes}
    return json.dumps({"schema": schema, "devices": {KIND: {"capability": capability, "tiles": [entry]}}})


def test_what_was_measured_on_a_device_goes_before_the_rule():
    table = sizes.read_table(table_text())
    measured = TileSizes(64, 128, 4, 2)
    assert sizes.choose(128, 128, 2, False, "9.0", KIND, table) == measured
    rule = sizes.by_rule(128, 128, 2, False, "9.0")
    assert rule != measured
    for other in ((128, 128, 2, True), (128, 128, 4, False), (64, 64, 2, False)):
        assert sizes.choose(*other, "9.0", KIND, table) == sizes.by_rule(*other, "9.0")
    assert sizes.choose(128, 128, 2, False, "9.0", "Another GPU", table) == rule
    assert sizes.choose(128, 128, 2, False, "9.0", "", table) == rule


def test_a_table_with_an_entry_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=f"an entry that {KIND} cannot run") as found:
        sizes.read_table(table_text(capability="8.9"))
    assert "101376" in str(found.value.__cause__)
    with pytest.raises(ValueError, match="cannot run"):
        sizes.read_table(table_text(block_q=48))
    with pytest.raises(ValueError, match="has schema"):
        sizes.read_table(table_text(schema="other/1"))


def test_the_shipped_table_is_read_and_fits():
    for (_, backward, *_), chosen in sizes.shipped_table().items():
        assert isinstance(backward, bool) and isinstance(chosen, TileSizes)


@pytest.mark.parametrize("capability", sorted(sizes.SHARED_MEMORY))
def test_an_entry_reaches_the_kernel_of_its_device_and_no_other(monkeypatch, capability):
    import jax

    import jattn
    from jattn.softmax import platforms

    table = sizes.read_table(table_text(head_dim=16, value_dim=16, block_q=32, block_k=16, capability=capability))
    monkeypatch.setattr(sizes, "shipped_table", lambda: table)
    query = jax.ShapeDtypeStruct((1, 64, 1, 16), "bfloat16")

    def programs(kind):
        # A function of its own each time, since what is traced depends on more than its arguments.
        with platforms.compiling_for("gpu", capability, kind):
            run = lambda *x: jattn.dot_product_attention(*x, implementation="triton")  # noqa: E731
            return str(jax.make_jaxpr(run)(query, query, query))

    assert "grid=(2, 1, 1)" in programs(KIND) and "grid=(2, 1, 1)" not in programs("Another GPU")
