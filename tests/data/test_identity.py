"""A resume on other shards says which is the first that differs."""

import hashlib
import json
import re
import shutil
from contextlib import nullcontext

import pytest
from cli import TINY, run_cli
from make_data import make_shards

from open_clip_train_fastclip.checkpoint.table import SHARDS, check_same_shards, write_shards
from open_clip_train_fastclip.data.identity import DataIdentity, first_difference
from open_clip_train_fastclip.data.manifest import ShardManifest
from open_clip_train_fastclip.errors import UserError

BEFORE = [("00000.tar", 1000), ("00001.tar", 999), ("00002.tar", 500)]


def identity(shards, folder="/data"):
    urls = tuple(f"{folder}/{number}/{name}" for number, (name, _) in enumerate(shards))
    return ShardManifest(urls, urls, tuple(count for _, count in shards)).identity


@pytest.mark.parametrize(
    ("now", "expected"),
    [
        (BEFORE, None),
        ([*BEFORE[:1], ("00001.tar", 1001), *BEFORE[2:]], "2, 00001.tar, which had 999 samples and has 1,001 now"),
        (BEFORE[1:], "shard 1, 00000.tar, which is missing now"),
        (BEFORE[:2], "shard 3, 00002.tar, which is missing now"),
        ([*BEFORE[:2], ("00003.tar", 500)], "shard 3, 00002.tar, which is missing now"),
        ([*BEFORE, ("00003.tar", 7)], "shard 4, 00003.tar, which is new"),
        ([("extra.tar", 7), *BEFORE], "shard 1, extra.tar, which is new"),
        ([*BEFORE, BEFORE[0]], "shard 4, 00000.tar, which is new"),
        (BEFORE[::-1], "shard 1, which was 00000.tar and is 00002.tar now: the order is another"),
        # the order comes first, though a count differs as well
        ([("00001.tar", 5), BEFORE[0], BEFORE[2]], "shard 1, which was 00000.tar and is 00001.tar now"),
    ],
)
def test_the_first_difference(now, expected, tmp_path):
    found = first_difference(identity(BEFORE).text, identity(now).text)
    assert found is None if expected is None else expected in found, found
    write_shards(tmp_path, identity(BEFORE))
    with nullcontext() if expected is None else pytest.raises(UserError, match=re.escape(expected)):
        check_same_shards(tmp_path, identity(BEFORE).hash, identity(now))


def test_the_hash_is_of_the_text_and_names_no_folder():
    text = identity(BEFORE).text
    assert json.loads(text) == [list(shard) for shard in BEFORE]
    assert identity(BEFORE).hash == hashlib.sha256(text.encode()).hexdigest() == identity(BEFORE, "/other").hash


@pytest.mark.parametrize(
    "content", [None, b"", b"[[", b"7", b"[7]", b'[["a.tar"]]', b"\xff\xfe", b'{"a": 1}', b'["a"]']
)
def test_a_file_that_is_absent_or_wild_tells_nothing(content, tmp_path):
    if content is not None:
        (tmp_path / SHARDS).write_bytes(content)
    check_same_shards(tmp_path, hashlib.sha256(content or b"").hexdigest(), identity(BEFORE))


def test_a_damaged_file_and_a_run_without_shards_tell_nothing(tmp_path):
    write_shards(tmp_path, identity(BEFORE))
    check_same_shards(tmp_path, identity(BEFORE).hash, DataIdentity.of_json_keys(7))
    check_same_shards(tmp_path, "0" * 64, identity(BEFORE[1:]))
    with pytest.raises(UserError, match="is missing now"):
        check_same_shards(tmp_path, identity(BEFORE).hash, identity(BEFORE[1:]))


# ------------------------------------------------------------------ through the command line


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    """Folder of the shards and of the checkpoints of a run, which has one inside an epoch as well."""
    folder = tmp_path_factory.mktemp("run")
    data = make_shards(folder / "data", shards=4, per_shard=8)
    flags = [*TINY, "--loss", "fastclip-v3", "--train-data", data, "--save-every", "2steps", "--keep", "9"]
    run = run_cli([*flags, "--logs", folder / "logs", "--name", "run"], folder / "out")
    assert run.ok, run
    return folder / "data", folder / "logs" / "run" / "checkpoints"


@pytest.mark.parametrize("checkpoint", ["epoch_1.pt", "epoch_0_step_2"])
@pytest.mark.parametrize(
    ("change", "shards", "expected"),
    [
        ("shorter", "{00000..00003}", "shard 3, 00002.tar, which had 8 samples and has 7 now"),
        ("none", "{00000..00002}", "shard 4, 00003.tar, which is missing now"),
        ("more", "{00000..00004}", "shard 5, 00004.tar, which is new"),
    ],
)
def test_a_resume_on_other_shards_names_the_first(checkpoint, change, shards, expected, finished_run, tmp_path):
    data, checkpoints = finished_run
    shutil.copytree(data, tmp_path / "data")
    if change == "shorter":
        make_shards(tmp_path / "data", shards=4, per_shard=[8, 8, 7, 8])
    elif change == "more":
        make_shards(tmp_path / "data", shards=5, per_shard=8)
    train_data = f"{tmp_path}/data/{shards}.tar"
    flags = [*TINY, "--loss", "fastclip-v3", "--train-data", train_data, "--resume", checkpoints / checkpoint]
    run = run_cli([*flags, "--epochs", 2, "--logs", tmp_path / "logs", "--name", "run"], tmp_path / "out", ranks=2)
    assert run.codes == [2, 2] and "Traceback" not in str(run), run
    assert expected in run.output[0] and str(checkpoints) in run.output[0], run


def test_a_checkpoint_inside_an_epoch_of_an_openclip_loss_names_them_too(tmp_path):
    data = make_shards(tmp_path / "data", shards=4, per_shard=8)
    flags = [*TINY, "--loss", "clip", "--train-data", data, "--save-every", "2steps", "--logs", tmp_path / "logs"]
    assert run_cli([*flags, "--name", "run"], tmp_path / "out").ok
    make_shards(tmp_path / "data", shards=4, per_shard=[8, 8, 7, 8])
    resume = ["--resume", tmp_path / "logs" / "run" / "checkpoints" / "epoch_0_step_2", "--name", "other"]
    run = run_cli([*flags, *resume], tmp_path / "out")
    assert run.codes == [2] and "shard 3, 00002.tar, which had 8 samples and has 7 now" in run.output[0], run
