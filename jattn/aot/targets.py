"""The devices that programs can be compiled for without them."""

from __future__ import annotations

import dataclasses
import difflib
import os
from typing import Any


@dataclasses.dataclass(frozen=True)
class Target:
    """A device, or a slice of a TPU pod.

    Args:
        name: as on the command line.
        platform: "gpu" or "tpu".
        title: what the maker calls it.
        capability: compute capability of a GPU.
        cores: multiprocessors of a GPU.
        shared_memory: bytes that a block of a GPU may ask for.
        memory: bytes of device memory.
        topology: of a TPU slice.
    """

    name: str
    platform: str
    title: str
    capability: str = ""
    cores: int = 0
    shared_memory: int = 0
    memory: int = 0
    topology: str = ""


def _gpu(name: str, title: str, capability: str, cores: int, shared_memory: int, gigabytes: int) -> Target:
    return Target(name, "gpu", title, capability, cores, shared_memory, gigabytes * 10**9)


def _tpu(name: str, topology: str) -> Target:
    return Target(name, "tpu", f"TPU {topology.replace(':', ' ')}", topology=topology)


TARGETS = {
    target.name: target
    for target in (
        _gpu("a100", "NVIDIA A100-SXM4-80GB", "8.0", 108, 166912, 85),
        _gpu("h100", "NVIDIA H100 80GB HBM3", "9.0", 132, 232448, 85),
        _gpu("h200", "NVIDIA H200", "9.0", 132, 232448, 150),
        _gpu("b200", "NVIDIA B200", "10.0", 148, 232448, 190),
        _gpu("rtx4090", "NVIDIA GeForce RTX 4090", "8.9", 128, 101376, 25),
        _tpu("v4", "v4:2x2x1"),
        _tpu("v5e", "v5e:2x2"),
        _tpu("v5p", "v5p:2x2x1"),
        _tpu("v6e", "v6e:2x2"),
        _tpu("v5e-256", "v5e:16x16"),
        _tpu("v6e-256", "v6e:16x16"),
    )
}
"""All targets by name."""


def find_target(name: str) -> Target:
    """The target of a name.

    Raises:
        ValueError: there is none; the nearest ones are named.

    Example:
        >>> find_target("h100").capability
        '9.0'
    """
    if name not in TARGETS:
        near = difflib.get_close_matches(name, TARGETS, 3, 0.3)
        raise ValueError(
            f"unknown target {name!r}; did you mean {' or '.join(near)}?"
            if near
            else f"unknown target {name!r}; there are {', '.join(TARGETS)}"
        )
    return TARGETS[name]


def devices(target: Target) -> list[Any]:
    """Devices of the target, which programs can be compiled for and not run on; four at least.

    Raises:
        RuntimeError: the compiler for the platform is not installed; the message says what is.
    """
    import jax
    from jax.experimental import topologies

    jax.devices()  # Finds the plugins.
    try:
        if target.platform == "gpu":
            found = topologies.get_topology_desc(
                platform="cuda", topology_name="", target_config=_description(target), topology="1x1x4"
            )
        else:
            # Several processes may compile, since none of them holds a device.
            os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
            # Without these the runtime looks for the machines of a pod.
            os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
            os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
            os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
            found = topologies.get_topology_desc(platform="tpu", topology_name=target.topology)
    except Exception as error:  # Whatever class the missing plugin raises.
        extra = "aot-cuda" if target.platform == "gpu" else "aot-tpu"
        raise RuntimeError(
            f"{target.name} needs its compiler: pip install 'jattn[{extra}]' (in an environment of its own, with "
            f"JAX_PLATFORMS=cpu set); {type(error).__name__}: {str(error).splitlines()[0][:160]}"
        ) from error
    return list(found.devices)


def _description(target: Target) -> str:
    major, minor = target.capability.split(".")
    per_core = {"8.9": 102400}.get(target.capability, target.shared_memory + 1024)
    return f"""
        gpu_device_info {{
          threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: {1536 if minor == "9" else 2048}
          core_count: {target.cores} fpus_per_core: 128
          shared_memory_per_block: 49152 shared_memory_per_core: {per_core}
          shared_memory_per_block_optin: {target.shared_memory}
          block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
          registers_per_core_limit: 65536 registers_per_block_limit: 65536
          memory_bandwidth: 2000000000000 l2_cache_size: 52428800 clock_rate_ghz: 1.8
          device_memory_size: {target.memory}
          cuda_compute_capability {{ major: {major} minor: {minor} }}
        }}
        platform_name: "CUDA"
        dnn_version_info {{ major: 9 minor: 8 patch: 0 }}
        device_description_str: "{target.title}"
    """
