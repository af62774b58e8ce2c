"""`--loss clip` is stock OpenCLIP, bit for bit; `--loss siglip` is its own --siglip."""

from pathlib import Path

import open_clip_train.main
import pytest
import torch
from cli import TINY, run_cli, run_forked
from make_data import make_csv


def stock_main(argv):
    """OpenCLIP's main() untouched, but for DDP, which refuses a CPU device by name (the same on both sides)."""
    ddp = torch.nn.parallel.DistributedDataParallel
    torch.nn.parallel.DistributedDataParallel = lambda model, device_ids=None, **kwargs: ddp(model, **kwargs)
    open_clip_train.main.main(argv)
    return 0


@pytest.fixture(scope="module")
def csv(tmp_path_factory):
    return make_csv(tmp_path_factory.mktemp("csv"), rows=48)


def checkpoint(folder: Path) -> dict:
    return torch.load(folder / "run" / "checkpoints" / "epoch_2.pt", weights_only=True)


def assert_same_bits(ours: dict, stock: dict):
    assert ours.keys() == stock.keys()
    assert ours["state_dict"].keys() == stock["state_dict"].keys()
    for name, value in stock["state_dict"].items():
        assert torch.equal(ours["state_dict"][name], value), name
    for index, moments in stock["optimizer"]["state"].items():
        for name, value in moments.items():
            assert torch.equal(ours["optimizer"]["state"][index][name], value), (index, name)
    assert ours["optimizer"]["param_groups"] == stock["optimizer"]["param_groups"]


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("loss", ["clip", "siglip"])
def test_same_bits_as_stock(loss, ranks, csv, tmp_path):
    flags = [*TINY, "--epochs", "2", "--train-data", csv, "--val-data", csv, "--name", "run", "--logs"]
    own_flag = {"clip": [], "siglip": ["--siglip"]}[loss]
    stock = run_forked(
        stock_main, ([*map(str, flags), str(tmp_path / "stock"), *own_flag],), tmp_path / "out", ranks=ranks
    )
    assert stock.ok, stock
    ours = run_cli([*flags, tmp_path / "ours", "--loss", loss], tmp_path / "out", ranks=ranks)
    assert ours.ok, ours
    assert_same_bits(checkpoint(tmp_path / "ours"), checkpoint(tmp_path / "stock"))


def test_the_comparison_can_fail(csv, tmp_path):
    flags = [*TINY, "--epochs", "2", "--train-data", csv, "--name", "run", "--logs"]
    for name, seed in (("a", 1), ("b", 2)):
        assert run_cli([*flags, tmp_path / name, "--seed", seed], tmp_path / "out").ok
    with pytest.raises(AssertionError):
        assert_same_bits(checkpoint(tmp_path / "a"), checkpoint(tmp_path / "b"))
