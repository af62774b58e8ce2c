"""The real pairs: what is taken from the packages and how it is called, drawn and split, on packages made here."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path

import fake_packages
import numpy as np
import pytest
from PIL import Image

from benchmarks.real_data import captions, dataset, drawing, packages, sources, splits
from benchmarks.real_data.__main__ import main
from benchmarks.real_data.dataset import Settings
from benchmarks.real_data.sources import Drawing
from open_clip_train_fastclip.errors import UserError

needs_dpkg = pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="dpkg-deb, which builds the fakes, is missing")
SIZES = {"val_new": 3, "val": 4, "tune": 2}
SVG = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {0} {1}" width="{0}" height="{1}">{2}</svg>'


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """The folder of the fake packages, and their hashes."""
    folder = tmp_path_factory.mktemp("fakes") / "packages"
    return folder, fake_packages.write(folder, Image.linear_gradient("L").convert("RGB"))


@pytest.fixture
def fakes(real, monkeypatch):
    folder, hashed = real
    monkeypatch.setattr(packages, "PACKAGES", hashed)
    monkeypatch.setattr(splits, "SIZES", SIZES)
    return folder


@pytest.mark.parametrize(
    "name, keywords, expected",
    [
        ("grinning-face", [], "grinning face"),
        ("Grinning  Face", ["Smile", "happy_day", "smile"], "grinning face: smile, happy day"),
        ("cube", ["*new*", "Cube", "", "box"], "cube: box"),
        ("a", list("bcdefghi"), "a: b, c, d, e, f, g"),
    ],
)
def test_a_caption_is_the_name_and_at_most_six_other_words(name, keywords, expected):
    assert captions.caption(name, keywords) == expected


@needs_dpkg
def test_every_source_gives_its_drawings_with_the_words_of_its_packages(fakes):
    emoji = captions.read_emoji(fakes)
    assert emoji.theme_names == {"face": ["grinning face"], "hand": ["waving hand"], "country-flag": ["flag: Andorra"]}
    icons = [*sources.icons(fakes, sources.COLOUR, emoji), *sources.icons(fakes, sources.ONE_COLOUR, emoji)]
    found = {}
    for one in icons:
        found.setdefault(one.collection, []).append((one.caption, one.theme))
    expected = {name: [(f"{name.replace('-', ' ')} thing", None)] for name in (*sources.COLOUR, *sources.ONE_COLOUR)}
    expected |= {
        "openmoji": [
            ("grinning face: smile, face", "face"),
            ("waving hand: dark skin tone: hello", "hand"),
            ("soldering iron: tool, maker, heat", None),
        ],
        "flag": [("flag: andorra: ad", "country-flag")],
        "fluent-color": [("cube", None)],
        "healthicons": [("baby", None)],
        "tabler": [("bell: alarm, 7", None), ("bell filled: alarm, 7", None)],
        "ph": [("cube: box, 3d", None), ("cube fill: box, 3d", None)],
        "mdi": [("ab testing: ab test", None)],
        "fa7-solid": [("car: auto", None)],
        "lucide": [("apple: fruit, food", None)],
    }
    for name in ("circle-flags", "cif", "flagpack"):  # their only icons here are of no region
        del expected[name]
    assert found == expected


@needs_dpkg
def test_clip_art_is_called_by_its_title_or_its_file_and_stamps_by_their_sentence(fakes):
    art = [one.caption for one in sources.clip_art(fakes)]
    assert art == ["yellow duck: bird", "nothing", "plain", *(f"car {n}: road" for n in range(1, 7))]
    assert [(one.caption, one.suffix) for one in sources.stamps(fakes)] == [("A yellow pepper.", ".png")]
    assert {row[2] for row in sources.licences(fakes, sources.COLOUR)} >= {"MIT", "GPL-2", "public domain"}


def test_an_icon_fills_its_box_and_clip_art_is_cropped_to_its_ink():
    ink = '<rect x="2" y="4" width="4" height="2" fill="#0000ff"/>'
    icon = drawing.draw(Drawing("mdi", "", None, SVG.format(16, 8, ink).encode(), ".svg"))
    # 16 x 8 units on 64 px: 4 px a unit, centred, so 16 px of paper above and below
    assert icon.shape == (64, 64, 3) and icon.dtype == np.uint8
    expected = np.full((64, 64, 3), 255, np.uint8)
    expected[16 + 16 : 16 + 24, 8:24] = (0, 0, 255)
    assert np.array_equal(icon, expected)
    art = drawing.draw(Drawing(sources.CLIP_ART, "", None, SVG.format(16, 8, ink).encode(), ".svg"))
    assert np.array_equal(art[20:44, 4:60], np.broadcast_to(np.uint8([0, 0, 255]), (24, 56, 3)))
    assert (art[:15] == 255).all() and (art[49:] == 255).all()


@pytest.mark.parametrize("ink", ["", '<path d="M0 0h8v8z" fill="#fff"/>'])
@pytest.mark.parametrize("collection", ["mdi", sources.CLIP_ART])
def test_what_shows_nothing_is_left_out(ink, collection):
    assert drawing.draw(Drawing(collection, "", None, SVG.format(8, 8, ink).encode(), ".svg")) is None


@pytest.mark.parametrize("collection, suffix", [(sources.CLIP_ART, ".svg"), (sources.STAMPS, ".png")])
def test_a_broken_file_is_left_out(collection, suffix):
    assert drawing.draw(Drawing(collection, "", None, b"<svg", suffix)) is None


def random_pictures(count, seed=0):
    """Blocks of 4 x 4 px of random colours, so that the 16 x 16 version keeps them."""
    blocks = np.random.default_rng(seed).integers(0, 256, (count, 16, 16, 3), np.uint8)
    return blocks.repeat(4, 1).repeat(4, 2)


def test_no_held_out_picture_has_a_near_duplicate_elsewhere():
    pictures = random_pictures(60)
    noise = np.random.default_rng(1).integers(-6, 7, pictures[:20].shape)
    pictures[40:] = np.clip(pictures[:20].astype(int) + noise, 0, 255)  # 20 pictures twice, nearly
    words = [f"word {i % 50}" for i in range(60)]
    found = splits.split(words, splits.features(pictures), 0, {"val_new": 8, "val": 9, "tune": 7})
    assert [len(found[name]) for name in ("val_new", "val", "tune")] == [8, 9, 7] and len(found["train"]) > 15
    assert found != splits.split(words, splits.features(pictures), 1, {"val_new": 8, "val": 9, "tune": 7})
    small = pictures.reshape(60, 16, 4, 16, 4, 3).mean((2, 4)).reshape(60, -1)
    correlation = np.corrcoef(small)
    places = Counter(place for part in found.values() for place in part)
    assert set(places.values()) == {1}
    for name in ("val_new", "val", "tune"):
        others = [place for part in found.values() for place in part if part is not found[name]]
        assert correlation[np.ix_(found[name], others)].max() < 0.97
        texts = [words[place] for place in found[name]]
        assert len(set(texts)) == len(texts)
    of = {name: {words[place] for place in part} for name, part in found.items()}
    assert not of["val_new"] & (of["train"] | of["val"] | of["tune"])


def test_of_the_same_picture_with_the_same_caption_one_is_kept():
    first, other = random_pictures(2)
    parts = [
        dataset.Pairs(["a", "b"], ["cat", "dog"], ["animal", None], np.stack([first, first])),
        dataset.Pairs(["c", "d"], ["cat", "cat"], [None, None], np.stack([first, other])),
    ]
    kept = dataset._without_copies(parts)
    assert (kept.collections, kept.captions, kept.themes) == (
        ["a", "b", "d"],
        ["cat", "dog", "cat"],
        ["animal", None, None],
    )
    assert np.array_equal(kept.pictures, np.stack([first, first, other]))


def read_pairs(folder):
    """[(pixels, caption)] of a folder's shards."""
    pairs = []
    for name in json.loads((folder / "sizes.json").read_text()):
        with tarfile.open(folder / name) as tar:
            files = [tar.extractfile(entry).read() for entry in tar]
        pairs += [
            (Image.open(io.BytesIO(a)).tobytes(), b.decode()) for a, b in zip(files[::2], files[1::2], strict=True)
        ]
    return pairs


