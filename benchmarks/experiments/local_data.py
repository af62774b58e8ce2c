"""The two kinds of data that are trained on on this machine: what a run on them needs, and how it is scored."""

import json
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

from open_clip_train_fastclip.errors import UserError

from ..glyph_data import dataset as glyphs
from . import glyph_scores, real_scores
from .real_pairs import VAL_PAIRS, VAL_SHARDS, RealPairs
from .store import key_of
from .table import Row


class LocalData(Protocol):
    """The data of one row."""

    scale: str
    folder: Path
    train_pairs: int  # that a run trains on, in the first train_shards shards of train/
    train_shards: int
    val_pairs: int  # on which it evaluates, in the first val_shards shards of val/
    val_shards: int

    made_with: dict  # what the folder's content depends on, of the data's settings in a stored run

    def make(self) -> dict:
        """Makes the data or finds them; returns dataset.json. Raises UserError if the folder holds others."""

    def measure(self, checkpoint: Path, flags: dict) -> dict:
        """What a stored run has of these data: "scores" of the checkpoint of a run with these flags, in percent."""

    def metrics(self, scores: dict) -> dict[str, float]:
        """The figures of the tables by their names (see measured.Measured.metric) in the scores of `measure`."""


@dataclass(frozen=True)
class Glyphs:
    """Characters that are drawn on the spot."""

    settings: glyphs.Settings
    folder: Path

    @property
    def train_pairs(self) -> int:
        return sum(glyphs.train_counts(self.settings))

    @property
    def train_shards(self) -> int:
        return self.settings.train_shards

    @property
    def val_pairs(self) -> int:
        pairs = self.settings.characters * self.settings.val_per_character
        return pairs * self.val_shards // self.settings.val_shards

    scale, val_shards = "tiny", glyph_scores.REPORTED_SHARDS

    @property
    def made_with(self) -> dict:
        return asdict(self.settings)

    def make(self) -> dict:
        return glyphs.make(self.folder, self.settings)

    def measure(self, checkpoint: Path, flags: dict) -> dict:
        return {"scores": glyph_scores.scores(checkpoint, self.folder), "floor": glyph_scores.floor(self.folder)}

    def metrics(self, scores: dict) -> dict[str, float]:
        found = {"R@1": both_ways(scores["reported"], 1), **scores["reported"], **scores["zero_shot"]}
        return found | ({"tuning": both_ways(scores["tuning"], 1)} if "tuning" in scores else {})


@dataclass(frozen=True)
class Real:
    """Icons, emoji and clip art with their names."""

    pairs: RealPairs
    scale, val_pairs, val_shards = "real", VAL_PAIRS, VAL_SHARDS

    @property
    def folder(self) -> Path:
        return self.pairs.folder

    @property
    def train_pairs(self) -> int:
        return self.pairs.pairs

    @property
    def train_shards(self) -> int:
        return self.pairs.shards

    @property
    def made_with(self) -> dict:
        return {"sets": self.pairs.sets, "size": self.pairs.size}

    def make(self) -> dict:
        from ..real_data import dataset  # needs a library that draws, which no other scale does

        found = dataset.make(self.folder, dataset.Settings(sets=self.pairs.sets, size=self.pairs.size))
        for split, pairs, shards in (
            ("train", self.train_pairs, self.train_shards),
            ("val", self.val_pairs, self.val_shards),
        ):
            sizes = json.loads((self.folder / split / "sizes.json").read_text())
            held = sum(sizes[name] for name in sorted(sizes)[:shards])
            if held != pairs:
                raise UserError(
                    f"{self.folder}/{split}: the first {shards} shards hold {held:,} pairs and not the {pairs:,} that "
                    "the tables expect: remove the folder to make it anew, or correct experiments/real_pairs.py"
                )
        return found

    def measure(self, checkpoint: Path, flags: dict) -> dict:
        settings = (flags["--model"], flags.get("--force-image-size"), flags["--device"])
        return {"scores": real_scores.scores(checkpoint, self.folder, self.train_shards, *settings)}

    def metrics(self, scores: dict) -> dict[str, float]:
        return {
            "R@1": both_ways(scores["val"], 1),
            "R@1 new": both_ways(scores["val_new"], 1),
            "R@10": both_ways(scores["val"], 10),
            "tuning": both_ways(scores["tuning"], 1),
            **scores["val"],
            **scores["zero_shot"],
            "probe": scores["linear_probe"]["theme"],
        }


def both_ways(recalls: dict[str, float], k: int) -> float:
    """Recall at k, the mean of image to text and text to image."""
    return statistics.fmean(recalls[f"{way}_R@{k}"] for way in ("image_to_text", "text_to_image"))


def data_of(row: Row) -> LocalData:
    """The data of a row at scale tiny or real."""
    if isinstance(row.data, RealPairs):
        return Real(row.data)
    return Glyphs(row.data, row.kept.data if row.kept else Path("data", f"tables-{key_of(asdict(row.data))}"))
