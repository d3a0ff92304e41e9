"""The model class for lmms-eval on a tiny random LLaDA-V: settings, requests with images and videos, registration.

lmms-eval is not needed: where it is not installed, stand-ins of the three names that the module takes from it are used.
"""

import importlib
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image

from baatt import BAAttConfig, Policy
from baatt.lab.options import read_options
from baatt.llada_v.prompt import conversation, prompt_ids
from baatt.llada_v.settings import PUBLISHED, LLaDAVArguments, TaskSetting, read_setting
from tests.llada_v.folder import tensors, tokenizer, write_folder

NAME = "baatt.llada_v.lmms"
SPLIT = "test"


class StandIn:
    """`lmms_eval.api.model.lmms` of 0.7.2, as far as a model class meets it."""

    is_simple = True

    def __init__(self) -> None:
        self._rank, self._world_size = 0, 1
        self.cache_hook = SimpleNamespace(add_partial=lambda *_: None)
        self.task_dict: dict[str, Any] = {}

    rank = property(lambda self: self._rank)
    world_size = property(lambda self: self._world_size)

    @classmethod
    def create_from_arg_string(cls, arguments: str, more: dict[str, Any]) -> "StandIn":
        """Values as `lmms_eval.utils.handle_arg_string` reads them."""
        pairs = [pair.split("=", 1) for pair in arguments.split(",")]
        return cls(
            **{name: cls.read(value) for name, value in pairs}, **{n: x for n, x in more.items() if x is not None}
        )

    @staticmethod
    def read(text: str) -> object:
        if text.isnumeric():
            return int(text)
        try:
            return float(text)
        except ValueError:
            return text


class Manifest(NamedTuple):
    """`lmms_eval.models.registry_v2.ModelManifest`."""

    model_id: str
    simple_class_path: str | None = None
    chat_class_path: str | None = None
    aliases: tuple[str, ...] = ()


@pytest.fixture
def module(monkeypatch) -> Iterator[ModuleType]:
    """`baatt.llada_v.lmms`, with lmms-eval's own names where it is installed."""
    try:
        importlib.import_module("lmms_eval.api.model")
    except ModuleNotFoundError:
        parts = {
            **{name: {} for name in ("lmms_eval", "lmms_eval.api", "lmms_eval.models")},
            "lmms_eval.api.model": {"lmms": StandIn},
            "lmms_eval.models.registry_v2": {"ModelManifest": Manifest},
            "loguru": {"logger": logging.getLogger("stand-in")},
        }
        for name, contents in parts.items():
            stand_in = ModuleType(name)
            vars(stand_in).update(contents)
            monkeypatch.setitem(sys.modules, name, stand_in)
    yield importlib.import_module(NAME)
    sys.modules.pop(NAME)  # it has the stand-ins in it


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_folder(tmp_path_factory.mktemp("llada-v"))


def picture(width: int, height: int, shade: int = 0) -> Image.Image:
    rows, columns = np.mgrid[:height, :width]
    return Image.fromarray(np.stack((rows % 256, (columns + shade) % 256, (rows * columns) % 256), -1).astype(np.uint8))


def load(module: ModuleType, folder: Path, more: str = "") -> Any:
    """The model as lmms-eval makes it on the command line."""
    arguments = f"pretrained={folder},dtype=float32{more}"
    return module.LLaDAV.create_from_arg_string(arguments, {"batch_size": "1", "max_batch_size": None, "device": "cpu"})


def ask(
    model: Any, visuals: list[Any], task: str = "realworldqa", context: str = "what is it", **gen_kwargs: Any
) -> str:
    """The answer to one request."""
    model.task_dict[task] = {SPLIT: [{"visuals": visuals}]}
    settings = {"until": ["\n\n"], "max_new_tokens": 16, "temperature": 0, "do_sample": False, **gen_kwargs}
    request = SimpleNamespace(args=(context, settings, lambda doc: doc["visuals"], 0, task, SPLIT))
    (answer,) = model.generate_until([request])
    return answer


@pytest.fixture
def prompts(module, monkeypatch) -> list[Any]:
    """Every prompt that reaches the sampler, with its arguments and the handle that makes the model sparse."""
    seen = []

    def generate(prompt, ids, mask, sampler, *, on_step):
        handle = on_step.__self__
        seen.append(
            SimpleNamespace(ids=ids[0].tolist(), visual=prompt.visual, sampler=sampler, prompt=prompt, handle=handle)
        )
        return original(prompt, ids, mask, sampler, on_step=on_step)

    original = module.generate
    monkeypatch.setattr(module, "generate", generate)
    return seen


