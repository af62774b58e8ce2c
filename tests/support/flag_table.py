"""The table of docs/flags.md, from the flags themselves; `python tests/support/flag_table.py` prints it."""

from open_clip_train_fastclip.openclip import released_flags
from open_clip_train_fastclip.openclip.flags import FLAGS


def rows() -> list[tuple[str, str, str]]:
    """(flag with its released spelling, meaning, default) of every flag that OpenCLIP does not have."""
    table = []
    for flag in (*FLAGS, *released_flags.FLAGS):
        names = [f"`{name}`" for name in (flag.name, released_flags.SPELLINGS.get(flag.name)) if name]
        table.append((", ".join(names), flag.meaning, flag.default_text))
    return table


def markdown() -> str:
    """The table."""
    lines = [("flag", "meaning", "default"), ("---", "---", "---"), *rows()]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


if __name__ == "__main__":
    print(markdown(), end="")
