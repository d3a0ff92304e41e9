"""What the commands find: an empty cache, and a tiny model that chats."""

from pathlib import Path

import pytest

from baatt.lab import smollm2
from tests.models.gguf_files import write_gguf


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing was fetched, whatever the machine that tests has."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(smollm2, "cache_folder", lambda: folder)
    return folder


@pytest.fixture(scope="session")
def chatting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model with a chat template."""
    place = tmp_path_factory.mktemp("chatting")
    write_gguf(place / "base.gguf")
    smollm2.export(place / "base.gguf", place / "model")
    return place / "model"
