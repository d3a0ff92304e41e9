"""Signs planted in pictures: exact answers, pixels where they belong, and the model that reads them."""

from random import Random

import pytest
import torch
from safetensors.torch import save_file

from baatt import BAAttConfig, make_plan
from baatt.lab.ruler.cells import Cell
from baatt.lab.vision import media, patches, study
from baatt.lab.vision.model import Seen, VisionConfig, VisionModel
from baatt.lab.vision.planting import paint, place, sprite
from baatt.lab.vision.scenes import (
    ANSWER_WORDS,
    CELLS,
    CLIP_TASKS,
    COLOURS,
    END,
    FRAME_CELLS,
    PHOTO,
    PHOTO_TASKS,
    SHAPES,
    TASKS,
    WORDS,
    Window,
    ask,
    plant_clip,
    plant_photo,
    whole_clip,
)
from baatt.models.small_folder import WEIGHTS
from baatt.sampling import SampleResult

CONFIG = VisionConfig(photo=(48, 72), frame=(16, 24), frames=12, tower=16, width=32, heads=2, layers=2, hidden=32)


def scene(task, random):
    return plant_photo(random) if task in PHOTO_TASKS else plant_clip(random, whole_clip(random.randint(4, 72)))


@pytest.mark.parametrize("task", TASKS)
def test_answers_follow_from_the_signs(task):
    """Each answer is found again from the words of the question alone."""
    random, lengths, answers = Random(1), set(), set()
    for _ in range(300):
        signs = scene(task, random)
        question = ask(task, signs, random)
        assert {*question.words, *question.answer} <= {*WORDS}
        assert len(question.answer) == ANSWER_WORDS
        lengths.add(len(question.words))
        answers.add(question.answer)
        told = " ".join(question.answer).removesuffix(f" {END}")
        colours = [word for word in question.words if word in COLOURS]
        numbers = int("0" + "".join(word for word in question.words if word.isdigit()))
        mine = [one for one in signs if one.colour in colours]
        expected = {
            "photo_number": lambda mine=mine: [str(one.number) for one in mine],
            "photo_colour": lambda n=numbers, signs=signs: [one.colour for one in signs if one.number == n],
            "photo_position": lambda mine=mine: [
                f"{['top', 'middle', 'bottom'][one.cell[0] // 2]} {['left', 'centre', 'right'][one.cell[1] // 3]}"
                for one in mine
            ],
            "photo_count": lambda mine=mine: [str(len(mine))],
            "clip_when": lambda mine=mine: [f"{one.frame:02}"[0] + " " + f"{one.frame:02}"[1] for one in mine],
            "clip_number": lambda n=numbers, signs=signs: [str(one.number) for one in signs if one.frame == n],
            "clip_colour": lambda n=numbers, signs=signs: [one.colour for one in signs if one.frame == n],
            "clip_often": lambda mine=mine: [str(len(mine))],
        }[task]()
        assert [told] == expected
    assert len(lengths) == 1
    assert len(answers) >= 5


def test_photos_and_clips_are_planted_without_doubt():
    random = Random(2)
    for _ in range(200):
        signs = plant_photo(random)
        for values in ([one.number for one in signs], [one.cell for one in signs]):
            assert len({*values}) == len(signs)
        frames = random.randint(4, 72)
        shown = plant_clip(random, whole_clip(frames))
        assert len({one.frame for one in shown}) == len(shown)
        assert all(0 <= one.frame < frames for one in shown)
        for some in (signs, shown):
            others = [one.colour for one in some if one.colour != some[0].colour]
            assert others
            assert len({*others}) == len(others)


