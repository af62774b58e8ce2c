"""Slips of the pen in flags, OpenCLIP's own included: each value is meant by somebody, or is refused with one line."""

import argparse
import math
import os
import shlex
from types import SimpleNamespace

import open_clip
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from resolved_flags import TRAIN, V3, parse, resolved

from open_clip_train_fastclip.errors import UserError
from open_clip_train_fastclip.openclip import checks, environment, register_models, settings

register_models()

TWO = "--train-data a/{0..3}.tar::b/{0..3}.tar --dataset-resampled --train-num-samples 8"
SLIPS = [  # flags, words that the line holds
    ("--seed -1", "--seed is -1: it must be 0 or more"),
    ("--seed 4294967295", "--seed is 4294967295: it must be 4294901760 or less"),
    ("--workers -1", "--workers is -1"),
    ("--workers 100000", "--workers is 100000"),
    ("--log-every-n-steps 0", "--log-every-n-steps is 0: it must be 1 or more"),
    ("--batch-size 0", "--batch-size is 0"),
    ("--epochs -1", "--epochs is -1"),
    ("--epochs 0", "--epochs 0 trains nothing"),
    ("--warmup -1", "--warmup is -1"),
    ("--wd -0.1", "--wd is -0.1"),
    ("--wd nan", "--wd is nan"),
    ("--lr inf", "--lr is inf"),
    ("--beta1 1", "--beta1 is 1.0: it must be below 1"),
    ("--eps=-1e-8", "--eps is -1e-08"),
    ("--grad-clip-norm 0", "--grad-clip-norm is 0.0: it must be above 0"),
    ("--force-patch-dropout 1", "--force-patch-dropout is 1.0"),
    ("--image-std 0.5 0 0.5", "--image-std is 0.0"),
    ("--image-mean 0.5 0.5", "--image-mean has 2 values: give 1 or 3"),
    ("--force-image-size 32 32 32", "--force-image-size has 3 values"),
    ("--save-frequency -1", "--save-frequency is -1"),
    ("--lock-image --lock-image-unlocked-groups -1", "--lock-image-unlocked-groups is -1"),
    ("--dist-timeout 1e300", "--dist-timeout is 1e+300"),
    ("--lr-scheduler linear", "--lr-scheduler linear is unknown: choose cosine, const or const-cooldown"),
    ("--report-to wandb,tensorbord", "--report-to tensorbord is unknown: choose wandb, tensorboard, all or none"),
    ("--horovod", "--horovod needs the package horovod"),
    ("--device gpu", "--device gpu does not work here"),
    ("--device meta", "--device meta does not work here"),
    ("--dist-backend glo", "--dist-backend glo does not work here: give gloo or nccl"),
    ("--dist-url localhost:29500", "--dist-url localhost:29500 is unknown: write tcp://HOST:PORT"),
    ("--aug-cfg scal=0.5", "--aug-cfg scal is unknown: it takes scale, ratio"),
    ("--aug-cfg scale", "--aug-cfg takes NAME=VALUE pairs"),
    ("--aug-cfg scale=0.5", "a range is written as 'scale=(0.4, 1.0)'"),
    ("--aug-cfg 'scale=(0.5'", "--aug-cfg takes NAME=VALUE pairs"),
    ("--trace", "--trace works only in evaluation"),
    ("--distill-model ViT-B-32", "go together: give both or none"),
    ("--distill-model ViT-B-32 --distill-pretrained openai --accum-freq 2", "do not go with --accum-freq 2"),
    ("--distill-model ViT-B32 --distill-pretrained openai", "--distill-model ViT-B32 is unknown: the nearest are"),
    (f"{TWO} --train-data-upsampling-factors 1::x", "--train-data-upsampling-factors 1::x: 'x' must be a number"),
    (f"{TWO} --train-data-upsampling-factors 1::-1", "'-1' must be a number, 0 or more"),
    (f"{TWO} --train-data-upsampling-factors 1::nan", "'nan' must be a number"),
    (f"{TWO} --train-data-upsampling-factors 0::0", "one of them must be above 0"),
    ("--train-data a/0.tar a/1.tar a/2.tar a/3.tar", "a/1.tar a/2.tar a/3.tar: if the shell"),
    (
        "--train-data " + " ".join(f"a/{n}.tar" for n in range(1000)),
        "a/1.tar a/2.tar a/3.tar and 996 more: if the shell has made several words of one pattern, quote it",
    ),
    ("--train-data 'a/0.tar b/0.tar'", "these are several paths in one string: join them with ::"),
    ("--train-data a/{0..3}.tar,b/{0..3}.tar", "join them with ::"),
    ("--train-data a/0.tar::'b/0.tar, c/0.tar'", "--train-data b/0.tar, c/0.tar: these are several paths"),
    ("--train-data a.csv,b.csv", "these are several paths in one string: give one table"),
    ("--val-data 'a.tar b.tar'", "--val-data a.tar b.tar: these are several paths"),
]


