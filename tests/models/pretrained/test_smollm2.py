"""SmolLM2 by known numbers, through caches and in bfloat16; needs `jattn fetch smollm2` (93 MB)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jattn import masks, probes
from jattn.cache import FullCache
from jattn.models import Stream, Swap
from jattn.models.pretrained import load, packages
from jattn.models.pretrained.readers import gguf_file
from jattn.testing.compiling import usual_options
from jattn.testing.tolerance import assert_within_policy
from tests.models.pretrained.plain import TRUTH, in_precision

pytestmark = pytest.mark.pretrained

TEXT = (
    "The Eiffel Tower is a wrought-iron lattice tower on the Champ de Mars in Paris, France. It is named after the "
    "engineer Gustave Eiffel, whose company designed and built the tower from 1887 to 1889."
)


@pytest.fixture(scope="module")
def language(fetched):
    fetched("smollm2")
    return load("smollm2")


def logits(model, tokens, **call):
    return np.asarray(nnx.jit(lambda m, t: m(t, **call).logits)(model, jnp.asarray(tokens)[None])[0], np.float32)


def nll(found, tokens):
    chances = jax.nn.log_softmax(jnp.asarray(found[:-1], jnp.float32))
    return -np.asarray(chances)[np.arange(len(tokens) - 1), tokens[1:]]


def test_known_likelihood_and_answer(language):
    tokens = language.encode(TEXT)
    assert len(tokens) == 52
    assert nll(logits(language.model, tokens), tokens).mean() == pytest.approx(1.834, abs=0.01)
    question = language.encode("The capital of France is")
    assert language.decode([int(logits(language.model, question)[-1].argmax())]) == " Paris"
    assert language.decode(tokens) == TEXT


def test_known_sinks_and_induction_heads(language):
    tokens = language.encode(TEXT)
    sinks = probes.capture(language.model, tokens[None], sites=())["weights"][:, 0, :, 8:, 0].mean(axis=(1, 2))
    known = [0.04, 0.04, 0.21, 0.33, 0.29, 0.33, 0.34, 0.34, 0.34, 0.29, 0.09, 0.01, 0.43, 0.49, 0.68]
    known += [0.58, 0.33, 0.68, 0.71, 0.53, 0.83, 0.52, 0.57, 0.74, 0.86, 0.72, 0.79, 0.63, 0.71, 0.57]
    np.testing.assert_allclose(sinks, known, atol=0.006)

    once = np.random.default_rng(0).integers(1000, 40000, 25)
    twice = np.concatenate([once, once])
    losses = nll(logits(language.model, twice), twice)
    assert losses[:24].mean() == pytest.approx(13.93, abs=0.01)
    assert losses[26:].mean() == pytest.approx(3.31, abs=0.01)
    weights = probes.capture(language.model, twice[None], sites=())["weights"]
    scores = np.asarray(probes.induction_score(weights, 25))[:, 0]
    for (layer, head), score in {(18, 6): 0.90, (17, 4): 0.79, (17, 3): 0.78, (17, 5): 0.75, (18, 7): 0.57}.items():
        assert scores[layer, head] == pytest.approx(score, abs=0.006)
    assert sorted(map(tuple, np.argwhere(scores > 0.56))) == [(17, 3), (17, 4), (17, 5), (18, 6), (18, 7)]


def test_token_by_token_equals_the_parallel_pass(language):
    tokens = language.encode(TEXT)
    want = logits(language.model, tokens)
    graphdef, state = nnx.split(language.model)

    @jax.jit
    def step(state, cache, token):
        out = nnx.merge(graphdef, state)(token, cache=cache)
        return out.cache, out.logits[0, 0]

    cache, rows = language.model.init_cache(FullCache(64), 1), []
    for token in tokens:
        cache, row = step(state, cache, jnp.full((1, 1), token))
        rows.append(row)
    np.testing.assert_allclose(np.stack(rows), want, atol=2e-3 * np.abs(want).max())
    assert nll(np.stack(rows), tokens).mean() == pytest.approx(nll(want, tokens).mean(), abs=1e-4)


def turned(plain, x, positions):
    """Neighboring channels turn by position * base^(-2m/64): the file's own order, which the loader does not keep."""
    angles = positions[:, None] * 100_000.0 ** (-np.arange(32) / 32)
    cos, sin = (plain.np.asarray(f(angles), plain.wide)[:, None] for f in (np.cos, np.sin))
    heads = plain.np.asarray(x, plain.wide).reshape(len(x), -1, 64)
    even, odd = heads[..., 0::2], heads[..., 1::2]
    pairs = plain.np.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return plain.array(pairs.reshape(x.shape))


