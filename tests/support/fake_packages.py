"""Packages of the same names and layout as the real ones, with a few drawings each."""

import hashlib
import io
import json
import random
import shutil
import subprocess
import tarfile
from dataclasses import replace

from benchmarks.real_data import packages, sources

RDF = (
    '<svg xmlns="http://www.w3.org/2000/svg" xmlns:c="c" xmlns:d="d" xmlns:r="r" width="90mm" height="90mm">'
    "<!-- drawn by hand --><c:Work><d:title>{title}</d:title><d:subject><r:Bag>{keywords}</r:Bag></d:subject></c:Work>"
    '<rect x="{x}" y="40" width="60" height="30" fill="#{colour}"/></svg>'
)
EMOJI = [
    {"label": "grinning face", "emoji": "😀", "tags": ["smile", "face"], "subgroup": 0},
    {
        "label": "waving hand", "emoji": "👋", "tags": ["hello"], "subgroup": 1,
        "skins": [{"label": "waving hand: dark skin tone", "emoji": "👋🏿"}],
    },
    {"label": "flag: Andorra", "emoji": "🇦🇩", "tags": ["AD"], "subgroup": 2},
    {"label": "regional indicator A", "emoji": "🇦", "tags": []},
]  # fmt: skip
OPENMOJI = [
    {"annotation": "grinning face", "tags": "other", "openmoji_tags": ""},
    {"annotation": "soldering-iron", "tags": "tool", "openmoji_tags": "maker, heat"},
]
ICONS = {  # of these sets; every other set has one icon, called after the set
    "openmoji": ["grinning-face", "waving-hand-dark-skin-tone", "soldering-iron"],
    "flag": ["ad-1x1", "ad-4x3", "zz-4x3"],
    "fluent-color": ["cube-16", "cube-20"],
    "healthicons": ["baby", "baby-negative", "baby-24px"],
    "tabler": ["bell", "bell-filled"],
    "ph": ["cube", "cube-thin", "cube-fill"],
    "mdi": ["ab-testing"],
    "fa7-solid": ["car"],
    "lucide": ["apple"],
}


def _squares(seed):
    """Ten of the sixteen squares of a board, in random colours: no two boards are alike."""
    chance = random.Random(seed)
    return "".join(
        f'<path d="M{place % 4 * 4} {place // 4 * 4}h4v4h-4z" fill="#{chance.randrange(1 << 24):06x}"/>'
        for place in chance.sample(range(16), 10)
    )


def _iconify():
    files = {"package/collections.json": {}}
    for name in (*sources.COLOUR, *sources.ONE_COLOUR):
        icons = {}
        for icon in ICONS.get(name, [f"{name}-thing"]):
            icons[icon] = {"body": _squares(f"{name}/{icon}")}
        icons["old"] = {"body": _squares("old"), "hidden": True}
        files[f"package/json/{name}.json"] = {"icons": icons, "width": 16, "height": 16}
        about = {"name": name.title(), "author": {"name": f"those of {name}"}, "license": {"title": "MIT"}}
        files["package/collections.json"][name] = about
    return files


def _npm():
    messages = {"subgroups": [{"order": n, "key": key} for n, key in enumerate(("face", "hand", "country-flag"))]}
    phosphor = 'export const icons = [{\n name: "cube",\n pascal: "Cube",\n tags: ["*new*", "box", "3D"],\n}]'
    return {
        packages.ICONIFY: _iconify(),
        packages.EMOJIBASE: {"package/en/data.json": EMOJI, "package/en/messages.json": messages},
        packages.OPENMOJI: {"package/data/openmoji.json": OPENMOJI},
        packages.LUCIDE: {"package/tags.json": {"apple": ["fruit", "food"]}},
        packages.TABLER: {"package/icons.json": {"bell": {"tags": ["alarm", 7]}}},
        packages.MDI: {"package/meta.json": [{"name": "ab-testing", "aliases": ["ab_test"]}]},
        packages.PHOSPHOR: {"package/dist/index.mjs": phosphor},
        packages.FONT_AWESOME: {
            "package/metadata/icon-families.json": {"car": {"label": "Car", "search": {"terms": ["auto"]}}}
        },
    }


def _clip_art():
    def drawing(title, words, x, colour):
        keywords = "".join(f"<r:li>{word}</r:li>" for word in words)
        return RDF.format(title=title, keywords=keywords, x=x, colour=colour).encode()

    files = {f"series/car_{n}.svg": drawing("Road signs", ["hash", "road"], n, f"00{n}0ff") for n in range(1, 7)}
    files["animals/duck.svg"] = drawing("Clipart by Jo - Yellow  duck", ["bird", "hash"], 10, "ffff00")
    files["star.svg"] = drawing("gramastar", [], 10, "ff0000")
    files["blank.svg"] = drawing("Nothing", [], 10, "ffffff")
    files["plain.svg"] = b'<svg xmlns="http://www.w3.org/2000/svg"><rect width="9" height="9"/></svg>'
    return {f"usr/share/openclipart/svg/{name}": content for name, content in files.items()}


def _stamps(photo):
    png = io.BytesIO()
    photo.save(png, "PNG")
    files = {"a/pepper.png": png.getvalue(), "a/pepper.txt": b"A yellow  pepper.\nde.utf8=Eine Paprika.\n"}
    files |= {"a/silent.png": png.getvalue(), "a/silent.txt": b"\n", "a/lonely.txt": b"No picture.\n"}
    return {f"usr/share/tuxpaint/stamps/{name}": content for name, content in files.items()}


def _write_npm(path, files):
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            data = (content if isinstance(content, str) else json.dumps(content)).encode()
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))


def _write_debian(path, files, scratch):
    (scratch / "DEBIAN").mkdir(parents=True)
    control = "Package: fake\nVersion: 1\nArchitecture: all\nMaintainer: nobody <nobody@localhost>\nDescription: fake\n"
    (scratch / "DEBIAN" / "control").write_text(control)
    for name, content in files.items():
        (scratch / name).parent.mkdir(parents=True, exist_ok=True)
        (scratch / name).write_bytes(content)
    subprocess.run(["dpkg-deb", "--build", scratch, path], check=True, capture_output=True)
    shutil.rmtree(scratch)


def write(folder, photo):
    """Writes every package to `folder`; returns them with the hashes that they now have, by the names in packages."""
    folder.mkdir(parents=True)
    for package, files in _npm().items():
        _write_npm(folder / package.file_name, files)
    _write_debian(folder / packages.OPENCLIPART.file_name, _clip_art(), folder / "scratch")
    _write_debian(folder / packages.TUXPAINT.file_name, _stamps(photo), folder / "scratch")
    return [
        replace(package, sha256=hashlib.sha256((folder / package.file_name).read_bytes()).hexdigest())
        for package in packages.PACKAGES
    ]
