"""Foreign files execute nothing and lead nowhere; our own files are as readable as the umask says."""

import os
import pickle
import shutil
import stat
from pathlib import Path

import pytest
import torch
from cli import TINY, run_cli
from make_data import make_csv, make_shards

from open_clip_train_fastclip import convert


class Harm:
    """Unpickling it writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"echo harm > {self.path}",)


@pytest.fixture(scope="module")
def csv(tmp_path_factory):
    return make_csv(tmp_path_factory.mktemp("csv"), rows=16)


def v3(train_data, logs, *extra):
    return [*TINY, "--loss", "fastclip-v3", "--train-data", train_data, "--logs", logs, "--name", "run", *extra]


def refused(run):
    assert all(code > 0 for code in run.codes) and "Traceback" not in str(run), run
    assert "error" in run.output[0], run


@pytest.fixture(scope="module")
def checkpoints(csv, tmp_path_factory):
    """Folder of the checkpoints of a finished run, by loss."""
    folders = {}
    for loss in ("clip", "fastclip-v3"):
        logs = tmp_path_factory.mktemp(loss)
        run = run_cli([*v3(csv, logs), "--loss", loss], logs / "out")
        assert run.ok, run
        folders[loss] = logs / "run" / "checkpoints"
    return folders


def resume_with(changes, loss, csv, checkpoints, tmp_path):
    """Go on for an epoch from a run's epoch_1.pt with some of its contents changed."""
    for state in checkpoints[loss].glob("*.fastclip"):
        shutil.copytree(state, tmp_path / "checkpoints" / state.name)
        shutil.copytree(state, tmp_path / "elsewhere" / state.name)
    path = tmp_path / "checkpoints" / "epoch_1.pt"
    (path.parent / "epoch_").mkdir(parents=True)  # so that epoch_/../.. is a path
    torch.save(torch.load(checkpoints[loss] / "epoch_1.pt", weights_only=True) | changes, path)
    flags = [*v3(csv, tmp_path / "logs", "--resume", path, "--epochs", 2), "--loss", loss]
    return run_cli(flags, tmp_path / "out")


@pytest.mark.parametrize("loss", ["clip", "fastclip-v3"])
def test_an_unchanged_checkpoint_is_good(loss, csv, checkpoints, tmp_path):
    run = resume_with({}, loss, csv, checkpoints, tmp_path)
    assert run.ok, run


@pytest.mark.parametrize("place", ["name", "optimizer", "state_dict"])
@pytest.mark.parametrize("loss", ["clip", "fastclip-v3"])
def test_a_checkpoint_executes_nothing(loss, place, csv, checkpoints, tmp_path):
    mark = tmp_path / "mark"
    refused(resume_with({place: Harm(mark)}, loss, csv, checkpoints, tmp_path))
    assert not mark.exists()
    torch.load(tmp_path / "checkpoints" / "epoch_1.pt", weights_only=False)
    assert mark.exists(), "the file is harmless, so this tests nothing"


def test_a_plain_pickle_executes_nothing(csv, tmp_path):
    mark, path = tmp_path / "mark", tmp_path / "epoch_1.pt"
    path.write_bytes(pickle.dumps({"epoch": 1, "state_dict": Harm(mark)}))
    refused(run_cli(v3(csv, tmp_path / "logs", "--resume", path), tmp_path / "out"))
    assert not mark.exists()


def test_converting_a_checkpoint_executes_nothing(tmp_path, capsys):
    mark, path = tmp_path / "mark", tmp_path / "epoch_1.pt"
    torch.save({"epoch": 1, "state_dict": {}, "name": Harm(mark)}, path)
    assert convert.main([str(path), str(tmp_path / "new")]) == 2
    assert "epoch_1.pt" in capsys.readouterr().err
    assert not mark.exists()


@pytest.mark.parametrize("epoch", ["/../../elsewhere/epoch_1", -1, 1.5, None, True, 2**70], ids=str)
@pytest.mark.parametrize("loss", ["clip", "fastclip-v3"])
def test_the_epoch_in_a_checkpoint_leads_nowhere(loss, epoch, csv, checkpoints, tmp_path):
    """The state's folder is named after it."""
    run = resume_with({"epoch": epoch}, loss, csv, checkpoints, tmp_path)
    refused(run)
    assert "epoch_1.pt" in run.output[0], run


@pytest.mark.parametrize(
    "changes",
    [{"fastclip": 7}, {"fastclip": {"loss": []}}, {"optimizer": 7}, {"optimizer": {}}, {"state_dict": {}},
     {"state_dict": {7: torch.zeros(1)}}, {"optimizer": {"state": {0: {"step": "x"}}, "param_groups": [{}]}}],
    ids=str,
)  # fmt: skip
def test_a_checkpoint_of_any_content(changes, csv, checkpoints, tmp_path):
    refused(resume_with(changes, "fastclip-v3", csv, checkpoints, tmp_path))


@pytest.mark.parametrize("umask", [0o027, 0o077, 0o002], ids=oct)
def test_new_files_follow_the_umask(umask, tmp_path):
    make_shards(tmp_path / "data", shards=2, per_shard=8)
    flags = v3(
        str(tmp_path / "data" / "{00000..00001}.tar"), tmp_path / "logs", "--save-most-recent", "--save-every", "1steps"
    )
    before = set(tmp_path.rglob("*"))
    old = os.umask(umask)
    try:
        run = run_cli(flags, Path(tmp_path, "out"), ranks=2)
    finally:
        os.umask(old)
    assert run.ok, run
    new = {path for path in tmp_path.rglob("*") if path not in before and "out" not in path.relative_to(tmp_path).parts}
    names = {path.name for path in new}
    expected = {"fastclip_sizes.json", "epoch_1.pt", "epoch_latest.pt", "checkpoint.pt", "shards.json", "index.json"}
    assert names >= expected | {"rank-00001-of-00002.safetensors", "out.log"}
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in new}
    wrong = {p: oct(m) for p, m in modes.items() if m != (0o777 if p.is_dir() else 0o666) & ~umask}
    assert not wrong, wrong