@needs_dpkg
def test_the_folder_has_what_it_says_and_is_the_same_every_time(fakes, tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "TRAIN_SHARD", 5)
    info = dataset.make(tmp_path / "one", Settings("all"), fakes)
    shutil.rmtree(fakes / "drawn")  # drawn anew
    assert dataset.make(tmp_path / "two", Settings("all"), fakes) == info
    for path in (tmp_path / "one").rglob("*.*"):
        assert (tmp_path / "two" / path.relative_to(tmp_path / "one")).read_bytes() == path.read_bytes(), path
    pairs = {name: read_pairs(tmp_path / "one" / name) for name in ("train", "val", "tune", "val_new")}
    assert {name: len(of) for name, of in pairs.items()} == info["splits"] and len(pairs["val"]) == 4
    everything = [pair for of in pairs.values() for pair in of]
    assert len(set(everything)) == len(everything) and "old" not in [text for _, text in everything]
    labels = json.loads((tmp_path / "one" / "labels.json").read_text())
    emoji = captions.read_emoji(fakes)
    icons = sources.icons(fakes, (*sources.COLOUR, *sources.ONE_COLOUR), emoji)
    known = {one.caption: (one.collection, one.theme) for one in icons}
    for name, of in pairs.items():
        label = labels["splits"][name]
        for (_, text), collection, theme in zip(of, label["set"], label["theme"], strict=True):
            about = labels["sets"][collection], None if theme is None else labels["themes"][theme]
            assert about == known.get(text, (about[0], None))
    larger = dataset.make(tmp_path / "large", Settings("all", 64), fakes)
    for (small, text), (large, same) in zip(pairs["train"], read_pairs(tmp_path / "large" / "train"), strict=True):
        halved = np.frombuffer(large, np.uint8).reshape(32, 2, 32, 2, 3).mean((1, 3))
        assert text == same and np.abs(halved - np.frombuffer(small, np.uint8).reshape(32, 32, 3)).max() <= 0.5
    assert larger["sha256"] != info["sha256"]
    assert "| Openmoji (openmoji) | those of openmoji | MIT |" in (tmp_path / "one" / "licences.md").read_text()


