"""The glyph data: deterministic, captions as promised, and readable by OpenCLIP's loader."""

import gc
import io
import json
import random
import tarfile
import warnings
from collections import Counter
from dataclasses import replace

import numpy as np
import open_clip
import pytest
from PIL import Image

from benchmarks.glyph_data import dataset
from benchmarks.glyph_data.__main__ import main
from benchmarks.glyph_data.captions import FILLERS, Look, Pair, attribute_floor, exchange, shorten
from benchmarks.glyph_data.characters import Character, choose_characters, draw_ink, load_fonts, scale_to
from benchmarks.glyph_data.dataset import Settings
from open_clip_train_fastclip.errors import UserError

SMALL = Settings(characters=12, train_per_character=10, val_per_character=4, train_shards=3, val_shards=2)


def read_pairs(folder):
    """[(png bytes, caption)] in the order of the shards, checked against sizes.json."""
    pairs = []
    for name, size in json.loads((folder / "sizes.json").read_text()).items():
        with tarfile.open(folder / name) as tar:
            files = [(entry.name, tar.extractfile(entry).read()) for entry in tar]
        assert len(files) == 2 * size
        for (picture, png), (text, caption) in zip(files[::2], files[1::2], strict=True):
            assert picture == text.replace(".txt", ".png")
            pairs.append((png, caption.decode()))
    return pairs


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("glyphs") / "data"
    return folder, dataset.make(folder, SMALL)


def test_same_settings_same_bytes_and_another_seed_other_bytes(data, tmp_path):
    folder, info = data
    dataset.make(tmp_path / "again", SMALL)
    for path in folder.rglob("*.*"):
        assert (tmp_path / "again" / path.relative_to(folder)).read_bytes() == path.read_bytes(), path
    assert dataset.make(tmp_path / "other", replace(SMALL, seed=1))["sha256"] != info["sha256"]


def test_exactly_the_share_of_training_captions_is_wrong(data, tmp_path):
    folder, info = data
    dataset.make(tmp_path / "clean", replace(SMALL, mismatched=0.0))
    noisy, clean = read_pairs(folder / "train"), read_pairs(tmp_path / "clean" / "train")
    assert [png for png, _ in noisy] == [png for png, _ in clean]
    wrong = sum(a != b for (_, a), (_, b) in zip(noisy, clean, strict=True))
    assert wrong == info["mismatched_pairs"] == round(0.3 * len(clean)) == 36
    assert Counter(caption for _, caption in noisy) == Counter(caption for _, caption in clean)
    assert read_pairs(folder / "val") == read_pairs(tmp_path / "clean" / "val")


@pytest.mark.parametrize("share, wrong", [(0, 0), (0.5, 5), (1, 10)])
def test_exchange_moves_every_chosen_caption(share, wrong):
    captions = [f"caption {i}" for i in range(10)]
    moved = exchange(captions, share, seed=0)
    assert sorted(moved) == captions and sum(a != b for a, b in zip(moved, captions, strict=True)) == wrong


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan"), 0.1])  # 0.1 of 10 is one caption: nowhere to go
def test_exchange_refuses_a_share_it_cannot_make(share):
    with pytest.raises(UserError, match="--mismatched"):
        exchange([f"caption {i}" for i in range(10)], share, seed=0)


def test_a_share_of_the_captions_is_partial_and_names_the_character():
    train, _ = dataset.choose_pairs(SMALL)
    shortened = shorten(train, 0.5, seed=0)
    partial = [(pair, caption) for pair, caption in zip(train, shortened, strict=True) if pair.caption != caption]
    assert len(partial) == len(train) // 2
    for pair, caption in partial:
        filler = next(filler for filler in FILLERS if caption.startswith(filler))
        rest, whole = caption.removeprefix(filler).strip(), pair.caption
        assert pair.character.name in rest and set(rest.split()) <= set(whole.split())
    assert 15 < sum(caption.endswith(f"on {pair.look.background}") for pair, caption in partial) < 45  # about half


def test_a_long_tail_keeps_the_number_of_pairs_and_the_order():
    assert dataset.train_counts(SMALL) == [10] * 12
    counts = dataset.train_counts(replace(SMALL, long_tail=1.0))
    assert counts == sorted(counts, reverse=True) and abs(sum(counts) - 120) <= 6
    assert counts[0] == round(120 / sum(1 / n for n in range(1, 13))) == 39
    train, val = dataset.choose_pairs(replace(SMALL, long_tail=1.0))
    assert sorted(Counter(pair.character.name for pair in train).values(), reverse=True) == counts
    assert set(Counter(pair.character.name for pair in val).values()) == {4}


