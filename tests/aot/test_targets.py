"""Targets, and what compiling for one says where its compiler is missing."""

import pytest

import jattn.aot
from jattn.aot import targets
from jattn.softmax import platforms
from pallas_kernels.flash_attention.sizes import SHARED_MEMORY


def test_every_gpu_has_the_shared_memory_that_tile_sizes_are_chosen_for():
    for target in jattn.aot.TARGETS.values():
        if target.platform == "gpu":
            assert SHARED_MEMORY[target.capability] == target.shared_memory
            assert f"core_count: {target.cores}" in targets._description(target)


def test_an_unknown_target_names_the_nearest():
    with pytest.raises(ValueError, match="unknown target 'h10'; did you mean h100"):
        jattn.aot.find_target("h10")


def test_the_platform_is_that_of_the_target_while_compiling_for_it():
    assert platforms.current().name == "cpu"
    with platforms.compiling_for("gpu", "8.0"):
        assert platforms.current() == platforms.Platform("gpu", "8.0", attached=False)
    assert platforms.current().attached


def test_a_report_can_be_read():
    assert "does not compile: ValueError: no" in str(jattn.aot.Report("v5e", "ValueError: no"))
    assert not jattn.aot.Report("v5e", "ValueError: no").compiles
