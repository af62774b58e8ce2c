"""Scales medium, large and xlarge of the tables: the recipes of scripts/slurm, on a cluster or on this machine's GPUs.

A finished run is one whose folder in $LOGS (default: logs) holds the last epoch's checkpoint.
"""

import os
import re
import shlex
import shutil
import subprocess
from datetime import datetime, timezone
from pathlib import Path

import torch

from open_clip_train_fastclip.errors import UserError

from ..harness.records import circumstances
from .run_log import final_temperature, last_line, read_log, read_results, samples_per_second, step_parts
from .store import DONE, FAILED, Store, key_of
from .table import Row, arguments_of
from .training_runs import MODULE, Run, train_all

SLURM = Path(__file__).parents[2] / "scripts" / "slurm"
SCRIPT = "scripts/slurm/fastclip_32gpu.sh"
RECIPES = {"medium": "medium_cc3m", "large": "large_cc12m", "xlarge": "xlarge_laion400m"}
PUBLISHED_NODES = {"medium": 2, "large": 2, "xlarge": 4}
GPUS_A_NODE = 4
FIRST_SEED = 2024  # of the published runs


def recipe_flags(scale: str, loss: str) -> dict[str, str | None]:
    """The flags of a scale's recipe for a loss, $DATA left as it is."""
    flags, section = {}, None
    for line in (SLURM / "recipes" / f"{RECIPES[scale]}.args").read_text().splitlines():
        if line.startswith("["):
            section = line[1:-1]
        elif line.startswith("--") and section in (None, loss):
            flag, _, value = line.partition(" ")
            flags[flag] = value or None
    return flags


def logs() -> Path:
    """Folder of all runs, as the batch scripts know it."""
    return Path(os.environ.get("LOGS", "logs"))


