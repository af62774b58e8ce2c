"""README's example of a training loop of one's own, as it stands there."""

import re
from pathlib import Path

import pytest
import torch

from open_clip_train_fastclip import FastCLIPConfig, FastCLIPLoss, load_state

README = Path(__file__).parents[2] / "README.md"


def test_readmes_example_trains_saves_and_loads(tmp_path, monkeypatch, capsys):
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)
    monkeypatch.chdir(tmp_path)
    make, devices, names = FastCLIPLoss.__init__, [], {}

    def make_there(loss, config, device):
        devices.append(device)
        make(loss, config, device)

    with monkeypatch.context() as watched:
        watched.setattr(FastCLIPLoss, "__init__", make_there)
        exec(example, names)
    assert devices == [names["device"]] and names["images"].device.type == torch.device(names["device"]).type
    values = [float(line.split()[1]) for line in capsys.readouterr().out.splitlines()]
    assert len(values) == 4 and values[-1] < values[0]
    assert names["loss"].visited == 64
    assert sorted(path.name for path in (tmp_path / "states").iterdir()) == [f"epoch_{n}" for n in range(1, 5)]
    resumed = FastCLIPLoss(FastCLIPConfig(loss="fastclip-v3", num_samples=64, epochs=4, rho=2.0, lr=1e-2))
    index = load_state(resumed, tmp_path / "states" / "epoch_4")
    assert index["epoch"] == 4 and resumed.visited == 64
    assert resumed.temperature == names["loss"].temperature != pytest.approx(0.07, rel=1e-4)
