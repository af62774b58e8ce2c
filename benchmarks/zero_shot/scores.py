"""One of the tasks on a data set in clip_benchmark's webdataset layout, with its zero-shot code.

In float32. clip_benchmark's own summary of a classification is not used: numpy 2.4 refuses it, and DataComp's metrics
by groups need the logits.
"""

import functools
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import webdataset
from clip_benchmark.datasets.builder import build_wds_dataset
from clip_benchmark.metrics import zeroshot_classification, zeroshot_retrieval
from PIL import Image
from sklearn.metrics import balanced_accuracy_score, f1_score
from torch import Tensor
from torch.utils.data import DataLoader
from webdataset.autodecode import Decoder

from open_clip_train_fastclip.data.images import rgb
from open_clip_train_fastclip.errors import UserError

from .tasks import PER_CLASS, RECALL, Task

IMAGES = ["webp", "png", "jpg", "jpeg"]
READERS = {  # of what is opened beside the images; nothing is unpickled
    "cls": int,
    "txt": bytes.decode,
    "json": json.loads,
    "npy": lambda content: np.load(io.BytesIO(content), allow_pickle=False),
}
# Metrics of the worst group of samples, a group being what the first column of their npy says: the region (fmow, geode)
# or the income (dollar_street). The value: a sample is right if its class is among so many.
WORST_GROUP = {"acc_worst_region": 1, "acc_wg": 1, "acc_top5_wg": 5}
JACCARD = "jaccard_score_10-12"


@dataclass
class Model:
    """A model to evaluate, with what its inputs need."""

    model: torch.nn.Module
    transform: Callable
    tokenizer: Callable
    device: str
    batch_size: int = 64
    workers: int = 4


def evaluate(task: Task, folder: Path, model: Model) -> tuple[float, int]:
    """The task's metric, as a share, and how many samples it is of. Raises UserError for an incomplete data set."""
    shards = _shards(folder)
    if task.metric == JACCARD:
        return winogavil(shards, model)
    if task.metric == RECALL:
        return retrieval(folder, len(shards), model)
    logits, target = classification(folder, shards, model, grouped=task.metric in WORST_GROUP)
    return classification_metric(task.metric, logits, target), len(logits)


def _shards(folder: Path) -> list[Path]:
    count = folder / "test" / "nshards.txt"
    if not count.is_file():
        raise UserError(f"{count} is missing: it holds the number of shards in clip_benchmark's webdataset layout")
    shards = [folder / "test" / f"{i}.tar" for i in range(int(count.read_text()))]
    missing = [shard.name for shard in shards if not shard.is_file()]
    if missing:
        raise UserError(
            f"{folder}/test lacks {len(missing)} of its {len(shards)} shards ({missing[0]}): fetch it again"
        )
    return shards


def _loader(dataset, num_shards: int, model: Model) -> DataLoader:
    workers = min(model.workers, num_shards)  # more would have none to read
    return DataLoader(dataset.batched(model.batch_size), batch_size=None, shuffle=False, num_workers=workers)


def _decoded(shards: list[Path], *labels: str):
    """The samples with their images (RGB) and the files of these endings, and nothing else."""
    dataset = webdataset.WebDataset([str(shard) for shard in shards], shardshuffle=False)
    return dataset.map(functools.partial(_decode, labels=labels))


def _built(folder: Path, model: Model, *labels: str):
    """clip_benchmark's data set, whose own decoder would open every file of a sample, pickles too."""
    dataset = build_wds_dataset(folder.name, model.transform, split="test", data_dir=str(folder))
    (place,) = (
        place
        for place, stage in enumerate(dataset.pipeline)
        if isinstance(next(iter(getattr(stage, "args", ())), None), Decoder)
    )
    dataset.pipeline[place] = webdataset.map(functools.partial(_decode, labels=labels))
    return dataset


def _decode(sample: dict, labels: tuple[str, ...]) -> dict:
    decoded = {}
    for name, content in sample.items():
        if name.rpartition(".")[2] in IMAGES:
            decoded[name] = rgb(Image.open(io.BytesIO(content)))
        elif name in labels:
            decoded[name] = READERS[name](content)
    return decoded


