"""Measure attention: forward and backward, per implementation and length, beside other libraries in the same run.

    python -m experiments.benchmark --suite=lengths          causal, T = 128 ... 8192, beside jax.nn and torch
    python -m experiments.benchmark --suite=short            T <= 512: 30 interleaved pairs with jax.nn
    python -m experiments.benchmark --suite=sparse           window, packing, GNA at T = 16384: time per visited pair
    python -m experiments.benchmark --suite=lengths --lengths=1024,2048 --rounds=5
    python -m experiments.benchmark --suite=gpu              on an NVIDIA GPU: all kernels, cuDNN and JAX's own
    python -m experiments.benchmark --suite=gpu --groups=published,decode --lengths=4096
    python -m experiments.benchmark --suite=gpu --tiny --output=results/gpu    the same path anywhere, at toy sizes

Programs are compiled anew and then run in turn, so that a busy machine disturbs all alike; ratios are taken round by
round and given as medians with quartiles. `compile s` includes tracing, `temp MB` is what the compiler reserves
besides arguments and results. Dense peers stop at --max_dense_length: their memory grows with the square of the
length. The table goes to the terminal, everything measured to OUTPUT/SUITE.json, a plot of time against length to
OUTPUT/lengths.png. Measure on a machine that does nothing else.

The suite gpu prints TFLOP/s (2 B N pairs (D + Dv) forward, 2.5 times that backward, half of all pairs for causal
attention, visible pairs for windows and documents), the share of the device's peak, temporary memory, and time to that
of cuDNN through jax.nn; it writes one JSON file a group, with device, driver and versions.
"""

import pathlib
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

import jattn
from experiments import devices, gpu_suite, peers, records
from experiments.measures import visited_pairs
from experiments.peers import gradient_of
from experiments.timing import Subject, compiled, interleave, ratio, spread
from experiments.train import versions

HEADS, DIM = 8, 64
PASSES = ("forward", "forward+backward")
RESULTS = pathlib.Path("experiments/results")


def make_arrays(length: int) -> tuple[jax.Array, ...]:
    """Query, key and value `[1, T, 8, 64]`, float32."""
    rng = np.random.default_rng(0)
    return tuple(jnp.asarray(rng.standard_normal((1, length, HEADS, DIM)), jnp.float32) for _ in range(3))


def ours(name: str, arrays, gradient: bool, **arguments: Any) -> Subject:
    """jattn's engine with the given arguments."""

    def run(query, key, value):
        return jattn.dot_product_attention(query, key, value, **arguments)

    return compiled(name, gradient_of(run) if gradient else run, *arrays)


def row(suite: str, passes: str, length: int, subject: Subject, baseline: Subject, **more: Any) -> dict[str, Any]:
    """One line of the results."""
    return {
        "suite": suite,
        "passes": passes,
        "length": length,
        "name": subject.name,
        "time_s": spread(subject.times),
        "rounds": len(subject.times),
        "ratio_to": baseline.name,
        "ratio": ratio(subject, baseline),
        "compile_s": subject.compile_s,
        "temp_bytes": subject.temp_bytes,
        **more,
    }


def lengths_suite(lengths: Sequence[int], rounds: int, max_dense: int, threads: int) -> list[dict[str, Any]]:
    """Causal self-attention at growing lengths, every implementation and peer."""
    rows = []
    for passes in PASSES:
        gradient = passes != "forward"
        for length in lengths:
            arrays = make_arrays(length)
            candidates: list[Subject | str] = [
                ours("jattn blockwise", arrays, gradient, is_causal=True, implementation="blockwise")
            ]
            if length <= max_dense:
                candidates.append(peers.jax_nn("jax.nn xla", arrays, gradient, "xla", is_causal=True))
            if length <= min(max_dense, 2048):
                candidates.append(ours("jattn reference", arrays, gradient, is_causal=True, implementation="reference"))
            if jax.default_backend() == "gpu":
                candidates.append(peers.jax_nn("jax.nn cudnn", arrays, gradient, "cudnn", is_causal=True))
            candidates += [peers.torch_sdpa(arrays, gradient, threads), peers.torch_flex(arrays, gradient, threads)]
            subjects = [x for x in candidates if isinstance(x, Subject)]
            for reason in (x for x in candidates if isinstance(x, str)):
                print(f"  not run at T = {length}, {passes}: {reason}", flush=True)
            # A dense peer at this length takes minutes a round: it runs once, and its one round is what is compared.
            heavy = [s for s in subjects if s.name == "jax.nn xla" and length > 4096]
            light = [s for s in subjects if s not in heavy]
            interleave(light, rounds)
            interleave(heavy, 1, warm=False)
            baseline = next((s for s in subjects if s.name == "jax.nn xla"), subjects[0])
            torch = next((s for s in subjects if s.name == "torch SDPA"), None)
            for subject in subjects:
                more = {"ratio_to_torch": ratio(subject, torch)} if torch and subject not in heavy else {}
                if baseline in heavy:
                    more["speedup_over_jax_nn"] = baseline.times[0] / float(np.median(subject.times))
                compare_with = subject if baseline in heavy else baseline
                rows.append(row("lengths", passes, length, subject, compare_with, **more))
                show(rows[-1])
    return rows


