"""What the scores of a checkpoint share: the model, pairs as it reads them, normalised features, and recall."""

import io
import logging
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path

import open_clip
import torch
from open_clip_train.train import get_clip_metrics
from PIL import Image

from open_clip_train_fastclip.openclip import register_models

MODEL = "ViT-Glyph-32"  # of every row that does not name another
CHUNK = 500  # images or texts encoded at a time


@cache
def tools(model_name: str = MODEL, image_size: int | None = None):
    """The model with random weights, in eval mode, its transform of a picture and its tokenizer.

    image_size: px, as --force-image-size takes it; None: the model's own.
    """
    register_models()
    logging.disable(logging.WARNING)  # of random weights: those of a checkpoint take their place
    model, _, transform = open_clip.create_model_and_transforms(model_name, force_image_size=image_size)
    logging.disable(logging.NOTSET)
    return model.eval(), transform, open_clip.get_tokenizer(model_name)


def load_weights(model, checkpoint: Path) -> None:
    """Gives the model the weights of a checkpoint, but for the bias of siglip, which no feature depends on."""
    torch.set_num_threads(1)
    weights = torch.load(checkpoint, map_location="cpu", weights_only=True)["state_dict"]
    weights = {name.removeprefix("module."): value for name, value in weights.items()}
    weights.pop("logit_bias", None)
    model.load_state_dict(weights)


def as_images(pictures: Iterable[bytes], transform) -> torch.Tensor:
    """The pictures as the model takes them, [N, 3, size, size]."""
    return torch.stack([transform(Image.open(io.BytesIO(picture)).convert("RGB")) for picture in pictures])


@torch.no_grad()
def features(encode: Callable, inputs: torch.Tensor, device: str = "cpu") -> torch.Tensor:
    """Features of unit length, [N, d], on the CPU; inputs: images or tokens, [N, ...]."""
    encoded = [encode(chunk.to(device)).float().cpu() for chunk in inputs.split(CHUNK)]
    return torch.nn.functional.normalize(torch.cat(encoded), dim=1)


@torch.no_grad()
def recalls(image_features: torch.Tensor, text_features: torch.Tensor, model, names: Iterable[str]) -> dict[str, float]:
    """OpenCLIP's own metrics of these names, in percent, for pairs in the same order."""
    metrics = get_clip_metrics(image_features, text_features, model.logit_scale.exp().cpu())
    return {name: round(100 * float(metrics[name]), 2) for name in names}


def zero_shot(image_features: torch.Tensor, means: torch.Tensor, shown: list[int]) -> dict[str, float]:
    """{"top1": ..., "top5": ...}: percent of the pictures whose class `shown` is among the first.

    image_features: [N, d] of unit length. means: [C, d], the mean text features of each of 5 classes or more.
    """
    guesses = (image_features @ torch.nn.functional.normalize(means, dim=1).T).topk(5).indices
    right = (guesses == torch.tensor(shown)[:, None]).float().cumsum(1).mean(0)
    return {f"top{k}": round(100 * right[k - 1].item(), 2) for k in (1, 5)}
