"""A head that tells the next token: the logits of a token are those of the one before, whole, in part and cached."""

import dataclasses

import pytest
import torch

from baatt.models import MaskedDiffusionLM, ModelConfig
from baatt.models.cache import KeyValueCache
from baatt.sampling import SamplerConfig, generate
from baatt.sampling.config import CACHES
from tests.models.test_config import SMALL
from tests.models.test_llada import make_ids, make_model

NEXT = dataclasses.replace(SMALL, predicts="next")


def pair() -> tuple[MaskedDiffusionLM, MaskedDiffusionLM]:
    """Models of the same weights that tell the same token and the next."""
    return make_model(SMALL), make_model(NEXT)


def test_logits_are_those_of_the_token_before() -> None:
    same, following = pair()
    ids = make_ids(2, 9)
    with torch.no_grad():
        expected = same(ids)
        expected = torch.cat((expected[:, :1], expected[:, :-1]), dim=1)
        for first, stop in ((0, None), (0, 4), (1, 4), (4, 9), (0, 0), (3, 3)):
            found = following(ids, logits_from=first, logits_to=stop)
            torch.testing.assert_close(found, expected[:, first:stop])


def test_a_cached_part_begins_with_the_token_before() -> None:
    _, following = pair()
    ids, cache = make_ids(1, 12), KeyValueCache()
    with torch.no_grad():
        whole = following(ids, cache=cache)
        part = following(ids[:, 4:8], cache=cache, start=4, logits_from=1)
        torch.testing.assert_close(part, whole[:, 5:8])
        with pytest.raises(ValueError, match="logits_from must be at least 1 where predicts is 'next' and start > 0"):
            following(ids[:, 4:8], cache=cache, start=4)


@pytest.mark.parametrize("cache", list(CACHES))
def test_the_sampler_fills_masks_with_every_cache(cache: str) -> None:
    _, following = pair()
    config = SamplerConfig(steps=8, gen_length=8, block_length=4, cache=cache)
    found = generate(following, make_ids(2, 5), config=config)
    assert found.tokens.shape == (2, 8)
    assert not (found.tokens == following.config.mask_token_id).any()


def test_the_config_says_it(tmp_path) -> None:
    assert ModelConfig.from_dict(NEXT.to_dict()).predicts == "next"
    make_model(NEXT).save_pretrained(tmp_path)
    assert MaskedDiffusionLM.from_pretrained(tmp_path).config.predicts == "next"
    with pytest.raises(ValueError, match="predicts must be 'same' or 'next'"):
        dataclasses.replace(SMALL, predicts="both")