@needs_dpkg
def test_the_same_settings_are_kept_and_anything_else_is_refused(fakes, tmp_path, capsys, monkeypatch):
    out = tmp_path / "data"
    arguments = ["--out", str(out), "--packages", str(fakes)]
    assert main(arguments) == 0 and f"{out}: 3 val_new, 4 val, 2 tune, 29 train; see" in capsys.readouterr().out
    (out / "train" / "00000.tar").unlink()
    assert main(arguments) == 0  # left as they are
    refused = f"error: {out} exists and is not the data asked for: remove it\n"
    assert main([*arguments, "--size", "64"]) == 2 and capsys.readouterr().err == refused
    monkeypatch.setattr(packages, "PACKAGES", packages.PACKAGES[1:])  # as of another version
    assert main(arguments) == 2 and capsys.readouterr().err == refused


def test_settings_are_all_on_the_command_line_and_choose_the_folder(monkeypatch):
    asked = []
    monkeypatch.setattr("benchmarks.real_data.__main__.make", lambda *words: asked.append(words) or {"splits": {}})
    main(["--out", "a", "--sets", "all", "--size", "64", "--seed", "3", "--packages", "b"])
    main([])
    main(["--sets", "all", "--size", "64"])
    assert asked == [
        (Path("a"), Settings("all", 64, 3), Path("b")),
        (Path("data/real"), Settings("colour", 32, 0), Path("data/packages")),
        (Path("data/real-all-64"), Settings("all", 64, 0), Path("data/packages")),
    ]