def classification(folder: Path, shards: list[Path], model: Model, grouped: bool) -> tuple[Tensor, Tensor]:
    """Logits [n, classes] and targets [n] int64; with `grouped` [n, 2], the second column being the group."""
    for name in ("classnames.txt", "zeroshot_classification_templates.txt"):
        if not (folder / name).is_file():
            raise UserError(f"{folder / name} is missing: it belongs to clip_benchmark's webdataset layout")
    dataset = _built(folder, model, "cls", "npy")
    names, templates = dataset.classes, dataset.templates
    if grouped:
        dataset = (
            _decoded(shards, "cls", "npy")
            .to_tuple(IMAGES, "cls", "npy")
            .map(lambda sample: (model.transform(sample[0]), torch.tensor([int(sample[1]), int(sample[2][0])])))
        )
    classifier = zeroshot_classification.zero_shot_classifier(
        model.model, model.tokenizer, names, templates, model.device, amp=False
    )
    logits, target = zeroshot_classification.run_classification(
        model.model, classifier, _loader(dataset, len(shards), model), model.device, amp=False
    )
    if target.ndim != 1 + grouped:
        raise UserError(f"{folder} has several labels an image, and this task has one: fetch the data set of DataComp")
    return logits, target


def classification_metric(name: str, logits: Tensor, target: Tensor) -> float:
    """A metric of classification as DataComp computes it."""
    if name in WORST_GROUP:
        target, group = target.unbind(1)
        right = (logits.topk(WORST_GROUP[name], dim=1).indices == target[:, None]).any(1).double()
        return min(right[group == g].mean().item() for g in group.unique())
    predicted = logits.argmax(1)
    if name == "acc1":
        return (predicted == target).double().mean().item()
    if name == PER_CLASS:
        return float(balanced_accuracy_score(target, predicted))
    assert name == "F1-macro_all", name
    return float(f1_score(target, predicted, average="macro", labels=target.unique()))


def retrieval(folder: Path, num_shards: int, model: Model) -> tuple[float, int]:
    """Mean of recall@1 from images to texts and back, and the number of images."""
    kind = folder / "dataset_type.txt"
    if not kind.is_file() or kind.read_text().strip().lower() != "retrieval":
        raise UserError(f"{kind} does not say retrieval, as clip_benchmark's webdataset layout needs it")
    dataset = _built(folder, model, "txt")
    seen = []

    def counted(batches):
        for images, texts in batches:
            seen.append(len(images))
            yield images, texts

    recall = zeroshot_retrieval.evaluate(
        model.model, counted(_loader(dataset, num_shards, model)), model.tokenizer, model.device, False, [1]
    )
    return (recall["image_retrieval_recall@1"] + recall["text_retrieval_recall@1"]) / 2, sum(seen)


@torch.no_grad()
def winogavil(shards: list[Path], model: Model) -> tuple[float, int]:
    """Mean Jaccard index of the chosen and the associated images, over the cues with 10 or 12, and the number of cues.

    A sample holds the images 0.jpg, 1.jpg, ... and a json with the cue, the candidates (a name for each image) and the
    associations (the names of the right ones).
    """
    scores, cues = [], 0
    for sample in _decoded(shards, "json"):
        cues += 1
        answers = sample["json"]
        candidates, cue = answers["candidates"], answers["cue"].lower()
        if len(candidates) < 10:
            continue
        images = [sample[f"{i}.jpg"] for i in range(len(candidates))]
        images = torch.stack([model.transform(image) for image in images]).to(model.device)
        text = model.tokenizer([f"{'An' if cue[0] in 'aeiou' else 'A'} {cue}"]).to(model.device)
        image_features = model.model.encode_image(images, normalize=True)
        similarity = image_features @ model.model.encode_text(text, normalize=True)[0]
        chosen = {candidates[i] for i in similarity.topk(len(answers["associations"])).indices.tolist()}
        right = set(answers["associations"])
        scores.append(len(chosen & right) / len(chosen | right))
    return sum(scores) / len(scores), cues
