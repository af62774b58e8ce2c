"""The words that the packages give a picture: names, keywords and search terms, and an emoji's theme."""

import json
import re
from pathlib import Path
from typing import NamedTuple

from . import packages

KEYWORDS = 6  # at most; ViT-Glyph-32's tokenizer keeps 22 tokens
REGIONAL_A = 0x1F1E6  # Unicode's regional indicator A; a flag's emoji is two of them
NOT_A_WORD = ("", "new")  # Phosphor marks its newest icons so


def caption(name: str, keywords: list[str] | tuple[str, ...] = ()) -> str:
    """`name: keyword, keyword, ...` in lower case, with spaces for hyphens in the name; no keyword twice."""
    name = re.sub(r"[\s_-]+", " ", name).strip().lower()
    words = (re.sub(r"[\s_]+", " ", word).strip(" *").lower() for word in keywords)
    kept = [word for word in dict.fromkeys(words) if word not in (name, *NOT_A_WORD)]
    return f"{name}: {', '.join(kept[:KEYWORDS])}" if kept else name


def slug(text: str) -> str:
    """Letters and digits in lower case with hyphens between: how Iconify names an emoji by its Unicode name."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


class Known(NamedTuple):
    """What is known of an icon beyond its name in its set."""

    name: str
    keywords: list[str]
    theme: str | None = None  # Unicode's subgroup of an emoji, as "animal-mammal"


class Emoji(NamedTuple):
    """All emoji, found by slug or, flags, by the two letters of their region."""

    by_slug: dict[str, Known]
    by_region: dict[str, Known]
    theme_names: dict[str, list[str]]  # theme -> names of its emoji, without those in other skin tones


def read_emoji(folder: Path) -> Emoji:
    """Unicode's names, keywords and subgroups, and OpenMoji's of what is in no standard."""
    files = {"package/en/data.json", "package/en/messages.json"}
    data = {name: json.loads(text) for name, text in packages.members(folder, packages.EMOJIBASE, files.__contains__)}
    themes = {group["order"]: group["key"] for group in data["package/en/messages.json"]["subgroups"]}
    found = Emoji({}, {}, {})
    for entry in data["package/en/data.json"]:
        theme = themes.get(entry.get("subgroup"))
        if theme:
            found.theme_names.setdefault(theme, []).append(entry["label"])
        for one in (entry, *entry.get("skins", [])):
            found.by_slug[slug(one["label"])] = Known(one["label"], entry.get("tags", []), theme)
        letters = [ord(sign) - REGIONAL_A for sign in entry["emoji"]]
        if len(letters) == 2 and all(0 <= letter < 26 for letter in letters):
            region = "".join(chr(ord("a") + letter) for letter in letters)
            found.by_region[region] = Known(entry["label"], entry.get("tags", []), theme)
    path = "package/data/openmoji.json"
    ((_, text),) = packages.members(folder, packages.OPENMOJI, path.__eq__)
    for entry in json.loads(text):
        tags = [tag.strip() for tag in f"{entry['tags']}, {entry['openmoji_tags']}".split(",") if tag.strip()]
        found.by_slug.setdefault(slug(entry["annotation"]), Known(entry["annotation"], tags))
    return found


def read_search_terms(folder: Path) -> dict[str, dict[str, Known]]:
    """Icon set -> icon -> its name and search terms, for the sets that ship them in packages of their own."""

    def read(package, path):
        ((_, content),) = packages.members(folder, package, path.__eq__)
        return content.decode()

    lucide = json.loads(read(packages.LUCIDE, "package/tags.json"))
    tabler = json.loads(read(packages.TABLER, "package/icons.json"))
    mdi = json.loads(read(packages.MDI, "package/meta.json"))
    awesome = json.loads(read(packages.FONT_AWESOME, "package/metadata/icon-families.json"))
    phosphor = re.finditer(
        r'name: "([^"]+)",.*?\n\s+tags: \[(.*?)\]', read(packages.PHOSPHOR, "package/dist/index.mjs"), re.DOTALL
    )
    return {
        "lucide": {name: Known(name, tags) for name, tags in lucide.items()},
        "tabler": {name: Known(name, [str(tag) for tag in about["tags"]]) for name, about in tabler.items()},
        "mdi": {about["name"]: Known(about["name"], about["aliases"]) for about in mdi},
        "fa7-solid": {name: Known(about["label"], about["search"]["terms"]) for name, about in awesome.items()},
        "ph": {found[1]: Known(found[1], re.findall(r'"([^"]+)"', found[2])) for found in phosphor},
    }
