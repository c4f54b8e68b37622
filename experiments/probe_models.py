"""How each trained model is probed: what it is given, what is captured, and how its queries and keys are called.

A model has one or more views, a kind of attention each: SmolLM2 has one, Whisper three (decoder, cross, encoder).
"""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jattn.models.pretrained import packages, rxnmapper, vit
from jattn.models.pretrained.log_mel import HOP, RATE, log_mel, read_sound, windows
from jattn.probes import AttnHook, capture, for_layers, induction_rows
from jattn.probes.summary import weights_by_rows

LONGEST = 512
"""Tokens that a text is cut to: the weights of SmolLM2 are 142 MB then, in a process of 1.6 GB."""
PERIOD = 25
"""Length of the random sequence that is repeated."""


@dataclasses.dataclass(frozen=True)
class View:
    """One kind of attention of a model, captured.

    Args:
        name: for file names and anchors.
        title: for people.
        weights: `[L, 1, N, T, S]`.
        queries: T labels.
        keys: S labels.
        resid: `[L, 1, T, M]`, the stream after each layer; None if it is that of another view.
        column: the key that counts as the sink; None for the one that draws most.
        from_row: the first query that counts.
        repeated: weights `[L, 1, N, R, S]` of the rows `induction_rows(PERIOD)` of a random sequence that stands there
            twice; None where a model was not made to repeat.
        named: heads (layer, head) that are known for something, by what it is.
        grid: height and width of the patches after the first token, of a model that sees images; maps then show what
            the first token attends to.
        places: a key for each query, where something else says that it belongs; drawn into the maps.
        shown_keys: how many keys maps show, the first ones; all if None.
        listed: whether the page lists the queries, as tokens of a text.
    """

    name: str
    title: str
    weights: np.ndarray
    queries: Sequence[str]
    keys: Sequence[str]
    resid: Any = None
    column: int | None = 0
    from_row: int = 0
    repeated: Any = None
    named: Mapping[str, Sequence[tuple[int, int]]] = dataclasses.field(default_factory=dict)
    grid: tuple[int, int] | None = None
    places: Sequence[int] | None = None
    shown_keys: int | None = None
    listed: bool = True


@dataclasses.dataclass(frozen=True)
class Probed:
    """What is known about a model after it has run.

    Args:
        facts: what it was given and what came out, by name.
        views: its kinds of attention.
    """

    facts: Mapping[str, str]
    views: Sequence[View]


@dataclasses.dataclass(frozen=True)
class Adapter:
    """How one model of `jattn.models.pretrained` is probed.

    Args:
        title: of the page.
        given: what the model takes: "text" or "file".
        example: what it is given if nothing is said; the path of an example file depends on the machine.
        probe: (loaded model, text or path) -> Probed.
    """

    title: str
    given: str
    example: Callable[[], str]
    probe: Callable[[Any, str], Probed]