class Job:
    """One run of a row at a scale, on the cluster's nodes or with the same global batch on GPUs of this machine."""

    def __init__(self, row: Row, scale: str, seed: int):
        self.row, self.scale, self.seed = row, scale, FIRST_SEED + seed
        self.nodes = row.nodes or PUBLISHED_NODES[scale]
        self.recipe = recipe_flags(scale, row.loss)
        self.batch = int(self.recipe["--batch-size"]) * GPUS_A_NODE * self.nodes
        self.flags = row.flags | row.larger
        self.epochs = int(self.flags.get("--stop-epochs", self.recipe["--epochs"]))
        flags = {"--loss": row.loss} | self.recipe | self.flags
        self.settings = {"scale": scale, "flags": flags, "seed": self.seed, "batch": self.batch}
        self.key = key_of(self.settings)
        # without the row's name: rows of two tables may be the same run
        self.name = f"{RECIPES[scale]}-{row.loss}-{self.nodes}nodes-seed{self.seed}-{self.key}"

    @property
    def own_arguments(self) -> list[str]:
        """Beyond the recipe; $IMAGENET_VAL as the environment has it."""
        flags = {"--name": self.name, "--seed": self.seed} | self.flags
        return [os.path.expandvars(word) for word in arguments_of(flags)]

    @property
    def submission(self) -> list[str]:
        """The command that submits it."""
        setting = [f"RECIPE={RECIPES[self.scale]}", f"LOSS={self.row.loss}"]
        options = [f"--job-name={self.name}", f"--nodes={self.nodes}"]
        return ["env", *setting, "sbatch", *options, SCRIPT, *self.own_arguments]

    def local_run(self, gpus: int) -> Run:
        """The same on GPUs of this machine, `batch` divided by their number. Raises UserError if that is not whole."""
        if self.batch % gpus:
            raise UserError(f"the global batch of {self.batch} cannot be divided among {gpus} GPUs")
        data = os.environ.get("DATA", "$DATA")
        flags = {flag: value and value.replace("$DATA", data) for flag, value in self.recipe.items()}
        flags |= {"--batch-size": self.batch // gpus, "--logs": logs()}
        arguments = ["--loss", self.row.loss, *arguments_of(flags), *self.own_arguments]
        steps = int(self.recipe["--train-num-samples"]) // self.batch * self.epochs
        return Run(self.name, logs(), arguments, data, self.batch, steps, self.epochs, gpus)

    @property
    def final_checkpoint(self) -> Path:
        """What a finished run has."""
        return logs() / self.name / "checkpoints" / f"epoch_{self.epochs}.pt"

    def result(self, command: list[str], machine: dict) -> dict | None:
        """The line of results/runs.jsonl for what the run's folder holds; None if it was never begun."""
        folder = logs() / self.name
        if not (folder / "out.log").is_file():
            return None
        date = datetime.fromtimestamp((folder / "out.log").stat().st_mtime, timezone.utc).isoformat(timespec="seconds")
        result = {"key": self.key, "scale": self.scale, "name": self.name, "loss": self.row.loss}
        result |= {"settings": self.settings, "train_pairs": int(self.recipe["--train-num-samples"])}
        result |= circumstances(MODULE, []) | {"command": shlex.join(command), "date": date, "machine": machine}
        if not self.final_checkpoint.is_file():
            return result | {"status": FAILED, "error": self._last_words()}
        log = read_log(folder)
        curve = [
            {"samples": evaluation["epoch"] * result["train_pairs"], **_percent(evaluation)}
            for evaluation in read_results(folder)
        ]
        measured = {"tau": round(final_temperature(log), 4), "samples_per_second": round(samples_per_second(log))}
        return result | {"status": DONE, "curve": curve, "step_time": step_parts(folder), **measured}

    def _last_words(self) -> str:
        outputs = sorted(Path().glob(f"slurm-{self.name}-*.out"), key=lambda path: path.stat().st_mtime)
        outputs += [path for path in [logs() / f"{self.name}.log"] if path.is_file()]
        return last_line((outputs[-1] if outputs else logs() / self.name / "out.log").read_text(errors="replace"))


def _percent(evaluation):
    """The shares of an evaluation, as OpenCLIP names them, in percent."""
    wanted = re.compile(r".*(R@\d+|top\d)$")
    return {name: round(100 * value, 2) for name, value in evaluation.items() if wanted.match(name)}


def require_imagenet(jobs: list[Job]) -> None:
    """Raises UserError if one of them evaluates on ImageNet in its training, and nothing says where that is."""
    if not os.environ.get("IMAGENET_VAL") and any("$IMAGENET_VAL" in job.own_arguments for job in jobs):
        raise UserError("these runs evaluate on ImageNet: export IMAGENET_VAL, its validation folder of class folders")


def queued() -> set[str]:
    """Names of this user's jobs that wait or run. Raises UserError where there is no SLURM."""
    if not shutil.which("sbatch") or not shutil.which("squeue"):
        raise UserError("--launcher slurm: there is no sbatch here: run this on the cluster, or add --dry-run")
    jobs = subprocess.run(["squeue", "--me", "-h", "-o", "%j"], capture_output=True, text=True)
    if jobs.returncode:
        raise UserError(f"squeue failed: {last_line(jobs.stderr)}")
    return set(jobs.stdout.split())


def submit(jobs: list[Job], store: Store) -> int:
    """Stores what ended since the last call and submits what is missing; returns the exit code."""
    names = queued()
    for job in jobs:
        if job.name in names:
            print(f"{job.name}: in the queue", flush=True)
            continue
        result = job.result(job.submission, {"nodes": job.nodes, "gpus": GPUS_A_NODE * job.nodes})
        if result:
            store.add(result)
        if store.is_done(job.key):
            print(f"{job.name}: finished, stored", flush=True)
            continue
        sent = subprocess.run(job.submission, capture_output=True, text=True, cwd=SLURM.parents[1])
        if sent.returncode:
            raise UserError(f"sbatch refused {job.name}: {last_line(sent.stderr)}")
        print(f"{job.name}: {last_line(sent.stdout)}", flush=True)
    return 0


def require_gpus_and_data(scale: str) -> int:
    """Number of this machine's GPUs. Raises UserError that names what is missing."""
    first = re.sub(r"\{(\d+)\.\.\d+\}", r"\1", recipe_flags(scale, "clip")["--train-data"])
    shard = Path(first.replace("$DATA", os.environ.get("DATA", "$DATA")))
    missing = [] if torch.cuda.is_available() else ["a GPU (torch sees none)"]
    if not shard.is_file():
        missing.append(f"the data ({shard}; DATA names the folder of the data sets)")
    if missing:
        raise UserError(f"--scale {scale} --launcher local lacks {' and '.join(missing)}")
    return torch.cuda.device_count()


def run_here(jobs: list[Job], store: Store, gpus: int) -> int:
    """Trains on all GPUs of this machine, one run after the other; returns the exit code."""
    by_name = {job.name: job for job in jobs}
    runs = [job.local_run(gpus) for job in jobs]

    def keep(run):
        job, around = by_name[run.name], circumstances(MODULE, run.arguments)
        failed = {"key": job.key, "scale": job.scale, "name": job.name, "settings": job.settings, **around}
        result = job.result(["python", *run.command], around["machine"] | {"gpus": gpus})
        store.add(result or failed | {"status": FAILED, "error": run.error})

    train_all(runs, 1, keep)
    return 1 if any(run.error for run in runs) else 0
