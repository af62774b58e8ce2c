"""Whole runs through the command line: every loss, saving, resuming, watching."""

import json
import math
import os

import open_clip
import pytest
import torch
from cli import MODEL, TINY, run_cli, run_forked
from make_data import make_csv, make_shards
from safetensors.torch import load_file

from open_clip_train_fastclip.loss.config import LOSSES, default_gamma
from open_clip_train_fastclip.main import main


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    make_shards(folder, shards=4, per_shard=12)
    return f"{folder}/{{00000..00003}}.tar"


@pytest.fixture(scope="module")
def csv(tmp_path_factory):
    return make_csv(tmp_path_factory.mktemp("csv"), rows=48)


def run_folder(logs):
    return logs / "run"


def states(logs, epoch):
    """FastCLIP's state of an epoch as {column: tensor over all samples} and its index."""
    folder = run_folder(logs) / "checkpoints" / f"epoch_{epoch}.fastclip"
    parts = [load_file(f) for f in sorted(folder.glob("*.safetensors"))]
    table = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return table, json.loads((folder / "index.json").read_text())


def weights(logs, epoch):
    checkpoint = torch.load(run_folder(logs) / "checkpoints" / f"epoch_{epoch}.pt", weights_only=True)
    return {name.removeprefix("module."): value for name, value in checkpoint["state_dict"].items()}


@pytest.mark.parametrize(
    "extra, visits",
    [
        ((), 24),
        (("--train-num-samples", 24), 12),
        (("--train-num-samples", 24, "--dataset-resampled"), 12),
        # where the number of samples is not known an epoch is all of them
        (("--train-num-samples", 24, "--sample-id", "json-key", "--data-size", 48), 24),
        (("--train-num-samples", 24, "--samples-per-shard", 12, "--train-data", "pipe:cat {}"), 24),
    ],
)
def test_the_default_of_gamma_counts_the_visits_of_a_sample(extra, visits, shards, tmp_path):
    flags = [*TINY, "--loss", "fastclip-v1", "--train-data", shards, "--logs", tmp_path, "--name", "run"]
    flags += [flag.format(shards) if isinstance(flag, str) else flag for flag in extra]
    assert run_cli([*flags, "--epochs", 24, "--stop-epochs", 1], tmp_path / "out").ok
    assert states(tmp_path, 1)[1]["settings"]["gamma"] == default_gamma(visits) < 1


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_trains_on_shards(loss, ranks, shards, tmp_path):
    flags = [*TINY, "--loss", loss, "--train-data", shards, "--logs", tmp_path, "--name", "run", "--epochs", 2]
    run = run_cli(flags, tmp_path / "out", ranks=ranks)
    assert run.ok, run
    table, index = states(tmp_path, 2)
    assert len(table["log_u_image"]) == 48
    assert torch.isfinite(table["log_u_image"]).all(), "every sample of the data set was visited"
    assert "visited: 1" in run.output[0]
    scale = weights(tmp_path, 2)["logit_scale"].item()
    if loss in ("fastclip-v0", "fastclip-v3"):
        assert scale == pytest.approx(index["tau"]["log_inv_tau"]) and scale != pytest.approx(math.log(1 / 0.07))
    else:
        assert scale == pytest.approx(math.log(1 / (0.03 if loss in ("fastclip-v2", "isogclr") else 0.07)))