def probe_smollm2(loaded: Any, text: str) -> Probed:
    """Text, and 25 random tokens twice, which show who repeats."""
    tokens = loaded.encode(text)[:LONGEST]
    _at_least(len(tokens), 10, "tokens")
    model, row = loaded.model, tokens[None]
    nll, following, resid = _reading(model, row)
    first = np.zeros((1, 1), np.int32)  # The logits of one place are computed fast.
    weights = weights_by_rows(model, row, len(tokens), dtype=np.float16, logits_at=first)
    low, high = min(1000, model.config.vocab_size // 2), min(40000, model.config.vocab_size)
    random = np.random.default_rng(0).integers(low, high, PERIOD)
    twice = np.concatenate([random, random])[None].astype(np.int32)
    repeated = capture(model, twice, rows=induction_rows(PERIOD), sites=(), logits_at=first)["weights"]
    labels = [_label(loaded.tokenizer.decode([int(token)], skip_special_tokens=False)) for token in tokens]
    view = View("decoder", "Decoder, self attention", weights, labels, labels, resid, from_row=8, repeated=repeated)
    best = loaded.tokenizer.decode([following])
    facts = {
        "text": loaded.decode(tokens),
        "negative log-likelihood": f"{nll:.3f} nats a token",
        "continues with": best,
    }
    return Probed(facts, [view])


def _reading(model: Any, row: np.ndarray) -> tuple[float, int, Any]:
    """The mean negative log-likelihood of a row of tokens, the token that would follow, and the stream."""
    seen = capture(model, row, observe=(), sites=("resid",))
    logits = seen["output"]
    return float(_surprise(logits, row).mean()), int(logits[0, -1].argmax()), seen["resid"]


@jax.jit
def _surprise(logits: Any, tokens: Any) -> Any:
    """-ln p of each token but the first, `[B, T - 1]`."""
    logits = logits[:, :-1].astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - chosen


def probe_minilm(loaded: Any, text: str) -> Probed:
    """A text between [CLS] and [SEP]."""
    tokens, _ = loaded.encode([text])
    labels = [loaded.tokenizer.id_to_token(int(token)) for token in tokens[0]]
    return Probed({"text": text}, [_encoder_view(loaded.model, tokens, labels)])


def probe_rxnmapper(loaded: Any, text: str) -> Probed:
    """A reaction, whose atoms one head maps."""
    tokens, _ = loaded.encode(text)
    names = {number: token for token, number in loaded.vocabulary.items()}
    labels = [names[int(token)] for token in tokens]
    found = loaded.map_atoms(text)
    facts = {"reaction": text, "mapped by attention": found.reaction, "confidence": f"{found.confidence:.3f}"}
    heads = {"maps atoms": [(rxnmapper.LAYER, rxnmapper.HEAD)]}
    return Probed(facts, [_encoder_view(loaded.model, tokens[None], labels, named=heads)])


def probe_vit_s14(loaded: Any, path: str) -> Probed:
    """A photo, cut to the square in its middle."""
    from PIL import Image, ImageOps

    size = loaded.model.image_shape[:2]
    try:
        with Image.open(path) as photo:
            pixels = np.asarray(ImageOps.fit(photo.convert("RGB"), size[::-1]))
    except OSError as error:
        raise ValueError(f"{path} cannot be read as a picture: {error}") from error
    rows, columns = loaded.model.grid
    labels = ["class", *(f"{row},{column}" for row in range(rows) for column in range(columns))]
    view = _encoder_view(loaded.model, vit.normalized(pixels[None]), labels, grid=(rows, columns), listed=False)
    return Probed({"picture": pathlib.Path(path).name}, [view])


def probe_whisper_tiny_en(loaded: Any, path: str) -> Probed:
    """Speech, and the text that the model heard in it."""
    _, sound = windows(read_sound(path))[0]
    tokens = loaded.tokens(sound)
    _at_least(len(tokens), 1, "tokens of text in the first window")
    times = loaded.token_times(sound, tokens)
    frame = 2 * HOP / RATE
    heard = max(1, round(len(sound) / RATE / frame))
    model, row = loaded.model, np.asarray([[*loaded.prompt, *tokens]], np.int32)
    mel = jnp.asarray(log_mel(sound)[None])

    memory, encoded = model.encode(mel, hook=_weights(model.encoder_config, np.arange(heard)), record=("resid",))
    hook = _weights(model.config)
    decoded = model(row, memory, hook=hook, cross_hook=hook, record=("resid",)).aux
    words = [_label(loaded.tokenizer.decode([int(token)], skip_special_tokens=False)) for token in row[0]]
    # The row before a token is the one that predicts it.
    first = len(loaded.prompt) - 1
    predicted = [f"{word} {time:.2f} s" for word, time in zip(words[first + 1 :], times, strict=True)]
    seconds = [f"{place * frame:.2f} s" for place in range(memory.shape[1])]
    cross = np.asarray(decoded["cross_hook"]["row_weights"])[:, :, :, first:-1]
    frames = np.asarray(encoded["hook"]["row_weights"])
    views = [
        View(
            "cross",
            "Decoder to sound, cross attention (frames of 20 ms)",
            cross,
            predicted,
            seconds,
            column=None,
            named={"alignment": loaded.alignment_heads},
            places=[round(time / frame) for time in times],
            shown_keys=heard,
        ),
        View(
            "decoder",
            "Decoder, self attention",
            np.asarray(decoded["hook"]["row_weights"]),
            words,
            words,
            decoded["sites"]["resid"],
            from_row=min(8, len(words) - 1),
        ),
        View(
            "encoder",
            "Encoder, self attention (frames of 20 ms)",
            frames,
            seconds[:heard],
            seconds,
            encoded["sites"]["resid"][:, :, :heard],
            column=None,
            shown_keys=heard,
            listed=False,
        ),
    ]
    silence = {
        f"attention of {whose} to the silence after the sound": f"{float(weights[..., heard:].sum(-1).mean()):.3f}"
        for whose, weights in (("words", cross), ("sound", frames))
    }
    facts = {"sound": f"{pathlib.Path(path).name}, {len(sound) / RATE:.2f} s"}
    return Probed({**facts, "text": loaded.tokenizer.decode(tokens).strip(), **silence}, views)


def _encoder_view(model: Any, inputs: Any, labels: Sequence[str], **more: Any) -> View:
    """An encoder's only view; its sink is the key that draws most."""
    _, aux = model.states(inputs, hook=_weights(model.config), record=("resid",))
    weights = np.asarray(aux["hook"]["row_weights"])
    return View("encoder", "Encoder, self attention", weights, labels, labels, aux["sites"]["resid"], None, **more)


def _weights(config: Any, rows: Any = None) -> AttnHook:
    """A hook for all layers that shows the weights of some rows."""
    return for_layers(AttnHook(rows=rows, observe=frozenset({"row_weights"})), config.num_layers)


def _label(token: str) -> str:
    """A token as a label, on which spaces can be seen."""
    return token.replace("\n", "\\n").replace(" ", "·") or "∅"


def _at_least(count: int, least: int, what: str) -> None:
    if count < least:
        raise ValueError(f"at least {least} {what} are needed, got {count}")


def _clip() -> str:
    return str(packages.path("librivox", "clip_0870"))


def _photo() -> str:
    from sklearn import datasets

    return str(pathlib.Path(datasets.__file__).parent / "images" / "china.jpg")


TOWER = (
    "The Eiffel Tower is a wrought-iron lattice tower on the Champ de Mars in Paris, France. It is named after the "
    "engineer Gustave Eiffel, whose company designed and built the tower from 1887 to 1889."
)
REACTION = "CC(C)S.CN(C)C=O.Fc1cccnc1F.O=C([O-])[O-].[K+].[K+]>>CC(C)Sc1ncccc1F"
ADAPTERS = {
    "smollm2": Adapter("SmolLM2-135M", "text", lambda: TOWER, probe_smollm2),
    "whisper_tiny_en": Adapter("Whisper tiny.en", "file", _clip, probe_whisper_tiny_en),
    "minilm": Adapter("MiniLM-L6", "text", lambda: "A man is eating a piece of bread.", probe_minilm),
    "rxnmapper": Adapter("rxnmapper", "text", lambda: REACTION, probe_rxnmapper),
    "vit_s14": Adapter("a trained ViT-S/14", "file", _photo, probe_vit_s14),
}
"""The models by name."""
