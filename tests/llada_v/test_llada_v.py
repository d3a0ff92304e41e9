"""LLaDA-V against transformers' SigLIP and Llama, its order of visual tokens against loops, and what it refuses."""

import dataclasses
import importlib
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from jinja2 import Environment
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

import baatt
from baatt import BAAttConfig, Policy
from baatt.llada_v.config import LLaDAVConfig
from baatt.llada_v.model import VisualDiffusionLM, stored_name
from baatt.llada_v.pictures import (
    NEWLINES,
    POOLING,
    TileGrid,
    as_pixels,
    cut_into_tiles,
    image_tokens,
    pad_to_square,
    read_canvases,
    read_frames,
    video_tokens,
)
from baatt.llada_v.prompt import SYSTEM, PicturePrompt, answer_rules, conversation, prompt_ids, special_id
from baatt.models.checkpoint import load_tokenizer
from baatt.sampling import SamplerConfig, generate
from tests.llada_v.folder import (
    CONFIG,
    SPECIAL,
    TOWER,
    VOCABULARY,
    language_model,
    tensors,
    tokenizer,
    tower_tensors,
    vision_model,
    write_folder,
)

SIDE = CONFIG["vision_config"]["image_size"]
CANVASES = read_canvases("(1x1),...,(6x6)", 384)
EOT = SPECIAL.index("<|eot_id|>")
SIX_STEPS = SamplerConfig(steps=6, gen_length=12, block_length=12)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_folder(tmp_path_factory.mktemp("llada-v"))


@pytest.fixture(scope="module")
def model(folder) -> VisualDiffusionLM:
    return VisualDiffusionLM.from_pretrained(folder)


def frames(count: int) -> list[Image.Image]:
    """Gradients that move."""
    rows, columns = np.mgrid[:60, :90]
    return [
        Image.fromarray(np.stack((rows * 4, (columns * 2 + 5 * number) % 256, rows + columns), -1).astype(np.uint8))
        for number in range(count)
    ]


def labelled(parts: int, side: int) -> Tensor:
    """Features [parts, side * side, 3] that say where they are: part, row, column."""
    grid = torch.stack(torch.meshgrid(*(torch.arange(n) for n in (parts, side, side)), indexing="ij"), -1)
    return grid.reshape(parts, side * side, 3).float()


NEWLINE = torch.tensor([-1.0, -1.0, -1.0])


class TestParts:
    @torch.no_grad()
    def test_the_tower_is_siglip_without_its_last_layer(self, model):
        pixels = torch.randn(3, 3, SIDE, SIDE)
        states = vision_model()(pixels, output_hidden_states=True).hidden_states
        torch.testing.assert_close(model.vision(pixels).last_hidden_state, states[-2])

    @torch.no_grad()
    def test_the_language_model_is_a_llama_without_a_causal_mask(self, model):
        ids = torch.randint(VOCABULARY, (2, 50))
        expected = language_model()(ids, attention_mask=torch.zeros(2, 1, 50, 50)).logits
        torch.testing.assert_close(model.language(ids), expected, atol=2e-5, rtol=1e-5)

    @torch.no_grad()
    def test_features_are_projected_by_two_layers(self, model):
        parts = frames(2)
        stored = tensors()
        x = model.vision(as_pixels(parts, SIDE)).last_hidden_state
        names = ("model.mm_projector.0", "model.mm_projector.2")
        weights = [(stored[f"{name}.weight"], stored[f"{name}.bias"]) for name in names]
        hidden = torch.nn.functional.gelu(x @ weights[0][0].T + weights[0][1])
        expected = hidden @ weights[1][0].T + weights[1][1]
        side = model.side
        tokens = model.embed_video(parts, stride=1)
        assert tokens.shape == (2 * side * (side + 1), 32)
        kept = tokens.reshape(2, side, side + 1, 32)
        torch.testing.assert_close(kept[:, :, :-1].reshape(2, side * side, 32), expected)
        assert torch.equal(kept[:, :, -1], stored["model.image_newline"].expand(2, side, 32))

    def test_real_sizes_are_those_of_so400m(self):
        with torch.device("meta"):
            real = {
                **CONFIG,
                "hidden_size": 4096,
                "num_attention_heads": 32,
                "mm_hidden_size": 1152,
                "vision_config": None,
            }
            whole = VisualDiffusionLM(LLaDAVConfig.from_dict(real))
        config = whole.vision.config
        assert (whole.side, config.image_size, config.hidden_size, config.num_hidden_layers) == (27, 384, 1152, 26)
        names = {stored_name(name) for name in whole.state_dict()}
        assert f"{TOWER}vision_model.encoder.layers.25.mlp.fc2.bias" in names
        assert f"{TOWER}vision_model.encoder.layers.26.mlp.fc2.bias" not in names
        features = whole.projector(whole.vision(torch.empty(32, 3, 384, 384, device="meta")).last_hidden_state)
        assert features.shape == (32, 729, 4096)
        tokens = video_tokens(features, whole.newline, stride=2, mode="bilinear", newlines="one_token")
        assert tokens.shape == (32 * 14 * 14 + 1, 4096)


