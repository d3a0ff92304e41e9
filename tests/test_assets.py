"""Where the shipped model is looked for, and what is said where it is not."""

import shutil
import sys
import tomllib
from pathlib import Path

import pytest

from baatt import assets

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """The module as a wheel installs it, far from any checkout."""
    place = tmp_path / "site" / "baatt" / "assets"
    place.mkdir(parents=True)
    monkeypatch.setattr(assets, "__file__", str(place / "__init__.py"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path / "site"


def test_a_checkout_has_it():
    assert assets.shipped_model() == ROOT / "src/baatt/assets/needle-18m"


def test_a_wheel_has_not_and_names_the_command(wheel):
    with pytest.raises(
        FileNotFoundError, match=r"not part of the baatt wheel: run `pip install \./model` in a checkout"
    ):
        assets.shipped_model()


@pytest.mark.parametrize("depth", ["", "docs", "benchmarks/results"])
def test_a_wheel_finds_the_checkout_that_one_stands_in(wheel, monkeypatch, depth):
    monkeypatch.chdir(ROOT / depth)
    assert assets.shipped_model() == ROOT / "src/baatt/assets/needle-18m"


def test_a_wheel_finds_the_package_of_the_model(wheel, monkeypatch):
    project = tomllib.loads((ROOT / "model/pyproject.toml").read_text())
    (source, target), *none = project["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"].items()
    assert not none
    (wheel / target).mkdir(parents=True)
    shutil.copy(ROOT / "model" / source / "config.json", wheel / target)
    monkeypatch.setattr(sys, "path", [str(wheel), *sys.path])
    assert assets.shipped_model() == wheel / target


def test_the_wheel_leaves_it_out():
    targets = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]
    assert {kind: target["exclude"] for kind, target in targets.items()} == {
        kind: ["src/baatt/assets/needle-18m"] for kind in ("wheel", "sdist")
    }
