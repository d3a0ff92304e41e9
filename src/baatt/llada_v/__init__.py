"""An optional wing: LLaDA-V, that is pictures and videos in front of a masked-diffusion language model.

`model.py` loads it and sees, `prompt.py` brings what it saw to the sampler, `lmms.py` is its model of lmms-eval. Needs
transformers, Pillow and for videos PyAV: `pip install 'baatt[multimodal]'`. Nothing else of `baatt` imports it.
"""

try:
    import PIL  # noqa: F401
    import transformers  # noqa: F401
except ModuleNotFoundError as error:
    raise ImportError(f"baatt.llada_v needs {error.name}: pip install 'baatt[multimodal]'") from None

from baatt.llada_v.model import VisualDiffusionLM
from baatt.llada_v.prompt import PicturePrompt

__all__ = ["PicturePrompt", "VisualDiffusionLM"]
