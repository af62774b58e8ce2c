"""What a run of the training command line leaves in its folder, as figures."""

import json
import re
import statistics
from pathlib import Path

from open_clip_train_fastclip.training.profiling import FOLDER

from ..harness.trace_times import read_trace, step_times

TRAIN_LINE = re.compile(
    r"Train Epoch: (?P<epoch>\d+) \[\s*(?P<done>\d+)/(?P<total>\d+) .*?Batch \(t\): (?P<seconds>[\d.]+),"
)
LOGIT_SCALE = re.compile(r"Logit Scale: ([\d.]+)")
FASTCLIP_TAU = re.compile(r"FastCLIP Epoch: .*?\btau: ([\d.e+-]+)")
U_FIGURES = ("log_u_mean", "log_u_std", "u_lag")
FASTCLIP_U = re.compile(r"FastCLIP Epoch: (\d+) .*?log_u_mean: (\S+) log_u_std: (\S+) u_lag: (\S+)")


def read_results(folder: Path) -> list[dict]:
    """The validation metrics of a run, one dict an epoch (recall as a share); empty before the first."""
    path = folder / "checkpoints" / "results.jsonl"
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]  # not one half written


def read_log(folder: Path) -> str:
    """out.log of a run; empty before it exists."""
    path = folder / "out.log"
    return path.read_text(errors="replace") if path.is_file() else ""


def samples_done(log: str) -> int:
    """Training pairs seen so far, over all epochs, to the last line that says so."""
    lines = list(TRAIN_LINE.finditer(log))
    return int(lines[-1]["epoch"]) * int(lines[-1]["total"]) + int(lines[-1]["done"]) if lines else 0


def samples_per_second(log: str) -> float:
    """Training pairs a second over the whole run, validation left out."""
    pairs, seconds, batch, before = 0, 0.0, 0, (-1, 0)
    for line in TRAIN_LINE.finditer(log):
        epoch, done = int(line["epoch"]), int(line["done"])
        new = done - (before[1] if before[0] == epoch else 0)
        batch = batch or new  # the first line comes after the first batch
        pairs, seconds = pairs + new, seconds + new / batch * float(line["seconds"])
        before = epoch, done
    return pairs / seconds if seconds else 0.0


def final_temperature(log: str) -> float:
    """tau at the end of the run: FastCLIP's own figure, else the inverse of OpenCLIP's logit scale."""
    if taus := FASTCLIP_TAU.findall(log):
        return float(taus[-1])
    return 1 / float(LOGIT_SCALE.findall(log)[-1])


def final_u(log: str) -> dict[str, float]:
    """log_u_mean, log_u_std and u_lag, means over the log lines of the last epoch; empty without FastCLIP's."""
    lines = FASTCLIP_U.findall(log)
    last = [map(float, figures) for epoch, *figures in lines if epoch == lines[-1][0]]
    return {name: round(statistics.fmean(of), 2) for name, of in zip(U_FIGURES, zip(*last, strict=True), strict=False)}


def step_parts(folder: Path) -> dict[str, float]:
    """Milliseconds of a step by part, mean over the ranks; empty for a run without --profile."""
    ranks = [step_times(read_trace(path)) for path in sorted((folder / FOLDER).glob("rank-*.json.gz"))]
    names = [name for name, value in (ranks or [{}])[0].items() if isinstance(value, float)]
    return {name: round(statistics.fmean(times[name] for times in ranks), 3) for name in names}


def last_line(text: str) -> str:
    """The last line of a log that says something."""
    lines = [line.strip() for line in text.replace("\r", "\n").splitlines() if line.strip()]
    return lines[-1] if lines else "no output"


def read_settings(folder: Path) -> dict[str, str]:
    """The flags of a run as its params.txt shows them, by name; empty if there is none."""
    path = folder / "params.txt"
    lines = path.read_text(errors="surrogateescape").splitlines() if path.is_file() else []
    return dict(line.split(": ", 1) for line in lines if ": " in line)
