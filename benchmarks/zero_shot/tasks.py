"""The data sets of each suite and the metric that counts in them.

The 38 tasks of DataComp, their metrics and numbers of samples are those of tasklist.yml in mlfoundations/datacomp
(commit 4afedc4); a task without main_metric there has acc1. Its FairFace and UTKFace are outside the average of 38
(aggregate_scores.py there), and left out here.
"""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Task:
    """A data set under DataComp's name for it."""

    key: str
    samples: int  # of the whole test set
    metric: str = "acc1"
    folder: str = ""  # its folder's name after wds_, where that is not the key's

    @property
    def name(self) -> str:
        """The data set's name in that of its folder."""
        return self.folder or self.key.replace("/", "-")

    def find(self, data: Path) -> Path | None:
        """The data set's folder in `data`: wds_NAME as clip_benchmark calls it, or DataComp's wds_NAME_test."""
        found = [path for path in (data / f"wds_{self.name}", data / f"wds_{self.name}_test") if path.is_dir()]
        return found[0] if found else None


PER_CLASS = "mean_per_class_recall"
RECALL = "mean_recall@1"  # of image to text and text to image

IMAGENET_VARIANTS = (
    Task("imagenet1k", 50000),
    Task("imagenet_sketch", 50889),
    Task("imagenetv2", 10000),
    Task("imagenet-a", 7500),
    Task("imagenet-o", 2000),
    Task("imagenet-r", 30000),
    Task("objectnet", 18574),
)
RETRIEVAL = (
    Task("retrieval/flickr_1k_test_image_text_retrieval", 1000, RECALL, folder="flickr30k"),
    Task("retrieval/mscoco_2014_5k_test_image_text_retrieval", 5000, RECALL, folder="mscoco_captions"),
)
DATACOMP = (
    *IMAGENET_VARIANTS,
    *RETRIEVAL,
    Task("vtab/caltech101", 6085, PER_CLASS),
    Task("cifar10", 10000),
    Task("vtab/cifar100", 10000),
    Task("vtab/clevr_count_all", 15000),
    Task("vtab/clevr_closest_object_distance", 15000),
    Task("country211", 21100),
    Task("vtab/dtd", 1880),
    Task("vtab/eurosat", 5400),
    Task("fgvc_aircraft", 3333, PER_CLASS),
    Task("food101", 25250),
    Task("gtsrb", 12630),
    Task("vtab/kitti_closest_vehicle_distance", 711),
    Task("mnist", 10000),
    Task("vtab/flowers", 6149, PER_CLASS),
    Task("vtab/pets", 3669, PER_CLASS),
    Task("voc2007", 14976),
    Task("vtab/pcam", 32768),
    Task("renderedsst2", 1821),
    Task("vtab/resisc45", 6300),
    Task("cars", 8041),
    Task("stl10", 8000),
    Task("sun397", 108754),
    Task("vtab/svhn", 26032),
    Task("misc/winogavil", 3563, "jaccard_score_10-12", folder="winogavil"),
    Task("wilds/iwildcam", 42791, "F1-macro_all"),
    Task("wilds/camelyon17", 85054),
    Task("wilds/fmow", 22108, "acc_worst_region"),
    Task("fairness/dollar_street", 3503, "acc_top5_wg", folder="dollar_street"),
    Task("fairness/geode", 12488, "acc_wg", folder="geode"),
)
SUITES = {"imagenet-variants": IMAGENET_VARIANTS, "retrieval": RETRIEVAL, "datacomp": DATACOMP}
