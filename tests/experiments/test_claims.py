"""Claims: found by their files, run in a few steps, judged by their stated rules."""

import json

import numpy as np
import pytest
from absl import app, flags

from experiments.claims import __main__ as command
from experiments.claims import lightning_constant_speed, mqar_width64, registry, ssa_temperature
from experiments.claims.ssa_temperature import Paired


def flags_of(*arguments):
    values = flags.FlagValues()
    command.define_flags(values)
    values(["claims", *arguments])
    return values


def test_every_claim_states_what_it_tests():
    found = registry.claims()
    assert {"mqar_width64", "ssa_temperature"} <= set(found)
    for name, claim in found.items():
        assert claim.name == name
        assert all((claim.claim, claim.setting, claim.expected, claim.paper.title))


def test_list_shows_them(capsys):
    command.main(["claims", "list"], flags_of())
    shown = capsys.readouterr().out
    assert "mqar_width64\n  paper:" in shown
    assert "2411.12892" in shown


def test_an_unknown_claim_is_answered_with_the_nearest():
    with pytest.raises(SystemExit, match="mqar_width64"):
        command.main(["claims", "run", "mqar_width"], flags_of())
    with pytest.raises(app.UsageError):
        command.main(["claims", "rnu"], flags_of())


@pytest.mark.slow
def test_a_quick_run_writes_its_files(tmp_path, capsys):
    command.main(["claims", "run", "ssa_temperature"], flags_of("--quick", f"--output={tmp_path}"))
    assert "this verdict means nothing" in capsys.readouterr().out
    written = json.loads((tmp_path / "ssa_temperature-quick.json").read_text())
    assert written["quick"]
    assert written["verdict"] in registry.VERDICTS
    assert set(written["numbers"]["models"]) == {"2", "4", "8"}
    assert (tmp_path / "ssa_temperature-quick.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_recall_claim_runs(tmp_path):
    result = registry.run(registry.find("mqar_width64"), tmp_path, True, lambda text: None)
    assert set(result["numbers"]["mechanisms"]["linear_attention"]["accuracy"]) == {"4", "8", "16"}


@pytest.mark.parametrize(
    ("softmax", "linear", "verdict"),
    [(0.995, 0.5, "reproduced"), (0.98, 0.5, "partly"), (0.995, 0.95, "not reproduced"), (0.5, 0.5, "not reproduced")],
)
def test_verdicts_of_recall(softmax, linear, verdict):
    found = [{"4": [1.0], "16": [value]} for value in (softmax, linear)]
    assert mqar_width64.judge(*found)[0] == verdict
    untrained = mqar_width64.judge({"4": [1.0], "16": [1.0]}, {"4": [0.3], "16": [0.1]})
    assert untrained[0] == "partly"
    assert "not its state alone" in untrained[1]


def test_verdicts_of_temperature():
    clear, none = Paired(1.0, 0.1), Paired(0.1, 1.0)

    def verdict(*at):
        gaps = {2: none, 4: none, 8: none} | dict.fromkeys(at, clear)
        return ssa_temperature.judge({width: {"excess": gap, "l1": gap} for width, gap in gaps.items()})

    assert [verdict(), verdict(2), verdict(8), verdict(2, 8)] == [
        "not reproduced",
        "partly",
        "reproduced",
        "reproduced",
    ]
    mixed = {"excess": clear, "l1": none}
    assert ssa_temperature.judge(dict.fromkeys((2, 4, 8), mixed)) == "not reproduced"


def test_both_models_of_temperature_start_almost_equal():
    import jax

    params = ssa_temperature.initial(0, 4)
    plain, tempered = (np.asarray(ssa_temperature.predict(params, flag)) for flag in (False, True))
    np.testing.assert_allclose(plain.sum(-1), 1, rtol=1e-6)
    np.testing.assert_allclose(tempered, plain, atol=0.05)
    sharper = ssa_temperature.predict({**params, "alpha": jax.numpy.asarray(3.0)}, True)
    assert (np.asarray(sharper).max(-1) >= plain.max(-1)).all()


@pytest.mark.parametrize(("longest", "verdict"), [(1.19, "reproduced"), (1.4, "partly"), (1.6, "not reproduced")])
def test_constant_speed_is_judged_from_where_it_is_claimed(longest, verdict):
    lightning = {512: 9.0, 2048: 1.0, 65536: longest}
    assert lightning_constant_speed.growth(lightning) == longest
    assert lightning_constant_speed.judge(lightning, {2048: 1.0, 16384: 8.0}) == verdict
    assert lightning_constant_speed.judge(lightning, {2048: 1.0, 16384: 1.9}) == "not reproduced"
