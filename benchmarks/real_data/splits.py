"""Held-out pairs: no training picture is nearly the same, and no caption of val_new is a training caption."""

import random
from collections import defaultdict
from collections.abc import Callable, Sequence

import numpy as np

ALIKE = 0.97  # correlation of two pictures' 16 x 16 px versions from which they count as near duplicates
GRID = 16  # px
CHUNK = 500  # pictures compared with all at a time
SIZES = {"val_new": 1000, "val": 2000, "tune": 1000}  # held out, in this order


def features(pictures: np.ndarray) -> np.ndarray:
    """float32 [N, 768]: the product of two rows is the correlation of the pictures' 16 x 16 px versions.

    pictures: uint8 [N, 64, 64, 3]
    """
    found = np.empty((len(pictures), GRID * GRID * 3), np.float32)
    cell = pictures.shape[1] // GRID
    for start in range(0, len(pictures), CHUNK):
        part = pictures[start : start + CHUNK].astype(np.float32)
        part = part.reshape(-1, GRID, cell, GRID, cell, 3).mean((2, 4)).reshape(len(part), -1)
        part -= part.mean(1, keepdims=True)
        found[start : start + CHUNK] = part / np.maximum(np.linalg.norm(part, axis=1, keepdims=True), 1e-6)
    return found


def split(captions: Sequence[str], vectors: np.ndarray, seed: int, sizes: dict[str, int]) -> dict[str, list[int]]:
    """{"val_new": places, "val": places, "tune": places, "train": places}, each in random order.

    vectors: `features` of the pictures; sizes: pairs to hold out, as SIZES. No held-out picture has a near duplicate in
    train or in another held-out split, and no caption occurs twice in a split, so that every pair has one right answer.
    Captions of val_new occur in no other split.
    """
    chance = random.Random(seed)
    order = list(range(len(captions)))
    chance.shuffle(order)
    by_caption = defaultdict(list)
    for place in order:
        by_caption[captions[place]].append(place)
    concepts = sorted(by_caption)
    chance.shuffle(concepts)
    gone: set[int] = set()  # taken, or too like one that was
    used: set[str] = set()  # captions of the held-out pairs

    def hold_out(candidates: list[int], size: int, leaving: Callable[[int], list[int]]) -> list[int]:
        taken: list[int] = []
        for start in range(0, len(candidates), CHUNK):
            part = [place for place in candidates[start : start + CHUNK] if place not in gone]
            for place, products in zip(part, vectors[part] @ vectors.T, strict=True):
                if len(taken) == size:
                    return taken
                if place not in gone and captions[place] not in used:
                    taken.append(place)
                    used.add(captions[place])
                    gone.update(np.flatnonzero(products > ALIKE).tolist(), leaving(place), [place])
        return taken

    def concept_of(place):
        return by_caption[captions[place]]

    found = {"val_new": hold_out([by_caption[text][0] for text in concepts], sizes["val_new"], concept_of)}
    for name in ("val", "tune"):
        found[name] = hold_out([place for place in order if place not in gone], sizes[name], lambda place: [])
    return found | {"train": [place for place in order if place not in gone]}
