"""Files and flags of any content: all that comes out is UserError with one line, or the command line's exit code 2.

The examples are the same in each run (derandomize). More of foreign files is in test_table.py and test_trust.py.
"""

import contextlib
import copy
import functools
import hashlib
import json
import math
import os
import sys
import zlib
from types import SimpleNamespace

import open_clip_train.params
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from make_data import make_shards
from open_clip_train import data as openclip_data

from open_clip_train_fastclip import FastCLIPConfig, FastCLIPLoss
from open_clip_train_fastclip.checkpoint import index as indexes
from open_clip_train_fastclip.checkpoint import mid_epoch, retention
from open_clip_train_fastclip.checkpoint.index import INDEX, rank_file
from open_clip_train_fastclip.checkpoint.table import SHARDS, check_same_shards, load_state, read_index, save_state
from open_clip_train_fastclip.data.identity import DataIdentity
from open_clip_train_fastclip.data.rows import attach_row_ids, rows_identity
from open_clip_train_fastclip.data.shard_list import check_shards, shard_name
from open_clip_train_fastclip.data.tar_scan import FILE_NAME
from open_clip_train_fastclip.errors import UserError
from open_clip_train_fastclip.openclip import checks, released_flags
from open_clip_train_fastclip.openclip import settings as flag_settings
from open_clip_train_fastclip.openclip.flags import FLAGS
from open_clip_train_fastclip.openclip.hooks import Run
from open_clip_train_fastclip.openclip.pipeline import manifest_of

DATA = DataIdentity("abc")
N, NUM_SHARDS, PER_SHARD = 13, 3, 2


