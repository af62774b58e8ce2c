"""What make quickstart trains: OpenCLIP and FastCLIP, with the defaults of their flags and otherwise the same settings.

Of every character 16 glyph pairs are held out, 2,400 in all, of the real ones 2,000; OpenCLIP evaluates on them after
every epoch.
"""

from dataclasses import replace
from pathlib import Path

from open_clip_train_fastclip.loss.config import LOSSES

from ..experiments.real_pairs import RealPairs
from ..experiments.table import Kept, Row, Table
from ..glyph_data.dataset import Settings

TRAINING = {"--lr": 5e-4, "--beta1": 0.9, "--beta2": 0.98, "--eps": 1e-6, "--val-frequency": 1}
FROZEN = {"--freeze-temperature": None, "--temperature": 0.07}


def kept(data: Settings | RealPairs) -> Kept:
    """Where data and runs are kept: every kind of data and share of wrong captions beside the usual one's."""
    if isinstance(data, RealPairs):
        return Kept(data.folder, Path("runs", "quickstart-real"))
    suffix = "" if data == Settings() else f"-mismatched-{data.mismatched:g}"
    return Kept(Path("data", f"glyphs{suffix}"), Path("runs", f"quickstart{suffix}"))


def rows(data: Settings | RealPairs) -> tuple[Row, ...]:
    """The rows on these data."""
    clip = Row("clip", "OpenCLIP", "clip", local=TRAINING, data=data, curve=True, seeds=1, kept=kept(data))
    return (
        clip,
        replace(clip, name="clip-frozen", label="OpenCLIP, temperature frozen", flags=FROZEN),
        *(replace(clip, name=loss, label=loss, loss=loss) for loss in LOSSES),
    )


TABLE = Table(
    "Quickstart",
    "OpenCLIP and FastCLIP with the defaults of their flags, one seed.",
    rows(Settings()),
    scales=("tiny",),
)
