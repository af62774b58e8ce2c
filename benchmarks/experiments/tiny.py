"""Scale tiny of the tables: every run trains a small model on glyph data, on the CPUs of this machine."""

import math
import shlex
import shutil
from dataclasses import asdict
from pathlib import Path

from open_clip_train_fastclip.errors import UserError

from ..glyph_data import dataset
from ..harness.records import circumstances
from .glyph_scores import MODEL, REPORTED_SHARDS, floor, scores
from .run_log import final_temperature, read_log, read_results, samples_per_second, step_parts
from .store import DONE, FAILED, Store, key_of
from .table import Row, arguments_of
from .training_runs import MODULE, Run, train_all

LOGS = Path("runs", "tables")
WARMUP_SHARE = 0.05  # of all steps
# Loading in the training process is faster than a worker when every core trains.
COMMON = f"--model {MODEL} --wd 0.1 --workers 0 --precision fp32 --device cpu --save-frequency 0 --log-every-n-steps 20"


def settings_of(row: Row, seed: int) -> dict:
    """What a run's result depends on, and what is measured on the way; the same settings are the same run."""
    flags = {"--loss": row.loss} | row.tiny | row.flags
    of_row = {name: getattr(row, name) for name in ("batch", "ranks", "epochs", "curve")}
    return {"flags": flags, "common": COMMON, "data": asdict(row.data), "seed": seed} | of_row


def by_key(rows: list[tuple[Row, int]]) -> dict[str, tuple[Row, int]]:
    """The runs of (row, seed), each once, though rows of several tables ask for it."""
    runs: dict[str, tuple[Row, int]] = {}
    for row, seed in rows:
        runs.setdefault(key_of(settings_of(row, seed)), (row, seed))
    return runs


def data_folder(row: Row) -> Path:
    """Where the glyph data of a row are made."""
    return row.kept.data if row.kept else Path("data", f"tables-{key_of(asdict(row.data))}")


def make_run(row: Row, seed: int, sha256: str) -> Run:
    """The training run of a row and seed on data with that hash."""
    data, steps = data_folder(row), math.ceil(train_pairs(row.data) / row.batch) * row.epochs
    logs, name = LOGS, f"{row.name}-seed{seed}-{key_of(settings_of(row, seed))}"
    if row.kept:
        logs, name = row.kept.runs, row.name
    evaluation = {}
    if row.curve:
        pairs = row.data.characters * row.data.val_per_character * REPORTED_SHARDS // row.data.val_shards
        evaluation = {"--val-data": f"{data}/val/{{00000..{REPORTED_SHARDS - 1:05d}}}.tar"}
        evaluation |= {"--val-num-samples": pairs, "--val-frequency": 2}
    arguments = [
        *arguments_of({"--loss": row.loss}),
        *COMMON.split(),
        *arguments_of(evaluation | row.tiny | row.flags),
        *("--train-data", f"{data}/train/{{00000..{row.data.train_shards - 1:05d}}}.tar"),
        *("--batch-size", str(row.batch // row.ranks), "--epochs", str(row.epochs), "--seed", str(seed)),
        *("--warmup", str(round(WARMUP_SHARE * steps)), "--logs", str(logs), "--name", name),
    ]
    if row.ranks > 1 and row.loss == "clip":
        arguments += ["--local-loss", "--gather-with-grad"]
    return Run(name, logs, arguments, sha256, row.batch, steps, row.epochs, row.ranks)


def train_pairs(data: dataset.Settings) -> int:
    """Number of training pairs that dataset.make makes."""
    return sum(dataset.train_counts(data))


def _make_data(row: Row, store: Store) -> str:
    """Makes a row's data, returns their hash. Raises UserError if stored runs had other data of the same settings."""
    sha256 = dataset.make(data_folder(row), row.data)["sha256"]
    for run in store.rows.values():
        if run["scale"] == "tiny" and run["settings"]["data"] == asdict(row.data) and run["data_sha256"] != sha256:
            raise UserError(
                f"{data_folder(row)} differs from the data of the runs in {store.path}, as with another version of "
                "Pillow or matplotlib: install requirements.txt, or move that file away to run all anew"
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
    settings, info = settings_of(row, seed), dataset.make(data_folder(row), row.data)
    minutes = run.record["minutes"]
    result = {
        "key": key_of(settings),
        "scale": "tiny",
        "name": run.name,
        "loss": row.loss,
        "settings": settings,
        "data_sha256": info["sha256"],
        "train_pairs": info["train_pairs"],
        "seconds": minutes and round(60 * minutes),
        **circumstances(MODULE, run.arguments),
        "command": shlex.join(["python", *run.command]),
    }
    if run.error:
        return result | {"status": FAILED, "error": run.error}
    log = read_log(run.folder)
    (checkpoint,) = (run.folder / "checkpoints").glob("epoch_*.pt")
    curve = [
        {"samples": evaluation["epoch"] * info["train_pairs"]}
        | {name: round(100 * evaluation[name], 2) for name in evaluation if name.endswith(("R@1", "R@5"))}
        for evaluation in read_results(run.folder)
    ]
    return result | {
        "status": DONE,
        "scores": scores(checkpoint, data_folder(row)),
        "floor": floor(data_folder(row)),
        "tau": round(final_temperature(log), 4),
        "samples_per_second": round(samples_per_second(log)),
        "curve": curve,
        "step_time": step_parts(run.folder),
    }
