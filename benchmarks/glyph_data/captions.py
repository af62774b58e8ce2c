"""What the captions of the glyph data say, right, wrong or in part."""

import random
from collections import Counter
from typing import NamedTuple

from open_clip_train_fastclip.errors import UserError

from .characters import Character

FILLERS = ("a picture of", "photo:", "here you see", "free download", "my new", "image of the")


class Look(NamedTuple):
    """Everything a caption says but the character's name. `colour` is None for an emoji, which has its own."""

    colour: str | None
    background: str
    small: bool
    frame: str | None


class Pair(NamedTuple):
    """One picture and its right caption."""

    character: Character
    look: Look

    @property
    def parts(self) -> tuple[str | None, str | None, str, str | None, str]:
        """The parts of the caption in their order; the third, the name, says what nothing else does."""
        small, colour, frame = "small" if self.look.small else None, self.look.colour, self.look.frame
        return small, colour, self.character.name, f"framed in {frame}" if frame else None, f"on {self.look.background}"

    @property
    def caption(self) -> str:
        """[small] COLOUR NAME [framed in X] on BACKGROUND"""
        return " ".join(filter(None, self.parts))


def shorten(pairs: list[Pair], share: float, seed: int) -> list[str]:
    """The captions of `pairs`; `share` of them (rounded) after filler words and without what chance leaves out."""
    chance = random.Random(f"{seed}/partial")
    captions = [pair.caption for pair in pairs]
    for place in chance.sample(range(len(pairs)), round(share * len(pairs))):
        name = pairs[place].character.name
        kept = [part for part in pairs[place].parts if part and (part == name or chance.random() < 0.5)]
        captions[place] = " ".join([chance.choice(FILLERS), *kept])
    return captions


def exchange(captions: list[str], share: float, seed: int) -> list[str]:
    """Exactly `share` of the captions (rounded to a whole number) moved among themselves, so that none stays in place.

    Raises UserError for a share outside 0 to 1 or one that comes to a single caption.
    """
    count = round(share * len(captions)) if 0 <= share <= 1 else 1
    if count == 1:
        raise UserError(f"--mismatched {share}: give a share from 0 to 1 that comes to 0 or at least 2 captions")
    places = random.Random(f"{seed}/mismatched").sample(range(len(captions)), count)
    moved = list(captions)
    for place, source in zip(places, places[1:] + places[:1], strict=True):
        moved[place] = captions[source]
    return moved


def attribute_floor(looks: list[Look]) -> dict[str, float]:
    """Recall in percent of a model that knows size, colour, frame and background but not the character.

    It ranks the pairs that share a caption's look first, in random order: R@k = mean over pairs of min(k, n) / n with
    n pairs of that look. The same in both directions.
    """
    sizes = Counter(looks).values()
    return {f"R@{k}": 100 * sum(min(k, n) for n in sizes) / len(looks) for k in (1, 5)}
