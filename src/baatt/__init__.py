"""BA-Att: block approximate sparse attention for diffusion models and causal prefill (arXiv 2605.19726)."""

from typing import TYPE_CHECKING, Any

from baatt.attention import attend, attend_partial, ba_attention, make_plan
from baatt.config import BAAttConfig, Policy
from baatt.operators import attention as _registered  # noqa: F401  (torch.ops.baatt.attention)

if TYPE_CHECKING:
    from baatt.integrations.enable import enable

__version__ = "0.2.0"

__all__ = ["BAAttConfig", "Policy", "__version__", "attend", "attend_partial", "ba_attention", "enable", "make_plan"]


def __getattr__(name: str) -> Any:
    """`enable` is imported when it is asked for: it brings the adapters, which the operator does not need."""
    if name == "enable":
        from baatt.integrations.enable import enable

        return enable
    raise AttributeError(f"module 'baatt' has no attribute {name!r}")
