"""LLaDA-V for lmms-eval: `--model baatt_llada_v`, found by the entry point that installing `baatt` declares.

In: lmms-eval's requests, (contexts, gen_kwargs, doc_to_visual, doc_id, task, split). Out: answers as text. The prompt,
the pictures and the settings of every task are those of LLaDA-V's own evaluation; attention is dense or BA-Att. Needs
lmms-eval, which is why nothing else of `baatt` imports this module.
"""

from collections.abc import Sequence
from typing import Any

import torch
from lmms_eval.api.model import lmms
from loguru import logger
from torch import Tensor

from baatt.integrations.enable import enable
from baatt.lab.loading import DTYPES
from baatt.lab.options import read_options
from baatt.llada_v.model import VisualDiffusionLM
from baatt.llada_v.pictures import read_frames
from baatt.llada_v.prompt import MASK, PicturePrompt, answer_rules, conversation, prompt_ids, special_id
from baatt.llada_v.settings import LLaDAVArguments, TaskSetting, read_setting
from baatt.models.checkpoint import load_tokenizer
from baatt.sampling import SamplerConfig, generate

MODEL_ID = "baatt_llada_v"


class LLaDAV(lmms):  # type: ignore[misc]  # lmms-eval has no types
    """LLaDA-V with dense attention or BA-Att in its language model; one request at a time.

    Its arguments, as --model_args gives them, are the fields of `LLaDAVArguments`, `BAAttConfig` and `Policy`.

    Attributes:
        model: LLaDA-V. device: where it is. accelerator: of the processes that share the requests.

    Raises:
        TypeError, ValueError, FileNotFoundError: an argument that is unknown or out of range, or a folder that does not
            hold LLaDA-V.
    """

    is_simple = True

    def __init__(self, pretrained: str, **given: Any) -> None:
        from accelerate import Accelerator

        super().__init__()
        arguments = read_options(LLaDAVArguments, {"pretrained": pretrained, **given})
        self.arguments = arguments
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        asked = None if self._world_size > 1 else arguments.device
        self.device = torch.device(asked or self.accelerator.device)
        self.model = VisualDiffusionLM.from_pretrained(
            pretrained, vision_tower=arguments.vision_tower, dtype=DTYPES[arguments.dtype], device=self.device
        )
        self.tokenizer = load_tokenizer(pretrained)
        mask, expected = special_id(self.tokenizer, MASK), self.model.config.mask_token_id
        if mask != expected:
            raise ValueError(f"{pretrained}: {MASK} must have the id {expected} of the model's mask token, got {mask}")
        self._last_video: tuple[str, Tensor] | None = None
        self._reported: set[str] = set()

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """The answer of every request, in their order."""
        answers = []
        for request in requests:
            context, gen_kwargs, doc_to_visual, doc_id, task, split = request.args
            visuals = doc_to_visual(self.task_dict[task][split][doc_id]) or []
            answers.append(self._answer(context, gen_kwargs, visuals, task))
            self.cache_hook.add_partial("generate_until", (context, gen_kwargs), answers[-1])
        return answers

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Refused with a NotImplementedError: LLaDA-V's own evaluation scores answers, not likelihoods."""
        raise NotImplementedError(f"{MODEL_ID} answers generate_until tasks only, this one asks for loglikelihood")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Refused with a NotImplementedError."""
        raise NotImplementedError(f"{MODEL_ID} answers generate_until tasks only, this one has several rounds")

    @torch.inference_mode()
    def _answer(self, context: str, gen_kwargs: dict[str, Any], visuals: Sequence[Any], task: str) -> str:
        setting = read_setting(task, gen_kwargs, self.arguments)
        sampler = SamplerConfig(
            steps=setting.gen_steps, gen_length=setting.gen_length, block_length=setting.block_length,
            temperature=gen_kwargs.get("temperature", 0) if gen_kwargs.get("do_sample", True) else 0,
            cfg_scale=gen_kwargs.get("cfg", 0),
            remasking=gen_kwargs.get("remasking", "low_confidence"),
        )  # fmt: skip
        pictures = self._see(visuals)
        counts = [len(tokens) for tokens in pictures]
        ids = prompt_ids(conversation(context, len(counts), setting.think_mode), counts, self.tokenizer)
        self._report(task, setting, len(ids))
        stops, forbidden = answer_rules(self.tokenizer, self.model.config.logit_size, setting.stops)
        visual = torch.cat([self.model.newline[None][:0], *pictures])
        prompt = PicturePrompt(self.model.language, ids, visual, stops=stops, forbidden=forbidden)
        with enable(self.model, self.arguments.sparse, self.arguments.policy, impl=self.arguments.impl) as handle:
            result = generate(prompt, prompt.ids, None, sampler, on_step=handle.at_step)
        return prompt.answer_text(result.tokens, self.tokenizer)

    def _see(self, visuals: Sequence[Any]) -> list[Tensor]:
        """Visual tokens [K, D] of every picture that a document shows: nothing, images, or the path of a video.

        Those of a video are kept for the next request: tasks ask several questions about one.
        """
        if not visuals:
            return []
        if all(hasattr(one, "convert") and hasattr(one, "size") for one in visuals):
            return self.model.embed_images(visuals)
        if not all(isinstance(one, str) for one in visuals):
            kinds = sorted({type(one).__name__ for one in visuals})
            raise TypeError(f"a request must show Pillow images or the path of a video, got {', '.join(kinds)}")
        if len(visuals) != 1:
            raise ValueError(f"a request must show one video, got {len(visuals)}")
        if self._last_video is None or self._last_video[0] != visuals[0]:
            self._last_video = None
            frames = read_frames(visuals[0], self.arguments.max_frames_num)
            stride, mode = self.arguments.mm_spatial_pool_stride, self.arguments.mm_spatial_pool_mode
            self._last_video = visuals[0], self.model.embed_video(frames, stride=stride, mode=mode)
        return [self._last_video[1]]

    def _report(self, task: str, setting: TaskSetting, tokens: int) -> None:
        """Log the setting of a task once, and every prompt that is longer than those of training."""
        if task not in self._reported:
            self._reported.add(task)
            logger.info(f"{task}: {setting}, {self.arguments.sparse or 'dense attention'}, {self.arguments.policy}")
        longest = self.model.pictures.tokenizer_model_max_length
        if longest is not None and tokens > longest:
            logger.warning(f"{task}: a prompt of {tokens} tokens, trained were at most {longest}")


def manifest() -> Any:
    """What lmms-eval registers: the payload of the entry point."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id=MODEL_ID, simple_class_path=f"{__name__}.{LLaDAV.__name__}")
