"""The swap table on a tiny random model: its figures against plain computations, what it keeps, what it refuses."""

import json
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import app, flags
from flax import nnx

import jattn
from experiments import swap, swap_cells, swap_kept, swap_tune
from experiments.cells import Request, parse_requests
from experiments.swap_cells import BLANK, PATTERN, Bench, Source, run_cell
from experiments.swap_tune import TuneOptions
from jattn import catalog, masks
from jattn.models import DecoderLM, Swap, TransformerConfig
from jattn.models.pretrained.filling import fill, new_in_attention
from jattn.models.resolve import is_attention, resolve
from jattn.tasks.real_qkv import articles

CONFIG = TransformerConfig(
    vocab_size=64,
    features=16,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    mlp="swiglu",
    position="rope",
    embedding_std=1.0,
)
LENGTH = 40
TEXT = "".join(chr(33 + (i * i * 7 + i // 3) % 90) for i in range(64))
PLAIN = "softmax_attention"


def encode(text):
    return np.frombuffer(text.encode(), np.uint8).astype(np.int32) % CONFIG.vocab_size


@pytest.fixture(scope="module")
def source():
    state = nnx.to_flat_state(nnx.state(DecoderLM(CONFIG, rngs=nnx.Rngs(0))))
    # Queries and keys large enough for attention to be far from uniform.
    sharper = {"query": 3.0, "key": 3.0}
    weights = {
        ".".join(map(str, path)): np.asarray(leaf.get_value()) * sharper.get(str(path[-2]), 1.0) for path, leaf in state
    }

    def load(attention):
        def build(rngs):
            return DecoderLM(CONFIG, attention=attention, rngs=rngs)

        return types.SimpleNamespace(model=fill(build, dict(weights), new=new_in_attention), encode=encode)

    return Source("tiny", "hash", load)


@pytest.fixture(scope="module")
def bench(source):
    return Bench(source, TEXT, LENGTH)


def outcome_of(bench, text, **options):
    (cell,) = bench.cells(parse_requests(text), rounds=1, **options)
    return run_cell(cell, bench)


def plain_weights(bench):
    """Weights of full attention `[L, N, T, S]` in float64, from the model's own queries and keys."""
    query, key = (np.asarray(x, np.float64) for x in (bench.seen.queries, bench.seen.keys))
    logits = np.einsum("ltnd,lsnd->lnts", query, np.repeat(key, 2, 2)) / np.sqrt(query.shape[-1])
    logits = np.where(np.tril(np.ones((LENGTH, LENGTH), bool)), logits, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def window(size, sinks=0):
    i, j = np.arange(LENGTH)[:, None], np.arange(LENGTH)
    return (j <= i) & ((j > i - size) | (j < sinks))


def test_the_plain_model_is_the_measure(bench):
    found = outcome_of(bench, PLAIN)
    logits = np.asarray(bench.base.model(bench.tokens).logits, np.float64)[0, :-1]
    logits -= logits.max(-1, keepdims=True)
    losses = np.log(np.exp(logits).sum(-1)) - logits[np.arange(LENGTH - 1), bench.tokens[0, 1:]]
    assert found["perplexity"] == pytest.approx(np.exp(losses.mean()), rel=1e-5)
    assert found["ratio"] == pytest.approx(1.0, rel=1e-6)
    assert found["status"] == "ok"
    assert found.keys() == BLANK.keys()
    assert found["new_params"] == 0
    assert found["temp_bytes"] > 0
    assert found["compile_s"] > 0
    assert found["forward_s"]["median"] > 0
    assert found["forward_ratio"] > 0
    assert found["kept_mass"] is None
    assert "every pair" in found["kept_how"]
    assert found["visited_share"] == pytest.approx((LENGTH + 1) / (2 * LENGTH))


@pytest.mark.parametrize(
    ("text", "size", "sinks"),
    [
        ("window_cache:window=5", 5, 0),
        ("sink_window_cache:window=5,num_sinks=2,positions=original", 5, 2),
        ("gna_attention:window=7", 7, 0),
    ],
)
def test_kept_mass_is_what_full_attention_has_on_the_kept_pairs(bench, text, size, sinks):
    found = outcome_of(bench, text)
    support = window(size, sinks)
    share = (plain_weights(bench) * support).sum(-1)[:, :, LENGTH // 2 :]
    np.testing.assert_allclose(found["kept_by_layer"], share.mean((1, 2)), rtol=1e-4)
    assert found["kept_mass"] == pytest.approx(share.mean(), rel=1e-4)
    assert found["visited_share"] == pytest.approx(support.mean())
    assert found["kept_how"].startswith("lse")
    assert found["ratio"] != pytest.approx(1.0, rel=1e-4)


def test_a_cell_judges_the_model_with_the_mechanism_in_it(bench):
    """Independent of how mechanisms are named: the mask is put into every layer by hand."""
    model = bench.source.load(PLAIN).model
    for block in model.stack.blocks:
        block.attention.attention_fn = lambda q, k, v, *, is_causal: jattn.dot_product_attention(
            q, k, v, mask=masks.sliding_window(5)
        )
    by_hand = swap_cells.perplexity_of(model(bench.tokens).logits, bench.tokens)
    assert outcome_of(bench, "window_cache:window=5")["perplexity"] == pytest.approx(by_hand, rel=1e-5)


@pytest.mark.slow
def test_pairs_that_depend_on_the_data_are_read_as_they_are_chosen(bench):
    found = outcome_of(bench, "moba_attention:chunk_size=8,topk=2")
    model = bench.source.load(Swap("moba_attention", {"chunk_size": 8, "topk": 2})).model
    streams = jnp.asarray(bench.seen.streams)
    shares = []
    for layer, full in enumerate(plain_weights(bench)):
        block = bench.base.model.stack.blocks[layer]
        hook = jattn.probes.AttnHook(observe={"row_weights"})
        inputs = block.attention_norm(streams[layer][None])
        seen = model.stack.blocks[layer].attention(inputs, mask=masks.causal(), hook=hook).aux["hook"]["row_weights"]
        shares.append((full * (np.asarray(seen[0]) > 0)).sum(-1)[:, LENGTH // 2 :].mean())
    np.testing.assert_allclose(found["kept_by_layer"], shares, rtol=1e-3)
    assert 0.1 < found["kept_mass"] < 1
    assert found["visited_share"] < 0.45


@pytest.mark.slow
def test_some_layers_and_heads_alone(bench):
    found = outcome_of(bench, "window_cache:window=5", layers=[-1], heads=[1])
    share = (plain_weights(bench)[1, 1] * window(5)).sum(-1)
    rows = np.unique(np.linspace(LENGTH // 2, LENGTH - 1, swap_kept.ROWS).round().astype(int))
    np.testing.assert_allclose(found["kept_by_layer"], [share[rows].mean()], rtol=1e-4)
    assert found["kept_how"].startswith("weights on one-hot values")
    whole = outcome_of(bench, "window_cache:window=5")
    assert abs(np.log(found["ratio"])) < abs(np.log(whole["ratio"]))
    assert (found["layers"], found["heads"]) == ([1], [1])


@pytest.mark.parametrize("name", ["linear_attention", "kv_bias"])
def test_a_mechanism_that_keeps_every_pair_has_no_kept_mass(bench, name):
    found = outcome_of(bench, name)
    assert found["status"] == "ok"
    assert found["kept_mass"] is None
    assert found["kept_how"] == "n/a: keeps every pair"
    assert (found["new_params"] > 0) == (name == "kv_bias")
    assert (found["visited_share"] is None) == (name == "linear_attention")


def test_what_stands_beside_the_engine_is_noticed(bench):
    """A window, and a rest that sees everything: the masks of the engine are not all there is."""

    def hybrid(query, key, value, *, is_causal):
        near = jattn.dot_product_attention(query, key, value, mask=masks.sliding_window(5))
        return near + 0.1 * jattn.get("linear_attention")(query, key, value, is_causal=is_causal)

    model = bench.source.load(PLAIN).model
    for block in model.stack.blocks:
        block.attention.attention_fn = hybrid
    found = swap_kept.kept(model, bench.base.model, bench.seen, [0, 1], [0, 1])
    assert found == {"visited_share": None, "kept_how": "n/a: keeps every pair"}


def test_what_cannot_run_is_a_row_with_its_reason(bench):
    found = outcome_of(bench, "AgentAttention")
    assert (found["status"], found["perplexity"]) == ("unsupported", None)
    assert "causal self" in found["reason"]
    found = outcome_of(bench, "window_cache:window=0")
    assert found["status"] == "failed"
    assert "window" in found["reason"]


def test_everything_of_the_catalogue_takes_part():
    requests = swap_cells.everything(128)
    names = {request.name for request in requests}
    standing = {entry.name for entry in catalog.entries() if entry.kind != "task" and is_attention(entry)}
    assert names == standing
    assert {"window_cache", "gna_mask", "softmax_attention", "ssa"} <= names
    for request in requests:
        if PATTERN in catalog.find(request.name).patterns:
            resolve(request.name, PATTERN, **request.options)
    assert Request("full_cache", {"max_tokens": 128}, "full_cache:max_tokens=128") in requests


@pytest.mark.slow
def test_tuning_pulls_towards_the_unswapped_model(bench, monkeypatch):
    # A text with a single place for a piece, so that losses of all steps are of the same tokens.
    monkeypatch.setattr(swap_tune, "texts", lambda: ((TEXT * 3)[: 16 * swap_tune.CHARACTERS + 1],))
    options = TuneOptions(20, batch=4, length=16, learning_rate=3e-3)
    found = outcome_of(bench, "linear_attention", layers=[1], tune=options)
    tuned = found["tuned"]
    assert tuned["steps"] == 20
    assert tuned["divergence"][1] < tuned["divergence"][0]
    assert tuned["error"][1] < tuned["error"][0]
    assert tuned["trained_params"] == 16 * (16 + 8 + 8 + 16)
    assert tuned["ratio"] == pytest.approx(tuned["perplexity"] / bench.perplexity)
    assert outcome_of(bench, PLAIN, tune=options)["tuned"] is None


def test_tuning_leaves_all_else_as_it_is(bench, monkeypatch):
    monkeypatch.setattr(swap_tune, "texts", lambda: (TEXT * 20,))
    model = bench.source.load(Swap("window_cache", {"window": 3}, layers=[0])).model
    before = dict(nnx.to_flat_state(nnx.state(model)))
    tuned = swap_tune.tune(model, bench.base, [0], TuneOptions(2, batch=1, length=8))
    changed = set()
    for path, leaf in nnx.to_flat_state(tuned.state):
        if not np.array_equal(leaf.get_value(), before[path].get_value()):
            changed.add(path[:4])
        np.testing.assert_array_equal(dict(nnx.to_flat_state(nnx.state(model)))[path], before[path])
    assert changed == {("stack", "blocks", 0, "attention")}


@pytest.mark.slow
def test_tuning_does_not_read_what_is_judged():
    prose, code = swap_tune.texts()
    lines = {line.strip() for line in articles().splitlines() if len(line.strip()) >= 60}
    assert len(lines) > 300
    assert not lines & {line.strip() for line in prose.splitlines()}
    assert sum(line in code for line in sorted(lines)[::25]) == 0
    assert len(prose) > 100_000
    assert len(code) > 1_000_000


@pytest.fixture(scope="module")
def finished(bench, tmp_path_factory):
    folder = tmp_path_factory.mktemp("swap")
    cells = bench.cells(parse_requests("softmax_attention,window_cache:window=5,AgentAttention"), rounds=1)
    return folder, cells, swap.run(cells, bench, folder, "the <command>")


def test_results_have_the_agreed_keys(finished):
    folder, _, results = finished
    assert results == json.loads((folder / "results.json").read_text())
    assert list(results) == ["schema", "command", "versions", "device", "budget", "cells"]
    assert results["schema"] == "jattn.swap/1"
    assert all(list(cell) == list(BLANK) for cell in results["cells"])
    assert [cell["status"] for cell in results["cells"]] == ["ok", "ok", "unsupported"]
    assert results["budget"]["tokens"] == LENGTH


def test_the_report_stands_alone(finished):
    page = (finished[0] / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 3
    assert "the &lt;command&gt;" in page
    assert "window_cache:window=5" in page
    assert "does not support" in page
    assert not re.search(r"(src|href)=.?(http|/|\w+\.png)", page)


def test_finished_cells_are_kept(finished, bench, monkeypatch):
    folder, cells, results = finished
    monkeypatch.setattr(swap_cells, "run_cell", lambda *arguments: pytest.fail("the cell was there already"))
    assert swap.run(cells, bench, folder, "the <command>") == results
    others = bench.cells(parse_requests("softmax_attention"), rounds=1, tune=TuneOptions(1))
    assert others[0].key != cells[0].key == bench.cells(parse_requests("softmax_attention"), rounds=1)[0].key


def test_a_text_that_is_too_short_says_so(source):
    with pytest.raises(ValueError, match="--tokens is 99, but the text has 64 tokens"):
        _ = Bench(source, TEXT, 99).tokens


@pytest.mark.parametrize("text", ["a", "1:b", "3:3", "1;2"])
def test_layers_are_numbers_and_ranges(text):
    assert swap.numbers("") is None
    with pytest.raises(ValueError, match="numbers and ranges|names nothing"):
        swap.numbers(text)


def flags_of(*words):
    values = flags.FlagValues()
    swap.define_flags(values)
    values(["swap", *words])
    return values


def test_flags_reach_the_cells(bench):
    words = ("--mechanisms=ssa", "--layers=0,-1", "--heads=1", "--rounds=2", "--tune=3", "--tune_rate=0.5")
    (cell,) = swap.chosen_cells(flags_of(*words), bench)
    assert (cell.mechanism, cell.layers, cell.heads, cell.rounds) == ("ssa", (0, -1), (1,), 2)
    assert (cell.tune.steps, cell.tune.learning_rate) == (3, 0.5)
    with pytest.raises(ValueError, match="softmax_attention"):
        swap.chosen_cells(flags_of("--mechanisms=sofmax_attention"), bench)
    with pytest.raises(ValueError, match="no option 'windw'"):
        swap.chosen_cells(flags_of("--mechanisms=window_cache:windw=3"), bench)
    assert len(swap.chosen_cells(flags_of(), bench)) > 10
    with pytest.raises(app.UsageError):
        swap.main(["swap", "extra"], flags_of())


def test_a_model_that_was_not_fetched_says_how(monkeypatch, tmp_path):
    monkeypatch.setenv("JATTN_DATA", str(tmp_path))
    before = jax.config.jax_enable_compilation_cache
    try:
        with pytest.raises(SystemExit, match="jattn fetch smollm2"):
            swap.main(["swap"], flags_of())
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
