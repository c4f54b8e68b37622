"""The GPU benchmark: its arithmetic, and the whole path at toy sizes; no figure of time is asserted."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from absl import app, flags

import jattn
from experiments import benchmark, devices, gpu_cases, gpu_peers, gpu_suite, timing


def run(*arguments):
    values = flags.FlagValues()
    benchmark.define_flags(values)
    values(["benchmark", "--suite=gpu", *arguments])
    benchmark.main(["benchmark"], values)


def test_without_a_gpu_it_says_what_runs_without_one(tmp_path):
    with pytest.raises(SystemExit, match="--suite=gpu measures an NVIDIA GPU.*--tiny --output=FOLDER"):
        run()
    with pytest.raises(app.UsageError, match="--tiny measures nothing"):
        run("--tiny")
    with pytest.raises(app.UsageError, match="not sparce"):
        run("--groups=sparce")


def test_flops_are_those_of_published_figures():
    (case,) = (x for x in gpu_cases.all_cases([4096]) if x.name == "D 128 T 4096 causal")
    assert (case.batch, case.heads) == (4, 16)
    assert case.flops("forward") == 4 * 4 * 16 * 4096**2 * 128 / 2
    assert case.flops("backward") == 2.5 * case.flops("forward")
    (mla,) = (x for x in gpu_cases.all_cases([]) if x.group == "mla")
    assert mla.flops("forward") == 2 * 512 * 16 * 1024**2 * (192 + 128) / 2


@pytest.mark.parametrize("case", [x for x in gpu_cases.tiny_cases() if x.group == "sparse"], ids=lambda x: x.name)
def test_pairs_of_sparse_cases_are_the_visible_ones(case):
    mask = case.arguments().get("mask", jattn.masks.causal())
    if case.documents:
        assert sum(case.documents) == case.length and len(set(case.documents)) > 1
        mask = jattn.masks.causal() & jattn.masks.segment_mask(case.segment_ids())
    visible = int(np.sum(mask.to_dense(1, 1, case.length, case.length)))
    assert case.pairs == (case.length**2 / 2 if case.name == "causal" else visible)
    assert gpu_suite.live_pairs(case) >= visible


def test_every_published_group_has_cases():
    cases = gpu_cases.all_cases(gpu_suite.LENGTHS)
    assert {x.group for x in cases} == {x.group for x in gpu_cases.tiny_cases()} == set(gpu_suite.GROUPS)
    published = [x for x in cases if x.group == "published"]
    assert len(published) == 30
    assert all(x.batch * x.length == 16384 and x.heads * x.head_dim == 2048 for x in published)
    assert sorted(x.batch for x in cases if x.group == "decode") == [1, 4, 16, 64]


def test_time_per_live_pair():
    rows = [
        {"case": case, "passes": "forward", "name": "kernel", "time_s": {"median": seconds}}
        for case, seconds in (("causal", 8.0), ("window 32", 3.0))
    ]
    gpu_suite.relate_to_causal(rows, {"causal": 400, "window 32": 100})
    assert rows[0]["time_per_live_pair_relative_to_causal"] == 1.0
    assert rows[1]["time_per_live_pair_relative_to_causal"] == 1.5
    assert rows[1]["live_pairs"] == 100


def test_shares_of_a_peak_are_those_of_the_device(monkeypatch):
    case = gpu_cases.tiny_cases()[-1]
    subject = timing.Subject("kernel", lambda: None, times=[1e-6])
    assert gpu_suite.row(case, "forward", subject, {}, None)["share_of_peak"] is None
    monkeypatch.setitem(devices.PEAKS, devices.describe()["kind"], devices.Peak(1e12, 1e12, "a test"))
    line = gpu_suite.row(case, "forward", subject, {}, subject)
    assert line["share_of_peak"] == pytest.approx(case.flops("forward") / 1e-6 / 1e12)
    assert line["share_of_bandwidth"] == pytest.approx(case.cache_bytes / 1e-6 / 1e12)
    assert line["time_to_cudnn"]["median"] == 1.0


def test_the_fastest_variant_counts_and_the_others_say_why_not():
    case = gpu_cases.tiny_cases()[0]
    arrays = case.arrays()

    def slow(query, key, value):
        return jnp.linalg.matrix_power(jnp.ones((300, 300)), 50).sum() + query

    def fails(query, key, value):
        raise ValueError("too large a tile")

    variants = {"slow": slow, "fast": lambda query, key, value: query, "fails": fails}
    _, found = gpu_suite.fastest(case, "forward", "x", variants, arrays)
    assert found == {"variant": "fast", "variants_that_fail": {"fails": "ValueError: too large a tile"}}
    with pytest.raises(gpu_peers.Refusal, match="too large a tile"):
        gpu_suite.fastest(case, "backward", "x", {"fails": fails}, arrays)


def test_dense_logits_beyond_the_limit_are_refused(monkeypatch):
    monkeypatch.setattr(gpu_suite, "implementations", lambda: [("jax.nn xla", None)])
    done = gpu_suite.measure(gpu_cases.tiny_cases()[0], "forward", 1, 0.0, True, 100.0)
    assert "--max_logits_gib" in done["refused"][0]["reason"] and not done["rows"]


def check_rows(path):
    content = json.loads(path.read_text())
    assert {"device", "versions", "command"} <= set(content) and content["device"]["kind"]
    assert all(x["time_s"]["median"] > 0 and x["tflops"] > 0 for x in content["rows"])
    assert all(x["reason"] for x in content["refused"])
    names = {name for name, _ in gpu_peers.implementations()}
    told = {}
    for line in content["rows"] + content["refused"]:
        told.setdefault((line["case"], line["passes"]), set()).add(line["name"])
    assert all(x == names for x in told.values())
    return content


@pytest.mark.slow
def test_one_group_from_the_command_line_to_its_file(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark.jax.config, "update", lambda *_: None)
    run("--tiny", f"--output={tmp_path}", "--groups=decode", "--rounds=1")
    content = check_rows(tmp_path / "decode.json")
    ran = {x["name"]: x for x in content["rows"]}
    assert {"jattn triton", "jattn blockwise", "jax.nn xla", "jax pallas decode"} == set(ran)
    assert ran["jattn triton"]["runs_a_measurement"] == gpu_suite.DECODE_RUNS
    assert content["tiny"] is True


@pytest.mark.slow
def test_every_group_runs_at_toy_sizes(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark.jax.config, "update", lambda *_: None)
    run("--tiny", f"--output={tmp_path}", "--rounds=1", "--groups=published,pair_bias,mla,sparse")
    for group in gpu_suite.GROUPS[:-1]:
        content = check_rows(tmp_path / f"{group}.json")
        assert {"forward", "backward"} == {x["passes"] for x in content["rows"] if x["name"] == "jattn triton"}
    sparse = json.loads((tmp_path / "sparse.json").read_text())["rows"]
    assert all("time_per_live_pair_relative_to_causal" in x for x in sparse if x["name"] == "jattn triton")
