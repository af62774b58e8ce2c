"""Scales tiny and real of the tables: every run trains a small model on this machine, and is scored and stored."""

import math
import shlex
import shutil
from dataclasses import asdict
from pathlib import Path

import torch

from open_clip_train_fastclip.errors import UserError
from open_clip_train_fastclip.loss.config import ALGORITHMS

from ..harness.records import circumstances
from .encoding import MODEL
from .local_data import data_of
from .run_log import final_temperature, final_u, read_log, read_results, samples_per_second, step_parts
from .store import DONE, FAILED, Store, key_of
from .table import Row, arguments_of
from .training_runs import MODULE, Run, train_all

LOGS = Path("runs", "tables")
WARMUP_SHARE = 0.05  # of all steps
# Defaults that were others when the first of the stored runs were made: a table's row that sets none has these. Rows
# that are kept for a user have today's, as a part of their settings, so that no older run is shown for them.
FIRST_DEFAULTS = {"--fastclip-eps": 1e-14}
COMMON = {  # a row's own flags win
    "--model": MODEL,
    "--wd": 0.1,
    "--workers": 0,  # loading in the training process is faster than a worker when every core trains
    "--precision": "fp32",
    "--device": "cpu",
    "--save-frequency": 0,
    "--log-every-n-steps": 20,
}


def settings_of(row: Row, seed: int) -> dict:
    """What a run's result depends on, and what is measured on the way; the same settings are the same run."""
    defaults = {"--fastclip-eps": ALGORITHMS[row.loss].eps} if row.loss in ALGORITHMS and row.kept else {}
    flags = {"--loss": row.loss} | defaults | row.local | row.flags
    of_row = {name: getattr(row, name) for name in ("batch", "ranks", "epochs", "curve")}
    common = " ".join(arguments_of(COMMON))
    return {"flags": flags, "common": common, "data": asdict(row.data), "seed": seed} | of_row


def flags_of(row: Row) -> dict:
    """The flags that a row's runs are trained with, but for those of data, length and seed."""
    return COMMON | row.local | row.flags


def has_device(row: Row) -> bool:
    """Whether this machine has what the row is trained on, a CPU or a GPU."""
    return flags_of(row)["--device"] == "cpu" or torch.cuda.is_available()


def by_key(rows: list[tuple[Row, int]]) -> dict[str, tuple[Row, int]]:
    """The runs of (row, seed), each once, though rows of several tables ask for it."""
    runs: dict[str, tuple[Row, int]] = {}
    for row, seed in rows:
        runs.setdefault(key_of(settings_of(row, seed)), (row, seed))
    return runs


def make_run(row: Row, seed: int, sha256: str) -> Run:
    """The training run of a row and seed on data with that hash."""
    data = data_of(row)
    steps = math.ceil(data.train_pairs / row.batch) * row.epochs
    logs, name = LOGS, f"{row.name}-seed{seed}-{key_of(settings_of(row, seed))}"
    if row.kept:
        logs, name = row.kept.runs, row.name
    evaluation = {}
    if row.curve:
        evaluation = {"--val-data": f"{data.folder}/val/{{00000..{data.val_shards - 1:05d}}}.tar"}
        evaluation |= {"--val-num-samples": data.val_pairs, "--val-frequency": 2}
    first_defaults = FIRST_DEFAULTS if row.loss in ALGORITHMS and not row.kept else {}
    arguments = [
        *arguments_of({"--loss": row.loss}),
        *arguments_of(COMMON),
        *arguments_of(evaluation | first_defaults | row.local | row.flags),
        *("--train-data", f"{data.folder}/train/{{00000..{data.train_shards - 1:05d}}}.tar"),
        *("--batch-size", str(row.batch // row.ranks), "--epochs", str(row.epochs), "--seed", str(seed)),
        *("--warmup", str(round(WARMUP_SHARE * steps)), "--logs", str(logs), "--name", name),
    ]
    if row.ranks > 1 and row.loss == "clip":
        arguments += ["--local-loss", "--gather-with-grad"]
    return Run(name, logs, arguments, sha256, row.batch, steps, row.epochs, row.ranks)


def _make_data(row: Row, store: Store) -> str:
    """Makes a row's data, returns their hash. Raises UserError if stored runs had other data of the same settings."""
    data = data_of(row)
    sha256 = data.make()["sha256"]
    for run in store.rows.values():
        of_run = run["settings"].get("data", {})
        if {name: of_run.get(name) for name in data.made_with} == data.made_with and run["data_sha256"] != sha256:
            raise UserError(
                f"{data.folder} differs from the data of the runs in {store.path}, as with other versions of the "
                "packages that draw them: install requirements.txt, or move that file away to run all anew"
            )
    return sha256


def run_all(wanted: list[tuple[Row, int]], store: Store, jobs: int) -> list[Run]:
    """Trains every (row, seed), `jobs` at a time, and stores each as it ends; last, alone, what needs the machine."""
    runs = {}
    for row, seed in wanted:
        run = make_run(row, seed, _make_data(row, store))
        runs[run.name] = run, row, seed

    def keep(run):
        _, row, seed = runs[run.name]
        store.add(result_of(run, row, seed))
        if not run.error and not row.kept:
            shutil.rmtree(run.folder)  # 50 MB; what matters is stored, and NAME.log stays

    alone = [run for run, *_ in runs.values() if run.ranks > 1 or "--profile" in run.arguments]
    others = [run for run, *_ in runs.values() if run not in alone]
    train_all(others, jobs, keep)
    train_all(alone, 1, keep)
    return others + alone


def result_of(run: Run, row: Row, seed: int) -> dict:
    """The line of results/runs.jsonl for a run that ended, well or not."""
    settings, data = settings_of(row, seed), data_of(row)
    minutes = run.record["minutes"]
    result = {
        "key": key_of(settings),
        "scale": data.scale,
        "name": run.name,
        "loss": row.loss,
        "settings": settings,
        "data_sha256": run.data,
        "train_pairs": data.train_pairs,
        "seconds": minutes and round(60 * minutes),
        **circumstances(MODULE, run.arguments),
        "command": shlex.join(["python", *run.command]),
    }
    if run.error:
        return result | {"status": FAILED, "error": run.error}
    log = read_log(run.folder)
    (checkpoint,) = (run.folder / "checkpoints").glob("epoch_*.pt")
    curve = [
        {"samples": evaluation["epoch"] * data.train_pairs}
        | {name: round(100 * evaluation[name], 2) for name in evaluation if name.endswith(("R@1", "R@5"))}
        for evaluation in read_results(run.folder)
    ]
    return result | {
        "status": DONE,
        **data.measure(checkpoint, flags_of(row)),
        "tau": round(final_temperature(log), 4),
        "u": final_u(log),
        "samples_per_second": round(samples_per_second(log)),
        "curve": curve,
        "step_time": step_parts(run.folder),
    }
