"""How fast trained models are here: loading, reading, generating, transcribing, and the memory it takes.

    python -m experiments.speed
    python -m experiments.speed --model=whisper_tiny_en --file=talk.wav
    python -m experiments.speed --length=2048 --steps=200 --output=results/speed

SmolLM2 is loaded, reads `--length` tokens in one compiled pass with all their logits, and generates `--steps` tokens
one by one through a cache; Whisper transcribes a file (a LibriVox clip if none is given), once with compilation and
once without. Figures are medians; compilation is apart. Peak memory is that of the whole process, the interpreter and
JAX included, which is why each model wants a process of its own.

`jattn fetch smollm2 whisper_tiny_en librivox` comes first.
"""

import pathlib
import resource
import shlex
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from flax import nnx

from experiments import records
from experiments.train import versions
from jattn.cache import FullCache
from jattn.models import pretrained
from jattn.models.pretrained import packages
from jattn.models.pretrained.log_mel import read_sound

SCHEMA = "jattn.speed/1"


def seconds(function: Callable[[], Any]) -> tuple[float, Any]:
    """How long a call takes until its arrays are there, and what it returns."""
    start = time.perf_counter()
    result = jax.block_until_ready(function())
    return time.perf_counter() - start, result


def smollm2(length: int, steps: int, repeats: int) -> dict[str, Any]:
    """Load, read and generate."""
    load, language = seconds(lambda: pretrained.load("smollm2"))
    graphdef, state = nnx.split(language.model)
    tokens = np.random.default_rng(0).integers(1000, 40_000, (1, length)).astype(np.int32)

    def read(state: Any, tokens: Any) -> Any:
        return nnx.merge(graphdef, state)(tokens).logits

    def step(state: Any, cache: Any, token: Any) -> Any:
        out = nnx.merge(graphdef, state)(token, cache=cache)
        return out.cache, jnp.argmax(out.logits[:, -1:], axis=-1).astype(jnp.int32)

    read_compile, reader = seconds(lambda: jax.jit(read).lower(state, tokens).compile())
    prefill = np.median([seconds(lambda: reader(state, tokens))[0] for _ in range(repeats)])
    cache, token = language.model.init_cache(FullCache(length), 1), tokens[:, :1]
    stepper = jax.jit(step, donate_argnums=1)
    step_compile, (cache, token) = seconds(lambda: stepper(state, cache, token))
    times = []
    for _ in range(steps):
        spent, (cache, token) = seconds(lambda cache=cache, token=token: stepper(state, cache, token))
        times.append(spent)
    return {
        "load_s": load,
        "prefill_tokens": length,
        "prefill_s": float(prefill),
        "prefill_temp_bytes": reader.memory_analysis().temp_size_in_bytes,
        "decode_tokens_per_s": float(1 / np.median(times)),
        "compile_s": {"prefill": read_compile, "decode": step_compile},
    }


def whisper(path: str, repeats: int) -> dict[str, Any]:
    """Load and transcribe."""
    sound = read_sound(path or packages.path("librivox", "clip_0870"))
    load, speech = seconds(lambda: pretrained.load("whisper_tiny_en"))
    first, found = seconds(lambda: speech.transcribe(sound))
    again = np.median([seconds(lambda: speech.transcribe(sound))[0] for _ in range(repeats)])
    return {
        "load_s": load,
        "sound_s": len(sound) / 16_000,
        "first_s": first,
        "again_s": float(again),
        "text": found.text,
    }


def main(arguments: list[str]) -> None:
    if len(arguments) > 1:
        raise app.UsageError(f"unknown arguments: {' '.join(arguments[1:])}")
    options = flags.FLAGS
    try:
        if options.model == "smollm2":
            found = smollm2(options.length, options.steps, options.repeats)
        else:
            found = whisper(options.file, options.repeats)
    except packages.NotFetched as missing:
        print(missing, file=sys.stderr)
        sys.exit(2)
    unit = 1 if sys.platform == "darwin" else 1024
    found["peak_memory_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    for name, value in found.items():
        print(f"{name:22} {value:.4g}" if isinstance(value, float) else f"{name:22} {value}")
    if options.output:
        device = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
        record = {"schema": SCHEMA, "command": shlex.join(["python", "-m", "experiments.speed", *sys.argv[1:]])}
        record |= {"versions": versions(), "device": device, "model": options.model, **found}
        path = pathlib.Path(options.output) / f"{options.model}.json"
        records.write_json(path, record)
        print(f"written to {path}")


def define_flags() -> None:
    flags.DEFINE_enum("model", "smollm2", ["smollm2", "whisper_tiny_en"], "Which model.")
    flags.DEFINE_integer("length", 512, "Tokens that are read in one pass, and slots of the cache.", lower_bound=2)
    flags.DEFINE_integer("steps", 60, "Tokens that are generated.", lower_bound=1)
    flags.DEFINE_integer("repeats", 5, "How often the rest is repeated.", lower_bound=1)
    flags.DEFINE_string("file", "", "WAV file to transcribe; a LibriVox clip if not given.")
    flags.DEFINE_string("output", "", "Folder for a JSON file; none if not given.")


if __name__ == "__main__":
    define_flags()
    app.run(main)