OF_CLIP_ALONE = ("--distill", "--trace", "--horovod")  # refused with the loss by another line
SLIPS_OF_EACH_LOSS = [
    pytest.param(flags, words, loss, id=f"{flags[:60]}-{loss}")
    for flags, words in SLIPS
    for loss in ("clip", "fastclip-v3")
    if loss == "clip" or not flags.startswith(OF_CLIP_ALONE)
]


@pytest.mark.parametrize("flags, words, loss", SLIPS_OF_EACH_LOSS)
def test_a_slip_is_one_line(flags, words, loss):
    with pytest.raises(UserError) as caught:
        resolved(*TRAIN, "--loss", loss, *shlex.split(flags))
    assert words in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "flags",
    [
        "--train-data '{a/0.tar,b/0.tar}'",
        "--train-data 'pipe:cat a.tar b.tar'::c.tar",
        "--report-to tensorboard",
        "--report-to none",
        "--grad-clip-norm inf",
        "--image-mean 0.5 --image-std 0.5",
        "--aug-cfg scale=(0.4,1.0) color_jitter=(0.32,0.32,0.32,0.08) color_jitter_prob=0.8 gray_scale_prob=0.2",
        "--aug-cfg use_timm=True re_prob=0.2",
        "--device cuda:3",  # where there is none, OpenCLIP falls back to the CPU
        "--save-frequency 0 --val-frequency 0 --zeroshot-frequency 0",
        f"{TWO} --train-data-upsampling-factors 0::0.5",
    ],
)
def test_what_is_meant_passes(flags):
    assert resolved(*TRAIN, *shlex.split(flags))


def numeric_flags():
    """Every flag of the merged parser that takes numbers: name, type, whether it takes several."""
    found = []

    class Recording(settings.MergedParser):
        def parse_args(self, args=None, namespace=None):
            parsed = super().parse_args(args, namespace)
            found.extend((a.option_strings[0], a.type, a.nargs) for a in self._actions if a.type in (int, float))
            return parsed

    parse(parser=Recording)
    return found


NUMERIC = numeric_flags()
MEANS_NOT_GIVEN = ("--data-size", "--stop-epochs", "--fastclip-tau-lr")  # -1, as in the released code
OF_ANY_SIGN = ("--image-mean",)
NEEDED_WITH = {
    "--epochs-cooldown": "--lr-scheduler const-cooldown",
    "--data-size": "--train-data x.tar --sample-id json-key",
}


@hypothesis_settings(max_examples=400, deadline=None)
@given(
    st.sampled_from(NUMERIC),
    st.one_of(
        st.sampled_from([-1, 0, 2**31, 2**63, 10**30, math.nan, math.inf, -math.inf, 1e-320, -0.5, 1e300]),
        st.integers(),
        st.floats(),
    ),
    st.sampled_from(["clip", "fastclip-v3", "fastclip-v2"]),
)
def test_every_number_is_meant_or_refused(flag, value, loss):
    name, kind, nargs = flag
    text = str(int(value)) if kind is int and math.isfinite(value) else str(value)
    extra = shlex.split(NEEDED_WITH.get(name, ""))
    try:
        args = resolved(*TRAIN, "--loss", loss, *extra, f"{name}={text}")
    except UserError as error:
        assert name in str(error) and "\n" not in str(error)
        return
    number = kind(text)
    assert not math.isnan(number)
    assert number >= 0 or name in OF_ANY_SIGN or (number == -1 and name in MEANS_NOT_GIVEN)
    assert number <= (10**12 if kind is int else 1e30) or name == "--grad-clip-norm"
    if loss != "clip":
        settings.config_from_args(args, num_samples=100, global_batch_size=64)


def test_the_test_of_all_numbers_knows_them():
    names = {name for name, *_ in NUMERIC}
    assert len(names) > 40 and {"--seed", "--wd", "--dist-timeout", "--fastclip-rho", "--image-std"} <= names


# ---- what needs a look at the machine


def checked(*flags, rank=0):
    """What check_before_building() says of flags that were resolved; empty if nothing."""
    args = resolved(*flags)
    args.rank, args.world_size, args.distributed = rank, 1, False
    args.device = "cpu"
    try:
        checks.check_before_building(args)
    except UserError as error:
        return str(error)
    return ""


