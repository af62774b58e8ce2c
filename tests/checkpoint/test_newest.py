"""What --resume latest takes for the newest checkpoint of a run, and what it passes over."""

import logging

import pytest
import torch

from open_clip_train_fastclip import UserError
from open_clip_train_fastclip.checkpoint.retention import latest_epoch, newest_checkpoint


@pytest.fixture
def folder(tmp_path):
    """Names that are patterns to a shell, and .pt files beside the folder."""
    folder = tmp_path / "lr=[1e-3],*?" / "checkpoints"
    folder.mkdir(parents=True)
    for path in (folder.with_name("checkpoints-copy"), folder / "exported"):
        path.mkdir()
        save(path / "epoch_9.pt", 9)
    return folder


def save(path, epoch):
    """A checkpoint with so many epochs done; None: weights alone."""
    contents = {"weight": torch.zeros(2)}
    torch.save(contents if epoch is None else {"epoch": epoch, "state_dict": contents}, path)


def test_a_folder_without_checkpoints(folder):
    assert newest_checkpoint(folder) is None and newest_checkpoint(folder / "nowhere") is None


@pytest.mark.parametrize(("latest", "newest"), [(1, "epoch_10.pt"), (11, "epoch_latest.pt"), (None, "epoch_10.pt")])
def test_epochs_count_and_not_names(latest, newest, folder):
    for epoch in (1, 2, 10):
        save(folder / f"epoch_{epoch}.pt", epoch)
    save(folder / "epoch_latest.pt", latest)
    assert newest_checkpoint(folder).name == newest and latest_epoch(folder) == latest


@pytest.mark.parametrize(
    ("name", "epoch", "is_named"),
    [
        ("weights.pt", None, False),
        ("best.pt", 7, False),
        ("epoch_2 (copy).pt", 2, False),
        ("epoch_2_copy.pt", 2, False),
        ("epoch_3.pt", None, True),
        ("epoch_12.pt", 2, True),
    ],
)
def test_other_files_in_the_folder(name, epoch, is_named, folder, caplog):
    save(folder / "epoch_2.pt", 2)
    save(folder / name, epoch)
    with caplog.at_level(logging.WARNING):
        assert newest_checkpoint(folder).name == "epoch_2.pt"
    assert (name in caplog.text) == is_named


@pytest.mark.parametrize("name", ["epoch_3.pt", "epoch_latest.pt"])
@pytest.mark.parametrize("harm", ["empty", "cut", "no zip"])
def test_an_unreadable_newest_one_is_named(name, harm, folder):
    save(folder / "epoch_2.pt", 2)
    save(folder / name, 3)
    content = (folder / name).read_bytes()
    (folder / name).write_bytes({"empty": b"", "cut": content[:-300], "no zip": b"nothing" * 99}[harm])
    with pytest.raises(UserError, match=f"{name} is no checkpoint, or cut short .*: restore it from a copy, or remove"):
        newest_checkpoint(folder)
    (folder / name).unlink()
    assert newest_checkpoint(folder).name == "epoch_2.pt"


def test_what_is_older_is_not_read(folder):
    (folder / "epoch_1.pt").write_bytes(b"nothing")
    save(folder / "epoch_2.pt", 2)
    assert newest_checkpoint(folder).name == "epoch_2.pt"


def test_nothing_is_executed(folder, tmp_path):
    class Harm:
        def __reduce__(self):
            return open, (str(tmp_path / "executed"), "w")

    torch.save({"epoch": 3, "harm": Harm()}, folder / "epoch_3.pt")
    with pytest.raises(UserError, match="more than tensors and plain values"):
        newest_checkpoint(folder)
    assert not (tmp_path / "executed").exists()