def test_packages_must_lie_in_a_folder(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main(["--out", str(tmp_path / "data"), "--packages", str(tmp_path / "file")]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path}/file is a file: give a folder for the packages\n"


def program(folder, name, script):
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def test_packages_are_downloaded_once_and_checked(real, fakes, tmp_path, monkeypatch):
    """By stand-ins of npm and apt-get that bring the fakes, and write down what they were asked for."""
    programs, asked = tmp_path / "programs", tmp_path / "asked"
    programs.mkdir()
    program(programs, "npm", f'echo "$@" >> {asked}; n=$(echo "$2" | sed "s/^@//; s/[/@]/-/g"); cp {fakes}/$n.tgz .')
    program(
        programs, "apt-get",
        f'echo "$@" >> {asked}; test -d "${{2#*=}}/partial" || exit; '
        'for last; do :; done; case "$last" in update) exit;; esac; '
        f'cp "{fakes}/$(echo "$last" | sed "s/=/_/; s/:/%3a/")_all.deb" .',
    )  # fmt: skip
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    packages.fetch(Path("new"))  # relative, as the default
    lines = asked.read_text().splitlines()
    assert f"-o Dir::State::Lists={tmp_path}/new/" in asked.read_text()  # never in the system's
    assert len(lines) == 8 + 2 * 2 and "pack @iconify/json@2.2.535" in lines
    assert sum(line.endswith("download openclipart-svg=1:0.18+dfsg-19") for line in lines) == 1
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == sorted(p.file_name for p in packages.PACKAGES)
    packages.fetch(tmp_path / "new")
    assert asked.read_text().splitlines() == lines
    (tmp_path / "new" / packages.MDI.file_name).write_text("something else")
    with pytest.raises(UserError, match="mdi-svg-7.4.47.tgz is not the package @mdi/svg@7.4.47: remove it"):
        packages.fetch(tmp_path / "new")


@pytest.mark.parametrize(
    "script, line",
    [
        (
            None,
            "npm is missing, which downloads @iconify/json@2.2.535: install it, or put iconify-json-2.2.535.tgz into",
        ),
        (
            "echo one; echo npm ERR! no network >&2; exit 1",
            "npm pack @iconify/json@2.2.535 failed: npm ERR! no network",
        ),
        ("echo x > iconify-json-2.2.535.tgz", "npm brought another file than the one known as @iconify/json@2.2.535"),
        ("true", "npm brought another file than the one known as @iconify/json@2.2.535"),
    ],
)
def test_a_download_that_fails_is_one_line_and_leaves_nothing(script, line, tmp_path, monkeypatch, capsys):
    programs = tmp_path / "programs"
    programs.mkdir()
    if script:
        program(programs, "npm", script)
    monkeypatch.setenv("PATH", str(programs))
    assert main(["--out", str(tmp_path / "data"), "--packages", str(tmp_path / "packages")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {line}") and error.count("\n") == 1
    assert not (tmp_path / "data").exists() and not list((tmp_path / "packages").iterdir())


INTERRUPTED = """
import os, sys, time
from benchmarks.harness.command import exit_code_of
from benchmarks.real_data import drawing

def draw(number):
    os.write(1, b"drawing\\n")  # at once: several processes write here
    time.sleep(0.005)

drawing.draw = draw
sys.exit(exit_code_of(lambda: len(list(drawing.draw_all(range(100_000), "drawing")))))
"""


def test_an_interrupt_ends_all_processes_that_draw():
    command = [sys.executable, "-c", INTERRUPTED]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout.readline() == "drawing\n"
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, error = process.communicate(timeout=60)  # the pipes end with the last process
    assert process.returncode == 130 and error.endswith("interrupted; what is finished is not run again\n")
    assert "Traceback" not in error
