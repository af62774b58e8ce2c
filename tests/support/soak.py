"""`make soak`: ends runs at random moments and resumes them; prints a table of what became of each.

python tests/support/soak.py [--kills 20] [--seed N]
"""

import argparse
import itertools
import random
import sys
import tempfile
from datetime import date
from pathlib import Path

from kills import HOW, RANKS, kill_and_resume, undisturbed

LOSSES = ("fastclip-v3", "fastclip-v2", "clip")


def main() -> int:
    parser = argparse.ArgumentParser(description="Kill short runs at random moments and resume them.")
    parser.add_argument("--kills", type=int, default=20, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6), help="of the moments (default: by chance)")
    args = parser.parse_args()
    if args.kills < 1:
        parser.error(f"--kills {args.kills}: give 1 or more")
    chance = random.Random(args.seed)
    failed = 0
    print(f"{args.kills} kills of runs of {RANKS} ranks, {date.today()}, --seed {args.seed}\n", flush=True)
    print("| | loss | killed | after | resumed from | final state |\n|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory(prefix="soak-") as name:
        references = {loss: undisturbed(Path(name, loss), loss) for loss in LOSSES}
        plan = itertools.islice(itertools.cycle(itertools.product(HOW, LOSSES)), args.kills)
        for number, (how, loss) in enumerate(plan):
            try:
                kill = kill_and_resume(references[loss], Path(name, f"kill-{number}"), how, chance)
            except AssertionError as error:
                print(f"kill {number + 1} ({loss}, {how}): {error}", file=sys.stderr)
                failed += 1
                continue
            failed += not kill.equal
            outcome = "equal" if kill.equal else "DIFFERENT"
            print(f"| {number + 1} | {loss} | {how} | {kill.after} s | {kill.resumed_from} | {outcome} |", flush=True)
    print(f"\n{args.kills - failed} of {args.kills} runs ended as the undisturbed one did.")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
