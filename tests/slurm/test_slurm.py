"""The batch scripts on a real SLURM: eight nodes on this machine, with pretended GPUs (scripts/slurm/local_cluster.sh).

Runs that shall last wait for their data (`pipe:sleep 1; cat ...`), which takes no time of a core; what takes its time
in SLURM (a time limit, a requeue) is waited for in threads, while other jobs run. To start and to end takes a process
eight seconds of a core, so a job has no more of them than it needs: two, and once 32.
"""

import atexit
import json
import math
import os
import re
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

pytestmark = pytest.mark.slurm

REPOSITORY = Path(__file__).parents[2]
SCRIPTS = REPOSITORY / "scripts" / "slurm"
TRAIN = SCRIPTS / "fastclip_32gpu.sh"
SMALL = ("--nodes=2", "--gres=gpu:1", "--ntasks-per-node=1")
EPOCHS = 3
FINAL = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


def wait_for(condition, seconds, what):
    """The first true value of condition(); fails after so many seconds."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.2)
    pytest.fail(f"after {seconds} seconds: {what() if callable(what) else what}")


def environment_of(pid) -> dict[str, str]:
    """The environment that a process was started with; empty if it is gone."""
    try:
        text = Path(f"/proc/{pid}/environ").read_text(errors="replace")
    except OSError:
        return {}
    return dict(entry.split("=", 1) for entry in text.split("\0") if "=" in entry)


@dataclass
class Job:
    """A submitted job; `cluster` made it."""

    cluster: "Cluster"
    number: str

    def field(self, name) -> str:
        text = self.cluster.ask("scontrol", "show", "job", "-o", self.number)
        return re.search(rf"(?:^| ){name}=(\S*)", text)[1]

    @property
    def state(self) -> str:
        return self.field("JobState")

    @property
    def output(self) -> str:
        path = Path(self.field("StdOut"))
        return path.read_text(errors="replace") if path.exists() else ""

    def limit(self, minutes):
        self.cluster.ask("scontrol", "update", f"JobId={self.number}", f"TimeLimit={minutes}")

    def ends(self, state, seconds=200):
        """Wait until the job is over; fails, with the end of its output, if it does not end as `state`."""

        def describe():
            return f"job {self.number} is {self.state} (restarts: {self.field('Restarts')})\n{self.output[-3000:]}"

        ended = wait_for(lambda: self.state in FINAL and self.state, seconds, describe)
        assert ended == state, describe()

    def tasks(self, count) -> dict[int, int]:
        """Rank -> process id of the training processes, once there are so many."""

        def find():
            found = {}
            for path in Path("/proc").glob("[0-9]*"):
                pid = int(path.name)
                variables = environment_of(pid)
                if variables.get("SLURM_JOB_ID") == self.number and "SLURM_STEP_ID" in variables:
                    # data workers are forks of the task, so the first process is the task
                    rank = int(variables["SLURM_PROCID"])
                    found[rank] = min(pid, found.get(rank, pid))
            return found if len(found) == count else None

        return wait_for(find, 120, lambda: f"job {self.number} has no {count} tasks\n{self.output[-3000:]}")


@dataclass
class Cluster:
    folder: Path
    environment: dict

    def ask(self, *command) -> str:
        options = {"env": self.environment, "capture_output": True, "text": True, "timeout": 30}
        return subprocess.run(command, check=True, **options).stdout

    def submit(self, script, *arguments, sbatch=SMALL, **variables) -> Job:
        environment = {**self.environment, "REHEARSE": "1", "LOGS": str(self.folder / "logs"), **variables}
        command = ["sbatch", "--parsable", *sbatch, str(script), *map(str, arguments)]
        result = subprocess.run(command, env=environment, cwd=self.folder, capture_output=True, text=True, timeout=30)
        assert result.returncode == 0, result.stderr
        return Job(self, result.stdout.strip())

    def train(self, name, *arguments, **options) -> Job:
        return self.submit(TRAIN, "--name", name, *arguments, **options)

    def checkpoints(self, name) -> Path:
        return self.folder / "logs" / name / "checkpoints"

    def has_epoch(self, name, epoch, job):
        path = self.checkpoints(name) / f"epoch_{epoch}.pt"
        wait_for(path.exists, 200, lambda: f"no {path}\n{job.output[-3000:]}")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """Eight nodes of four GPUs that are up; everything of them is gone afterwards, whatever happens."""
    folder = tmp_path_factory.mktemp("slurm")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH"))}
    environment |= {"LOCAL_CLUSTER": str(folder / "cluster"), "CLUSTER_ENV": str(folder / "none")}
    script = SCRIPTS / "local_cluster.sh"

    def down():
        subprocess.run([script, "down"], env=environment, capture_output=True, timeout=60, check=True)

    atexit.register(down)
    try:
        result = subprocess.run(
            [script, "up", "--nodes", "8", "--gpus", "4"], env=environment, capture_output=True, text=True, timeout=300
        )
        message = result.stderr.strip().split("\n")[-1]
        if "needs root" in message or "cannot be installed" in message or "apt-get" in message:
            pytest.skip(message)
        assert result.returncode == 0, result.stderr
        environment["SLURM_CONF"] = result.stdout.strip().removeprefix("export SLURM_CONF=")
        yield Cluster(folder, environment)
    finally:
        down()
        atexit.unregister(down)
    assert not (folder / "cluster").exists()
    assert str(folder) not in Path("/etc/hosts").read_text()
    left = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert str(folder / "cluster") not in left


@pytest.fixture(scope="module")
def shards(cluster):
    """Shards of 512 samples, in a pattern that waits so many seconds before each shard."""
    folder = cluster.folder / "shards"
    subprocess.run(
        ["python", "-m", "benchmarks.glyph_data", "--out", folder, "--characters", "32", "--train-per-character", "16"]
        + ["--val-per-character", "1", "--train-shards", "32", "--val-shards", "1"],
        cwd=REPOSITORY, check=True, capture_output=True,
        env={**os.environ, "PATH": f"{REPOSITORY}/.venv/bin:{os.environ['PATH']}"},
    )  # fmt: skip

    def flags(seconds):
        pattern = f"pipe:sleep {seconds}; cat {folder}/train/{{00000..00031}}.tar"
        data = ["--train-data", pattern, "--samples-per-shard", "16", "--batch-size", "16"]
        return [*data, "--epochs", EPOCHS, "--val-frequency", "0"]

    return flags


def table(checkpoints: Path, epoch: int) -> torch.Tensor:
    """Log u of all samples [N, columns], from the files of all ranks."""
    files = sorted((checkpoints / f"epoch_{epoch}.fastclip").glob("rank-*.safetensors"))
    parts = [load_file(file) for file in files]
    return torch.cat([torch.stack([part[name].flatten() for name in sorted(part)], 1) for part in parts])


@pytest.fixture(scope="module")
def started(cluster, shards):
    """Futures of jobs, by name: runs of three epochs that SLURM or a signal ends in the second, and two others."""

    def ended_after_an_epoch(name, *how):
        job = cluster.train(name, *shards(0.5))
        cluster.has_epoch(name, 1, job)
        cluster.ask("scancel", *how, job.number)
        return job

    def limited():
        job = cluster.train("limited", *shards(1.375), sbatch=(*SMALL, "--time=60", "--signal=B:USR1@60"))
        cluster.has_epoch("limited", 1, job)
        # SLURM looks every 30 seconds, for limits in whole minutes; the new limit is for the first start alone
        hours, minutes, seconds = map(int, job.field("RunTime").split(":"))
        job.limit(minutes=math.ceil((3600 * hours + 60 * minutes + seconds + 40) / 60))
        wait_for(lambda: job.field("Restarts") == "1", 120, lambda: f"no restart\n{job.output[-3000:]}")
        job.limit(minutes=60)
        return job

    def idle():
        """Signalled before it trains, and once more when it has restarted."""
        job = cluster.train("idle", *shards(10), MAX_IDLE_RESTARTS="1")
        for restart in (0, 1):
            wait_for(lambda restart=restart: f"start {restart}," in job.output, 120, "no start")
            cluster.ask("scancel", "--signal=USR1", "--batch", job.number)
        return job

    with ThreadPoolExecutor(max_workers=6) as pool:
        yield {
            "undisturbed": pool.submit(cluster.train, "undisturbed", *shards(0)),
            "signalled": pool.submit(ended_after_an_epoch, "signalled", "--signal=USR1", "--batch"),
            "stepped": pool.submit(ended_after_an_epoch, "stepped", "--signal=USR1"),
            "cancelled": pool.submit(ended_after_an_epoch, "cancelled"),
            "limited": pool.submit(limited),
            "idle": pool.submit(idle),
        }


@pytest.fixture(scope="module")
def undisturbed(cluster, started):
    """The table that three epochs leave if nothing happens to the run."""
    started["undisturbed"].result().ends("COMPLETED")
    return table(cluster.checkpoints("undisturbed"), EPOCHS)


@pytest.fixture(scope="module")
def pair(cluster, shards):
    """Two runs at once, by the loss; the first lasts for ten minutes, if nothing ends it."""
    return {
        "fastclip-v3": cluster.train("killed", *shards(0.5), "--epochs", 60),
        "clip": cluster.train("clip", *shards(0.25), "--loss", "clip"),
    }


def assert_same_end(cluster, name, undisturbed):
    ended = table(cluster.checkpoints(name), EPOCHS)
    assert torch.equal(ended.isinf(), undisturbed.isinf()), "other samples were visited than in an undisturbed run"
    torch.testing.assert_close(ended, undisturbed, rtol=1e-3, atol=1e-3)


def test_a_wrong_flag_fails_the_job_at_once_in_one_line(cluster):
    job = cluster.train("wrong", "--fastclip-rhoo", "3")
    job.ends("FAILED", 40)
    last = job.output.strip().split("\n")[-1]
    assert last.startswith("fastclip_32gpu.sh: error: unrecognized arguments: --fastclip-rhoo 3"), job.output
    assert not (cluster.folder / "logs" / "wrong").exists()


@pytest.mark.parametrize(
    ("variables", "arguments", "sbatch", "message"),
    [
        ({"REHEARSE": ""}, [], SMALL, "none is missing: cp scripts/slurm/cluster.env.example cluster.env"),
        ({"RECIPE": "tiny"}, [], SMALL, "RECIPE=tiny: there is no"),
        ({"LOSS": "v9"}, [], SMALL, "the loss v9 has no section"),
        ({"LOSS": "v1"}, ["--loss=clip"], SMALL, "LOSS=v1 contradicts --loss clip"),
    ],
)
def test_a_wrong_setting_is_told_in_one_line(cluster, variables, arguments, sbatch, message):
    job = cluster.train("setting", *arguments, sbatch=sbatch, **variables)
    job.ends("FAILED", 20)
    lines = job.output.strip().split("\n")
    assert len(lines) == 1
    assert lines[0].startswith("fastclip_32gpu.sh: error: ")
    assert message in lines[0]


def test_the_signal_requeues_and_the_run_ends_as_if_undisturbed(cluster, started, undisturbed):
    job = started["signalled"].result()
    job.ends("COMPLETED")
    assert job.field("Restarts") == "1"
    assert "the run saves and ends here, and the job is requeued" in job.output
    assert re.search(r"going on in epoch 1 after \d+ of \d+ batches", job.output)
    assert "epochs done: 1 of 3" in job.output
    assert_same_end(cluster, "signalled", undisturbed)


def test_after_scancel_submitting_again_continues(cluster, shards, started, undisturbed):
    started["cancelled"].result().ends("CANCELLED", 30)
    again = cluster.train("cancelled", *shards(0))
    again.ends("COMPLETED")
    assert "epochs done: 1 of 3" in again.output
    assert_same_end(cluster, "cancelled", undisturbed)


def test_a_file_to_resume_is_the_start_and_another_one_is_not_overridden(cluster, shards, undisturbed):
    alone = ("--nodes=1", "--gres=gpu:1", "--ntasks-per-node=1")
    first, second = (cluster.checkpoints("undisturbed") / f"epoch_{epoch}.pt" for epoch in (2, 3))
    job = cluster.train(
        "tuned", *shards(0), "--resume", first, "--fastclip-fresh-state", "--stop-epochs", "1", sbatch=alone
    )
    job.ends("COMPLETED")
    assert f"loaded checkpoint '{first}'" in (cluster.folder / "logs" / "tuned" / "out.log").read_text()
    job = cluster.train(
        "tuned", *shards(0), "--resume", first, "--fastclip-fresh-state", "--stop-epochs", "1", sbatch=alone
    )
    job.ends("COMPLETED")
    assert f"tuned started from {first} and goes on from its own checkpoints" in job.output
    assert "epochs done: 1 of 1" in job.output
    job = cluster.train("tuned", *shards(0), "--resume", second, sbatch=alone)
    job.ends("FAILED", 40)
    assert "out.log exists: give another --name, or --resume latest" in job.output.strip().split("\n")[-1]


def test_two_jobs_at_once_have_ports_of_their_own_and_all_their_cpus(cluster, pair):
    ports = []
    for job in pair.values():
        tasks = [environment_of(pid) for pid in job.tasks(2).values()]
        assert {task["SLURM_CPUS_PER_TASK"] for task in tasks} == {"6"}
        assert "CPUs=12 " in cluster.ask("scontrol", "show", "step", "-o", f"{job.number}.0")
        (port,) = {task["MASTER_PORT"] for task in tasks}
        ports.append(port)
    assert ports[0] != ports[1]


def test_a_run_that_is_training_is_not_disturbed(cluster, shards, pair):
    running = pair["fastclip-v3"]
    job = cluster.train("killed", *shards(0.5))
    job.ends("FAILED", 40)
    assert f"job {running.number} is training killed now" in job.output.strip().split("\n")[-1]
    assert running.state == "RUNNING"


def test_a_task_killed_with_9_fails_the_job_within_a_minute(cluster, pair):
    job = pair["fastclip-v3"]
    log = cluster.folder / "logs" / "killed" / "out.log"
    # all of an epoch's data are waited for before its first step
    wait_for(lambda: log.exists() and "Train Epoch" in log.read_text(), 200, "no training")
    os.kill(job.tasks(2)[1], signal.SIGKILL)
    job.ends("FAILED", 60)
    assert job.field("ExitCode") != "0:0"
    assert job.field("Restarts") == "0"
    assert "then submit the job again, and it continues" in job.output.strip().split("\n")[-1], job.output


def test_the_same_script_trains_the_openclip_baseline(cluster, pair):
    pair["clip"].ends("COMPLETED")
    checkpoints = cluster.checkpoints("clip")
    assert (checkpoints / f"epoch_{EPOCHS}.pt").exists()
    assert not list(checkpoints.glob("*.fastclip"))


def test_restarts_that_train_nothing_come_to_an_end(started):
    job = started["idle"].result()
    job.ends("FAILED", 60)
    assert job.field("Restarts") == "1"
    assert "1 restarts in a row brought no new checkpoint" in job.output


def test_a_signal_to_the_tasks_alone_requeues_as_well(started):
    job = started["stepped"].result()
    job.ends("COMPLETED")
    assert job.field("Restarts") == "1"
    assert "the training got a signal of its own and saved: the job is requeued" in job.output
    assert re.search(r"going on in epoch \d+ after \d+ of \d+ batches", job.output)


def test_the_time_limit_requeues_and_the_run_ends_as_if_undisturbed(cluster, started, undisturbed):
    job = started["limited"].result()
    job.ends("COMPLETED")
    assert job.field("Restarts") == "1"
    assert "got SIGUSR1" in job.output
    assert "epochs done: 0 of 3" in job.output and "epochs done: 3 of 3" not in job.output
    assert_same_end(cluster, "limited", undisturbed)


def test_evaluation_of_a_checkpoint(cluster, undisturbed):
    imagenet = cluster.folder / "imagenet"
    for number in range(1000):
        (imagenet / f"n{number:08d}").mkdir(parents=True)
        Image.new("RGB", (32, 32), (200, 30, 60)).save(imagenet / f"n{number:08d}" / "0.png")
    checkpoint = cluster.checkpoints("undisturbed") / f"epoch_{EPOCHS}.pt"
    job = cluster.submit(SCRIPTS / "eval.sh", checkpoint, sbatch=(), IMAGENET_VAL=str(imagenet))
    job.ends("COMPLETED", 60)
    results = json.loads(job.output.strip().split("\n")[-1])
    assert 0 <= results["imagenet-zeroshot-val-top1"] <= results["imagenet-zeroshot-val-top5"] <= 1
    assert results["epoch"] == EPOCHS and results["text_to_image_R@10"] > 0


@pytest.fixture(scope="module")
def of_32_ranks(cluster):
    """The unchanged script, as sbatch runs it without options: 8 nodes x 4 tasks, one epoch of two."""
    job = cluster.train("large", "--stop-epochs", "1", sbatch=())
    job.ends("COMPLETED", 300)
    return cluster.checkpoints("large")


def test_32_processes_train_an_epoch(of_32_ranks):
    assert (of_32_ranks / "epoch_1.pt").exists()
    assert len(list((of_32_ranks / "epoch_1.fastclip").glob("rank-*-of-00032.safetensors"))) == 32
    assert not table(of_32_ranks, 1).isinf().any()
    (results,) = map(json.loads, (of_32_ranks / "results.jsonl").read_text().splitlines())
    assert results["epoch"] == 1 and results["image_to_text_R@1"] > 0


def test_8_processes_continue_from_the_state_of_32(cluster, of_32_ranks):
    job = cluster.train("large", sbatch=("--nodes=2",))
    job.ends("COMPLETED", 200)
    assert "epochs done: 1 of 2" in job.output
    assert len(list((of_32_ranks / "epoch_2.fastclip").glob("rank-*-of-00008.safetensors"))) == 8
    assert not table(of_32_ranks, 2).isinf().any()
