"""Where the shipped models are looked for, and what is said where they are not."""

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


def test_the_change_of_smollm2_is_looked_for_in_the_same_places(wheel, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"the change of SmolLM2 \(15 MB\) is not part of .* `pip install"):
        assets.shipped_adapter()
    for place in (wheel / "baatt_models", wheel / "baatt/assets"):
        (place / assets.SMOLLM2).mkdir(parents=True)
        (place / assets.SMOLLM2 / "adapter.safetensors").touch()
        monkeypatch.setattr(sys, "path", [str(wheel), *sys.path])
        assert assets.shipped_adapter() == place / assets.SMOLLM2 / "adapter.safetensors"


@pytest.mark.parametrize("name", [assets.VISION, assets.VIDEO])
def test_the_models_on_pixels_are_looked_for_in_the_same_places(wheel, monkeypatch, name):
    with pytest.raises(FileNotFoundError, match=f"the model {name} is not part of the baatt wheel: run `pip"):
        assets.shipped_vision_model(name)
    (wheel / "baatt_models" / name).mkdir(parents=True)
    (wheel / "baatt_models" / name / "config.json").touch()
    monkeypatch.setattr(sys, "path", [str(wheel), *sys.path])
    assert assets.shipped_vision_model(name) == wheel / "baatt_models" / name


@pytest.mark.parametrize("depth", ["", "docs", "benchmarks/results"])
def test_a_wheel_finds_the_checkout_that_one_stands_in(wheel, monkeypatch, depth):
    monkeypatch.chdir(ROOT / depth)
    assert assets.shipped_model() == ROOT / "src/baatt/assets/needle-18m"


MODELS = [f"src/baatt/assets/{name}" for name in (assets.NEEDLE, assets.SMOLLM2, assets.VISION, assets.VIDEO)]


def test_a_wheel_finds_the_package_of_the_models(wheel, monkeypatch):
    project = tomllib.loads((ROOT / "model/pyproject.toml").read_text())
    included = project["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    assert list(included) == [f"../{folder}" for folder in MODELS]
    for source, target in included.items():
        (wheel / target).mkdir(parents=True)
        assert (ROOT / "model" / source).is_dir()
    target = wheel / included[f"../{MODELS[0]}"]
    shutil.copy(ROOT / MODELS[0] / "config.json", target)
    monkeypatch.setattr(sys, "path", [str(wheel), *sys.path])
    assert assets.shipped_model() == target


def test_the_wheel_leaves_them_out():
    targets = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]
    assert {kind: target["exclude"] for kind, target in targets.items()} == dict.fromkeys(("wheel", "sdist"), MODELS)
