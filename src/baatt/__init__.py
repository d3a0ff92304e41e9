"""BA-Att: block approximate sparse attention for bidirectional diffusion models (arXiv 2605.19726)."""

from baatt.attention import attend, ba_attention, make_plan
from baatt.config import BAAttConfig, Policy
from baatt.operators import attention as _registered  # noqa: F401  (torch.ops.baatt.attention)

__version__ = "0.1.0"

__all__ = ["BAAttConfig", "Policy", "__version__", "attend", "ba_attention", "make_plan"]
