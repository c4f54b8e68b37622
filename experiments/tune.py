"""Search tile sizes of the Triton attention kernel on the attached GPU, and write the table that the kernel reads.

    python -m experiments.tune                                        bfloat16, head dims 64, 128, 256, both passes
    python -m experiments.tune --head_dims=192/128 --passes=backward  one head dim (D/Dv), one pass
    python -m experiments.tune --nowrite_table                        search and record, leave the table alone
    python -m experiments.tune --interpret --table=results/tiles.json    the whole path on a CPU, at toy sizes

For every (dtype, head dims, causal or not, pass) all candidates (block_q x block_k x num_warps x num_stages) are
compiled and run in turn, several calls at a time. A candidate that breaks the shared-memory rule, does not compile or
run, or has more than twice the error of the blockwise implementation is recorded with its reason and left out. Each
case is written to OUTPUT/KIND.json when it is done, with device, driver and versions; started again, the search goes on
behind the cases that stand there. The table gets, for each (pass, bytes of an element, head dims), the candidate with
the smallest geometric mean, over the measured cases, of its time to the best of the case. Measure on a GPU that does
nothing else.
"""

import dataclasses
import functools
import importlib.resources
import itertools
import json
import pathlib
import shlex
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from experiments import devices, records
from experiments.timing import Subject, calibrate, compiled, interleave, spread
from experiments.train import versions
from jattn.softmax import blockwise, platforms
from jattn.softmax.arguments import build_problem
from jattn.softmax.kernel_arguments import make_inputs, make_pipeline, make_tiling
from jattn.testing.tolerance import RMS_FACTOR
from pallas_kernels.flash_attention import sizes as tile_sizes
from pallas_kernels.flash_attention import triton, triton_backward
from pallas_kernels.flash_attention.pipeline import Backward
from pallas_kernels.flash_attention.sizes import TileSizes

SHIPPED_TABLE = pathlib.Path(str(importlib.resources.files("pallas_kernels.flash_attention") / tile_sizes.TABLE))
PASSES = ("forward", "backward")


@dataclasses.dataclass(frozen=True)
class Case:
    """What one search is for; shapes are `[batch, length, heads, D or Dv]`."""

    dtype: str
    head_dim: int
    value_dim: int
    causal: bool
    passes: str
    batch: int
    length: int
    heads: int

    @property
    def backward(self) -> bool:
        """Whether the backward kernels are searched."""
        return self.passes == "backward"

    @property
    def widths(self) -> tuple[int, int, int]:
        """D, Dv and bytes of an element, as tile sizes depend on them."""
        return self.head_dim, self.value_dim, jnp.dtype(self.dtype).itemsize

    def __str__(self) -> str:
        kind = "causal" if self.causal else "full"
        return f"{self.dtype} D {self.head_dim}/{self.value_dim} T {self.length} {kind} {self.passes}"


