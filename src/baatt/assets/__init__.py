"""Held-out text and words that come with the package, and the models, which do not come with a wheel."""

import importlib.util
from pathlib import Path

#: Folders of the models: the needle model, the change that makes a diffusion model of SmolLM2, and two on real pixels.
NEEDLE, SMOLLM2 = "needle-18m", "smollm2-diffusion"
VISION, VIDEO = "vision-3m", "video-6m"
#: Where they are inside a checkout.
_IN_CHECKOUT = Path("src/baatt/assets")
#: The package that brings them: the folder `model` of the repository.
_PACKAGE = "baatt_models"


def shipped_model() -> Path:
    """Folder of the 17.8M-parameter diffusion LM that knows RULER's questions; a FileNotFoundError as of `_shipped`."""
    return _shipped(f"{NEEDLE}/config.json", "the shipped model (18 MB)", "give another model").parent


def shipped_adapter() -> Path:
    """File with the change that makes a diffusion LM of SmolLM2-135M-Instruct; a FileNotFoundError as of `_shipped`."""
    return _shipped(f"{SMOLLM2}/adapter.safetensors", "the change of SmolLM2 (15 MB)", "give a model of your own")


def _shipped(name: str, what: str, instead: str) -> Path:
    """A file of a model: beside this one in a checkout, else in the installed package of the models, else in a checkout
    that one stands in.

    Raises:
        FileNotFoundError: it is in none of them, with the command that brings it.
    """
    package = importlib.util.find_spec(_PACKAGE)
    installed = [Path(place) for place in (package.submodule_search_locations or ())] if package else []
    for place in (Path(__file__).parent, *installed, *(x / _IN_CHECKOUT for x in _upwards())):
        if (place / name).is_file():
            return place / name
    raise FileNotFoundError(
        f"{what} is not part of the baatt wheel: run `pip install ./model` in a checkout of the repository, or "
        f"{instead}"
    )


def shipped_vision_model(name: str) -> Path:
    """Folder of one of the small models on real pixels.

    Args:
        name: `VIDEO`, which draws clips, or `VISION`, which answers questions about photos and clips.

    Raises:
        FileNotFoundError: as of `_shipped`.
    """
    return _shipped(f"{name}/config.json", f"the model {name}", "give its folder as --model").parent


def _upwards() -> list[Path]:
    here = Path.cwd()
    return [here, *here.parents]


def held_out_text() -> str:
    """Prose that the needle model was not trained on."""
    return (Path(__file__).parent / "heldout.txt").read_text(encoding="utf-8")
