"""Scores of a checkpoint on held-out glyph pairs."""

import json
from dataclasses import replace

import pytest
import torch

from benchmarks.experiments import encoding, glyph_scores
from benchmarks.experiments.table import NOISY
from benchmarks.glyph_data.dataset import choose_pairs


def test_the_character_is_found_in_its_caption():
    _, pairs = choose_pairs(replace(NOISY, characters=20))
    assert [glyph_scores.name_in(pair.caption) for pair in pairs] == [pair.character.name for pair in pairs]


class KnowsNames:
    """A model to which a picture is the number of its character, and a caption the number of the name in it."""

    logit_scale = torch.zeros(())

    def load_state_dict(self, weights):
        assert list(weights) == ["w"]  # the prefix of DDP is gone

    def encode_image(self, numbers):
        return torch.nn.functional.one_hot(numbers, 6).float()

    encode_text = encode_image


def test_zero_shot_counts_the_pictures_whose_character_is_recognised(tmp_path, monkeypatch):
    names = ["aries", "benzene ring", "coffin", "colon sign", "infinity", "much less-than"]
    captions = [f"small red {name} framed in blue on navy" for name in names] + ["white coffin on black"] * 2
    monkeypatch.setattr(
        encoding, "tools",
        lambda: (KnowsNames(), None, lambda texts: torch.tensor([names.index(glyph_scores.name_in(t)) for t in texts])),
    )  # fmt: skip
    seen = torch.tensor([0, 1, 2, 3, 5, 5, 2, 2])  # infinity is taken for another
    monkeypatch.setattr(glyph_scores, "held_out", lambda data: (seen, captions, 6))
    (tmp_path / "dataset.json").write_text(json.dumps({"characters": names}))
    torch.save({"state_dict": {"module.w": torch.zeros(1)}}, tmp_path / "epoch_1.pt")
    found = glyph_scores.scores(tmp_path / "epoch_1.pt", tmp_path)
    assert found["zero_shot"]["top1"] == pytest.approx(100 * 5 / 6, abs=0.01)
    assert found["reported"]["image_to_text_R@1"] == pytest.approx(100 * 5 / 6, abs=0.01)
    assert set(found["tuning"]) == set(glyph_scores.RECALLS)