def make_cases(dtypes, head_dims, passes, tokens: int, length: int, width: int) -> Iterator[Case]:
    """All cases of the flags; `tokens` is B * T and `width` N * D."""
    for dtype, dims, causal, name in itertools.product(dtypes, head_dims, (False, True), passes):
        head_dim, _, value_dim = dims.partition("/")
        heads = max(1, width // int(head_dim))
        batch = max(1, tokens // length)
        yield Case(dtype, int(head_dim), int(value_dim or head_dim), causal, name, batch, length, heads)


def make_arrays(case: Case) -> dict[str, jax.Array]:
    """Queries, keys, values and the cotangent of the output, normally distributed."""
    widths = {"query": case.head_dim, "key": case.head_dim, "value": case.value_dim, "output": case.value_dim}
    rng = np.random.default_rng(0)
    shape = (case.batch, case.length, case.heads)
    return {n: jnp.asarray(rng.standard_normal((*shape, w), np.float32), case.dtype) for n, w in widths.items()}


def plain_results(case: Case, arrays, dtype, precision: str | None = None) -> tuple[jax.Array, ...]:
    """Output and lse, or the three gradients, of the blockwise implementation in the given dtype."""

    def attend(query, key, value):
        problem, _ = build_problem(query, key, value, is_causal=case.causal, precision=precision)
        return blockwise.attend(problem, True)

    @jax.jit
    def run(query, key, value, output):
        out, pull = jax.vjp(attend, query, key, value)
        return pull((output.astype(out[0].dtype), jnp.zeros_like(out[1]))) if case.backward else out

    return run(*(x.astype(dtype) for x in arrays.values()))


@dataclasses.dataclass(frozen=True)
class Kernel:
    """The kernel of a case with given tile sizes: a function of the arrays of the case."""

    case: Case
    sizes: TileSizes
    interpret: bool

    def __call__(self, query, key, value, output, lse, total):
        """The output, or the three gradients."""
        problem, _ = build_problem(query, key, value, is_causal=self.case.causal)
        tiling = make_tiling(problem, self.sizes.block_q, self.sizes.block_k)
        arguments = {
            "lists": tiling.rows,
            "inputs": make_inputs(problem, {}),
            "pipeline": make_pipeline(problem, False),
            "sizes": self.sizes,
            "scale": problem.scale,
            "interpret": self.interpret,
        }
        if not self.case.backward:
            return triton.forward(query, key, value, out_dtype=query.dtype, **arguments)[:1]
        given = Backward(output, lse, total, jnp.asarray(tiling.code, jnp.int32), tiling.columns)
        return triton_backward.backward(query, key, value, given=given, **arguments)[:3]


@jax.jit
def relative_errors(found, truth):
    """RMS of the difference over RMS of the truth, for each array."""
    rms = lambda x: jnp.sqrt(jnp.mean(jnp.square(x.astype(jnp.float32))))  # noqa: E731
    return jnp.stack([rms(x.astype(jnp.float32) - y) / rms(y) for x, y in zip(found, truth, strict=True)])


def search(case: Case, candidates: Sequence[TileSizes], rounds: int, seconds: float, interpret: bool) -> dict[str, Any]:
    """Compile and run all candidates of a case.

    Args:
        case: what for.
        candidates: tile sizes.
        rounds: measured rounds; in each every candidate runs once.
        seconds: how long the calls of one measurement take together.
        interpret: whether the kernel runs in Pallas' interpreter.

    Returns:
        The case with all candidates: their times, or the reason why there are none.
    """
    capability = platforms.current().capability or "9.0"
    arrays = make_arrays(case)
    truth = plain_results(case, arrays, jnp.float32, "highest")
    allowed = RMS_FACTOR * np.asarray(relative_errors(plain_results(case, arrays, case.dtype), truth))
    # Rounding to the dtype may cost the kernel what it costs anybody, wherever the plain program happens to round less.
    allowed = np.maximum(allowed, RMS_FACTOR * float(jnp.finfo(case.dtype).eps))
    given = [*arrays.values(), *_rows(case, arrays)]
    rows: list[dict[str, Any]] = []
    subjects: dict[int, Subject] = {}
    for number, sizes in enumerate(candidates):
        rows.append({"sizes": dataclasses.asdict(sizes)})
        try:
            tile_sizes.check(sizes, *case.widths, case.backward, capability)
        except ValueError as error:
            rows[-1] |= {"status": "refused", "reason": str(error)}
            continue
        try:
            subject = compiled(str(sizes), Kernel(case, sizes, interpret), *given)
            errors = np.asarray(relative_errors(subject.call(), truth[: 3 if case.backward else 1]))
        except Exception as error:  # The compiler's own classes, and those of the driver.
            rows[-1] |= {"status": "fails", "reason": f"{type(error).__name__}: {str(error).strip()[:300]}"}
            print(f"    {number + 1}/{len(candidates)} {sizes}: {rows[-1]['reason'].splitlines()[0][:120]}", flush=True)
            continue
        rows[-1] |= {"relative_error": errors.tolist(), "compile_s": subject.compile_s}
        if not (errors <= allowed[: len(errors)]).all():
            rows[-1] |= {"status": "wrong", "reason": f"errors {errors.tolist()}, allowed {allowed.tolist()}"}
        else:
            rows[-1]["status"] = "ok"
            subjects[number] = subject
        status = rows[-1]["status"]
        print(
            f"    {number + 1}/{len(candidates)} {sizes}: {status}, compiled in {subject.compile_s:.1f} s", flush=True
        )
    calibrate(list(subjects.values()), seconds)
    interleave(list(subjects.values()), rounds)
    for number, subject in subjects.items():
        rows[number]["time_s"] = spread(subject.times)
    rule = tile_sizes.by_rule(*case.widths, case.backward, capability)
    return {**dataclasses.asdict(case), "rule": dataclasses.asdict(rule), "candidates": rows}


def _rows(case: Case, arrays) -> tuple[jax.Array, jax.Array]:
    """What the backward pass is given for each row, `[B, N, T]`: lse, and the cotangent of the sum of the weights."""
    out, lse = plain_results(dataclasses.replace(case, passes="forward"), arrays, case.dtype)
    total = -jnp.einsum("btnd,btnd->bnt", out, arrays["output"].astype(out.dtype))
    return jnp.swapaxes(lse, 1, 2), total


def best_entries(cases: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The entries of the table: for each key the candidate that is best over all measured cases of the key."""
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for case in cases:
        key = (case["passes"], jnp.dtype(case["dtype"]).itemsize, case["head_dim"], case["value_dim"])
        groups.setdefault(key, []).append(case)
    entries = []
    for key, group in sorted(groups.items()):
        times = [
            {tuple(x["sizes"].values()): x["time_s"]["median"] for x in case["candidates"] if x["status"] == "ok"}
            for case in group
        ]
        common = functools.reduce(lambda one, other: one & other, (set(x) for x in times))
        if not common:
            continue
        slowness = {x: float(np.mean([np.log(of[x] / min(of.values())) for of in times])) for x in sorted(common)}
        best = min(slowness, key=lambda x: slowness[x])
        named = dict(zip(("pass", "itemsize", "head_dim", "value_dim"), key, strict=True))
        entries.append(named | dataclasses.asdict(TileSizes(*best)))
    return entries


def update_table(path: pathlib.Path, kind: str, capability: str, entries: Sequence[dict[str, Any]]) -> None:
    """Put entries into a table, in place of those with the same key; the result is read once more before it is kept."""
    empty = {"schema": tile_sizes.SCHEMA, "devices": {}}
    content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else empty
    device = content["devices"].setdefault(kind, {"capability": capability, "tiles": []})
    key = lambda x: tuple(x[name] for name in ("pass", "itemsize", "head_dim", "value_dim"))  # noqa: E731
    merged = {key(x): x for x in [*device["tiles"], *entries]}
    device |= {"capability": capability, "tiles": [merged[k] for k in sorted(merged)]}
    tile_sizes.read_table(json.dumps(content))
    records.write_json(path, content)


def open_results(path: pathlib.Path, fixed: dict[str, Any], fresh: bool) -> list[dict[str, Any]]:
    """The cases of an earlier run with the same device, versions and settings.

    Raises:
        UsageError: the file is of another run.
    """
    if fresh or not path.exists():
        return []
    content = json.loads(path.read_text(encoding="utf-8"))
    for name, value in json.loads(records.to_json(fixed)).items():
        if content[name] != value:
            raise app.UsageError(
                f"{path} was measured with another {name}; --fresh begins anew, --output writes elsewhere"
            )
    return content["cases"]


TOY: dict[str, Any] = {
    "tokens": 128,
    "length": 64,
    "width": 32,
    "head_dims": ["16"],
    "block_q": ["16", "32"],
    "block_k": ["16", "32"],
    "num_warps": ["4"],
    "num_stages": ["1"],
    "rounds": 2,
    "seconds": 0.0,
}
"""What --interpret takes for the flags that are not given."""


def define_flags(values: flags.FlagValues) -> None:
    """Define the flags of this script; a function, so that several scripts can be imported into one process."""

    def several(name: str, default: list[str], meaning: str) -> None:
        flags.DEFINE_list(name, default, meaning, flag_values=values)

    def whole(name: str, default: int, meaning: str) -> None:
        flags.DEFINE_integer(name, default, meaning, lower_bound=1, flag_values=values)

    several("dtypes", ["bfloat16"], "dtypes of queries, keys and values")
    several("head_dims", ["64", "128", "256"], "head dims, D or D/Dv")
    several("passes", list(PASSES), "forward, backward")
    whole("tokens", 16384, "B * T")
    whole("length", 4096, "T")
    whole("width", 2048, "N * D")
    several("block_q", ["32", "64", "128"], "rows of queries in a tile, to try")
    several("block_k", ["32", "64", "128"], "rows of keys in a tile, to try")
    several("num_warps", ["4", "8"], "warps of a program, to try")
    several("num_stages", ["1", "2", "3"], "stages of the software pipeline, to try")
    whole("rounds", 5, "measured rounds")
    flags.DEFINE_float("seconds", 0.02, "how long the calls of one measurement take together", flag_values=values)
    flags.DEFINE_string("output", "experiments/results/tune", "folder for the results", flag_values=values)
    flags.DEFINE_string("table", None, "the table to write (default: the one the kernel reads)", flag_values=values)
    flags.DEFINE_bool("write_table", True, "--nowrite_table searches and records only", flag_values=values)
    flags.DEFINE_bool("fresh", False, "drop what the results hold, and measure everything anew", flag_values=values)
    flags.DEFINE_bool(
        "interpret", False, "run in Pallas' interpreter, on a CPU, at toy sizes; --table is needed", flag_values=values
    )


def main(argv: Sequence[str], values: flags.FlagValues = flags.FLAGS) -> None:
    """Search, record, and write the table."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}; everything is a flag")
    options = values.flag_values_dict()
    if unknown := set(options["passes"]) - set(PASSES):
        raise app.UsageError(f"--passes knows {', '.join(PASSES)}, not {', '.join(sorted(unknown))}")
    table = pathlib.Path(options["table"] or SHIPPED_TABLE)
    if not options["interpret"]:
        devices.require_gpu("tune", "--interpret --table=FILE runs the whole path on a CPU, at toy sizes.")
    else:
        if options["write_table"] and table.resolve() == SHIPPED_TABLE.resolve():
            raise app.UsageError(
                "--interpret times an interpreter, and the kernel reads this table; name another file with --table, "
                "or say --nowrite_table"
            )
        options |= {name: value for name, value in TOY.items() if not values[name].present}
    numbers = [[int(x) for x in options[name]] for name in ("block_q", "block_k", "num_warps", "num_stages")]
    candidates = [TileSizes(*x) for x in itertools.product(*numbers)]
    device = devices.describe()
    settings = {name: options[name] for name in ("block_q", "block_k", "num_warps", "num_stages", "rounds", "seconds")}
    fixed = {"schema": "jattn.tune/1", "device": device, "versions": versions(), "settings": settings}
    path = pathlib.Path(options["output"]) / f"{device['kind'].replace(' ', '_')}.json"
    done = open_results(path, fixed, options["fresh"])
    command = shlex.join(["python", "-m", "experiments.tune", *sys.argv[1:]])
    names = ("dtypes", "head_dims", "passes", "tokens", "length", "width")
    cases = list(make_cases(*(options[name] for name in names)))
    for number, case in enumerate(cases):
        print(f"{number + 1}/{len(cases)} {case}", flush=True)
        fields = json.loads(records.to_json(case))
        if any(fields.items() <= old.items() for old in done):
            print("    measured before", flush=True)
            continue
        done.append(search(case, candidates, options["rounds"], options["seconds"], options["interpret"]))
        records.write_json(path, {**fixed, "command": command, "cases": done})
        show(done[-1])
    print(f"written: {path}")
    entries = best_entries(done)
    for entry in entries:
        print("   ", entry)
    if options["write_table"] and entries:
        update_table(table, device["kind"], device["capability"] or "9.0", entries)
        print(f"written: {table}")


def show(case: dict[str, Any]) -> None:
    """Print the fastest candidates of a case, beside what the rule chooses."""
    ok = sorted((x for x in case["candidates"] if x["status"] == "ok"), key=lambda x: x["time_s"]["median"])
    left = len(case["candidates"]) - len(ok)
    print(f"    {len(ok)} candidates measured, {left} left out with their reasons; the fastest:")
    for row in ok[:3] + [x for x in ok[3:] if x["sizes"] == case["rule"]]:
        mark = " (the rule's)" if row["sizes"] == case["rule"] else ""
        print(f"    {row['time_s']['median'] * 1e3:9.3f} ms  {tuple(row['sizes'].values())}{mark}", flush=True)


if __name__ == "__main__":
    define_flags(flags.FLAGS)
    app.run(main)
