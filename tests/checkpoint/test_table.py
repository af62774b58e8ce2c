"""FastCLIP's state on the disk: any number of ranks, crashes, damage, foreign files."""

import copy
import json
import os
import resource
import shutil
import zlib
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import run_ranks
from safetensors.torch import load_file, save_file

from open_clip_train_fastclip import FastCLIPConfig, FastCLIPLoss
from open_clip_train_fastclip.checkpoint import atomic
from open_clip_train_fastclip.checkpoint import index as indexes
from open_clip_train_fastclip.checkpoint.atomic import atomic_torch_save
from open_clip_train_fastclip.checkpoint.pt_files import with_note
from open_clip_train_fastclip.checkpoint.retention import prune_states
from open_clip_train_fastclip.checkpoint.table import load_state, read_index, save_state, state_dir
from open_clip_train_fastclip.data.identity import DataIdentity
from open_clip_train_fastclip.errors import UserError

N = 13  # over 4 ranks: 4, 4, 4 and 1 rows
DATA = DataIdentity("abc")
SAVED = {"epoch": 3, "data": DATA, "settings": {"rho": 6.5, "gamma": 0.2}, "global_batch_size": 8}


def make_loss(name="fastclip-v3", num_samples=N, seed=None):
    """A loss whose state is drawn from `seed`, the same values on any number of ranks; without seed a fresh one."""
    loss = FastCLIPLoss(FastCLIPConfig(loss=name, num_samples=num_samples))
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randn(num_samples, len(loss.table.columns), generator=generator)
        rows[::3, :2] = -torch.inf
        loss.table.rows[:-1] = rows[loss.table.start : loss.table.stop]
        loss.load_tau_state({key: torch.rand((), generator=generator).item() for key in loss.tau_state()})
        loss.step = 123
        loss.recount()
    return loss


def contents(loss):
    """All that a state holds, for comparison bit by bit."""
    table = {name: column.numpy().tobytes() for name, column in loss.full_state().items()}
    return table, loss.tau_state(), loss.step, loss.visited.item()


def on_ranks(world_size, function):
    return [function()] if world_size == 1 else run_ranks(world_size, function)


def save(folder, world_size=1, name="fastclip-v3", num_samples=N, seed=0):
    on_ranks(world_size, lambda: save_state(make_loss(name, num_samples, seed), folder, **SAVED))


def load(folder, name="fastclip-v3", num_samples=N, data=DATA):
    loss = make_loss(name, num_samples)
    load_state(loss, folder, data)
    return loss


def message_of(function, *args, **kwargs):
    """The one line of the UserError that the call raises."""
    with pytest.raises(UserError) as caught:
        function(*args, **kwargs)
    message = str(caught.value)
    assert message and "\n" not in message
    return message


# ------------------------------------------------------------------ any number of ranks


@pytest.mark.parametrize(("name", "num_samples"), [("fastclip-v3", N), ("fastclip-v2", N), ("fastclip-v1", 2)])
def test_saved_on_four_ranks_and_loaded_on_others_and_back(tmp_path, name, num_samples):
    expected = contents(make_loss(name, num_samples, seed=0))
    save(tmp_path / "on4", 4, name, num_samples)
    for world_size in (2, 3, 1):

        def load_and_save_again(world_size=world_size):
            loss = load(tmp_path / "on4", name, num_samples)
            save_state(loss, tmp_path / f"on{world_size}", **SAVED)
            return contents(loss)

        assert on_ranks(world_size, load_and_save_again) == [expected] * world_size
    results = run_ranks(4, lambda: [contents(load(tmp_path / f"on{k}", name, num_samples)) for k in (2, 3, 1)])
    assert results == [[expected] * 3] * 4


