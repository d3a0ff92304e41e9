"""Held-out text and words that come with the package, and the needle model, which does not come with a wheel."""

import importlib.util
from pathlib import Path

#: Folder of the model inside a checkout.
_IN_CHECKOUT = Path("src/baatt/assets/needle-18m")
#: The package that brings it: the folder `model` of the repository.
_PACKAGE = "baatt_needle_18m"


def shipped_model() -> Path:
    """Folder of the 17.8M-parameter diffusion LM that the demo runs.

    Beside this file in a checkout, else in the installed package of the model, else in a checkout that one stands in.

    Raises:
        FileNotFoundError: it is in none of them, with the command that brings it.
    """
    package = importlib.util.find_spec(_PACKAGE)
    installed = [Path(place) / "needle-18m" for place in (package.submodule_search_locations or ())] if package else []
    for folder in (Path(__file__).parent / "needle-18m", *installed, *(x / _IN_CHECKOUT for x in _upwards())):
        if (folder / "config.json").is_file():
            return folder
    raise FileNotFoundError(
        "the shipped model (36 MB) is not part of the baatt wheel: run `pip install ./model` in a checkout of the "
        "repository, or give another model"
    )


def shipped_vision_model(name: str) -> Path:
    """Folder of a small model as `training/vision/session.sh` makes it: "video-6m", which draws clips, or "vision-6m",
    which answers questions about photos and clips.

    Raises:
        FileNotFoundError: nobody has trained it here.
    """
    folder = Path(__file__).parent / name
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"{name} is not shipped yet: train it as training/vision/session.sh says (25 minutes of a GPU) and give "
            "its folder as --model"
        )
    return folder


def _upwards() -> list[Path]:
    here = Path.cwd()
    return [here, *here.parents]


def held_out_text() -> str:
    """Prose that the needle model was not trained on."""
    return (Path(__file__).parent / "heldout.txt").read_text(encoding="utf-8")
