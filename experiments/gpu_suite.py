"""The suite "gpu" of the benchmark: attention on one NVIDIA GPU, all implementations in one run.

For every case (`gpu_cases.py`) and pass all implementations (`gpu_peers.py`) are compiled and run in turn. What one
does not run is printed and recorded with the reason. The backward pass is timed alone, from what the forward pass has
kept; a decoding step, which takes microseconds, many times in one program.
"""

import collections
import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import devices, records
from experiments.gpu_cases import Case, all_cases, tiny_cases
from experiments.gpu_peers import DTYPES, Refusal, implementations
from experiments.measures import visited_pairs
from experiments.timing import Subject, calibrate, compiled, interleave, ratio, repeated, spread
from experiments.train import versions

GROUPS = ("published", "pair_bias", "mla", "sparse", "decode")
LENGTHS = (1024, 2048, 4096, 8192, 16384)
DECODE_RUNS = 50
TILE = (128, 128)
"""Tiles in which live pairs are counted."""


def prepare(case: Case, passes: str, name: str, run: Callable[..., Any], arrays: Sequence[jax.Array]) -> Subject:
    """One implementation compiled for one pass, and run once."""
    if passes == "backward":
        out, pull = jax.jit(functools.partial(jax.vjp, run))(*arrays)
        subject = compiled(name, lambda pull, given: pull(given), pull, jnp.ones_like(out))
    else:
        subject = compiled(name, run, *arrays)
        if case.length == 1:
            many = compiled(name, repeated(run, DECODE_RUNS), *arrays)
            subject.call, subject.runs = many.call, DECODE_RUNS
    jax.block_until_ready(subject.call())
    return subject


def fastest(
    case: Case, passes: str, name: str, variants: dict[str, Callable[..., Any]], arrays: Sequence[jax.Array]
) -> tuple[Subject, dict[str, Any]]:
    """The fastest variant that runs, its name, and why others do not.

    Raises:
        Refusal: none runs; the message is what they say.
    """
    found: list[tuple[float, str, Subject]] = []
    failed: dict[str, str] = {}
    for variant, run in variants.items():
        try:
            subject = prepare(case, passes, name, run, arrays)
            found.append((min(subject.measure() for _ in range(3)), variant, subject))
        except Exception as error:  # Each implementation, the compiler and the driver have classes of their own.
            lines = [line for line in str(error).splitlines() if line.strip()]
            failed[variant] = f"{type(error).__name__}: {lines[0][:300] if lines else ''}"
    if not found:
        raise Refusal("; ".join(dict.fromkeys(failed.values())))
    _, variant, subject = min(found, key=lambda x: x[:2])
    return subject, {"variant": variant, "variants_that_fail": failed}


def measure(case: Case, passes: str, rounds: int, seconds: float, tiny: bool, max_logits: float) -> dict[str, Any]:
    """Rows and refusals of one case and pass.

    Args:
        case: the problem.
        passes: "forward" or "backward".
        rounds: measured rounds.
        seconds: how long the calls of one measurement take together.
        tiny: whether kernels are interpreted.
        max_logits: bytes of float32 logits up to which dense implementations are run.
    """
    arrays = case.arrays()
    subjects, variants, refused = [], {}, []
    print(f"{case.group}: {case.name}, {passes}", flush=True)
    for name, make in implementations():
        logits = 4.0 * case.batch * case.heads * case.length * case.source
        try:
            if name == "jax.nn xla" and logits > max_logits:
                raise Refusal(f"it would hold {logits / 2**30:.0f} GiB of logits; --max_logits_gib lets it")
            own = [x.astype(DTYPES.get(name, x.dtype)) for x in arrays]
            subject, variants[name] = fastest(case, passes, name, make(case, tiny), own)
            subjects.append(subject)
        except Refusal as reason:
            refused.append(
                {"group": case.group, "case": case.name, "passes": passes, "name": name, "reason": str(reason)}
            )
            print(f"    not run: {name}: {reason}", flush=True)
    calibrate(subjects, seconds)
    interleave(subjects, rounds)
    cudnn = next((s for s in subjects if s.name == "jax.nn cudnn"), None)
    rows = [row(case, passes, s, variants[s.name], cudnn) for s in sorted(subjects, key=lambda s: np.median(s.times))]
    for line in rows:
        show(line)
    return {"rows": rows, "refused": refused}


