"""The device that figures are measured on: what it is called, its driver, and what its maker says it can do at most."""

import subprocess
from typing import Any, NamedTuple

import jax


class Peak(NamedTuple):
    """Dense bfloat16 FLOP/s summed in float32, bytes/s of device memory, and where the maker says so."""

    flops: float
    bandwidth: float
    source: str


_H100 = "NVIDIA H100 Tensor Core GPU datasheet (half of the figure with sparsity)"
_A100 = "NVIDIA A100 Tensor Core GPU datasheet"
PEAKS = {
    "NVIDIA A100-SXM4-40GB": Peak(312e12, 1.555e12, _A100),
    "NVIDIA A100-SXM4-80GB": Peak(312e12, 2.039e12, _A100),
    "NVIDIA H100 80GB HBM3": Peak(989e12, 3.35e12, _H100),
    "NVIDIA H100 PCIe": Peak(756e12, 2.0e12, _H100),
    "NVIDIA H200": Peak(989e12, 4.8e12, "NVIDIA H200 Tensor Core GPU datasheet (half of the figure with sparsity)"),
    "NVIDIA B200": Peak(2250e12, 8.0e12, "NVIDIA DGX B200 datasheet (an eighth; half of the figure with sparsity)"),
    "NVIDIA GeForce RTX 4090": Peak(165.2e12, 1.008e12, "NVIDIA Ada GPU architecture whitepaper, appendix A"),
}
"""By device kind; an unknown device has no share of a peak."""


def driver_version() -> str | None:
    """The version of NVIDIA's driver, None where there is none."""
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return None
    return found[0] if found else None


def describe() -> dict[str, Any]:
    """The attached device as results name it."""
    device = jax.devices()[0]
    peak = PEAKS.get(device.device_kind)
    return {
        "kind": device.device_kind,
        "platform": device.platform,
        "capability": str(getattr(device, "compute_capability", "")) or None,
        "driver": driver_version(),
        "peak": None if peak is None else peak._asdict(),
    }


def require_gpu(command: str, otherwise: str) -> None:
    """Stop a script that measures a GPU where there is none.

    Raises:
        SystemExit: the default backend is no GPU; the message says what runs without one.
    """
    if jax.default_backend() != "gpu":
        raise SystemExit(
            f"{command} measures an NVIDIA GPU, and JAX sees {jax.devices()[0].device_kind!r} only "
            f"(pip install 'jax[cuda13]' brings the GPU's back end). {otherwise}"
        )