@pytest.mark.parametrize(
    ("loss", "ranks", "data"),
    [
        ("fastclip-v0", 1, "csv"),
        ("fastclip-v2", 1, "csv"),
        ("fastclip-v2", 2, "csv"),
        ("fastclip-v3", 2, "csv"),
        ("fastclip-v3", 1, "shards"),
        ("fastclip-v3", 2, "shards with workers"),
        ("fastclip-v1", 1, "shards resampled with workers"),
    ],
)
def test_resumed_is_undisturbed(loss, ranks, data, csv, shards, tmp_path):
    """4 epochs at once, and 2 + 2 with --stop-epochs and --resume latest: same bits of weights, log u and tau."""
    flags = [*TINY, "--loss", loss, "--train-data", csv if data == "csv" else shards, "--name", "run", "--epochs", 4]
    flags += ["--workers", 2 if "workers" in data else 0, "--batch-size", 4, "--force-patch-dropout", 0.25]
    flags += [*(["--dataset-resampled"] if "resampled" in data else []), "--logs"]
    whole = run_cli([*flags, tmp_path / "whole"], tmp_path / "out", ranks=ranks)
    first = run_cli([*flags, tmp_path / "parts", "--stop-epochs", 2], tmp_path / "out", ranks=ranks)
    second = run_cli([*flags, tmp_path / "parts", "--resume", "latest"], tmp_path / "out", ranks=ranks)
    assert whole.ok and first.ok and second.ok, f"{whole}\n{first}\n{second}"
    assert not (run_folder(tmp_path / "parts") / "checkpoints" / "epoch_5.pt").exists()
    (table, index), (expected, expected_index) = states(tmp_path / "parts", 4), states(tmp_path / "whole", 4)
    for name in expected:
        assert torch.equal(table[name], expected[name]), name
    assert index["tau"] == expected_index["tau"]
    for name, value in weights(tmp_path / "whole", 4).items():
        assert torch.equal(weights(tmp_path / "parts", 4)[name], value), name


def test_resume_on_another_number_of_ranks(shards, tmp_path):
    flags = [*TINY, "--loss", "fastclip-v2", "--train-data", shards, "--logs", tmp_path, "--name", "run"]
    assert run_cli([*flags, "--epochs", 3, "--stop-epochs", 1], tmp_path / "out", ranks=2).ok
    run = run_cli(
        [*flags, "--epochs", 3, "--stop-epochs", 2, "--resume", "latest", "--batch-size", 16], tmp_path / "out"
    )
    assert run.ok, run
    table, index = states(tmp_path, 2)
    assert index["settings"] == states(tmp_path, 1)[1]["settings"]
    assert "the global batch was" not in run.output[0], run
    # a changed batch changes the default of rho, but not that of a run that goes on
    run = run_cli([*flags, "--epochs", 3, "--resume", "latest"], tmp_path / "out")
    assert run.ok and "the global batch was 16 and is 8 now" in run.output[0], run
    assert states(tmp_path, 3)[1]["settings"] == index["settings"]


def test_evaluation_of_a_checkpoint(csv, tmp_path):
    flags = [*TINY, "--logs", tmp_path, "--val-data", csv]
    run = run_cli([*flags, "--loss", "fastclip-v3", "--train-data", csv, "--name", "run"], tmp_path / "out")
    assert run.ok, run
    path = run_folder(tmp_path) / "checkpoints" / "epoch_1.pt"
    alone = run_cli([*flags, "--resume", path, "--name", "evaluation"], tmp_path / "out")
    assert alone.ok, alone
    results = [
        json.loads((tmp_path / name / "checkpoints" / "results.jsonl").read_text()) for name in ("run", "evaluation")
    ]
    assert results[0] == results[1]
    pretrained = [*flags, "--pretrained", path, "--loss", "fastclip-v2", "--name", "pretrained"]
    assert run_cli(pretrained, tmp_path / "out").ok
    result = json.loads((tmp_path / "pretrained" / "checkpoints" / "results.jsonl").read_text())
    assert result["clip_val_loss"] == results[0]["clip_val_loss"], "evaluated with the temperature of the checkpoint"


def test_checkpoint_loads_in_open_clip(csv, tmp_path):
    flags = [*TINY, "--loss", "fastclip-v3", "--train-data", csv, "--logs", tmp_path, "--name", "run"]
    assert run_cli(flags, tmp_path / "out").ok
    path = run_folder(tmp_path) / "checkpoints" / "epoch_1.pt"
    torch.load(path, weights_only=True)
    model, _, _ = open_clip.create_model_and_transforms(MODEL, pretrained=str(path))
    for name, value in weights(tmp_path, 1).items():
        assert torch.equal(model.state_dict()[name], value), name


@pytest.mark.parametrize("policy", [["--save-most-recent", "--save-frequency", 0], ["--delete-previous-checkpoint"]])
def test_states_without_a_checkpoint_are_pruned(policy, csv, tmp_path):
    flags = [*TINY, "--loss", "fastclip-v1", "--train-data", csv, "--logs", tmp_path, "--name", "run", *policy]
    run = run_cli([*flags, "--epochs", 3], tmp_path / "out")
    assert run.ok, run
    kept = sorted(p.name for p in (run_folder(tmp_path) / "checkpoints").iterdir())
    assert [name for name in kept if name.endswith(".fastclip")] == ["epoch_3.fastclip"], kept
    # and what is kept can be continued
    run = run_cli([*flags, "--epochs", 4, "--resume", "latest"], tmp_path / "out")
    assert run.ok and "Start epoch 3" in run.output[0], run


