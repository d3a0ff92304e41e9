"""Files shipped with the package: the needle model, held-out text and words."""

from pathlib import Path


def shipped_model() -> Path:
    """Folder of the 17.8M-parameter diffusion LM that the demo runs."""
    return Path(__file__).parent / "needle-18m"


def held_out_text() -> str:
    """Prose that the needle model was not trained on."""
    return (Path(__file__).parent / "heldout.txt").read_text(encoding="utf-8")
