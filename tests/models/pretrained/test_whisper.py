"""Whisper on real clips, through caches and in bfloat16; needs `jattn fetch whisper_tiny_en librivox` (73 MB)."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jattn.cache import FullCache
from jattn.models import Swap
from jattn.models.pretrained import load, packages
from jattn.models.pretrained.log_mel import log_mel, read_sound
from jattn.models.pretrained.readers import ctranslate2_file
from jattn.testing.compiling import usual_options
from jattn.testing.tolerance import assert_within_policy
from tests.models.pretrained.plain import TRUTH, in_precision

pytestmark = pytest.mark.pretrained

SAID = {
    "clip_0870": "And Mr. John Dashwood had then leisure to consider how much there might be prudently in his power to "
    "do for them.",
    "clip_0890": "Unless to be rather cold-hearted and rather selfish is to be ill-disposed.",
    "clip_0930": "He might even have been made amiable himself.",
}


@pytest.fixture(scope="module")
def speech(fetched):
    fetched("whisper_tiny_en")
    return load("whisper_tiny_en")


@pytest.fixture(scope="module")
def clip():
    def read(name):
        try:
            return read_sound(packages.path("librivox", name))
        except packages.NotFetched as missing:
            pytest.skip(str(missing))

    return read


def words(text):
    return re.sub(r"[^a-z ]", "", text.lower().replace("-", " ").replace("mr.", "mister")).split()


def test_clips_are_transcribed_without_word_errors(speech, clip):
    sounds = {name: clip(name) for name in SAID}
    truth = packages.path("librivox", "transcription").read_text(encoding="utf-8")
    for name, said in SAID.items():
        line = next(line for line in truth.splitlines() if name[-4:] in line)
        found = speech.transcribe(sounds[name])
        assert found.text == said
        assert words(found.text) == words(re.sub(r"<s>|</s>|\(.*\)", "", line))


def test_alignment_heads_follow_the_sound(speech, clip):
    sound = clip("clip_0870")
    found = speech.transcribe(sound)
    times = [time for _, time in found.times]
    assert len(times) == 26
    assert times == sorted(times)
    assert times[0] == pytest.approx(0.40, abs=0.05) and times[24] <= len(sound) / 16_000
    assert [word for word, _ in found.words()][:4] == ["And", "Mr.", "John", "Dashwood"]


def test_token_by_token_equals_the_parallel_pass(speech, clip):
    memory, _ = speech.model.encode(log_mel(clip("clip_0930"))[None])
    tokens = np.array([[*speech.prompt, *speech.tokenizer.encode(" He might even", add_special_tokens=False).ids]])
    want = speech.model(tokens, memory).logits
    cache, rows = speech.model.init_cache(FullCache(16), memory), []
    for place in range(tokens.shape[1]):
        out = speech.model(tokens[:, place : place + 1], cache=cache)
        cache = out.cache
        rows.append(out.logits)
    np.testing.assert_allclose(np.concatenate(rows, 1), want, atol=2e-4 * np.abs(want).max())


def test_bfloat16_says_the_same(speech, clip):
    coarse = load("whisper_tiny_en", dtype=jnp.bfloat16)
    assert coarse.transcribe(clip("clip_0870")).text == SAID["clip_0870"]
    variables = (variable for _, variable in nnx.to_flat_state(nnx.state(coarse.model)))
    assert {variable.get_value().dtype for variable in variables} == {jnp.dtype("bfloat16")}


def plain_forward(plain, tensors, mel, tokens):
    """The memory and the logits, from the file's tensors."""

    def linear(x, name):
        return plain.linear(x, tensors[f"{name}/weight"], tensors[f"{name}/bias"])

    def norm(x, name):
        return plain.norm(x, tensors[f"{name}/layer_norm/gamma"], tensors[f"{name}/layer_norm/beta"], 1e-5)

    def convolve(x, name, stride):
        padded = plain.np.pad(x, ((1, 1), (0, 0)))
        taps = [padded[k : k + len(x) : stride] @ plain.array(tensors[f"{name}/weight"])[:, :, k].T for k in range(3)]
        return plain.gelu(sum(taps) + plain.array(tensors[f"{name}/bias"]))

    def blocks(x, side, memory=None):
        for layer in range(4):
            here = f"{side}/layer_{layer}"
            parts = plain.np.split(linear(norm(x, f"{here}/self_attention"), f"{here}/self_attention/linear_0"), 3, -1)
            x = x + linear(
                plain.attention(*parts, 6, is_causal=side == "decoder")[1], f"{here}/self_attention/linear_1"
            )
            if memory is not None:
                query = linear(norm(x, f"{here}/attention"), f"{here}/attention/linear_0")
                pair = plain.np.split(linear(memory, f"{here}/attention/linear_1"), 2, -1)
                x = x + linear(plain.attention(query, *pair, 6)[1], f"{here}/attention/linear_2")
            x = x + linear(plain.gelu(linear(norm(x, f"{here}/ffn"), f"{here}/ffn/linear_0")), f"{here}/ffn/linear_1")
        return norm(x, side)

    x = convolve(convolve(plain.array(mel), "encoder/conv1", 1), "encoder/conv2", 2)
    memory = blocks(x + plain.array(tensors["encoder/position_encodings/encodings"]), "encoder")
    table = plain.array(tensors["decoder/embeddings/weight"])
    x = table[tokens] + plain.array(tensors["decoder/position_encodings/encodings"][: len(tokens)])
    logits = blocks(x, "decoder", memory) @ table.T
    return np.asarray(memory, np.float64), np.asarray(logits, np.float64)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_memory_and_logits_against_float64(speech, clip, dtype):
    model = speech.model if dtype == jnp.float32 else load("whisper_tiny_en", dtype=dtype).model
    tensors = ctranslate2_file.read(packages.path("whisper_tiny_en", "weights"), "WhisperSpec")
    mel = log_mel(clip("clip_0930"))
    tokens = np.array([*speech.prompt, *speech.tokenizer.encode(" He might even", add_special_tokens=False).ids])
    truth, plain = (plain_forward(precision, tensors, mel, tokens) for precision in (TRUTH, in_precision(dtype)))

    @functools.partial(jax.jit, compiler_options=usual_options())
    def run(state, mel, tokens):
        merged = nnx.merge(graphdef, state)
        memory, _ = merged.encode(mel)
        return memory, merged(tokens, memory).logits

    graphdef, state = nnx.split(model)
    memory, logits = run(state, mel[None], tokens[None])
    assert_within_policy(memory[0], truth[0], plain[0], dtype=dtype, what="memory")
    assert_within_policy(logits[0], truth[1], plain[1], dtype=dtype, what="logits")


def test_other_mechanisms_in_each_place(speech, clip):
    """A window of 3 seconds in the encoder changes the memory; linear attention in the cross attention the words."""
    sound = log_mel(clip("clip_0930"))[None]
    memory, _ = speech.model.encode(sound)
    swap = Swap("gna_mask", {"grid": 1500, "window": 151}, layers=[3])
    near = load("whisper_tiny_en", encoder_attention=swap)
    windowed, _ = near.model.encode(sound)
    assert 0.001 < np.abs(windowed - memory).mean() / np.abs(memory).mean() < 1.0
    mixed = load("whisper_tiny_en", cross_attention=Swap("linear_attention", layers=[0], heads=[1]))
    tokens = np.array([speech.prompt])
    assert not np.allclose(mixed.model(tokens, memory).logits, speech.model(tokens, memory).logits, atol=1e-3)
