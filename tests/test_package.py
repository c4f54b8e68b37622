"""The package as a whole: what importing it costs, what it shows, and whether its README tells the truth."""

import importlib
import pathlib
import re
import subprocess
import sys
import tomllib

import jaxtyping
import pytest

import jattn
from jattn.layers import adapters

ROOT = pathlib.Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def _python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_leaves_alone_what_is_used_elsewhere():
    loaded = _python("import sys, jattn; print(*sorted({name.split('.')[0] for name in sys.modules}))").split()
    assert "jax" in loaded
    assert not {"matplotlib", "optax", "orbax", "sklearn", "torch", "experiments"}.intersection(loaded)


def test_import_does_not_read_the_catalogue():
    loaded = _python("import sys, jattn; print(*sys.modules)").split()
    assert not [name for name in loaded if name.startswith(("jattn.mechanisms.", "jattn.catalog", "jattn.models"))]


def test_annotations_of_internals_are_checked():
    with pytest.raises(jaxtyping.TypeCheckError):
        adapters._one_batch_axis("no array", (1,))


def test_version_is_that_of_the_distribution():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert jattn.__version__ == project["version"]


def test_public_names_exist_and_are_documented():
    assert sorted(jattn.__all__) == sorted(set(jattn.__all__))
    for name in jattn.__all__:
        public = getattr(jattn, name)
        assert name.startswith("__") or public.__doc__, name


def test_readme_example_runs(capsys):
    code = re.search(r"<!-- example -->\n```python\n(.*?)```", README, re.DOTALL)[1]
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    exec(compile(code, "README.md", "exec"), {})
    assert "(2, 300, 8, 64) (2, 300, 8)" in capsys.readouterr().out


def test_readme_has_two_set_up_commands_of_one_line():
    blocks = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    assert [len(block.strip().splitlines()) for block in blocks] == [1, 1]
    compare, tests = blocks
    assert "experiments.compare" in compare
    assert "pytest" in tests
    assert set(re.findall(r"<!-- command: (\w+) -->", README)) == {"compare", "test"}


def test_readme_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_readme_names_exist():
    for path in set(re.findall(r"`jattn((?:\.\w+)+)", README)):
        target, place = jattn, "jattn"
        for name in path.strip(".").split("."):
            place = f"{place}.{name}"
            target = getattr(target, name, None) or importlib.import_module(place)