def fuzz(max_examples):
    """The same examples in each run; a fixture serves all of them, and every example writes its files anew."""
    return settings(
        max_examples=max_examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


def outcome(function, *args, **kwargs):
    """What the call returns; None for a UserError, which is one line. Any other exception is the test's failure."""
    try:
        return function(*args, **kwargs)
    except UserError as error:
        assert str(error) and len(str(error).splitlines()) == 1, repr(str(error))
        return None


# ------------------------------------------------------------------ what to write into files

wild_names = st.sampled_from(
    ["", ".", "..", "../../etc/passwd", "/etc/passwd", "a/b.tar", "00000.tar\n", "\0", "__proto__", "nan", "🖼.tar"]
) | st.text(max_size=6)
wild_numbers = st.sampled_from(
    [0, -1, 1, 2**31, 2**53, 2**63 - 1, 2**63, 2**64, 10**30, -(2**63), 10**400, 0.5, -0.0, 1e308, math.inf, math.nan]
) | st.integers(min_value=-5, max_value=20)
json_values = wild_numbers | st.recursive(
    st.none() | st.booleans() | wild_numbers | wild_names,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(wild_names, inner, max_size=3),
    max_leaves=6,
)


@st.composite
def damaged(draw, content: bytes) -> bytes:
    """Bytes cut off, flipped, put in, repeated, or something else entirely."""
    kind = draw(st.sampled_from(["cut", "flip", "insert", "repeat", "other"]))
    place = draw(st.integers(0, len(content)))
    if kind == "cut":
        return content[:place]
    if kind == "flip":
        return (
            content[:place]
            + bytes(byte ^ draw(st.integers(1, 255)) for byte in content[place : place + 3])
            + content[place + 3 :]
        )
    if kind == "insert":
        return content[:place] + draw(st.binary(max_size=12)) + content[place:]
    if kind == "repeat":
        return content[:place] + content[: place // 2] + content[place:]
    return draw(st.binary(max_size=100) | json_values.map(lambda value: json.dumps(value).encode()))


@st.composite
def mutated(draw, value):
    """`value` (of JSON) with one to three places in it changed, taken away, or added."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        place = value
        while isinstance(place, dict | list) and place:
            key = draw(st.sampled_from(sorted(place) if isinstance(place, dict) else list(range(len(place)))))
            if isinstance(place[key], dict | list) and place[key] and draw(st.integers(0, 3)):
                place = place[key]
                continue
            change = draw(st.sampled_from(["value", "value", "delete", "add", "twice"]))
            if change == "delete":
                del place[key]
            elif change == "value" or isinstance(place, dict):
                place[draw(wild_names) if change == "add" else key] = draw(json_values)
            else:
                place.insert(key, place[key] if change == "twice" else draw(json_values))
            break
    return value


# ------------------------------------------------------------------ nothing but the data's own files is touched


class _Watch:
    """Names of the files that Python opens while it is on."""

    def __init__(self):
        self.names = None
        sys.addaudithook(self._hook)

    def _hook(self, event, args):
        if self.names is not None and event == "open" and isinstance(args[0], str | bytes):
            self.names.append(os.path.realpath(os.fsdecode(args[0])))

    @contextlib.contextmanager
    def only_below(self, folder):
        """Fail if the body opens a file that is not below `folder`."""
        self.names = []
        try:
            yield
        finally:
            names, self.names = self.names, None
        root = os.path.realpath(folder) + os.sep  # apart from modules that Python imports late, such as codecs
        outside = [name for name in names if not name.startswith(root) and not name.endswith((".py", ".pyc", ".so"))]
        assert not outside, outside


@pytest.fixture(scope="session")
def watch():
    return _Watch()


# ------------------------------------------------------------------ a saved state


def new_loss():
    return FastCLIPLoss(FastCLIPConfig(loss="fastclip-v3", num_samples=N))


@pytest.fixture(scope="module")
def state(tmp_path_factory):
    """A state in two files, as two ranks write them: its folder, the contents of its index, bytes of its files."""
    folder = tmp_path_factory.mktemp("state") / "epoch_1.fastclip"
    save_state(new_loss(), folder, 1, data=DATA, settings={"rho": 6.5, "gamma": 0.2}, global_batch_size=8)
    return folder, read_index(folder), (folder / rank_file(0, 1)).read_bytes()


def write_index(folder, content):
    """With the checksum that fits, as somebody who means harm would write it."""
    if isinstance(content, dict):
        content = {name: value for name, value in content.items() if name != "crc32"}
        content["crc32"] = zlib.crc32(json.dumps(content, sort_keys=True).encode())
    (folder / INDEX).write_text(json.dumps(content))


def load(folder):
    """A loss with the state; if there is a UserError, None, and the loss must be as it was."""
    loss = new_loss()
    before = loss.table.rows.clone(), loss.tau_state(), loss.step
    if outcome(load_state, loss, folder, DATA) is None:
        assert (loss.tau_state(), loss.step) == before[1:]
    assert loss.table.rows.shape == before[0].shape and type(loss.step) is int
    return loss


@fuzz(150)
@given(data=st.data())
def test_index_of_any_bytes(state, watch, data):
    folder, index, _ = state
    content = data.draw(damaged(json.dumps(index, indent=1).encode()))
    (folder / INDEX).write_bytes(content)
    with watch.only_below(folder):
        load(folder)


@fuzz(250)
@given(data=st.data())
def test_index_of_any_content(state, watch, data):
    folder, index, _ = state
    write_index(folder, data.draw(mutated(index)))
    with watch.only_below(folder):
        load(folder)


@fuzz(50)
@given(data=st.data())
def test_index_with_a_key_twice(state, data):
    folder, index, _ = state
    key = data.draw(st.sampled_from(sorted(index)))
    text = json.dumps(index)
    (folder / INDEX).write_text(f"{text[:-1]}, {json.dumps(key)}: {json.dumps(data.draw(json_values))}}}")
    load(folder)


def write_rank_file(folder, index, content):
    (folder / rank_file(0, 1)).write_bytes(content)
    index = copy.deepcopy(index)
    index["files"][0] |= {"bytes": len(content), "crc32": zlib.crc32(content)}
    write_index(folder, index)


@fuzz(150)
@given(data=st.data())
def test_rank_file_of_any_bytes(state, watch, data):
    folder, index, good = state
    write_rank_file(folder, index, data.draw(damaged(good)))
    with watch.only_below(folder):
        load(folder)


@fuzz(250)
@given(data=st.data())
def test_rank_file_with_any_header(state, watch, data):
    folder, index, good = state
    length = int.from_bytes(good[:8], "little")
    header, body = json.loads(good[8 : 8 + length]), good[8 + length :]
    header = json.dumps(data.draw(mutated(header))).encode()
    length = data.draw(st.just(len(header)) | st.sampled_from([0, 2**31, 2**63, 2**64 - 1]))
    write_rank_file(folder, index, length.to_bytes(8, "little") + header + body)
    with watch.only_below(folder):
        load(folder)


@fuzz(150)
@given(data=st.data())
def test_shards_of_a_state(tmp_path, data):
    now = [["00000.tar", 3], ["00001.tar", 4]]
    content = data.draw(mutated(now).map(lambda value: json.dumps(value).encode()) | damaged(json.dumps(now).encode()))
    (tmp_path / SHARDS).write_bytes(content)
    outcome(check_same_shards, tmp_path, hashlib.sha256(content).hexdigest(), DataIdentity("abc", json.dumps(now)))


@fuzz(200)
@given(data=st.data())
def test_settings_of_a_state(data):
    args = resolve(["--train-data", "{000..009}.tar", "--loss", "fastclip-v3"])
    good = flag_settings.config_from_args(args, num_samples=10, global_batch_size=8).resolved()
    stored = data.draw(mutated(good) | st.dictionaries(st.sampled_from([*good, "loss", "lr"]), json_values))
    config = outcome(flag_settings.config_from_args, args, num_samples=10, global_batch_size=8, stored=stored)
    assert config is None or config.loss == args.loss


# ------------------------------------------------------------------ a run saved inside an epoch


@pytest.fixture(scope="module")
def saved_run(tmp_path_factory):
    """Folder and index of a mid-epoch checkpoint without a state of FastCLIP."""
    folder = tmp_path_factory.mktemp("saved") / "epoch_1_step_2"
    tensors = {"data": {"samples": torch.tensor([8])}, "generator": {"torch": torch.get_rng_state()}}
    entry = mid_epoch.write_part(mid_epoch.RankPart(0, tensors, None, {"epoch": 1}), folder, 1)
    layout = mid_epoch.Layout(num_batches=1, accum_freq=1, world_size=1, workers=1, batch_size=1)
    mid_epoch.complete(folder, mid_epoch.Header(1, 1, 1, layout, 0, "clip", DATA), None, [entry])
    return folder, mid_epoch.read_index(folder)


def read_saved_run(folder):
    index = mid_epoch.read_index(folder)
    mid_epoch.check_files(folder, index["files"])
    return index, mid_epoch.read_tensors(folder, index)


@fuzz(250)
@given(data=st.data())
def test_index_of_a_saved_run(saved_run, watch, data):
    folder, index = saved_run
    if data.draw(st.booleans()):
        write_index(folder, data.draw(mutated(index)))
    else:
        (folder / INDEX).write_bytes(data.draw(damaged(json.dumps(index).encode())))
    with watch.only_below(folder):
        outcome(read_saved_run, folder)
        ((epoch, share, found),) = retention.mid_epoch_checkpoints(folder.parent)
    assert found == folder and epoch >= 0 and (0 <= share <= 1 or share == retention.DAMAGED)


def test_index_of_a_run_on_more_ranks_than_files(saved_run, monkeypatch):
    """Not a name is made for them: there could be 2^62."""
    folder, index = saved_run
    write_index(folder, {**index, "world_size": 10**5})
    named = []
    monkeypatch.setattr(indexes, "rank_file", lambda *place: named.append(place))
    assert outcome(mid_epoch.read_index, folder) is None and len(named) <= 1


@fuzz(100)
@given(data=st.data())
def test_rank_file_of_a_saved_run(saved_run, watch, data):
    folder, index = saved_run
    path = folder / rank_file(0, 1)
    good = path.read_bytes()
    content = data.draw(damaged(good))
    try:
        path.write_bytes(content)
        index = copy.deepcopy(index)
        index["files"][1] |= {"bytes": len(content), "crc32": zlib.crc32(content)}
        write_index(folder, index)
        with watch.only_below(folder):
            outcome(read_saved_run, folder)
    finally:
        path.write_bytes(good)


# ------------------------------------------------------------------ the sizes of shards


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """A pattern for --train-data; beside the shards nothing."""
    return make_shards(tmp_path_factory.mktemp("shards") / "data", shards=NUM_SHARDS, per_shard=PER_SHARD)


@contextlib.contextmanager
def beside(shards, name, content: bytes):
    """A file beside the shards; afterwards nothing but the shards is there, and nothing is around their folder."""
    folder = os.path.dirname(shards)
    try:
        with open(os.path.join(folder, name), "wb") as file:
            file.write(content)
        yield folder
        assert os.listdir(os.path.dirname(folder)) == [os.path.basename(folder)]
    finally:
        for other in os.listdir(folder):
            if not other.endswith(".tar"):
                os.unlink(os.path.join(folder, other))


def read_counts(shards, watch):
    """Counts of the shards as the manifest has them, which are numbers that a table can be made for; or None."""
    with watch.only_below(os.path.dirname(shards)):
        manifest = outcome(manifest_of, shards)
    if manifest is None:
        return None
    assert all(type(count) is int and 0 <= count < 2**48 for count in manifest.counts), manifest.counts
    assert manifest.num_samples > 0 and len(manifest.counts) == NUM_SHARDS
    return manifest.counts


SIZES = {f"{shard:05d}.tar": PER_SHARD for shard in range(NUM_SHARDS)}


@fuzz(200)
@given(data=st.data())
def test_sizes_json(shards, watch, data):
    content = data.draw(
        mutated(SIZES).map(lambda value: json.dumps(value).encode()) | damaged(json.dumps(SIZES).encode())
    )
    with beside(shards, "sizes.json", content):
        read_counts(shards, watch)


@fuzz(100)
@given(data=st.data())
def test_stats_json(shards, watch, data):
    stats = {"count": 4, "successes": PER_SHARD, "failed_to_download": 2, "status_dict": {"success": PER_SHARD}}
    content = data.draw(
        mutated(stats).map(lambda value: json.dumps(value).encode()) | damaged(json.dumps(stats).encode())
    )
    with beside(shards, "00001_stats.json", content):
        read_counts(shards, watch)


@fuzz(150)
@given(data=st.data())
def test_cache_of_a_scan(shards, watch, data):
    folder = os.path.dirname(shards)
    stats = {name: os.stat(os.path.join(folder, name)) for name in SIZES}
    cached = {name: [PER_SHARD, stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}
    content = data.draw(
        mutated(cached).map(lambda value: json.dumps(value).encode()) | damaged(json.dumps(cached).encode())
    )
    with beside(shards, FILE_NAME, content):
        read_counts(shards, watch)


@pytest.mark.parametrize("name", ["../{0}", "/etc/{0}", "{0}/../{0}"])
def test_names_in_sizes_lead_nowhere(shards, watch, name):
    """A size is looked up by the shard's own name, so another path to a file of that name is none of the shards."""
    sizes = {name.format(shard): 1000 for shard in SIZES}
    for file in ("sizes.json", FILE_NAME):
        with beside(shards, file, json.dumps(sizes).encode()):
            assert read_counts(shards, watch) == (PER_SHARD,) * NUM_SHARDS


PIECES = ["{", "}", "..", ",", "0", "07", "a", "::", "/", "[", "]", "http://", "http://[", "pipe:",
          "file:", "x://", "~", "*", ".tar", "\\", " ", "%2F", "#", "@", ":", "é", "?"]  # fmt: skip


@fuzz(300)
@given(data=st.lists(st.sampled_from(PIECES), min_size=1, max_size=8).map("".join))
def test_any_name_of_shards(data):
    for url in outcome(check_shards, data) or ():
        shard_name(url)


# ------------------------------------------------------------------ tables


@pytest.mark.filterwarnings("ignore:.*pin_memory")
@fuzz(250)
@given(data=st.data())
def test_table_of_any_content(tmp_path, data):
    """The check before anything is built, then the table as a run reads it, which it passes, and its rows."""
    good = "filepath\ttitle\n/data/1.png\ta cat\n/data/2.png\ta dog\n"
    lines = st.lists(st.text(st.sampled_from('ab\t,;"\r\n\0 é1'), max_size=12), max_size=5).map("\n".join)
    other = lines | lines.map(lambda text: "filepath\ttitle\n" + text) | st.just(good.replace("title", "name"))
    path = tmp_path / data.draw(st.sampled_from(["data.csv", "data.tsv"]))
    path.write_bytes(data.draw(damaged(good.encode()) | other.map(str.encode)))
    args = SimpleNamespace(
        device="cpu",
        dataset_type=data.draw(st.sampled_from(["csv", "auto"])),
        csv_separator=data.draw(st.sampled_from(["\t", ",", "\t\t", '"', "(", "é"])),
        csv_img_key=data.draw(st.sampled_from(["filepath", "url"])),
        csv_caption_key="title",
        train_data=str(path),
        rank=1,
        distributed=False,
        batch_size=1,
        workers=0,
    )
    try:
        checks._check_data("--train-data", str(path), args)
    except UserError as error:
        assert len(str(error).splitlines()) == 1
        return
    loaders = []

    def read(args, *_, **__):
        info = openclip_data.get_csv_dataset(args, lambda image: torch.zeros(1), True, tokenizer=lambda _: [0])
        loaders.append(info.dataloader)
        return {}

    run = Run()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(openclip_data, "CsvDataset", functools.partial(run.csv_dataset, None))
        run.get_data(read, args, None)
    assert len(rows_identity(loaders[0].dataset).hash) == 64
    loader, _ = attach_row_ids(loaders[0], 0, SimpleNamespace(get_value=lambda: 0))
    assert outcome(next, iter(loader)) is None, "no image is there"


# ------------------------------------------------------------------ flags

WORDS = [
    "",
    "x",
    "nan",
    "inf",
    "-inf",
    "1e400",
    "1e-400",
    "0",
    "-1",
    "0.5",
    "1",
    "7",
    "2147483648",
    "9" * 5000,
    "-",
]
words = st.sampled_from([*WORDS, "²", "１", "0x10", "1_0", "\0", "\ud800", "../..", "~", "%s", "{0..3}.tar", "@x"])
OURS = {flag.name: flag.options for flag in (*FLAGS, *released_flags.FLAGS)}
FLAG_NAMES = sorted(OURS) + sorted(released_flags.SPELLINGS.values())
STOCK = {  # flags of OpenCLIP that ours are checked against
    "--epochs", "--batch-size", "--accum-freq", "--lr", "--beta1", "--beta2", "--eps", "--warmup", "--opt", "--model",
    "--lr-scheduler", "--resume", "--train-data", "--train-num-samples", "--dataset-type", "--seed", "--workers",
    "--train-data-upsampling-factors", "--csv-separator", "--save-frequency", "--epochs-cooldown", "--precision",
}  # fmt: skip


def resolve(argv):
    """What main() does with its arguments before anything is built: the namespace, or None for exit code 2."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(open_clip_train.params, "argparse", SimpleNamespace(ArgumentParser=flag_settings.MergedParser))
        try:
            args = open_clip_train.params.parse_args(argv)
        except SystemExit as error:
            assert error.code == 2
            return None
    flag_settings.resolve(args)
    return args


@st.composite
def flag_and_value(draw, name):
    options = OURS.get(name, {})
    if options.get("action") == "store_true":
        return [name]
    value = draw(words | st.sampled_from([str(choice) for choice in options.get("choices", ["1e-3"])]))
    return [f"{name}={value}"] if draw(st.booleans()) else [name, value]


@fuzz(400)
@given(data=st.data())
def test_flags_of_any_value(data):
    names = data.draw(st.lists(st.sampled_from(FLAG_NAMES) | st.sampled_from(sorted(STOCK)), min_size=1, max_size=3))
    loss = data.draw(st.sampled_from(OURS["--loss"]["choices"]))
    argv = ["--train-data", "{000..009}.tar", "--loss", loss]
    for name in names:
        argv += data.draw(flag_and_value(name))
    args = outcome(resolve, argv)
    if args is not None and checks.is_fastclip(args):
        config = flag_settings.config_from_args(args, num_samples=10, global_batch_size=8, total_steps=10)
        torch.tensor([config.temperature, config.gamma, config.eps, config.rho, config.tau_lr]).isfinite().all().item()
