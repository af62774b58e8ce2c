"""Which drawings are taken from the packages, and what each is called.

Left out: sets of icons under the GPL or licences that forbid commercial use, logos, the same picture in several sizes
or weights of a line, and 1,375 generated stars.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

from . import packages
from .captions import Emoji, Known, caption, read_search_terms, slug

COLOUR = (
    "openmoji", "twemoji", "noto", "noto-v1", "fluent-emoji", "fluent-emoji-flat", "emojione", "emojione-v1", "fxemoji",
    "streamline-emojis", "streamline-color", "streamline-plump-color", "streamline-freehand-color",
    "streamline-ultimate-color", "streamline-flex-color", "streamline-sharp-color", "streamline-kameleon-color",
    "streamline-stickies-color", "streamline-cyber-color", "icon-park", "fluent-color", "glyphs-poly", "marketeq",
    "meteocons", "flat-color-icons", "flat-ui", "flag", "circle-flags", "cif", "flagpack",
)  # fmt: skip
ONE_COLOUR = (
    "game-icons", "healthicons", "pinhead", "emojione-monotone", "fluent-emoji-high-contrast", "streamline",
    "streamline-ultimate", "streamline-freehand", "streamline-pixel", "maki", "temaki", "roentgen", "osmic", "map",
    "medical-icon", "covid", "guidance", "memory", "dinkie-icons", "lucide", "tabler", "mdi", "ph", "fa7-solid",
)  # fmt: skip
EMOJI_SETS = (*COLOUR[:10], "emojione-monotone", "fluent-emoji-high-contrast")
FLAG_SETS = ("flag", "circle-flags", "cif", "flagpack")
PHOSPHOR_LINES = ("thin", "light", "bold")  # the regular line, the filled and the two-tone drawing are taken
CLIP_ART, STAMPS = "openclipart", "tuxpaint"
VIEW_BOX = {"left": 0, "top": 0, "width": 16, "height": 16}  # Iconify's defaults
SERIES = 5  # more drawings with one title: it names their series, and the file's name the drawing
DULL = ("hash", "unsorted", "theme", "icons", "icon", "computer")  # keywords of the archive, not of the drawing

LICENCE_FIELDS = (("author", "name"), ("license", "title"), ("author", "url"))  # of Iconify's list of sets
OTHER_LICENCES = (
    ("Open Clip Art Library 0.18 (openclipart)", "its contributors, named in the drawings", "public domain", "Debian"),
    ("Tux Paint stamps (tuxpaint)", "its contributors", "GPL-2", "Debian"),
    ("names and keywords of emoji", "Unicode CLDR through emojibase", "MIT, Unicode licence", "emojibase-data"),
    ("keywords of emoji", "OpenMoji", "CC BY-SA 4.0", "openmoji"),
    ("search terms of lucide, tabler, mdi, ph", "the sets' authors", "ISC, MIT, Apache 2.0, MIT", "npm"),
    ("search terms of fa7-solid", "Font Awesome", "CC BY 4.0", "npm"),
)


class Drawing(NamedTuple):
    """One drawing before it is drawn."""

    collection: str
    caption: str
    theme: str | None  # of an emoji
    content: bytes
    suffix: str  # of `content`: ".svg" or ".png"


def icons(folder: Path, collections: tuple[str, ...], emoji: Emoji) -> Iterator[Drawing]:
    """The icons of these sets of Iconify, set by set."""
    wanted = {f"package/json/{collection}.json" for collection in collections}
    found = {Path(path).stem: text for path, text in packages.members(folder, packages.ICONIFY, wanted.__contains__)}
    terms = read_search_terms(folder) | dict.fromkeys(EMOJI_SETS, emoji.by_slug)
    for collection in collections:
        data, taken = json.loads(found[collection]), set()
        for name, icon in data["icons"].items():
            about = None if icon.get("hidden") else _about(collection, name, terms.get(collection, {}), emoji)
            if about is None or (collection == "fluent-color" and about.name in taken):
                continue
            taken.add(about.name)
            svg = _svg(data | icon)
            yield Drawing(collection, caption(about.name, about.keywords), about.theme, svg, ".svg")


def _about(collection: str, name: str, terms: dict[str, Known], emoji: Emoji) -> Known | None:
    """What an icon is called; None for one that is left out."""
    if collection in FLAG_SETS:
        # By their region's two letters, alone or as ad-4x3; the square ad-1x1 shows the same and is not found.
        return emoji.by_region.get(name.removesuffix("-4x3"))
    if collection == "fluent-color":  # every drawing at several sizes: cube-16, cube-20, ...
        return Known(re.sub(r"-\d+$", "", name), [])
    if collection == "healthicons" and ("24px" in name or "negative" in name):
        return None
    if collection == "tabler":
        return Known(name, terms[base].keywords if (base := name.removesuffix("-filled")) in terms else [])
    if collection == "ph":
        base, line = re.fullmatch(r"(.+?)(?:-(thin|light|bold|fill|duotone))?", name).groups()
        if line in PHOSPHOR_LINES:
            return None
        return Known(f"{base} {line or ''}", terms[base].keywords if base in terms else [])
    return terms.get(name) or terms.get(slug(name)) or Known(name, [])


def _svg(icon: dict) -> bytes:
    """An icon of Iconify as a file."""
    left, top, width, height = (icon.get(key, usual) for key, usual in VIEW_BOX.items())
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" color="#000000" '
        f'viewBox="{left} {top} {width} {height}" width="{width}" height="{height}">{icon["body"]}</svg>'
    ).encode()


def clip_art(folder: Path) -> Iterator[Drawing]:
    """The Open Clip Art Library by path, with titles and keywords from the drawings' own metadata."""
    prefix = "./usr/share/openclipart/svg/"
    files = packages.members(folder, packages.OPENCLIPART, re.compile(rf"{prefix}.+\.svg").fullmatch)
    found = [(path.removeprefix(prefix), content, *_metadata(content)) for path, content in sorted(files)]
    titles = Counter(title for *_, title, _ in found)
    for path, content, title, keywords in found:
        if title == "gramastar":
            continue
        name = re.sub(r"^Clipart by [^-]+ - ", "", title).strip()
        if not name or titles[title] > SERIES:
            name = Path(path).stem
        words = [word for word in keywords if word not in DULL]
        yield Drawing(CLIP_ART, caption(name, words), None, content, ".svg")


