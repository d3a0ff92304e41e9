"""Not written yet."""

from typing import Any


def recognises(model: Any) -> bool:
    """Nothing."""
    return False
