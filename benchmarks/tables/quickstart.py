"""What make quickstart trains: OpenCLIP and FastCLIP, with the defaults of their flags and otherwise the same settings.

Of every character 16 pairs are held out, 2,400 in all, on which OpenCLIP evaluates after every epoch.
"""

from dataclasses import replace
from pathlib import Path

from open_clip_train_fastclip.loss.config import LOSSES

from ..experiments.table import Kept, Row, Table
from ..glyph_data.dataset import Settings

TRAINING = {"--lr": 5e-4, "--beta1": 0.9, "--beta2": 0.98, "--eps": 1e-6, "--val-frequency": 1}
FROZEN = {"--freeze-temperature": None, "--temperature": 0.07}


def rows(mismatched: float) -> tuple[Row, ...]:
    """The rows on data of which a share of the training captions, 0 to 1, is exchanged."""
    # The usual share has the plain names; others lie beside it, so that no table replaces another's.
    suffix = "" if mismatched == Settings.mismatched else f"-mismatched-{mismatched:g}"
    clip = Row(
        "clip", "OpenCLIP", "clip", local=TRAINING, data=Settings(mismatched=mismatched), curve=True, seeds=1,
        kept=Kept(Path("data", f"glyphs{suffix}"), Path("runs", f"quickstart{suffix}")),
    )  # fmt: skip
    return (
        clip,
        replace(clip, name="clip-frozen", label="OpenCLIP, temperature frozen", flags=FROZEN),
        *(replace(clip, name=loss, label=loss, loss=loss) for loss in LOSSES),
    )


TABLE = Table(
    "Quickstart",
    "OpenCLIP and FastCLIP with the defaults of their flags, one seed.",
    rows(Settings.mismatched),
    scales=("tiny",),
)