def plain_forward(plain, tensors, tokens):
    """The stream after each layer, and the logits, from the file's tensors."""
    x, stream = plain.array(tensors["token_embd.weight"][tokens]), []
    for layer in range(30):

        def weight(name, layer=layer):
            return plain.array(tensors[f"blk.{layer}.{name}.weight"]).T

        h = plain.rms_norm(x, tensors[f"blk.{layer}.attn_norm.weight"], 1e-5)
        query, key = (turned(plain, h @ weight(f"attn_{name}"), np.arange(len(tokens))) for name in "qk")
        _, mixed = plain.attention(query, key, h @ weight("attn_v"), 9, is_causal=True)
        x = x + mixed @ weight("attn_output")
        h = plain.rms_norm(x, tensors[f"blk.{layer}.ffn_norm.weight"], 1e-5)
        gate = h @ weight("ffn_gate")
        x = x + (gate / (1 + plain.np.exp(-gate)) * (h @ weight("ffn_up"))) @ weight("ffn_down")
        stream.append(np.asarray(x, np.float64))
    last = plain.rms_norm(x, tensors["output_norm.weight"], 1e-5)
    return np.stack(stream), np.asarray(last @ plain.array(tensors["token_embd.weight"]).T, np.float64)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_all_layers_against_float64(language, fetched, dtype):
    model = language.model if dtype == jnp.float32 else load("smollm2", dtype=dtype).model
    tokens = language.encode(TEXT)
    _, tensors = gguf_file.read(packages.path("smollm2", "weights"))
    truth, plain = (plain_forward(precision, tensors, tokens) for precision in (TRUTH, in_precision(dtype)))
    run = jax.jit(lambda s, t: nnx.merge(graphdef, s)(t, record=("resid",)), compiler_options=usual_options())
    graphdef, state = nnx.split(model)
    out = run(state, tokens[None])
    assert_within_policy(out.aux["sites"]["resid"][:, 0], truth[0], plain[0], dtype=dtype, what="stream")
    assert_within_policy(out.logits[0], truth[1], plain[1], dtype=dtype, what="logits")
    assert nll(np.asarray(truth[1]), tokens).mean() == pytest.approx(1.834, abs=0.001)


def test_a_hook_and_a_swap_say_the_same(language):
    tokens = language.encode(TEXT)
    hook = probes.for_layers(probes.AttnHook(mask=masks.sliding_window(16, num_sinks=4)), 30)
    options = {"window": 16, "num_sinks": 4, "positions": "original"}
    swapped = load("smollm2", attention=Swap("sink_window_cache", options))
    found, want = logits(swapped.model, tokens), logits(language.model, tokens, hook=hook)
    np.testing.assert_allclose(found, want, atol=2e-3 * np.abs(want).max())
    assert nll(found, tokens).mean() > nll(logits(language.model, tokens), tokens).mean()


def test_a_conversation(language):
    stream = Stream(language.model, 128, temperature=0)
    stream.read(language.chat([("user", "What is the capital of France?")]))
    answer = list(stream.tokens(20, language.stop_token))
    assert "Paris" in language.decode(answer)
    assert len(answer) < 20


def test_memory_of_a_prefill(language):
    graphdef, state = nnx.split(language.model)
    shape = jax.ShapeDtypeStruct((1, 512), jnp.int32)
    run = jax.jit(lambda s, t: nnx.merge(graphdef, s)(t).logits).lower(state, shape).compile(usual_options())
    analysis = run.memory_analysis()
    assert analysis.temp_size_in_bytes < 32e6
    assert analysis.argument_size_in_bytes == pytest.approx(4 * 134.5e6, rel=0.001)