def test_data_made_before_an_option_existed_are_used_again(data, tmp_path):
    folder, info = data
    (tmp_path / "old").mkdir()
    older = {name: value for name, value in info["settings"].items() if name not in ("partial", "long_tail")}
    (tmp_path / "old" / "dataset.json").write_text(json.dumps({**info, "settings": older}))
    assert dataset.make(tmp_path / "old", SMALL)["sha256"] == info["sha256"]


def test_pictures_are_32_px_rgb_and_every_caption_is_unique(data):
    folder, info = data
    train, val = read_pairs(folder / "train"), read_pairs(folder / "val")
    assert (len(train), len(val)) == (info["train_pairs"], info["val_pairs"]) == (120, 48)
    images = [Image.open(io.BytesIO(png)) for png, _ in train + val]
    assert {(image.mode, image.size) for image in images} == {("RGB", (32, 32))}
    assert len({caption for _, caption in train + val}) == 168


def test_no_character_is_shown_twice_under_two_names():
    """At the default size, over all fonts: no two characters have the same ink. Captions fit the model's context."""
    train, val = dataset.choose_pairs(Settings())
    characters = {pair.character for pair in train}
    inks = Counter()
    for character in characters:
        shapes = {font.path: draw_ink(character.text, font) for font in character.fonts}
        inks.update({(path, np.asarray(scale_to(ink, 32)).tobytes()) for path, ink in shapes.items()})
    assert len(characters) == len({c.name for c in characters}) == 150 and max(inks.values()) == 1
    assert all(len({font.family for font in c.fonts}) >= 2 for c in characters)
    captions = [pair.caption for pair in train + val]
    assert len(set(captions)) == len(captions) == 6900
    longest = sorted(captions, key=len)[-500:]
    tokenizer = open_clip.SimpleTokenizer()
    assert max(len(tokenizer.encode(caption)) for caption in longest) + 2 <= 24  # 2: start and end


def test_caption_names_what_is_seen():
    character = Character("λ", "greek small letter lambda", ())
    seen = Pair(character, Look("red", "navy", True, "blue")).caption
    assert seen == "small red greek small letter lambda framed in blue on navy"
    assert Pair(character, Look("red", "navy", False, None)).caption == "red greek small letter lambda on navy"


def test_drawn_colours_are_those_of_the_caption(data):
    fonts = load_fonts()
    character = choose_characters(fonts, 1, 0, set())[0]
    pair = Pair(character, Look("red", "navy", False, "green"))
    image = np.asarray(dataset.draw(pair, random.Random(0)))
    colours = Counter(map(tuple, image.reshape(-1, 3).tolist()))
    for colour in (dataset.COLOURS["red"], dataset.BACKGROUNDS["navy"], dataset.COLOURS["green"]):
        assert colours[colour] > 5
    assert colours[dataset.COLOURS["blue"]] == 0


def test_floor_of_knowing_the_attributes_only():
    a, b = Look("red", "navy", True, None), Look("blue", "navy", True, None)
    floor = attribute_floor([a, a, a, a, a, a, a, b])  # 7 alike and 1 alone
    assert floor == {"R@1": pytest.approx(100 * 2 / 8), "R@5": pytest.approx(100 * 6 / 8)}


def test_existing_data_are_used_again_or_refused_but_never_replaced(data, capsys):
    folder, info = data
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert dataset.make(folder, SMALL) == info
    with pytest.raises(UserError, match="exists and is not the data asked for"):
        dataset.make(folder, replace(SMALL, seed=1))
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


@pytest.mark.parametrize(
    "options, message",
    [
        ("--characters 0", "--characters is 0"),
        ("--train-shards 0", "--train-shards is 0"),
        ("--characters 100000", "too few characters"),
        ("--characters 2 --train-per-character 288", "has only 288 captions"),
        ("--fonts /no/such/font.ttf", "/no/such/font.ttf cannot be read"),
        ("--mismatched 2", "--mismatched 2"),
        ("--partial 1.5", "--partial 1.5"),
        ("--long-tail -1", "--long-tail -1"),
    ],
)
def test_wrong_options_get_one_line(options, message, tmp_path, capsys):
    assert main([*options.split(), "--out", str(tmp_path / "out")]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1 and message in errors[0] and not list(tmp_path.iterdir())


def test_font_files_are_closed_once_read():
    gc.collect()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ResourceWarning)
        load_fonts()
        gc.collect()
    assert not [str(warning.message) for warning in caught if ".ttf" in str(warning.message)]