def test_logs_that_cannot_be_made(tmp_path):
    file = tmp_path / "file"
    file.touch()
    for logs in (file, file / "logs", "/proc/nowhere/logs"):
        assert f"--logs {logs}: " in checked(*TRAIN, "--logs", str(logs))
    assert not checked(*TRAIN, "--logs", str(tmp_path / "a" / "b"))
    assert [path.name for path in tmp_path.iterdir()] == ["file"], "nothing is left of the try"


def test_no_data_at_all(tmp_path):
    assert "add --train-data" in checked("--logs", str(tmp_path))


def test_pretrained_of_nothing(tmp_path):
    logs = [*TRAIN, "--logs", str(tmp_path), "--pretrained"]
    assert "whose tags are openai, laion400m_e31" in checked(*logs, "openia", "--model", "ViT-B-32")
    assert "/nowhere/weights.pt" in checked(*logs, "/nowhere/weights.pt")
    for good in ("openai", "laion2b-s34b-b79k"):
        assert not checked(*logs, good, "--model", "ViT-B-32")


def test_resume_of_what_is_no_checkpoint(tmp_path):
    run = tmp_path / "run" / "checkpoints"
    (run / "epoch_2.fastclip").mkdir(parents=True)
    (run / "epoch_2.pt").touch()
    weights = tmp_path / "open_clip_model.safetensors"
    weights.touch()
    for path, words in (
        (tmp_path / "run", f"is a folder: name a checkpoint in it, such as {run / 'epoch_2.pt'}"),
        (run / "epoch_2.fastclip", f"name {run / 'epoch_2.pt'}"),
        (weights, f"start from them with --pretrained {weights}"),
        (run / "epoch_3.pt", "there is no such file"),
    ):
        said = checked(*TRAIN, "--logs", str(tmp_path), "--resume", str(path))
        assert str(path) in said and words in said


def test_resume_of_a_folder_of_other_things(tmp_path):
    """No folder is named for a checkpoint, and no link that leads nowhere."""
    run = tmp_path / "run" / "checkpoints"
    (run / "epoch_3.pt").mkdir(parents=True)
    (run / "epoch_4.pt").symlink_to("nowhere.pt")
    (run / "a" / "b").mkdir(parents=True)
    (run / "a" / "b" / "deep.pt").touch()
    resume = [*TRAIN, "--logs", str(tmp_path), "--resume", str(tmp_path / "run")]
    assert (
        checked(*resume)
        == f"--resume {tmp_path}/run is a folder without a checkpoint (.pt) in it: name the file of one"
    )
    (run / "epoch_1.pt").touch()
    (run / "epoch_2.pt").touch()
    os.utime(run / "epoch_2.pt", (0, 0))
    assert f"such as {run / 'epoch_1.pt'}, or" in checked(*resume)
    assert f"such as {run / 'epoch_1.pt'}, or" in checked(*resume[:-1], str(tmp_path))