class TestSettings:
    @pytest.mark.parametrize(
        ("task", "expected"),
        [
            ("videomme", TaskSetting(2, 2, 2, "no_think")),
            ("mlvu_dev", TaskSetting(2, 2, 2, "no_think")),
            ("realworldqa", TaskSetting(2, 2, 2, "no_think")),
            ("chartqa", TaskSetting(16, 16, 16, "no_think", ("\n",))),
            ("docvqa_val", TaskSetting(32, 32, 16, "no_think")),
            ("infovqa_val", TaskSetting(32, 32, 16, "no_think")),
            ("mathvista_testmini_cot", TaskSetting(96, 96, 48, "think")),
            ("mathverse_testmini_vision_only", TaskSetting(64, 64, 32, "think")),
        ],
    )
    def test_published(self, task, expected):
        assert read_setting(task, {"until": ["\n\n"], "max_new_tokens": 16}, LLaDAVArguments("x")) == expected

    def test_every_task_of_the_published_script_is_there(self):
        names = {
            *("mmmu_val", "mmmu_pro_standard", "mmstar", "ai2d", "seedbench", "mmbench_en_dev", "mmmu_pro_vision"),
            *("muirbench", "videomme", "mlvu_dev", "mme", "realworldqa", "chartqa", "docvqa_val", "infovqa_val"),
            *("mathvista_testmini", "mathverse_testmini_vision"),
        }
        assert names <= set(PUBLISHED)

    def test_arguments_win_over_gen_kwargs_and_those_over_the_task(self):
        arguments = LLaDAVArguments("x", gen_length=8, think_mode="none")
        gen_kwargs = {"gen_length": 4, "block_length": 4, "stopping_criteria": ["."]}
        assert read_setting("videomme", gen_kwargs, arguments) == TaskSetting(8, 4, 2, "none", (".",))

    def test_a_task_without_a_setting(self):
        with pytest.raises(
            ValueError, match="pope has no published setting for LLaDA-V: give block_length, gen_steps in"
        ):
            read_setting("pope", {"gen_length": 4}, LLaDAVArguments("x"))
        given = {"gen_length": 4, "block_length": 2, "gen_steps": 4}
        assert read_setting("pope", given, LLaDAVArguments("x")) == TaskSetting(4, 2, 4, "no_think")

    def test_refusals(self):
        with pytest.raises(ValueError, match=r"gen_kwargs of mme must be among .*, got \['beams'\]"):
            read_setting("mme", {"beams": 1}, LLaDAVArguments("x"))
        with pytest.raises(ValueError, match=r"think_mode must be one of \['no_think', 'think', 'none'\], got 'hard'"):
            read_setting("mme", {"think_mode": "hard"}, LLaDAVArguments("x"))

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"sparse": 1, "steps": 2}, "model_args must be among pretrained, .*, sparsity, .*; got sparse, steps"),
            ({"batch_size": "4"}, r"batch_size must be one of \[1\], got '4'"),
            ({"dtype": "int8"}, "dtype must be one of"),
            ({"think_mode": "hard"}, r"think_mode must be one of \['no_think', 'think', 'none'\], got 'hard'"),
            ({"max_frames_num": 0}, "max_frames_num must be positive, got 0"),
            ({"mm_spatial_pool_mode": "nearest"}, "mm_spatial_pool_mode must be one of"),
            ({"sort": "k", "beta": 1}, "model_args must have sparsity beside sort, beta, got none"),
            ({"dense_layers": "0:1"}, "dense_layers must be numbers of layers such as"),
            ({"sparsity": 2}, r"sparsity must be in \[0, 1\), got 2"),
        ],
    )
    def test_arguments_that_make_no_sense(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            read_options(LLaDAVArguments, {"pretrained": "x", **arguments})

    @pytest.mark.parametrize(
        ("arguments", "config", "policy"),
        [
            ({}, None, Policy()),
            ({"sparsity": "none"}, None, Policy()),
            ({"sparsity": 0.5}, BAAttConfig(sparsity=0.5), Policy()),
            (
                {"sparsity": 0, "sort": "qk", "segment": 1024, "beta": 0, "dense_layers": "0+1", "min_length": 4096},
                BAAttConfig(sparsity=0, sort="qk", segment=1024, beta=0),
                Policy(dense_layers=(0, 1), min_length=4096),
            ),
            (
                {"sparsity": 0.8, "segment": "whole", "dense_layers": -1.0, "dense_steps": 0.25},
                BAAttConfig(sparsity=0.8, segment=None),
                Policy(dense_layers=(-1,), dense_steps=0.25),
            ),
        ],
    )
    def test_dials(self, arguments, config, policy):
        read = read_options(LLaDAVArguments, {"pretrained": "x", **arguments})
        assert (read.sparse, read.policy) == (config, policy)


class TestRequests:
    def test_an_image(self, module, folder, prompts):
        model = load(module, folder)
        answer = ask(model, [picture(90, 60)])
        (seen,) = prompts
        assert isinstance(answer, str)
        assert len(seen.visual) == 25 + 8 * 13
        assert seen.ids == prompt_ids(conversation("<image>\nwhat is it /no_think"), [129], tokenizer())
        assert (seen.sampler.steps, seen.sampler.gen_length, seen.sampler.block_length) == (2, 2, 2)
        assert (seen.sampler.temperature, seen.sampler.cfg_scale, seen.sampler.remasking) == (0, 0, "low_confidence")
        assert set(seen.handle.reasons) == {"policy: dense attention everywhere"}

    def test_several_images(self, module, folder, prompts):
        model = load(module, folder)
        ask(model, [picture(90, 60), picture(40, 40)], task="muirbench", context="a <image> b <image>")
        ask(model, [picture(90, 60), picture(40, 40)], task="muirbench")
        assert [sum(token < 0 for token in seen.ids) for seen in prompts] == [50, 50]
        between = prompts[1].ids[prompts[1].ids.index(-25) + 1 : prompts[1].ids.index(-26)]
        assert between == []  # the space between two marks is the id that the published code drops

    def test_text_alone(self, module, folder, prompts):
        ask(load(module, folder), [], task="mmmu_val")
        (seen,) = prompts
        assert seen.ids == prompt_ids(conversation("what is it"), [], tokenizer())
        assert min(seen.ids) >= 0

    def test_a_video(self, module, folder, prompts, monkeypatch):
        reads = []

        def read_frames(path, count):
            reads.append((path, count))
            return [picture(64, 48, shade=9 * number) for number in range(count)]

        monkeypatch.setattr(module, "read_frames", read_frames)
        model = load(module, folder)
        for path in ("a.mp4", "a.mp4", "b.mp4"):
            ask(model, [path], task="videomme")
        assert reads == [("a.mp4", 32), ("b.mp4", 32)]
        assert [len(seen.visual) for seen in prompts] == [32 * 3 * 4] * 3
        fewer = load(module, folder, ",max_frames_num=5,mm_spatial_pool_stride=1,mm_spatial_pool_mode=max")
        ask(fewer, ["a.mp4"], task="mlvu_dev")
        assert len(prompts[-1].visual) == 5 * 5 * 6

    def test_sparsity_0_answers_as_dense_attention(self, module, folder, prompts):
        long = {"task": "docvqa_val", "visuals": [picture(200, 150)]}
        dense = ask(load(module, folder), **long)
        exact = ask(load(module, folder, ",sparsity=0,sort=k,segment=256,dense_layers=0"), **long)
        sparse = ask(load(module, folder, ",sparsity=0.5,impl=reference"), **long)
        assert dense == exact
        assert isinstance(sparse, str)
        handles = [seen.handle for seen in prompts]
        assert handles[1].config == BAAttConfig(sparsity=0, sort="k", segment=256)
        assert handles[1].policy == Policy(dense_layers=(0,))
        assert (handles[2].config.sparsity, handles[2].impl) == (0.5, "reference")
        assert [handle.sparse_calls > 0 for handle in handles] == [False, True, True]

    def test_answers_repeat(self, module, folder):
        model = load(module, folder)
        first, again = (ask(model, [picture(90, 60)], task="mathvista_testmini_cot") for _ in range(2))
        assert first == again

    def test_what_ends_and_what_never_occurs(self, module, folder, prompts):
        ask(load(module, folder), [picture(50, 50)], task="chartqa")
        made = tokenizer()
        assert [stop.tolist() for stop in prompts[0].prompt.stops] == [[made.token_to_id("\n")], [5]]
        forbidden = prompts[0].prompt.forbidden.nonzero()[:, 0].tolist()
        assert forbidden == [0, 1, 3, 4, *range(made.get_vocab_size(), 64)]

    def test_temperature_counts_only_where_sampling_is_asked_for(self, module, folder, prompts):
        model = load(module, folder)
        ask(model, [picture(50, 50)], temperature=0.7)
        ask(model, [picture(50, 50)], temperature=0.7, do_sample=True, cfg=0.5, remasking="random")
        assert [seen.sampler.temperature for seen in prompts] == [0, 0.7]
        assert (prompts[1].sampler.cfg_scale, prompts[1].sampler.remasking) == (0.5, "random")

    def test_refusals(self, module, folder, tmp_path):
        model = load(module, folder)
        with pytest.raises(NotImplementedError, match="this one asks for loglikelihood"):
            model.loglikelihood([])
        with pytest.raises(NotImplementedError, match="this one has several rounds"):
            model.generate_until_multi_round([])
        with pytest.raises(ValueError, match="a request must show one video, got 2"):
            ask(model, ["a.mp4", "b.mp4"])
        with pytest.raises(TypeError, match="must show Pillow images or the path of a video, got dict"):
            ask(model, [{"audio": 1}])
        with pytest.raises(FileNotFoundError, match="no such video"):
            ask(model, [str(tmp_path / "none.mp4")])
        with pytest.raises(FileNotFoundError, match="no such folder"):
            load(module, tmp_path / "nothing")
        other = write_folder(tmp_path / "other", tensors(), mask_token_id=9)
        with pytest.raises(ValueError, match=r"<\|mdm_mask\|> must have the id 9 of the model's mask token, got 2"):
            load(module, other)


def test_registration(module):
    manifest = module.manifest()
    assert (manifest.model_id, manifest.chat_class_path) == ("baatt_llada_v", None)
    path, _, name = manifest.simple_class_path.rpartition(".")
    assert getattr(importlib.import_module(path), name) is module.LLaDAV
    assert module.LLaDAV.is_simple