def test_signs_lie_in_their_cells_and_do_not_touch():
    random = Random(3)
    signs = plant_photo(random)
    before = torch.full((1, 1, 3, 96, 144), 0.4)
    placed = place([signs], [PHOTO], (96, 144), random)
    together, alone = paint(before.clone(), placed), before.clone()
    for sign in placed.table:
        paint(alone, placed._replace(table=sign[None]))
    assert torch.equal(together, alone)
    changed = (together != before)[0, 0].any(dim=0)
    cells = changed.unflatten(0, (CELLS[0], 16)).unflatten(2, (CELLS[1], 16)).any(dim=3).any(dim=1)
    assert {tuple(cell) for cell in cells.nonzero().tolist()} == {one.cell for one in signs}
    _, _, row, column = placed.middles
    assert torch.stack((row // 16, column // 16), dim=1).tolist() == [[*one.cell] for one in signs]


def test_signs_of_a_clip_are_in_their_frames_and_have_their_colour():
    signs = plant_clip(Random(5), whole_clip(12))
    painted = paint(torch.zeros(1, 12, 3, 96, 144), place([signs], [whole_clip(12)], (96, 144), Random(6)))[0]
    assert {*painted.flatten(1).any(dim=1).nonzero().flatten().tolist()} == {one.frame for one in signs}
    for sign in signs:
        colour = torch.tensor(COLOURS[sign.colour]) / 255
        same = (painted[sign.frame] - colour[:, None, None]).abs().amax(dim=0) < 1e-3
        assert same.sum() > 100


def test_a_window_shows_what_the_whole_has_there():
    random = Random(8)
    for _ in range(50):
        photo = Window(cell=(random.randint(0, 4), random.randint(0, 6)), size=(2, 3))
        clip = Window(random.randint(0, 60), 8, (1, 1), (1, 2))
        for window, plant in ((photo, plant_photo), (clip, plant_clip)):
            signs = plant(random, window, 3, (0, 3))
            placed = place([signs], [window], (16 * window.size[0], 16 * window.size[1]), random)
            _, frame, row, column = placed.middles
            found = torch.stack(
                (frame + window.frame, row // 16 + window.cell[0], column // 16 + window.cell[1]), dim=1
            )
            assert found.tolist() == [[one.frame, *one.cell] for one in signs]
            assert placed.table[:, 6].tolist() == [one.number for one in signs]
            assert any([one.colour for one in signs].count(sign.colour) == 1 for sign in signs)
    torch.manual_seed(0)
    model, whole = VisionModel(CONFIG), torch.rand(1, 12, 3, 16, 24)
    part = Window(7, 4, (1, 0), (1, 2))
    assert FRAME_CELLS == (2, 3)
    told = model.tell(model.look(whole), [whole_clip(12)]).unflatten(1, (12, 2, 3))
    assert torch.equal(told.flatten(1, 3), model.see(whole))
    # The tower sees beyond the edges of a token, so the same found by it stands at another place.
    found = model.look(whole)[:, 7:11, 1:, :2]
    assert torch.allclose(
        model.tell(found.expand(2, -1, -1, -1, -1), [part, part._replace(frame=2)])[:1],
        told[:, 7:11, 1:, :2].flatten(1, 3),
        atol=1e-6,
    )


def test_numbers_and_shapes_differ():
    numbers = torch.stack([sprite("disc", number, 24)[2] for number in range(10)]).flatten(1)
    assert torch.cdist(numbers, numbers).add(torch.eye(10) * 99).min() > 1
    shapes = torch.stack([sprite(shape, 0, 24)[0] for shape in SHAPES]).flatten(1)
    assert torch.cdist(shapes, shapes).add(torch.eye(3) * 99).min() > 1


def test_views_of_photos_films_and_panoramas():
    random, ramp = Random(7), torch.linspace(0, 255, 64).to(torch.uint8)[None, None, :, None].expand(1, 32, 64, 3)
    photo = media.view(media.Clip("ramp", ramp), 1, (24, 36), random)
    assert photo.shape == (1, 3, 24, 36)
    assert 0 <= photo.min() < photo.max() <= 1
    film = media.Clip("film", torch.arange(20, dtype=torch.uint8)[:, None, None, None].expand(20, 32, 64, 3))
    frames = media.view(film, 30, (8, 12), random)[:, 0, 0, 0] * 255
    assert (frames.diff() >= 0).all()
    turned = [media.view(media.Clip("ramp", ramp, True), 4, (8, 12), random) for _ in range(10)]
    assert any((one[0] - one[3]).abs().max() > 0.02 for one in turned)


def test_files_of_clips_are_refused_by_what_they_lack(tmp_path):
    pytest.importorskip("PIL")
    with pytest.raises(FileNotFoundError, match="no such file of clips and photos"):
        media.read(tmp_path / "none.safetensors")
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="must hold clips as training/vision"):
        media.read(tmp_path / "other.safetensors")


def test_a_token_sees_what_is_around_it_and_knows_its_place():
    torch.manual_seed(0)
    model, pixels = VisionModel(CONFIG), torch.rand(1, 3, 3, 16, 24)
    before, changed = model.see(pixels), pixels.clone()
    changed[0, 1, :, 8:, :4] += 0.5
    differ = (model.see(changed) - before).abs().amax(dim=-1)[0]
    assert differ[[6 + 2, 6 + 5]].max() < differ[6 + 3]
    assert {token // 6 for token in (differ > 1e-6).nonzero().flatten().tolist()} == {1}
    same = model.see(torch.zeros(1, 1, 3, 48, 72))[0]
    assert torch.cdist(same, same).add(torch.eye(54) * 99).min() > 1e-3
    seen = model.tower(torch.rand(4, 3, 48, 72))
    assert 0.1 < seen.std(dim=(0, 2, 3)).mean() < 3  # neither lost nor blown up on the way


def test_what_is_seen_stands_in_front_of_the_words():
    torch.manual_seed(0)
    model, pixels, ids = VisionModel(CONFIG).eval(), torch.rand(2, 1, 3, 48, 72), torch.randint(len(WORDS), (2, 5))
    visual = model.see(pixels)
    whole = torch.cat((visual, model.language.transformer.wte(ids)), dim=1)
    expected = model.language(torch.zeros(whole.shape[:2], dtype=torch.int64), embedding=lambda _: whole)[:, -5:]
    assert torch.allclose(model(pixels, ids), expected, atol=1e-6)
    seen = Seen(model.language, visual)
    assert torch.equal(seen.embed(seen.ids.flip(1)), visual.flip(1))


@pytest.mark.parametrize("sort", ["none", "qk"])
def test_a_token_reads_the_blocks_that_its_block_keeps(sort):
    torch.manual_seed(0)
    model, pixels = VisionModel(CONFIG).eval(), torch.rand(1, 3, 48, 72)
    captured = patches.capture_answer(model, pixels, ("where", "is", "the", "red", "sign", "?"), [1])
    heads, tokens = captured.layers[1], 54 + 6 + ANSWER_WORDS
    assert heads.q.shape == (1, 2, tokens, 16)
    dense = torch.softmax(captured.scale * heads.q @ heads.k.mT, dim=-1)[0, :, 60]
    assert torch.allclose(patches.attention_of(heads, captured.scale, 60), dense, atol=1e-6)
    config = BAAttConfig(block_size=16, sparsity=0.6, score="covariance", sort=sort, segment=32)
    plan = make_plan(heads.q, heads.k, config, scale=captured.scale, impl="reference")
    for head in (0, 1):
        block = plan.query_order.index[0, head].tolist().index(60) // 16
        kept = plan.selection.index[0, head, block, : plan.selection.count[0, head, block]].tolist()
        places = [place for one in kept for place in range(16 * one, min(16 * one + 16, tokens))]
        expected = {int(plan.key_order.index[0, head, place]) for place in places}
        assert {*patches.tokens_read(plan, head, 60).nonzero().flatten().tolist()} == expected
    with pytest.raises(ValueError, match=r"layers must be from 0 to 1, got \[2\]"):
        patches.capture_answer(model, pixels, ("?",), [2])


def test_folders_of_the_model(tmp_path):
    model = VisionModel(CONFIG)
    model.save(tmp_path / "kept")
    found = VisionModel.load(tmp_path / "kept")
    assert found.config == CONFIG
    for name, tensor in found.state_dict().items():
        assert (tensor - model.state_dict()[name]).abs().max() <= tensor.abs().max() / 250, name
    with pytest.raises(FileNotFoundError, match="must hold a model that sees"):
        VisionModel.load(tmp_path)
    (tmp_path / "kept" / WEIGHTS).write_bytes(b"no weights")
    with pytest.raises(ValueError, match="must hold a model that sees, got"):
        VisionModel.load(tmp_path / "kept")
    with pytest.raises(ValueError, match=r"photo must be multiples of 48 and 72, got \(48, 36\)"):
        VisionConfig(photo=(48, 36))
    with pytest.raises(ValueError, match=r"frame must be multiples of 16 and 24, got \(24, 24\)"):
        VisionConfig(frame=(24, 24))


@pytest.fixture(scope="module")
def reader():
    torch.manual_seed(0)
    clips = [media.Clip("one", torch.randint(0, 255, (5, 16, 24, 3), dtype=torch.uint8))]
    clips.append(media.Clip("two", torch.randint(0, 255, (1, 24, 48, 3), dtype=torch.uint8)))
    return study.VisionReader(VisionModel(CONFIG).eval(), clips, study.VisionSetup({"model.safetensors": "1"}))


@pytest.mark.parametrize("task", TASKS)
def test_a_right_answer_counts_and_a_wrong_one_does_not(reader, monkeypatch, task):
    (length,) = study.lengths_of(reader.model, task, [12])
    cell, samples = Cell(task, length, sampler=study.VISION_SAMPLER), reader.draw(task, length, 3)
    right = torch.tensor([reader.model.config.encode(one.question.answer) for one in samples])
    assert torch.equal(samples[2].pixels, reader.draw(task, length, 1, first=2)[0].pixels)
    for tokens, score in ((right, 1), ((right + 1) % len(WORDS), 0)):
        result = SampleResult(tokens, 2, 0.1, torch.zeros(3, 2))
        monkeypatch.setattr(reader, "generate", lambda *_, result=result: (result, 0.0))
        found = reader.answer(cell, list(enumerate(samples)))
        assert [one.score for one in found] == [score] * 3
    assert found[0].values == [" ".join(word for word in samples[0].question.answer if word != END)]


def test_other_files_seeds_and_settings_have_other_keys(reader):
    cell = Cell("photo_count", 54, sampler=study.VISION_SAMPLER)
    keys = {study.VisionSetup(files, seed=seed).keys(cell, [0])[0] for files in ({}, {"a": "b"}) for seed in (1, 2)}
    keys.add(study.VisionSetup({}, seed=1).keys(cell._replace(length=72), [0])[0])
    assert len(keys) == 5


def test_lengths_are_refused_in_words(reader):
    assert study.lengths_of(reader.model, "photo_count", [99]) == [54]
    assert study.lengths_of(reader.model, "clip_when", [4, 12]) == [24, 72]
    for frames in (3, 13):
        with pytest.raises(ValueError, match=f"frames must be from 4 to the model's 12, got {frames}"):
            study.lengths_of(reader.model, "clip_when", [frames])
    with pytest.raises(ValueError, match="tasks must be of photo_number"):
        study.lengths_of(reader.model, "clip_where", [8])


def test_all_tasks_are_of_one_kind():
    assert {*PHOTO_TASKS} | {*CLIP_TASKS} == {*TASKS}
    assert not {*PHOTO_TASKS} & {*CLIP_TASKS}