def test_leftover_tmp_is_not_the_latest(csv, tmp_path):
    flags = [*TINY, "--loss", "fastclip-v1", "--train-data", csv, "--logs", tmp_path, "--name", "run", "--epochs", 2]
    assert run_cli([*flags, "--stop-epochs", 1], tmp_path / "out").ok
    (run_folder(tmp_path) / "checkpoints" / "tmp.pt").write_bytes(b"half a checkpoint")
    run = run_cli([*flags, "--resume", "latest"], tmp_path / "out")
    assert run.ok and "Start epoch 1" in run.output[0], run


def test_fresh_state_takes_the_weights_of_an_openclip_checkpoint(csv, tmp_path):
    flags = [*TINY, "--train-data", csv, "--logs", tmp_path]
    assert run_cli([*flags, "--name", "clip"], tmp_path / "out").ok
    path = tmp_path / "clip" / "checkpoints" / "epoch_1.pt"
    fastclip = [*flags, "--loss", "fastclip-v3", "--name", "run", "--resume", path]
    refused = run_cli(fastclip, tmp_path / "out")
    assert refused.codes == [2] and "--fastclip-fresh-state" in refused.output[0], refused
    for ranks in (1, 2):
        name = ["--name", f"run{ranks}"]
        run = run_cli([*fastclip, *name, "--fastclip-fresh-state"], tmp_path / "out", ranks=ranks)
        assert run.ok and "Start epoch 0" in run.output[0], run
    frozen = [*flags, "--name", "frozen", "--resume", path, "--fastclip-fresh-state", "--freeze-temperature"]
    run = run_cli([*frozen, "--temperature", 0.5], tmp_path / "out")
    assert run.ok, run
    checkpoint = torch.load(tmp_path / "frozen" / "checkpoints" / "epoch_1.pt", weights_only=True)
    assert checkpoint["state_dict"]["logit_scale"].item() == pytest.approx(math.log(2))


def resumes_wandb(argv):
    """The command line, if a resumed run would continue its wandb run; else exit code 1."""
    import wandb

    code = main(argv)
    return code or int(os.environ.get("WANDB_RESUME") != "allow") or int(wandb.run is not None)


def test_watching(csv, tmp_path):
    """tau, gamma, log u in a line of our own, in tensorboard and in wandb, at OpenCLIP's steps; one wandb run."""
    flags = [*TINY, "--loss", "fastclip-v3", "--train-data", csv, "--logs", tmp_path, "--name", "run", "--epochs", 2]
    flags += ["--report-to", "all"]
    env = {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path / "wandb"), "WANDB_SILENT": "true"}
    os.makedirs(env["WANDB_DIR"])
    run = run_cli([*flags, "--stop-epochs", 1], tmp_path / "out", env=env)
    assert run.ok, run
    lines = [line for line in run.output[0].splitlines() if "FastCLIP Epoch" in line]
    assert len(lines) == 6 and all(word in lines[-1] for word in ("tau:", "gamma:", "log_u_mean:", "visited: 1"))
    assert "%|" not in run.output[0], "no progress bar in a file"
    resumed = run_forked(resumes_wandb, ([str(f) for f in [*flags, "--resume", "latest"]],), tmp_path / "out", env=env)
    assert resumed.ok, resumed
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_folder(tmp_path) / "tensorboard")).Reload()
    assert [e.step for e in events.Scalars("fastclip/tau")] == [e.step for e in events.Scalars("train/loss")]
    assert len(events.Scalars("fastclip/tau")) == 12
    assert len(events.Scalars("fastclip/u_lag")) == 6, "not before a sample comes again"
    offline = sorted((tmp_path / "wandb" / "wandb").glob("offline-run-*"))
    assert len(offline) == 2 and all(folder.name.endswith("-run") for folder in offline), "both continue run 'run'"
