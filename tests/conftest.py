"""What every test shares: run-time checks of shapes, a persistent compilation cache, and child processes with devices.

This file is loaded before any module of jattn, so that the import hook sees them all.
"""

import functools
import gc
import importlib.metadata
import os
import pathlib
import subprocess
import sys
import textwrap

ROOT = pathlib.Path(__file__).resolve().parents[1]

# Programs of tests are small and run once, so they are compiled with little optimization, which halves the time of the
# suite; what is measured, and errors against a plain program, ask for `usual_options()`. JATTN_TESTS_OPTIMIZED=1
# compiles everything as users do: .ci/run does so for the engine's tests.
OPTIMIZED = os.environ.get("JATTN_TESTS_OPTIMIZED") == "1"
# Options of the compiler end the process where they are not known, and insides of jax change.
KNOWN_JAX = importlib.metadata.version("jaxlib").startswith("0.10.")
if not OPTIMIZED and KNOWN_JAX:
    # Small programs are not worth being split for several threads.
    flags = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}"

import jax  # noqa: E402
import jaxtyping  # noqa: E402
import pytest  # noqa: E402

# Where annotations are checked at run time, with beartype. Public functions take array-likes and validate themselves
# with errors of their own, so they do not stand here.
HOOKED = (
    "jattn.layers",
    "jattn.models",
    "jattn.recurrence",
    "jattn.softmax.blockwise",
    "jattn.softmax.compilers",
    "jattn.softmax.dropout",
    "jattn.softmax.gather",
    "jattn.softmax.merge",
    "jattn.softmax.reference",
    "jattn.softmax.topk",
)
# Readers of files take a step for every few bytes and have no shapes; checked at each call they would take minutes.
UNHOOKED = ("jattn.models.pretrained.readers",)
# Pytree dataclasses must stay free to hold anything: vmap and tree.map put tracers, axes and None into them.
PYTREE = "register_dataclass"


def modules_to_hook() -> list[str]:
    """The modules that HOOKED covers and that define no pytree, found by reading files, so that nothing is imported."""
    names = []
    for path in sorted((ROOT / "jattn").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts)
        below = any(name == hooked or name.startswith((hooked + ".", hooked + "_")) for hooked in HOOKED)
        below = below and not name.startswith(UNHOOKED)
        if below and parts[-1] != "__init__" and PYTREE not in path.read_text(encoding="utf-8"):
            names.append(name)
    return names


def cache_directory() -> str:
    """The folder of compiled programs: $JAX_COMPILATION_CACHE_DIR, or one in the user's cache folder."""
    default = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "jattn" / "jax"
    return os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(default)


jaxtyping.install_import_hook(modules_to_hook(), "beartype.beartype")
jax.config.update("jax_disable_most_optimizations", not OPTIMIZED)
jax.config.update("jax_compilation_cache_dir", cache_directory())
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


if KNOWN_JAX:
    from jax._src.interpreters import mlir

    # Each program is written down in a context of its own, which takes 8 ms to make, a quarter of what a test costs.
    mlir.make_ir_context = functools.cache(mlir.make_ir_context)


class FewPrograms:
    """Forgets compiled programs before they are too many for one process.

    Each holds several of the memory maps of which Linux gives a process 65,530 (`vm.max_map_count`); beyond that the
    compiler ends the process.
    """

    MAPS = pathlib.Path("/proc/self/maps")
    LIMIT, EVERY = 30_000, 10

    def __init__(self):
        self.done = 0

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_teardown(self):
        self.done += 1
        if self.done % self.EVERY or not self.MAPS.exists():
            return
        with self.MAPS.open("rb") as lines:
            count = sum(1 for _ in lines)
        if count > self.LIMIT:
            jax.clear_caches()
            gc.collect()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    # Every case costs compilations: the fast suite runs the first and the last one of a grid, the slow suite the rest.
    grids = {}
    for item in items:
        if hasattr(item, "callspec") and not any(item.get_closest_marker(name) for name in ("slow", "every_case")):
            grids.setdefault((item.path, item.cls, item.originalname), []).append(item)
    for cases in grids.values():
        for item in cases[1:-1]:
            item.add_marker(pytest.mark.slow)


def pytest_configure(config):
    # JAX collects garbage of its own with each of Python's collections, which thousands of programs make long.
    gc.freeze()
    gc.set_threshold(100_000, 50, 50)
    config.pluginmanager.register(FewPrograms())


@pytest.fixture(scope="session")
def run_with_devices():
    """`run_with_devices(n, code) -> stdout`: runs code in a new process that has n CPU devices, and asserts success.

    The number of devices is fixed when a process starts its backend, so a test of sharding cannot set it in its own.
    """

    def run(num_devices: int, code: str, timeout: float = 300.0) -> str:
        environment = dict(
            os.environ,
            JAX_PLATFORMS="cpu",
            XLA_FLAGS=f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={num_devices}",
            JAX_DISABLE_MOST_OPTIMIZATIONS=str(not OPTIMIZED),
            PYTHONPATH=os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
            JAX_COMPILATION_CACHE_DIR=cache_directory(),
            JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
            JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES="0",
        )
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code)],
            env=environment,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    return run