def _metadata(svg: bytes) -> tuple[str, list[str]]:
    """Title and keywords of a drawing in the RDF that Inkscape writes; empty where there are none."""
    work = next((element for element in ElementTree.fromstring(svg).iter() if _tag(element) == "Work"), None)
    title, keywords = "", []
    for element in () if work is None else work:
        if _tag(element) == "title":
            title = _text(element)
        elif _tag(element) == "subject":
            keywords = [_text(item) for item in element.iter() if _tag(item) == "li" and _text(item)]
    return title, keywords


def _tag(element) -> str:
    return element.tag.split("}")[-1] if isinstance(element.tag, str) else ""  # a comment has a function for a tag


def _text(element) -> str:
    return _one_line("".join(element.itertext()))


def _one_line(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()


def stamps(folder: Path) -> Iterator[Drawing]:
    """Tux Paint's stamps by path, photographs among them, each with its English sentence."""
    prefix = "./usr/share/tuxpaint/stamps/"
    files = packages.members(folder, packages.TUXPAINT, re.compile(rf"{prefix}.+\.(txt|svg|png)").fullmatch)
    found = dict(files)
    for path in sorted(path for path in found if path.endswith(".txt")):
        sentence = _one_line(found[path].decode(errors="replace").splitlines()[0])  # the others are translations
        for suffix in (".svg", ".png"):
            drawing = path.removesuffix(".txt") + suffix
            if sentence and drawing in found:
                yield Drawing(STAMPS, sentence, None, found[drawing], suffix)
                break


def licences(folder: Path, collections: tuple[str, ...]) -> list[tuple[str, str, str, str]]:
    """(what, by whom, licence, where) of these sets of icons, and of all else that is taken."""
    path = "package/collections.json"
    ((_, text),) = packages.members(folder, packages.ICONIFY, path.__eq__)
    about = {name: of for name, of in json.loads(text).items() if name in collections}
    rows = [
        (f"{about[name]['name']} ({name})", *(about[name][key].get(of, "") for key, of in LICENCE_FIELDS))
        for name in collections
    ]
    return [*rows, *OTHER_LICENCES]
