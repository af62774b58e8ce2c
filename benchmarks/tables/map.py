"""Where does the global loss help? Scale tiny, one seed a point, with the settings that were tuned at 30% wrong.

OpenCLIP also runs with another learning rate and, on clean pairs, fastclip-v3 with another rho, so that neither is held
back by what was tuned on other data.
"""

from dataclasses import replace

from ..experiments.table import NOISY, Comparison, Table
from .memory import NO_MEMORY
from .scaling import at
from .settings import CLIP, FROZEN, V1, V3

# The rate that was best at 30% wrong need not be the best elsewhere.
FASTER = replace(CLIP, name="clip-faster", label="OpenCLIP, twice the lr", local=CLIP.local | {"--lr": 5e-4})
# A larger rho lets tau fall farther, as OpenCLIP's does on clean pairs.
RHO = replace(V3, name="v3-rho", label="fastclip-v3, rho 3.5", local=V3.local | {"--fastclip-rho": 3.5}, curve=False)
CLIPS = (CLIP, FASTER, FROZEN)
ALL = (*CLIPS, NO_MEMORY, V1, V3)
CLEAN = replace(NOISY, mismatched=0.0)
# 30 characters in 150 looks each: a pair has many others that differ from it in one word
ALIKE = replace(NOISY, characters=30, train_per_character=150, val_per_character=100)
# 260 of a character's 288 looks, the largest data that 150 characters give with the usual held-out pairs
LARGE = replace(NOISY, train_per_character=260)
REGIMES = {
    "wrong0": ("0% wrong", CLEAN, (*CLIPS, NO_MEMORY, V1, RHO, V3)),
    "wrong15": ("15% wrong", replace(NOISY, mismatched=0.15), ALL),
    "wrong30": ("30% wrong", NOISY, ALL),
    "wrong50": ("50% wrong", replace(NOISY, mismatched=0.5), ALL),
    "partial": ("0% wrong, every second caption partial", replace(CLEAN, partial=0.5), (*CLIPS, RHO, V3)),
    "tail": ("0% wrong, long-tailed characters", replace(CLEAN, long_tail=0.5), (*CLIPS, RHO, V3)),
    "alike0": ("0% wrong, near-duplicates", replace(ALIKE, mismatched=0.0), (*CLIPS, RHO, V3)),
    "alike30": ("30% wrong, near-duplicates", ALIKE, (*CLIPS, V3)),
    "batch16": ("30% wrong, batch 16", NOISY, (*CLIPS, NO_MEMORY, V3)),
    "batch64": ("30% wrong, batch 64", NOISY, (*CLIPS, NO_MEMORY, V3)),
    "batch128": ("30% wrong, batch 128", NOISY, (*CLIPS, NO_MEMORY, V3)),
    "batch256": ("30% wrong, batch 256", NOISY, (*CLIPS, NO_MEMORY, V3)),
    "pairs9000": ("30% wrong, 9,000 pairs", replace(NOISY, train_per_character=60), (*CLIPS, V3)),
    "pairs39000": ("30% wrong, 39,000 pairs", LARGE, (*CLIPS, V3)),
    "clean39000": ("0% wrong, 39,000 pairs", replace(LARGE, mismatched=0.0), (*CLIPS, RHO, V3)),
}


def _row(regime, row):
    label, data, _ = REGIMES[regime]
    # several seeds of what other tables have as well, and of the gap at batches that the scaling table does not have
    more = {"wrong30": (CLIP, FROZEN, NO_MEMORY, V1, V3), "batch16": (CLIP, V3), "batch64": (CLIP, V3)}
    seeds = row.seeds if row in more.get(regime, ()) else 1
    named = {"name": f"{row.name}-{regime}", "label": f"{label}: {row.label}", "data": data, "seeds": seeds}
    if regime.startswith("batch"):
        row = at(row, int(regime.removeprefix("batch")), 1, None)
    return replace(row, **named, curve=data == NOISY and row.curve)


ROWS = {regime: [_row(regime, row) for row in rows] for regime, (_, _, rows) in REGIMES.items()}
TABLE = Table(
    "Map of regimes",
    "OpenCLIP and the global loss over the share of wrong captions, partial captions, long-tailed characters, "
    "near-duplicates (30 characters in 150 looks each), batch and size of the data.",
    tuple(row for rows in ROWS.values() for row in rows),
    tuple(Comparison(row.name, rows[-1].name) for rows in ROWS.values() for row in rows if row.loss == "clip"),
    scales=("tiny",),
    notes="With wrong captions FastCLIP is ahead of every OpenCLIP row at batches of up to 64, in points most "
    "with 39,000 pairs (+18.5 over the best OpenCLIP row) and least at half of the captions wrong, where all are "
    "poor. It is ahead too where many pairs are nearly alike (+5.5 on clean, +13.7 on noisy captions) or every "
    "second caption is partial (+3.9). On the usual 4,500 clean pairs OpenCLIP at the better of its rates, v1 and "
    "v3 are level, and v1 without memory is behind. OpenCLIP is ahead with long-tailed characters (37.4 against "
    "34.3 at the larger rho), and far ahead on 39,000 clean pairs: 78.2, and 84.6 with a frozen temperature, "
    "against v3's 58.3 and 68.8. There its task in the batch is all but solved, and it may give all of its "
    "gradient to the few pairs that are not. At batches of 128 and 256 v3 with gamma 0.2 is level or behind, and "
    "v1 without memory ahead of the best OpenCLIP row by 5.9 and 2.5: what loses there is a memory of 12 visits. "
    "So the global loss helps where captions are wrong or vague or pairs nearly alike, and not where the right "
    "pair is easily told from the rest of the batch. One seed but where a deviation is shown; OpenCLIP's own "
    "scores move by up to two points, since its shuffle is unseeded. rho, temperatures and rates were tuned at 30% "
    "wrong, batch 32; elsewhere OpenCLIP has one more rate and v3, on clean pairs, one more rho.",
)