def test_training_goes_on_as_if_nothing_had_happened(tmp_path):
    def steps(loss, numbers):
        for number in numbers:
            generator = torch.Generator().manual_seed(number)
            features = torch.randn(2, 4, 8, generator=generator)
            features = torch.nn.functional.normalize(features, dim=-1).requires_grad_()
            loss.start_epoch(number // 2)
            loss(*features, torch.randperm(N, generator=generator)[:4]).backward()
        return contents(loss), features.grad

    for name in ("fastclip-v0", "fastclip-v2", "fastclip-v3"):
        loss = make_loss(name)
        steps(loss, range(3))
        save_state(loss, tmp_path / name, **SAVED)
        undisturbed, gradient = steps(loss, range(3, 6))
        resumed, resumed_gradient = steps(load(tmp_path / name, name), range(3, 6))
        assert resumed == undisturbed
        assert torch.equal(resumed_gradient, gradient)


def test_float64_table_is_kept_exactly_and_not_mixed_with_float32(tmp_path):
    config = FastCLIPConfig(loss="sogclr", num_samples=N, table_dtype=torch.float64)
    loss = FastCLIPLoss(config)
    loss.table.rows.copy_(torch.randn(N + 1, 2, dtype=torch.float64))
    save_state(loss, tmp_path / "s", **SAVED)
    again = FastCLIPLoss(config)
    load_state(again, tmp_path / "s", DATA)
    assert torch.equal(again.table.rows[:-1], loss.table.rows[:-1])
    assert "dtype" in message_of(load, tmp_path / "s", "sogclr")


def test_what_lies_in_the_folder(tmp_path):
    folder = state_dir(tmp_path / "checkpoints", 3)
    old_umask = os.umask(0o027)
    try:
        save(folder, 2)
    finally:
        os.umask(old_umask)
    assert folder == tmp_path / "checkpoints" / "epoch_3.fastclip"
    files = ["index.json", "rank-00000-of-00002.safetensors", "rank-00001-of-00002.safetensors"]
    assert sorted(path.name for path in folder.iterdir()) == files
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    assert all(path.stat().st_mode & 0o777 == 0o640 for path in folder.iterdir())
    index = read_index(folder)
    assert (index["epoch"], index["manifest_hash"], index["global_batch_size"]) == (3, "abc", 8)
    assert index["settings"] == SAVED["settings"]
    assert (index["loss"], index["num_samples"], index["step"], index["dtype"]) == ("fastclip-v3", N, 123, "float32")
    column = load_file(folder / files[2])["log_u_text"]
    assert torch.equal(column, make_loss(seed=0).table.local("log_u_text")[7:])


def test_note_in_the_checkpoint_loads_as_weights_only(tmp_path):
    atomic_torch_save(with_note({"epoch": 3}, "fastclip-v3"), tmp_path / "a.pt")
    note = {"loss": "fastclip-v3", "epoch": 3}
    assert torch.load(tmp_path / "a.pt", weights_only=True) == {"epoch": 3, "fastclip": note}


# ------------------------------------------------------------------ crashes and full disks


def test_leftover_of_a_killed_save_is_ignored_and_replaced(tmp_path):
    folder, leftover = tmp_path / "epoch_3.fastclip", tmp_path / "epoch_3.fastclip.tmp"
    leftover.mkdir()
    (leftover / "index.json").write_text("{")
    (leftover / "rank-00007-of-00008.safetensors").write_text("half a fi")
    assert "index.json is missing" in message_of(load, folder)
    save(folder, 2)
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]
    assert "rank-00007-of-00008.safetensors" not in {path.name for path in folder.iterdir()}
    assert contents(load(folder)) == contents(make_loss(seed=0))


def test_killed_before_the_folder_has_its_name_the_old_state_stays(tmp_path):
    folder = tmp_path / "epoch_3.fastclip"
    save(folder, seed=1)

    def killed(*args):
        os._exit(9)

    def save_and_die():
        atomic.sync = killed
        save(folder, seed=2)

    with pytest.raises(RuntimeError, match="died"):
        run_ranks(1, save_and_die)
    assert (tmp_path / "epoch_3.fastclip.tmp").exists()
    assert contents(load(folder)) == contents(make_loss(seed=1))
    save(folder, seed=2)
    assert contents(load(folder)) == contents(make_loss(seed=2))
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


def test_killed_while_one_state_replaces_another_the_old_one_is_found(tmp_path):
    folder = state_dir(tmp_path, 3)
    save(folder, seed=1)

    def save_and_die():
        atomic.Path.rename = lambda path, target: os.rename(path, target) or os._exit(9)
        save(folder, seed=2)

    with pytest.raises(RuntimeError, match="died"):
        run_ranks(1, save_and_die)
    assert not folder.exists()
    assert read_index(folder)["epoch"] == 3
    assert contents(load(folder)) == contents(make_loss(seed=1))
    prune_states(tmp_path, keep={3})
    assert contents(load(folder)) == contents(make_loss(seed=1))
    save(folder, seed=2)
    assert contents(load(folder)) == contents(make_loss(seed=2))
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


