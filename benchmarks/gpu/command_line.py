"""The training command line as the parts give it."""

from pathlib import Path

from open_clip_train_fastclip.openclip import register_models

from ..harness.training_steps import Trainer, set_up
from .measurement import Settings


def flags(settings: Settings, model: str, batch: int, steps: int, epochs: int, loss: str) -> list[str]:
    """Of a run on synthetic data, without a folder and a name."""
    return (
        f"--dataset-type synthetic --device {settings.device} --precision {settings.precision} --workers 0 --lr 1e-4 "
        f"--warmup 10 --seed 0 --save-frequency 0 --log-every-n-steps 1000000 --model {model} --batch-size {batch} "
        f"--train-num-samples {steps * batch} --epochs {epochs} --loss {loss}"
    ).split()


def trainer(
    settings: Settings, folder: str | Path, model: str, batch: int, steps: int, epochs: int, loss: str, *more: str
) -> Trainer:
    """Such a run at its first epoch, with its batches on the device."""
    argv = [*flags(settings, model, batch, steps, epochs, loss), *more, "--logs", str(folder), "--name", loss]
    register_models()
    made = set_up(argv)
    made.keep_batches(settings.device)
    return made
