"""What eps, the weight of the right pair in its own denominator, and gamma do to fastclip-v1 and v3, by kind of data.

With gamma 1 and eps 1/(B-1) fastclip-v1 is OpenCLIP's loss at a constant temperature. All settings are the flags'
defaults at 32 pairs and 12 epochs, where gamma is 0.69, but for what a row says.
"""

from ..experiments.real_pairs import TENTH
from ..experiments.table import Comparison, Row, Table
from .map import REGIMES

DATA = {  # the name: what is said of it, data, training pairs
    "many": ("39,000 clean glyphs", REGIMES["clean39000"][1], 39_000),
    "real": ("10,086 real pairs", TENTH, 10_086),
    "noisy": ("4,500 glyphs, 30% wrong", REGIMES["wrong30"][1], 4_500),
    "clean": ("4,500 clean glyphs", REGIMES["wrong0"][1], 4_500),
}
FROZEN = {"--lr": 5e-4, "--temperature": 0.07}
SETTINGS = {
    "fastclip-v1": {"--lr": 5e-4, "--fastclip-temperature": 0.07},
    "fastclip-v3": {"--lr": 5e-4, "--fastclip-rho": 3.22},
}
GAMMAS = {"": {}, ", gamma 1": {"--fastclip-gamma": 1.0}}
EPS = {"1/(B-1)": lambda pairs: 1 / 31, "0.001": lambda pairs: 1e-3, "1/N": lambda pairs: 1 / pairs}  # to three digits


def _rows(name):
    said, data, pairs = DATA[name]
    # curve: v1 and v3 with the defaults are rows of the table real too, and then one run serves both.
    common = {"data": data, "seeds": 1, "curve": name == "real", "scales": ("real" if name == "real" else "tiny",)}
    label, frozen = f"{said}: OpenCLIP, temperature frozen at 0.07", {"--freeze-temperature": None}
    yield Row(f"eps-{name}-clip-frozen", label, "clip", frozen, local=FROZEN, **common)
    for loss, settings in SETTINGS.items():
        for gamma_said, gamma in GAMMAS.items():
            for eps_said in ("", *EPS):
                eps = {"--fastclip-eps": float(f"{EPS[eps_said](pairs):.3g}")} if eps_said else {}
                yield Row(
                    _name(name, loss, gamma_said, eps_said),
                    f"{said}: {loss}{gamma_said}{eps_said and f', eps {eps_said}'}",
                    loss, gamma | eps, local=settings, **common,
                )  # fmt: skip


def _name(data, loss, gamma, eps):
    words = f"eps {data} {loss} {gamma} {eps}"
    return "-".join("".join(letter if letter.isalnum() or letter == "." else " " for letter in words).split())


def _comparisons(name):
    for loss in SETTINGS:
        for gamma in GAMMAS:
            for eps in EPS:
                yield Comparison(_name(name, loss, gamma, ""), _name(name, loss, gamma, eps))


TABLE = Table(
    "eps and gamma",
    "Does an anchor that fades once its pair is solved, as in OpenCLIP's loss, do better, and on which data?",
    tuple(row for name in DATA for row in _rows(name)),
    tuple(comparison for name in DATA for comparison in _comparisons(name)),
    scales=("tiny", "real"),
)