def test_gpus_that_are_not_there(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    args = argparse.Namespace(device="cuda:2", distributed=False)
    with pytest.raises(UserError, match="2 GPUs"):
        checks._check_gpu(args)
    args.device = "cuda:1"
    checks._check_gpu(args)


# ---- the environment

STEP = {"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_TASKS": "4"}
FOUND = {"MASTER_ADDR": "n1", "MASTER_PORT": "29500"}
ENVIRONMENTS = [  # variables, words of the line; none: it is good
    ({}, ""),
    ({"WORLD_SIZE": ""}, "WORLD_SIZE is '' in the environment"),
    ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two'"),
    ({"WORLD_SIZE": "1", "RANK": "0"}, ""),
    ({"WORLD_SIZE": "1", "RANK": "3"}, "RANK is 3 and WORLD_SIZE 1"),
    ({"WORLD_SIZE": "2"}, "RANK is missing"),
    ({"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}, "MASTER_ADDR is missing"),
    ({"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", **FOUND}, ""),
    ({"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "x", **FOUND}, "LOCAL_RANK is 'x'"),
    ({"WORKER": "0", "NUM_WORKERS": "2"}, "WORKER is '0' and NUM_WORKERS '2'"),
    ({"WORKER": "", "NUM_WORKERS": ""}, "WORKER is ''"),
    ({"NUM_WORKERS": "2"}, ""),
    # as SLURM 22.05 sets them
    ({"SLURM_NTASKS": "4"}, "start the run with srun, or set SLURM_NTASKS=1"),  # salloc
    ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}, "start the run with srun"),  # sbatch
    ({**STEP, "SLURM_STEP_NUM_TASKS": "1", "SLURM_TASK_PID": "1"}, "start the run with srun"),  # interactive step
    ({"SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}, ""),
    ({**STEP, "SLURM_TASK_PID": "1", **FOUND}, ""),  # a script that srun has started started us
    (STEP, "MASTER_ADDR is missing"),
    ({"SLURM_NTASKS": "4", "WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", **FOUND}, ""),  # torchrun in a job
    ({"SLURM_NTASKS": "4", "WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}, ""),
]


def said_of_environment(monkeypatch, variables, on_terminal=False, *flags):
    for name in (*environment.NUMBERS, "WORKER", "NUM_WORKERS", "MASTER_ADDR", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: on_terminal))
    try:
        environment.check_environment(resolved("--train-data", "x.tar", *flags))
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("variables, words", ENVIRONMENTS, ids=lambda value: " ".join(value))
def test_environments(variables, words, monkeypatch):
    said = said_of_environment(monkeypatch, variables)
    assert (words in said) if words else not said


def test_a_terminal_tells_a_shell_of_srun_from_its_tasks(monkeypatch):
    assert "srun" in said_of_environment(monkeypatch, {**STEP, **FOUND, "SLURM_TASK_PID": "1"}, True)
    assert not said_of_environment(monkeypatch, {**STEP, **FOUND, "SLURM_TASK_PID": str(os.getpid())}, True)


def test_tables_do_not_read_the_number_of_a_worker(monkeypatch):
    variables = {"WORKER": "0", "NUM_WORKERS": "2"}
    assert not said_of_environment(monkeypatch, variables, False, "--train-data", "x.csv")


@pytest.mark.parametrize(
    "variables, rank",
    [
        ({}, 0),
        ({"RANK": "3"}, 0),  # left over: OpenCLIP does not read it
        ({"RANK": "3", "WORLD_SIZE": "4"}, 3),
        ({"RANK": "", "WORLD_SIZE": "4"}, 0),
        ({"SLURM_PROCID": "2"}, 2),
    ],
)
def test_rank_of_process(variables, rank, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert environment.rank_of_process() == rank


# ---- locked towers

LOCKS = [
    ("ViT-Glyph-32", "--lock-image --lock-text --lock-text-freeze-layer-norm", "leave nothing to train"),
    ("ViT-Glyph-32", "--lock-text", "--lock-text fails with --model ViT-Glyph-32 (AssertionError: Unfreezing"),
    ("ViT-Glyph-32", "--lock-text --lock-text-freeze-layer-norm", ""),
    ("ViT-Glyph-32", "--lock-image --lock-text --lock-text-freeze-layer-norm --lock-text-unlocked-layers 1", ""),
    ("RN50", "--lock-image --lock-image-unlocked-groups 1", "partial locking not currently supported"),
    ("coca_ViT-B-32", "--lock-image", "--lock-image fails with --model coca_ViT-B-32"),
    ("coca_ViT-B-32", "--lock-text --lock-text-freeze-layer-norm", "leave --lock-text out"),
]


@pytest.mark.parametrize("model, flags, words", LOCKS)
def test_locked_towers(model, flags, words):
    args = resolved(*V3, "--model", model, *flags.split())
    with torch.device("meta"):
        built = open_clip.create_model(model, device="meta")
    if not words:
        checks.check_locks(built, args)
        return
    with pytest.raises(UserError) as caught:
        checks.check_locks(built, args)
    assert words in str(caught.value)


@pytest.mark.parametrize("loss", ["clip", "siglip", "fastclip-v0", "fastclip-v3"])
def test_a_temperature_and_a_bias_alone_are_no_model_to_train(loss):
    locked = "--lock-image --lock-text --lock-text-freeze-layer-norm".split()
    model = open_clip.create_model("ViT-Glyph-32", device="meta", init_logit_bias=-10 if loss == "siglip" else None)
    with pytest.raises(UserError, match="nothing to train"):
        checks.check_locks(model, resolved(*TRAIN, "--loss", loss, *locked))
    checks.check_locks(model, resolved("--val-data", "x.tar", "--resume", "x.pt", "--loss", loss, *locked))


def test_an_image_smaller_than_a_patch():
    args = resolved(*V3, "--model", "ViT-Glyph-32", "--force-image-size", "4")
    with torch.device("meta"):
        model = open_clip.create_model("ViT-Glyph-32", device="meta", force_image_size=4)
    with pytest.raises(UserError, match="--force-image-size"):
        checks.check_model(model, args)