class TestTokensOfAnImage:
    def test_order(self):
        """The whole, then the rows of all tiles, a newline behind each."""
        tokens = image_tokens(labelled(1 + 2 * 3, 4), TileGrid(300, 200, columns=3, rows=2), NEWLINE, None)
        expected = [[0, row, column] for row in range(4) for column in range(4)]
        for row in range(2 * 4):
            expected += [[1 + row // 4 * 3 + column // 4, row % 4, column % 4] for column in range(3 * 4)]
            expected += [[-1, -1, -1]]
        assert tokens.tolist() == expected

    @pytest.mark.parametrize(
        ("width", "height", "rows", "columns"),
        [(400, 200, range(2, 6), range(8)), (200, 400, range(8), range(2, 6)), (300, 300, range(8), range(8))],
    )
    def test_margins_are_cut(self, width, height, rows, columns):
        """Of 8 x 8 features of a canvas of 2 x 2 tiles."""
        tokens = image_tokens(labelled(5, 4), TileGrid(width, height, columns=2, rows=2), NEWLINE, None)[16:]
        expected = []
        for row in rows:
            expected += [[1 + row // 4 * 2 + column // 4, row % 4, column % 4] for column in columns] + [[-1, -1, -1]]
        assert tokens.tolist() == expected

    @pytest.mark.parametrize(
        ("width", "height", "canvas", "count"),
        [
            (384, 384, (1, 1), 729 + 27 * 28),
            (768, 768, (2, 2), 729 + 54 * 55),
            # 54 x 96 of 54 x 108 features are the image; 4/3 more a side than 4 tiles have: 40 x 72.
            (1280, 720, (4, 2), 729 + 40 * 73),
            (720, 1280, (2, 4), 729 + 72 * 41),
            # 122 x 162 of 135 x 162; 2.6 times more a side: 46 x 62.
            (4000, 3000, (6, 5), 729 + 46 * 63),
            # 162 x 3 of 162 x 27 features.
            (30, 2000, (1, 6), 729 + 162 * 4),
        ],
    )
    def test_number_at_real_size(self, width, height, canvas, count):
        """Tiles of 384 pixels and 27 x 27 patches, "anyres_max_4"."""
        parts, grid = cut_into_tiles(Image.new("RGB", (width, height)), CANVASES, 384)
        assert grid == (width, height, *canvas)
        assert len(parts) == 1 + math.prod(canvas)
        assert len(image_tokens(torch.zeros(len(parts), 729, 2), grid, torch.ones(2), 4)) == count


class TestTokensOfAVideo:
    @pytest.mark.parametrize(
        ("newlines", "count"), [("grid", 6720), ("frame", 6304), ("one_token", 6273), ("no_token", 6272)]
    )
    def test_number_of_32_frames(self, newlines, count):
        """27 x 27 patches become 14 x 14."""
        features = torch.zeros(32, 729, 2)
        assert len(video_tokens(features, torch.ones(2), stride=2, mode="bilinear", newlines=newlines)) == count

    @pytest.mark.parametrize("newlines", NEWLINES)
    def test_order(self, newlines):
        tokens = video_tokens(labelled(3, 2), NEWLINE, stride=1, mode="bilinear", newlines=newlines)
        expected: list[list[int]] = []
        for frame in range(3):
            for row in range(2):
                expected += [[frame, row, column] for column in range(2)] + [[-1] * 3] * (newlines == "grid")
            expected += [[-1] * 3] * (newlines == "frame")
        assert tokens.tolist() == expected + [[-1] * 3] * (newlines == "one_token")

    @pytest.mark.parametrize(
        ("mode", "expected"), [("average", [0.5, 2.5]), ("max", [1.0, 3.0]), ("bilinear", [1 / 3, 2.0, 4 - 1 / 3])]
    )
    def test_pooling(self, mode, expected):
        """Columns 0 1 2 3 4; bilinear takes the middles of three equal parts."""
        columns = torch.arange(5.0).expand(1, 1, 5, 5)
        pooled = POOLING[mode](columns, 2)[0, 0]
        torch.testing.assert_close(pooled, torch.tensor([expected] * len(expected)))

    def test_of_the_model(self, model):
        """32 frames of 5 x 5 patches, pooled to 3 x 3, with a newline behind every row."""
        assert model.embed_video(frames(32)).shape == (32 * 3 * 4, 32)
        with pytest.raises(ValueError, match=r"stride must be in \[1, 5\], got 0"):
            model.embed_video(frames(1), stride=0)
        with pytest.raises(ValueError, match="mode must be one of"):
            model.embed_video(frames(1), mode="nearest")
        with pytest.raises(ValueError, match="frames must not be empty"):
            model.embed_video([])


class TestPictures:
    def test_tiles_lie_row_by_row(self):
        colours = [(200, 0, 0), (0, 200, 0), (0, 0, 200), (200, 200, 0), (0, 200, 200), (200, 0, 200)]
        image = Image.new("RGB", (90, 60))
        for number, colour in enumerate(colours):
            image.paste(colour, (number % 3 * 30, number // 3 * 30, number % 3 * 30 + 30, number // 3 * 30 + 30))
        parts, grid = cut_into_tiles(image, read_canvases("(1x1),...,(3x3)", 30), 30)
        assert grid == TileGrid(90, 60, columns=3, rows=2)
        assert [part.getpixel((15, 15)) for part in parts[1:]] == colours
        assert all(part.size == (30, 30) for part in parts)

    def test_an_image_is_centred_on_black(self):
        parts, grid = cut_into_tiles(Image.new("RGB", (60, 20), (9, 9, 9)), [(60, 60)], 30)
        assert (grid.columns, grid.rows) == (2, 2)
        column = [parts[tile].getpixel((3, row))[0] for tile in (1, 3) for row in range(30)]
        assert column == [0] * 20 + [9] * 20 + [0] * 20

    @pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "LA"])
    def test_pixels_of_every_mode(self, mode):
        image = Image.new("RGB", (50, 20), (255, 255, 255)).convert(mode)
        pixels = as_pixels([pad_to_square(image)], 10)
        assert pixels.shape == (1, 3, 10, 10)
        assert pixels[0, 0, 5, 5] == 1
        torch.testing.assert_close(pixels[0, 1, 0, 0], torch.tensor(2 * 127 / 255 - 1))

    @pytest.mark.parametrize(
        ("pinpoints", "expected"),
        [
            ("(1x1),...,(2x2)", [(30, 30), (30, 60), (60, 30), (60, 60)]),
            ("[(30, 60), (60, 30)]", [(30, 60), (60, 30)]),
            ([[60, 60]], [(60, 60)]),
        ],
    )
    def test_canvases(self, pinpoints, expected):
        assert read_canvases(pinpoints, 30) == expected

    @pytest.mark.parametrize("pinpoints", ["", "[]", "(30, 60)", [[30, 31]], [[0, 30]], "import os"])
    def test_canvases_that_are_none(self, pinpoints):
        with pytest.raises(ValueError, match="image_grid_pinpoints must be like"):
            read_canvases(pinpoints, 30)

    def test_one_image_is_cut_and_several_are_padded(self, model):
        image = frames(1)[0]  # 90 x 60 on 3 x 2 tiles: 10 rows of 15 features, brought to 8 of 12
        one, pair = model.embed_images([image]), model.embed_images([image, image])
        assert [len(tokens) for tokens in one] == [25 + 8 * 13]
        assert [len(tokens) for tokens in pair] == [25, 25]
        torch.testing.assert_close(pair[0], pair[1])
        assert model.embed_images([]) == []


def write_video(path: Path, count: int, key_frames: int) -> Path:
    """Frame i is grey 6 i."""
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.gop_size, stream.bit_rate = key_frames, 20_000_000
        for number in range(count):
            grey = np.full((48, 64, 3), 6 * number, np.uint8)
            for packet in stream.encode(av.VideoFrame.from_ndarray(grey, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path


class TestVideoFiles:
    @pytest.mark.parametrize(("key_frames", "count"), [(1, 32), (7, 1), (7, 5), (7, 40), (7, 64), (250, 5), (250, 64)])
    def test_frames_are_spread_evenly(self, tmp_path, key_frames, count):
        found = read_frames(write_video(tmp_path / "a.mp4", 40, key_frames), count)
        wanted = np.linspace(0, 39, count, dtype=int)
        assert len(found) == count
        assert all(frame.size == (64, 48) for frame in found)
        assert [round(np.asarray(frame).mean() / 6) for frame in found] == wanted.tolist()

    def test_what_is_no_video(self, tmp_path):
        pytest.importorskip("av")
        with pytest.raises(FileNotFoundError, match="no such video"):
            read_frames(tmp_path / "none.mp4", 2)
        (tmp_path / "text.mp4").write_text("no video")
        with pytest.raises(ValueError, match=r"text\.mp4: must be a video that can be decoded"):
            read_frames(tmp_path / "text.mp4", 2)

    def test_without_pyav(self, tmp_path, monkeypatch):
        (tmp_path / "a.mp4").touch()
        monkeypatch.setitem(sys.modules, "av", None)
        with pytest.raises(ImportError, match=r"av is needed for videos: pip install 'baatt\[multimodal\]'"):
            read_frames(tmp_path / "a.mp4", 2)


def prompt_of(model: VisualDiffusionLM, **rules: object) -> PicturePrompt:
    """Text, 32 frames, text."""
    visual = model.embed_video(frames(32))
    ids = [9, 10, 11, *(-1 - row for row in range(len(visual))), 12, 13]
    return PicturePrompt(model.language, ids, visual, **rules)


class TestAnswers:
    @torch.no_grad()
    def test_negative_ids_are_visual_tokens(self, model):
        visual, table = torch.randn(3, 32), model.language.transformer.wte.weight
        found = PicturePrompt(model.language, [1], visual).embed(torch.tensor([[4, -2, 5, -1, -3]]))
        assert torch.equal(found[0], torch.stack((table[4], visual[1], table[5], visual[0], visual[2])))
        plain = PicturePrompt(model.language, [1], visual[:0]).embed(torch.tensor([[4, 5]]))
        assert torch.equal(plain[0], table[4:6])

    @pytest.mark.parametrize("sparsity", [0.0, 0.6])
    def test_sparse_at_sparsity_0_is_dense(self, model, sparsity):
        prompt = prompt_of(model)
        dense = generate(prompt, prompt.ids, None, SIX_STEPS)
        config = BAAttConfig(block_size=16, sparsity=sparsity)
        with baatt.enable(model, config) as handle:
            sparse = generate(prompt, prompt.ids, None, SIX_STEPS, on_step=handle.at_step)
        same = torch.equal(dense.tokens, sparse.tokens) and torch.equal(dense.unmasked_at, sparse.unmasked_at)
        assert same == (sparsity == 0)
        assert (handle.sparse_calls, handle.dense_calls) == (6 * 2, 0)

    @torch.no_grad()
    def test_logits_change_with_sparsity_and_policy(self, model):
        prompt = prompt_of(model)
        tokens = torch.cat((prompt.ids, torch.full((1, 4), model.config.mask_token_id)), dim=1)
        config = BAAttConfig(block_size=16, sparsity=0.6)
        length = prompt.ids.shape[1]
        dense = prompt(tokens, logits_from=length, logits_to=length + 4)
        with baatt.enable(model, config, Policy(dense_layers=(0,))) as handle:
            sparse = prompt(tokens, logits_from=length, logits_to=length + 4)
        assert [calls.sparse for calls in handle.layers.values()] == [0] + [1] * (len(handle.layers) - 1)
        assert dense.shape == sparse.shape == (1, 4, VOCABULARY)
        assert not torch.allclose(dense, sparse)

    def test_pictures_matter_and_answers_repeat(self, model):
        prompt = prompt_of(model)
        first, again = (generate(prompt, prompt.ids, None, SIX_STEPS).tokens for _ in range(2))
        assert torch.equal(first, again)
        blank = PicturePrompt(model.language, prompt.ids[0].tolist(), torch.zeros_like(prompt.visual))
        assert not torch.equal(generate(blank, blank.ids, None, SIX_STEPS).tokens, first)

    @pytest.mark.parametrize("scale", [0.0, 0.5])
    def test_forbidden_ids_do_not_occur(self, model, scale):
        guided = dataclasses.replace(SIX_STEPS, cfg_scale=scale)
        plain = generate(prompt_of(model), prompt_of(model).ids, None, guided).tokens
        forbidden = sorted(set(plain[0].tolist()))
        prompt = prompt_of(model, forbidden=forbidden)
        found = generate(prompt, prompt.ids, None, guided).tokens
        assert not set(forbidden) & set(found[0].tolist())

    def test_guidance_hides_the_pictures(self, model):
        """Its half of the batch has mask tokens in place of the whole prompt."""
        prompt = prompt_of(model)
        seen = []
        hook = model.language.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        generate(prompt, prompt.ids, None, dataclasses.replace(SIX_STEPS, cfg_scale=0.5))
        hook.remove()
        assert torch.equal(seen[0][0, : prompt.ids.shape[1]], prompt.ids[0])
        assert (seen[0][1] == model.config.mask_token_id).all()

    @pytest.mark.parametrize(("stops", "calls"), [([[EOT]], 5), ([], 8)])
    def test_from_a_stop_on_only_what_is_in_front_is_filled(self, model, monkeypatch, stops, calls):
        """A scripted model is surest of position 5, then of the end at 3, then of the others from the right."""
        prompt = prompt_of(model, stops=stops)
        tokens = torch.tensor([8, 9, 10, EOT, 11, 7, 12, 13])
        sureness = torch.tensor([1.0, 2, 3, 8, 4, 9, 5, 6])
        seen = []

        def forward(*_, logits_from, logits_to, **__):
            seen.append((logits_from, logits_to))
            return torch.nn.functional.one_hot(tokens, VOCABULARY)[None] * sureness[None, :, None]

        monkeypatch.setattr(model.language, "forward", forward)
        result = generate(prompt, prompt.ids, None, SamplerConfig(steps=8, gen_length=8, block_length=8))
        length = prompt.ids.shape[1]
        assert seen == [(length, length + 8)] * calls
        if stops:
            assert result.unmasked_at[0, :4].tolist() == [4, 3, 2, 1]
            assert result.unmasked_at[0, 5] == 0
            assert result.tokens[0, :4].tolist() == [8, 9, 10, EOT]
            assert result.unmasked_at[0, [4, 6, 7]].min() == 5
        else:
            assert result.unmasked_at[0].tolist() == [7, 6, 5, 1, 4, 0, 3, 2]
            assert torch.equal(result.tokens[0], tokens)

    def test_stop_sequences_are_found(self, model):
        prompt = prompt_of(model, stops=[[5], [7, 8]])
        answers = torch.tensor([[1, 7, 7, 8, 5], [5, 7, 8, 1, 1], [7, 1, 8, 7, 1]])
        assert prompt.stop_of(answers).tolist() == [2, 0, 5]

    def test_refusals(self, model):
        with pytest.raises(ValueError, match=r"ids must be in \[-2, 64\), and at least one, got -3 to 1"):
            PicturePrompt(model.language, [1, -3], torch.zeros(2, 32))
        with pytest.raises(ValueError, match="and at least one, got None to None"):
            PicturePrompt(model.language, [], torch.zeros(2, 32))
        prompt = prompt_of(model)
        cached = dataclasses.replace(SIX_STEPS, cache="dual")
        with pytest.raises(ValueError, match="the sampler's cache must be 'none' for a prompt with pictures"):
            generate(prompt, prompt.ids, None, cached)


class TestFolders:
    def test_of_half_precision(self, folder):
        half = VisualDiffusionLM.from_pretrained(folder, dtype=torch.bfloat16)
        assert {x.dtype for x in half.state_dict().values()} == {torch.bfloat16}
        assert not half.training
        prompt = prompt_of(half)
        assert prompt.visual.dtype == torch.bfloat16
        assert generate(prompt, prompt.ids, None, SIX_STEPS).tokens.shape == (1, 12)

    def test_a_tower_of_its_own(self, tmp_path, model):
        without = {name: x for name, x in tensors().items() if not name.startswith(TOWER)}
        folder = write_folder(tmp_path / "a", without, vision_config=...)
        tower = tmp_path / "tower"
        tower.mkdir()
        save_file({name: x.clone() for name, x in tower_tensors().items()}, tower / "model.safetensors")
        values = {"model_type": "siglip", "vision_config": CONFIG["vision_config"]}
        (tower / "config.json").write_text(json.dumps(values))
        found = VisualDiffusionLM.from_pretrained(folder, vision_tower=tower)
        assert all(torch.equal(x, model.state_dict()[name]) for name, x in found.state_dict().items())
        half = {name: x.bfloat16() for name, x in without.items()}
        found = VisualDiffusionLM.from_pretrained(
            write_folder(tmp_path / "c", half, vision_config=...), vision_tower=tower
        )
        assert {x.dtype for x in found.parameters()} == {torch.bfloat16}
        again = write_folder(tmp_path / "b", without)
        with pytest.raises(ValueError, match=r"missing model\.vision_tower.*give the folder of the vision tower"):
            VisualDiffusionLM.from_pretrained(again)

    def test_other_tensors(self, tmp_path):
        stored = {**tensors(), "model.faster_token": torch.zeros(32)}
        del stored["lm_head.weight"]
        with pytest.raises(ValueError, match=r"missing lm_head\.weight; unexpected model\.faster_token"):
            VisualDiffusionLM.from_pretrained(write_folder(tmp_path / "a", stored))

    @pytest.mark.parametrize(
        ("key", "value", "message"),
        [
            ("model_type", "llava_qwen", "model_type must be 'llava_llada'"),
            ("hidden_act", "gelu", "hidden_act must be 'silu'"),
            ("attention_bias", True, "attention_bias must be False or None"),
            ("rope_scaling", {"type": "linear", "factor": 2.0}, "rope_scaling must be None"),
            ("mm_projector_type", "linear", "mm_projector_type must be 'mlp2x_gelu'"),
            ("mm_patch_merge_type", "flat", "mm_patch_merge_type must be 'spatial_unpad'"),
            ("mm_vision_select_layer", -1, "mm_vision_select_layer must be -2"),
            ("mm_resampler_type", "qformer", "mm_resampler_type must be None"),
            ("mm_use_im_start_end", True, "mm_use_im_start_end must be False"),
            ("add_faster_video", True, "add_faster_video must be False"),
            ("tie_word_embeddings", True, "tie_word_embeddings must be False"),
            ("image_aspect_ratio", "highres", "image_aspect_ratio must be 'pad', 'anyres' or like"),
            ("image_grid_pinpoints", ..., "image_grid_pinpoints must be given with 'anyres_max_4', got None"),
            ("mm_newline_position", "row", "mm_newline_position must be one of"),
            ("mm_vision_tower", "openai/clip", "mm_vision_tower must name a SigLIP model, got 'openai/clip'"),
            ("rope_theta", ..., r"must have the keys \['rope_theta'\]"),
            ("num_attention_heads", 5, "d_model must be a multiple of 2"),
            ("vision_config", {"hidden_act": "relu"}, "hidden_act of the vision tower must be"),
            ("vision_config", {"patch_size": 0}, "patch_size of the vision tower must be positive"),
            (
                "vision_config",
                {"hidden_size": 25, "num_attention_heads": 2},
                "must be a multiple of num_attention_heads",
            ),
            ("vision_config", {"num_hidden_layers": 1}, "must be at least 2, got 1"),
            ("vision_config", {"image_size": 4}, "patch_size must be at most image_size=4, got 14"),
        ],
    )
    def test_what_is_not_implemented_is_refused(self, key, value, message):
        values = {name: one for name, one in {**CONFIG, key: value}.items() if one is not ...}
        with pytest.raises(ValueError, match=message):
            LLaDAVConfig.from_dict(values)

    @pytest.mark.parametrize(
        ("key", "value", "message"),
        [
            ("image_aspect_ratio", ["pad"], r"image_aspect_ratio must be a text, got \['pad'\]"),
            ("mm_newline_position", ["grid"], r"mm_newline_position must be a text, got \['grid'\]"),
            ("tokenizer_model_max_length", "8192", "tokenizer_model_max_length must be an int, got '8192'"),
            ("vision_config", "so400m", "vision_config must be an object, got 'so400m'"),
            ("vision_config", {"layer_norm_eps": "1e-6"}, "layer_norm_eps of the vision tower must be a number"),
            ("eos_token_id", ["a"], "eos_token_id must be an int, got 'a'"),
        ],
    )
    def test_values_of_another_type_are_refused(self, key, value, message):
        with pytest.raises(TypeError, match=message):
            LLaDAVConfig.from_dict({**CONFIG, key: value})

    def test_published_defaults(self):
        """What a config.json may leave out, as llava_arch.py reads it."""
        left_out = ("mm_newline_position", "mask_token_id", "num_key_value_heads", "vision_config", "mm_hidden_size")
        values = {name: value for name, value in CONFIG.items() if name not in left_out}
        config = LLaDAVConfig.from_dict({**values, "vocab_size": 126464})
        assert config.mm_newline_position == "one_token"
        assert config.language.mask_token_id == 126336
        assert config.language.kv_heads == 4
        assert config.max_tiles == 4
        assert [dataclasses.replace(config, image_aspect_ratio=ratio).max_tiles for ratio in ("anyres", "pad")] == [
            None,
            None,
        ]


TEMPLATE = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
    "message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
)


class TestConversation:
    def test_text_is_that_of_the_chat_template(self):
        turn = "<image>\n  What is it?\n /no_think"
        messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": turn}]
        expected = Environment().from_string(TEMPLATE).render(messages=messages, bos_token="<|startoftext|>")
        assert conversation("  What is it?\n", 1, "no_think") == conversation(turn) == expected
        assert conversation("hi") == (
            "<|startoftext|><|start_header_id|>system<|end_header_id|>\n\nYou are a helpful language and vision "
            "assistant. You are able to understand the visual content that the user provides, and assist the user with "
            "a variety of tasks using natural language.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nhi"
            "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
        )

    @pytest.mark.parametrize(
        ("question", "pictures", "think_mode", "expected"),
        [
            ("q", 0, "no_think", "q"),
            ("q", 3, "think", "<image> <image> <image>\nq /think"),
            ("q", 1, "none", "<image>\nq"),
            ("a <image> b", 1, "no_think", "a <image> b"),
        ],
    )
    def test_pictures_go_in_front(self, question, pictures, think_mode, expected):
        assert f"<|end_header_id|>\n\n{expected}<|eot_id|>" in conversation(question, pictures, think_mode)

    def test_ids(self):
        """The first id of every part behind a picture is dropped, as in the published code."""
        made = tokenizer()
        a, b, c, line = (made.token_to_id(x) for x in "abc\n")
        text = "<|startoftext|>ab<image>\nc<image>d"
        assert prompt_ids(text, [2, 3], made) == [0, a, b, -1, -2, c, -3, -4, -5]
        assert prompt_ids(text, [2], made) == [0, a, b, -1, -2, c, -1, -2]
        assert prompt_ids("ab<image>\nc", [1, 3], made) == [a, b, -1, line, c]
        assert prompt_ids("ab", [], made) == [a, b]
        with pytest.raises(ValueError, match="a prompt with <image> must come with pictures, got none"):
            prompt_ids(text, [], made)

    @pytest.mark.parametrize(
        ("answer", "expected"), [(" ab.<|eot_id|>c", "ab"), ("a.b..", "a.b."), ("x\ny", "x"), ("x<|eot_id|>\n", "x")]
    )
    def test_rules_and_text(self, model, answer, expected):
        made = tokenizer()
        stops, forbidden = answer_rules(made, VOCABULARY, ["\n"])
        assert stops == [[made.token_to_id("\n")], [EOT]]
        assert forbidden == [1, 0, 3, 4, *range(made.get_vocab_size(), VOCABULARY)]
        prompt = PicturePrompt(model.language, [1], torch.zeros(0, 32), stops=stops)
        assert prompt.answer_text(torch.tensor([made.encode(answer).ids]), made) == expected

    def test_a_tokenizer_of_another_model(self, folder):
        made = load_tokenizer(folder)
        assert special_id(made, "<|mdm_mask|>") == CONFIG["mask_token_id"]
        with pytest.raises(ValueError, match=r"the tokenizer must have the token <\|other\|>"):
            special_id(made, "<|other|>")


@pytest.mark.parametrize("package", ["transformers", "PIL"])
def test_without_what_it_needs(monkeypatch, package):
    for name in [name for name in sys.modules if name.startswith("baatt.llada_v")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"needs {package}: pip install 'baatt\[multimodal\]'"):
        importlib.import_module("baatt.llada_v")