def short_suite(lengths: Sequence[int], rounds: int) -> list[dict[str, Any]]:
    """Small problems in `rounds` interleaved pairs with jax.nn, without and with a mask that needs a guard."""
    rows = []
    for passes in PASSES:
        gradient = passes != "forward"
        for length in lengths:
            arrays = make_arrays(length)
            padding = jnp.arange(length)[None, None, None] < length - 5
            for kind, arguments in (("causal", {"is_causal": True}), ("plain", {}), ("key padding", {"mask": padding})):
                baseline = peers.jax_nn(f"jax.nn xla, {kind}", arrays, gradient, "xla", **arguments)
                assert isinstance(baseline, Subject), baseline
                subject = ours(f"jattn, {kind}", arrays, gradient, **arguments)
                interleave([subject, baseline], rounds)
                rows.append(row("short", passes, length, subject, baseline, kind=kind))
                show(rows[-1])
    return rows


def sparse_suite(length: int, rounds: int) -> list[dict[str, Any]]:
    """What skips tiles beside plain causal attention: time per visited pair, relative to causal."""
    arrays = make_arrays(length)
    documents = jnp.asarray(np.arange(length)[None] // 1024)
    cases: dict[str, dict[str, Any]] = {
        "causal": {"is_causal": True},
        "sliding window 256": {"mask": jattn.masks.sliding_window(256)},
        "packed documents of 1024": {"is_causal": True, "segment_ids": documents},
        "gna, window 256": {"mask": jattn.get("gna_mask")((length,), (256,))},
    }
    rows = []
    for passes in PASSES:
        gradient = passes != "forward"
        subjects = [ours(n, arrays, gradient, implementation="blockwise", **a) for n, a in cases.items()]
        interleave(subjects, rounds)
        visited = [visited_pairs(arrays, **arguments) for arguments in cases.values()]
        for subject, pairs in zip(subjects, visited, strict=True):
            relative = {k: x * visited[0] / pairs for k, x in ratio(subject, subjects[0]).items()}
            more = {"visited_pairs": pairs, "time_per_pair_relative_to_causal": relative}
            rows.append(row("sparse", passes, length, subject, subjects[0], **more))
            show(rows[-1])
            print(
                f"      {pairs / length**2:7.2%} of the pairs visited; per pair {relative['median']:.2f} x causal",
                flush=True,
            )
    return rows


def show(line: dict[str, Any]) -> None:
    """Print one line of the table."""
    memory = "" if line["temp_bytes"] is None else f"{line['temp_bytes'] / 1e6:9.1f} MB"
    compile_s = "" if line["compile_s"] is None else f"{line['compile_s']:6.2f} s"
    quotient = line["ratio"]
    text = f"{line['passes']:17}{line['length']:7}  {line['name']:26}{line['time_s']['median'] * 1e3:10.2f} ms"
    text += f"{compile_s:>10}{memory:>13}"
    if line["ratio_to"] != line["name"]:
        text += f"   {quotient['median']:6.3f} x {line['ratio_to']} [{quotient['q25']:.2f}, {quotient['q75']:.2f}]"
    if "ratio_to_torch" in line and line["name"] != "torch SDPA":
        text += f"   {line['ratio_to_torch']['median']:6.3f} x torch"
    if "speedup_over_jax_nn" in line and not line["name"].startswith("jax.nn"):
        text += f"   {line['speedup_over_jax_nn']:5.1f} times faster than jax.nn"
    print(text, flush=True)


def plot(rows: Sequence[dict[str, Any]], path: pathlib.Path) -> None:
    """Time against length, both axes logarithmic, one panel a pass."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    for axis, passes in zip(axes, PASSES, strict=True):
        chosen = [r for r in rows if r["passes"] == passes]
        for name in dict.fromkeys(r["name"] for r in chosen):
            points = [(r["length"], r["time_s"]["median"]) for r in chosen if r["name"] == name]
            axis.plot(*zip(*points, strict=True), marker="o", label=name)
        axis.set(xscale="log", yscale="log", xlabel="length T", title=passes)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("seconds")
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def define_flags(values: flags.FlagValues) -> None:
    """Define the flags of this script; a function, so that several scripts can be imported into one process."""

    def own(define: Callable[..., Any], name: str, default: Any, *more: Any, **limits: Any) -> None:
        define(name, default, *more, flag_values=values, **limits)

    suites = ["lengths", "short", "sparse", "gpu", "all"]
    own(flags.DEFINE_enum, "suite", "lengths", suites, "what to measure; see the top of the help (all: but gpu)")
    own(flags.DEFINE_list, "lengths", None, "lengths T (default: the suite's own)")
    own(flags.DEFINE_integer, "rounds", None, "measured rounds (default: 5; short: 30; gpu: 10)", lower_bound=1)
    own(flags.DEFINE_integer, "max_dense_length", 8192, "longest T for peers that hold the whole score matrix")
    own(flags.DEFINE_integer, "threads", 2, "threads for torch")
    own(flags.DEFINE_string, "output", None, "folder for JSON and plot (default: experiments/results/benchmark or gpu)")
    own(flags.DEFINE_list, "groups", list(gpu_suite.GROUPS), "groups of cases (gpu)")
    own(flags.DEFINE_float, "seconds", 0.02, "how long the calls of one measurement take together (gpu)")
    own(flags.DEFINE_float, "max_logits_gib", 20.0, "GiB of float32 logits up to which jax.nn xla is run (gpu)")
    own(flags.DEFINE_bool, "tiny", False, "toy sizes in interpreters, on any machine; no measurement (gpu)")


def main(argv: Sequence[str], values: flags.FlagValues = flags.FLAGS) -> None:
    """Run the chosen suites."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}; everything is a flag")
    jax.config.update("jax_enable_compilation_cache", False)
    given = None if values.lengths is None else [int(x) for x in values.lengths]
    command = shlex.join(["python", "-m", "experiments.benchmark", *sys.argv[1:]])
    if values.suite == "gpu":
        run_gpu_suite(values, given, command)
        return
    runs: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "lengths": lambda: lengths_suite(
            given or [128, 512, 1024, 2048, 4096, 8192], values.rounds or 5, values.max_dense_length, values.threads
        ),
        "short": lambda: short_suite(given or [128, 256, 512], values.rounds or 30),
        "sparse": lambda: sparse_suite((given or [16384])[0], values.rounds or 5),
    }
    output = pathlib.Path(values.output or RESULTS / "benchmark")
    for suite in runs if values.suite == "all" else [values.suite]:
        rows = runs[suite]()
        device = str(jax.devices()[0].device_kind)
        content = {
            "schema": "jattn.benchmark/1",
            "command": command,
            "versions": versions(),
            "device": device,
            "rows": rows,
        }
        records.write_json(output / f"{suite}.json", content)
        if suite == "lengths":
            plot(rows, output / "lengths.png")
        print(f"written: {output / suite}.json", flush=True)


def run_gpu_suite(values: flags.FlagValues, lengths: Sequence[int] | None, command: str) -> None:
    """The suite "gpu" with the flags of this script."""
    if unknown := set(values.groups) - set(gpu_suite.GROUPS):
        raise app.UsageError(f"--groups knows {', '.join(gpu_suite.GROUPS)}, not {', '.join(sorted(unknown))}")
    if values.tiny and values.output is None:
        raise app.UsageError("--tiny measures nothing: name a folder for what it writes with --output")
    if not values.tiny:
        devices.require_gpu("benchmark --suite=gpu", "--tiny --output=FOLDER runs the whole path, at toy sizes.")
    gpu_suite.run(
        pathlib.Path(values.output or RESULTS / "gpu"),
        command,
        groups=values.groups,
        lengths=lengths or gpu_suite.LENGTHS,
        rounds=values.rounds or 10,
        seconds=0.0 if values.tiny else values.seconds,
        tiny=values.tiny,
        max_logits=values.max_logits_gib * 2**30,
    )


if __name__ == "__main__":
    define_flags(flags.FLAGS)
    app.run(main)