def row(case: Case, passes: str, subject: Subject, variant: dict[str, Any], cudnn: Subject | None) -> dict[str, Any]:
    """One line of the results."""
    median = float(np.median(subject.times))
    peak = devices.PEAKS.get(jax.devices()[0].device_kind)
    flops = case.flops(passes) / median
    found = {
        "group": case.group,
        "case": case.name,
        "passes": passes,
        "name": subject.name,
        **variant,
        "time_s": spread(subject.times),
        "rounds": len(subject.times),
        "runs_a_measurement": subject.calls * subject.runs,
        "tflops": flops / 1e12,
        "share_of_peak": None if peak is None else flops / peak.flops,
        "time_to_cudnn": None if cudnn is None else ratio(subject, cudnn),
        "temp_bytes": subject.temp_bytes,
        "compile_s": subject.compile_s,
        "pairs": case.pairs,
    }
    if case.length == 1:
        found["cache_bytes_per_s"] = case.cache_bytes / median
        found["share_of_bandwidth"] = None if peak is None else case.cache_bytes / median / peak.bandwidth
    return found


def live_pairs(case: Case) -> int:
    """Pairs of a head in tiles of 128 x 128 in which something is visible."""
    one = jnp.zeros((1, case.length, 1, 8), jnp.bfloat16)
    return visited_pairs((one, one, one), block_sizes=TILE, **case.arguments())


def relate_to_causal(rows: Sequence[dict[str, Any]], live: dict[str, int]) -> None:
    """Add the time per live pair to that of causal attention, for each implementation and pass."""
    base = {(x["passes"], x["name"]): x for x in rows if x["case"] == "causal"}
    for line in rows:
        causal = base.get((line["passes"], line["name"]))
        line["live_pairs"] = live[line["case"]]
        if causal is not None:
            quotient = line["time_s"]["median"] / causal["time_s"]["median"]
            line["time_per_live_pair_relative_to_causal"] = quotient * live["causal"] / live[line["case"]]


def show(line: dict[str, Any]) -> None:
    """Print one line of the table."""
    text = f"    {line['name']:24}{line['time_s']['median'] * 1e3:10.3f} ms{line['tflops']:9.1f} TFLOP/s"
    if line["share_of_peak"] is not None:
        text += f"{line['share_of_peak']:8.1%} of peak"
    if line.get("share_of_bandwidth") is not None:
        text += f"{line['share_of_bandwidth']:8.1%} of bandwidth"
    if line["temp_bytes"] is not None:
        text += f"{line['temp_bytes'] / 1e6:10.1f} MB"
    if line["time_to_cudnn"] is not None:
        text += f"{line['time_to_cudnn']['median']:7.2f} x cudnn"
    print(f"{text}  {line['variant']}".rstrip(), flush=True)


def run(
    output: pathlib.Path,
    command: str,
    *,
    groups: Sequence[str] = GROUPS,
    lengths: Sequence[int] = LENGTHS,
    rounds: int = 10,
    seconds: float = 0.02,
    tiny: bool = False,
    max_logits: float = 20 * 2.0**30,
) -> None:
    """Measure groups of cases, and write OUTPUT/GROUP.json after every case.

    Args:
        output: folder of the results.
        command: as it was given, for the record.
        groups: which of `GROUPS`.
        lengths: of the published shapes.
        rounds: measured rounds.
        seconds: how long the calls of one measurement take together.
        tiny: toy sizes in interpreters, on any machine: a test of the path, not a measurement.
        max_logits: bytes of float32 logits up to which dense implementations are run.
    """
    content = {"schema": "jattn.benchmark.gpu/1", "command": command, "versions": versions()}
    content |= {"device": devices.describe(), "tiny": tiny}
    cases = collections.defaultdict(list)
    for case in tiny_cases() if tiny else all_cases(lengths):
        cases[case.group].append(case)
    for group in groups:
        rows: list[dict[str, Any]] = []
        refused: list[dict[str, Any]] = []
        live = {case.name: live_pairs(case) for case in cases[group]} if group == "sparse" else {}
        for case in cases[group]:
            for passes in case.passes:
                done = measure(case, passes, rounds, seconds, tiny, max_logits)
                rows += done["rows"]
                refused += done["refused"]
                if live:
                    relate_to_causal(rows, live)
                records.write_json(output / f"{group}.json", {**content, "rows": rows, "refused": refused})
        for line in rows if live else []:
            if "time_per_live_pair_relative_to_causal" in line and line["case"] != "causal":
                relative = line["time_per_live_pair_relative_to_causal"]
                print(f"{line['case']}, {line['passes']}, {line['name']}: {relative:.2f} x causal per live pair")
        print(f"written: {output / group}.json", flush=True)