def test_everything_is_synced_before_the_folder_gets_its_name(tmp_path, monkeypatch):
    events = []
    sync, rename = atomic.sync, Path.rename
    for module in (atomic, indexes):
        monkeypatch.setattr(module, "sync", lambda path: (events.append(path.name), sync(path)))
    monkeypatch.setattr(Path, "rename", lambda path, target: (events.append("rename"), rename(path, target)))
    save(tmp_path / "s")
    assert events == ["rank-00000-of-00001.safetensors", "index.json", "s.tmp", "rename", tmp_path.name]


def small_disk(size):
    """From here on no file of this process grows beyond `size` bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def test_full_disk_is_an_error_on_every_rank_and_the_old_state_stays(tmp_path):
    folder = tmp_path / "epoch_3.fastclip"
    save(folder, 2, num_samples=2000, seed=1)

    def save_where_rank_1_has_no_space():
        loss = make_loss(num_samples=2000, seed=2)
        if dist.get_rank() == 1:
            small_disk(1000)
        return message_of(save_state, loss, folder, **SAVED)

    messages = run_ranks(2, save_where_rank_1_has_no_space)
    assert messages[0] == messages[1]
    assert "rank-00001-of-00002.safetensors cannot be written" in messages[0] and "File too large" in messages[0]
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]
    assert contents(load(folder, num_samples=2000)) == contents(make_loss(num_samples=2000, seed=1))


def test_atomic_save_keeps_the_old_file_when_it_fails(tmp_path):
    path = tmp_path / "epoch_3.pt"
    atomic_torch_save({"epoch": 3}, path)

    def fail():
        small_disk(1000)
        return message_of(atomic_torch_save, {"weights": torch.zeros(5000)}, path)

    assert "epoch_3.pt cannot be written" in run_ranks(1, fail)[0]
    with pytest.raises(AttributeError):  # a local function cannot be pickled: the caller's mistake, not the disk's
        atomic_torch_save({"epoch": fail}, path)
    assert [file.name for file in tmp_path.iterdir()] == ["epoch_3.pt"]
    assert torch.load(path, weights_only=True) == {"epoch": 3}
    assert "cannot be written" in message_of(atomic_torch_save, {}, tmp_path / "nowhere" / "a.pt")


def test_atomic_save_puts_a_new_file_in_the_place_of_the_old_one(tmp_path):
    atomic_torch_save({"epoch": 3}, tmp_path / "epoch_latest.pt")
    os.link(tmp_path / "epoch_latest.pt", tmp_path / "old")
    atomic_torch_save({"epoch": 4}, tmp_path / "epoch_latest.pt")
    assert torch.load(tmp_path / "old", weights_only=True) == {"epoch": 3}
    assert torch.load(tmp_path / "epoch_latest.pt", weights_only=True) == {"epoch": 4}


def test_atomic_save_under_a_name_that_is_no_checkpoint(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(torch, "save", lambda obj, file: seen.append(Path(file.name).name))
    atomic_torch_save({}, tmp_path / "epoch_3.pt")
    assert seen == ["epoch_3.pt.tmp"]


def test_a_rank_without_the_shared_disk_is_told(tmp_path):
    def save_elsewhere():
        folder = tmp_path / f"node{dist.get_rank()}" / "s"
        return message_of(save_state, make_loss(seed=0), folder, **SAVED)

    messages = run_ranks(2, save_elsewhere)
    assert messages[0] == messages[1] and "written by another rank" in messages[0]


def test_states_go_when_no_checkpoint_names_them(tmp_path):
    for epoch in range(1, 8):
        save(state_dir(tmp_path, epoch))
    state_dir(tmp_path, 5).rename(tmp_path / "epoch_5.fastclip.old")
    for name in ("epoch_2.pt", "epoch_4.pt", "epoch_latest.pt", "epoch_5.pt.tmp", "epoch_6_best.pt"):
        (tmp_path / name).touch()
    (tmp_path / "epoch_2.fastclip.tmp").mkdir()
    (tmp_path / "epoch_2.fastclip.old").mkdir()
    (tmp_path / "epoch_x.fastclip").mkdir()
    (tmp_path / "notes").mkdir()
    prune_states(tmp_path, keep={7})
    kept = {path.name for path in tmp_path.iterdir() if path.is_dir()}
    assert kept == {"epoch_2.fastclip", "epoch_4.fastclip", "epoch_7.fastclip", "epoch_x.fastclip", "notes"}
    read_index(state_dir(tmp_path, 4))


# ------------------------------------------------------------------ damage and other runs


def flip_bit(path, position):
    data = bytearray(path.read_bytes())
    data[position] ^= 4
    path.write_bytes(data)


DAMAGES = {
    "missing": (lambda file: file.unlink(), "is missing"),
    "empty": (lambda file: file.write_bytes(b""), "has 0 bytes"),
    "truncated": (lambda file: file.write_bytes(file.read_bytes()[:-5]), "bytes and should have"),
    "longer": (lambda file: file.write_bytes(file.read_bytes() + b"0"), "bytes and should have"),
    "bit of a number": (lambda file: flip_bit(file, -3), "checksum"),
    "bit of the header": (lambda file: flip_bit(file, 20), "checksum"),
    "a folder": (lambda file: (file.unlink(), file.mkdir()), "is missing"),
}


LAST_FILE = "rank-00002-of-00003.safetensors"


def test_damaged_rank_file_is_named_on_every_rank(tmp_path):
    save(tmp_path / "good", 3)
    for damage, (harm, _) in DAMAGES.items():
        shutil.copytree(tmp_path / "good", tmp_path / damage)
        harm(tmp_path / damage / LAST_FILE)

    messages = run_ranks(2, lambda: [message_of(load, tmp_path / damage) for damage in DAMAGES])
    assert messages[0] == messages[1]
    for message, (damage, (_, expected)) in zip(messages[0], DAMAGES.items(), strict=True):
        assert expected in message and str(tmp_path / damage / LAST_FILE) in message
        assert "--fastclip-fresh-state" in message


def test_state_of_another_run_is_refused_on_every_rank(tmp_path):
    save(tmp_path / "s", 3)
    cases = {
        "state of 'fastclip-v3'": {"name": "fastclip-v0"},
        "'fastclip-v3' and this run is fastclip-v2": {"name": "fastclip-v2"},
        "holds 13 samples and this run has 14": {"num_samples": 14},
        "other training data ('abc', this run has 'abd')": {"data": DataIdentity("abd")},
    }
    messages = run_ranks(2, lambda: [message_of(load, tmp_path / "s", **case) for case in cases.values()])
    assert messages[0] == messages[1]
    for message, expected in zip(messages[0], cases, strict=True):
        assert expected in message and str(tmp_path / "s") in message and "--fastclip-fresh-state" in message


def test_missing_index_or_folder(tmp_path):
    assert "index.json is missing" in message_of(read_index, tmp_path / "nowhere")
    save(tmp_path / "s")
    (tmp_path / "s" / "index.json").unlink()
    (tmp_path / "s" / "index.json").mkdir()
    assert "index.json is missing" in message_of(read_index, tmp_path / "s")


def test_any_flipped_bit_of_the_index_is_found(tmp_path):
    save(tmp_path / "s")
    path = tmp_path / "s" / "index.json"
    good = path.read_bytes()
    for position in range(len(good)):
        flip_bit(path, position)
        try:
            assert read_index(tmp_path / "s") == json.loads(good)  # whitespace
        except UserError as error:
            assert str(path) in str(error)
        path.write_bytes(good)


# ------------------------------------------------------------------ foreign files


@pytest.fixture(scope="module")
def crafted(tmp_path_factory):
    """A state, the contents of its index, and a function that writes an index with a right checksum."""
    folder = tmp_path_factory.mktemp("crafted") / "s"
    save(folder, 2)
    index = read_index(folder)

    def write(content):
        content = {name: value for name, value in content.items() if name != "crc32"}
        checksum = zlib.crc32(json.dumps(content, sort_keys=True).encode())
        (folder / "index.json").write_text(json.dumps({**content, "crc32": checksum}))

    return folder, index, write


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None)
@given(data=st.binary(max_size=200) | json_values.map(lambda value: json.dumps(value).encode()))
def test_index_of_nonsense(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("nonsense")
    (folder / "index.json").write_bytes(data)
    assert "index.json is damaged" in message_of(read_index, folder)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_index_with_one_wild_value(crafted, data):
    """A right checksum does not help: what the index says is checked, and a loss takes nothing that does not fit."""
    folder, good, write = crafted
    index = copy.deepcopy(good)
    place = index
    while isinstance(place, dict | list) and place:
        key = data.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
        if not (isinstance(place[key], dict | list) and place[key]) or data.draw(st.booleans()):
            place[key] = data.draw(json_values)
            break
        place = place[key]
    write(index)
    try:
        loaded = load(folder)
    except UserError as error:
        assert "\n" not in str(error)
    else:
        assert loaded.table.rows.shape == (N + 1, 2) and loaded.step >= 0


def test_index_with_a_number_beyond_measure(tmp_path):
    (tmp_path / "index.json").write_text('{"step": ' + "9" * 5000 + "}")
    assert "index.json is damaged" in message_of(read_index, tmp_path)


@pytest.mark.parametrize(
    "name", ["../s/rank-00000-of-00002.safetensors", "/etc/passwd", "rank-00001-of-00002.safetensors"]
)
def test_index_leads_nowhere_else(crafted, name):
    folder, good, write = crafted
    index = copy.deepcopy(good)
    index["files"][0]["name"] = name
    write(index)
    assert "rank-00000-of-00002.safetensors has no entry" in message_of(load, folder)


@pytest.mark.parametrize(
    ("changes", "files"),
    [
        ({"epoch": -1}, {}),
        ({"step": 2**63}, {}),
        ({"dtype": "bfloat16"}, {}),
        ({"global_batch_size": 0}, {}),
        ({"num_samples": True}, {}),
        ({"tau": {"log_inv_tau": float("inf")}}, {}),
        ({"settings": {"rho": [6.5]}}, {}),
        ({}, {"start": 1}),
        ({}, {"stop": 6}),
        ({}, {"stop": 8}),
        ({}, {"stop": -1}),
        ({"num_samples": 12}, {}),
        ({"num_samples": 0, "files": []}, {}),
        ({"files": [7]}, {}),
        ({"files": [{}]}, {}),
    ],
)
def test_index_that_is_not_sound(crafted, changes, files):
    folder, good, write = crafted
    index = copy.deepcopy(good)
    index["files"][0] |= files
    write(index | changes)
    assert "index.json is damaged" in message_of(read_index, folder)


def test_index_of_another_version(crafted):
    folder, good, write = crafted
    write({**good, "version": 2})
    assert "another version of open-clip-train-fastclip" in message_of(read_index, folder)


@pytest.mark.parametrize(
    "tensors",
    [
        {"log_u_image": torch.zeros(7)},
        {"log_u_image": torch.zeros(7), "log_u_text": torch.zeros(7), "../../x": torch.zeros(7)},
        {"log_u_image": torch.zeros(7), "log_u_text": torch.zeros(6)},
        {"log_u_image": torch.zeros(7), "log_u_text": torch.zeros(7, 1)},
        {"log_u_image": torch.zeros(7), "log_u_text": torch.zeros(())},
        {"log_u_image": torch.zeros(7), "log_u_text": torch.zeros(7, dtype=torch.float64)},
        {"log_u_image": torch.zeros(7), "log_u_text": torch.zeros(7, dtype=torch.int32)},
        {"log_u_image": torch.zeros(7), "LOG_U_TEXT": torch.zeros(7)},
        {},
        b"",
        b"\xff" * 100,
        (2**62).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"[]",
    ],
)
def test_rank_file_with_wild_names_shapes_or_dtypes(crafted, tensors):
    folder, good, write = crafted
    index = copy.deepcopy(good)
    path = folder / "rank-00000-of-00002.safetensors"
    original = path.read_bytes()
    if isinstance(tensors, dict):
        save_file(tensors, path)
    else:
        path.write_bytes(tensors)
    index["files"][0] |= {"bytes": path.stat().st_size, "crc32": zlib.crc32(path.read_bytes())}
    write(index)
    message = message_of(load, folder)
    path.write_bytes(original)
    assert str(path) in message and ("other columns" in message or "cannot be read" in message)


def test_an_unsound_state_is_not_written(tmp_path):
    loss = make_loss(seed=0)
    loss.load_tau_state({"log_inv_tau": float("nan")})
    with pytest.raises(ValueError, match="tau's log_inv_tau has numbers that are not finite"):
        save_state(loss, tmp_path / "s", **SAVED)
    assert not (tmp_path / "s").exists()
    assert indexes.STATE.fields.keys() >= {"loss", "num_samples", "manifest_hash"}
