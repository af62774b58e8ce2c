"""convert.py: checkpoints of the released code, made here from its golden runs, become ours and go on."""

import io
import json
import math
import subprocess
import sys
import tarfile
import zipfile

import numpy as np
import open_clip
import pytest
import torch
from cli import MODEL, TINY, run_cli
from PIL import Image
from reference import GLOBAL_TAU, INDIVIDUAL_TAU
from trajectories import (
    GOLDEN,
    GOLDEN_LOSSES,
    STEPS_PER_EPOCH,
    assert_close,
    golden,
    golden_settings,
    hyperparameters,
    table_tolerance,
)

from open_clip_train_fastclip import FastCLIPConfig, FastCLIPLoss
from open_clip_train_fastclip.checkpoint.released import RELEASED_LOSSES
from open_clip_train_fastclip.checkpoint.table import load_state, read_index
from open_clip_train_fastclip.convert import convert, main
from open_clip_train_fastclip.data.identity import DataIdentity
from open_clip_train_fastclip.errors import UserError

EPOCH, STEP = 2, 2 * STEPS_PER_EPOCH  # the released checkpoints here are those after two epochs
TABLES = [f"{name}_{side}" for name in ("tau", "m_grad_tau", "v_grad_tau", "bound") for side in ("im", "tt")]


@pytest.fixture(scope="module")
def model_name(tmp_path_factory):
    """A tiny CLIP that open_clip can make by its name."""
    folder = tmp_path_factory.mktemp("models")
    config = {
        "embed_dim": 8,
        "vision_cfg": {"image_size": 16, "layers": 1, "width": 16, "head_width": 8, "patch_size": 8},
        "text_cfg": {"context_length": 8, "vocab_size": 32, "width": 16, "heads": 2, "layers": 1},
    }
    (folder / "tiny-clip.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)
    return "tiny-clip"


def is_gain_or_bias(name, parameter):
    return (parameter.ndim < 2 and "logit_scale" not in name) or "bn" in name or "ln" in name or "bias" in name


def two_groups(model):
    """Parameters as OpenCLIP groups them when logit_scale is frozen."""
    named = [(n, p) for n, p in model.named_parameters() if n != "logit_scale"]
    return [
        {"params": [p for n, p in named if is_gain_or_bias(n, p)], "weight_decay": 0.0},
        {"params": [p for n, p in named if not is_gain_or_bias(n, p)], "weight_decay": 0.1},
    ]


def released_run(model_name, loss):
    """Model and optimizer of a released run after STEP steps: golden temperature, drawn gradients elsewhere."""
    torch.manual_seed(0)
    h, arrays, learned = hyperparameters(loss), golden(loss, "float32"), loss in GLOBAL_TAU
    model = open_clip.create_model(model_name)
    model.logit_scale.data.fill_(math.log(1 / h.temperature))
    third = {"params": [model.logit_scale] if learned else [], "weight_decay": 0.0, "lr": h.lr_tau}
    optimizer = torch.optim.AdamW([*two_groups(model), third], lr=h.lr, betas=(h.beta1, h.beta2), eps=h.eps)
    for step in range(STEP):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.param_groups[2]["lr"] = arrays["lr_tau"][step].item()
        if learned:
            model.logit_scale.grad.fill_(arrays["g_logscale_avg"][step])
        optimizer.step()
    for group in optimizer.param_groups[:2]:
        group["lr"] = np.float64(h.lr) * np.cos(0.5)  # the released schedule leaves numpy scalars behind
        group |= {"an integer": np.int64(7), "a short one": np.int32(7), "a short float": np.float32(0.5)}
    return model, optimizer


def released_tables(loss):
    """u and, for v2, the rest as the released code holds them, [N, 1]."""
    with np.load(GOLDEN / f"{loss}_ws1_f32.npz") as file:
        names = ["u_im", "u_tt", *(TABLES if loss in INDIVIDUAL_TAU else [])]
        return {name: torch.tensor(file[name][STEP - 1]).reshape(-1, 1) for name in names}


def released_checkpoint(model_name, loss):
    model, optimizer = released_run(model_name, loss)
    return {
        "epoch": EPOCH,
        "name": "their-run",
        "state_dict": {f"module.{name}": value for name, value in model.state_dict().items()},
        "optimizer": optimizer.state_dict(),
        "scaler": torch.amp.GradScaler("cpu", init_scale=1024.0).state_dict(),
        **released_tables(loss),
    }


@pytest.fixture(scope="module")
def released(model_name):
    """Of each algorithm: the contents of a released checkpoint."""
    return {loss: released_checkpoint(model_name, loss) for loss in GOLDEN_LOSSES}


def without(contents, *names):
    return {name: value for name, value in contents.items() if name not in names}


def converted(contents, folder, loss=None):
    torch.save(contents, folder / "epoch_2.pt")
    return convert(folder / "epoch_2.pt", folder / "checkpoints", loss)


def message_of(function, *args):
    with pytest.raises(UserError) as caught:
        function(*args)
    message = str(caught.value)
    assert message and "\n" not in message
    return message


# ------------------------------------------------------------------ what goes over


@pytest.mark.parametrize("loss", GOLDEN_LOSSES)
def test_released_run_goes_on_along_its_golden_trajectory(loss, released, tmp_path):
    converted(released[loss], tmp_path, loss)
    again = FastCLIPLoss(FastCLIPConfig(**golden_settings(loss)))
    index = load_state(again, tmp_path / "checkpoints" / "epoch_2.fastclip", DataIdentity.of_json_keys(64))
    assert (index["epoch"], index["step"], index["settings"], index["global_batch_size"]) == (EPOCH, STEP, {}, None)
    assert again.step == STEP and again.visited == 64
    arrays, rows = golden(loss, "float32"), []
    again.start_epoch(EPOCH)
    for step in range(STEP, len(arrays["idx"])):
        image, text = (torch.tensor(arrays[name][step, 0], dtype=torch.float32) for name in ("f_im", "f_tt"))
        again(image, text, torch.tensor(arrays["idx"][step, 0]))
        tau = again.global_tau.log_inv_tau.item() if again.global_tau else 0.0
        rows.append({"logit_scale_after": tau, **again.full_state()})
    names = {"log_u_image": "u_im", "log_u_text": "u_tt"}
    if loss in INDIVIDUAL_TAU:
        names |= {"tau_image": "tau_im", "tau_text": "tau_tt", "tau_m_image": "m_grad_tau_im"}
    else:
        expected = arrays["logit_scale_after"][STEP:]
        assert_close([row["logit_scale_after"] for row in rows], expected, 2e-5, "log(1/tau)")
    for ours, theirs in names.items():
        column = torch.stack([row[ours] for row in rows])
        column = column.double().exp() if ours.startswith("log_u") else column
        assert_close(column, arrays[theirs][STEP:], table_tolerance(loss, "float32"), theirs)


@pytest.mark.parametrize("loss", ["fastclip-v1", "fastclip-v2", "fastclip-v3"])
def test_stock_open_clip_loads_the_result(loss, released, model_name, tmp_path):
    path, _ = converted(released[loss], tmp_path, loss)
    assert path == tmp_path / "checkpoints" / "epoch_2.pt"
    model, _, _ = open_clip.create_model_and_transforms(model_name, pretrained=str(path))
    for name, value in model.state_dict().items():
        assert torch.equal(value, released[loss]["state_dict"][f"module.{name}"]), name


def is_plain(value):
    if isinstance(value, dict):
        return all(is_plain(v) for v in value.values())
    if isinstance(value, list | tuple):
        return all(is_plain(v) for v in value)
    return value is None or type(value) in (str, int, float, bool, torch.Tensor)


@pytest.mark.parametrize("loss", ["fastclip-v1", "fastclip-v3"])
def test_optimizer_goes_on_without_the_temperature(loss, released, model_name, tmp_path):
    path, _ = converted(released[loss], tmp_path, loss)
    checkpoint = torch.load(path, weights_only=True)
    assert is_plain(checkpoint)
    assert checkpoint.keys() == {"epoch", "name", "state_dict", "optimizer", "scaler", "fastclip"}
    assert checkpoint["fastclip"] == {"loss": loss, "epoch": EPOCH}
    assert checkpoint["scaler"] == released[loss]["scaler"]
    optimizer = checkpoint["optimizer"]
    assert optimizer["state"].keys() == {number for group in optimizer["param_groups"] for number in group["params"]}

    theirs, their_optimizer = released_run(model_name, loss)
    ours = open_clip.create_model(model_name, pretrained=str(path))
    ours.logit_scale.requires_grad_(False)
    our_optimizer = torch.optim.AdamW(two_groups(ours), lr=1.0)
    our_optimizer.load_state_dict(checkpoint["optimizer"])
    generator = torch.Generator().manual_seed(5)
    for (name, a), b in zip(theirs.named_parameters(), ours.parameters(), strict=True):
        a.grad = torch.randn(a.shape, generator=generator)
        b.grad = a.grad.clone() if name != "logit_scale" else None
    their_optimizer.step()
    our_optimizer.step()
    for (name, a), b in zip(theirs.named_parameters(), ours.parameters(), strict=True):
        assert name == "logit_scale" or torch.equal(a, b), name


def test_moments_of_the_temperature_go_into_the_state(released, tmp_path):
    path, _ = converted(released["fastclip-v3"], tmp_path, "fastclip-v3")
    optimizer = released["fastclip-v3"]["optimizer"]
    moments = optimizer["state"][optimizer["param_groups"][2]["params"][0]]
    assert read_index(path.with_suffix(".fastclip"))["tau"] == {
        "log_inv_tau": released["fastclip-v3"]["state_dict"]["module.logit_scale"].item(),
        "m": moments["exp_avg"].item(),
        "v": moments["exp_avg_sq"].item(),
        "steps": float(STEP),
    }


def test_u_that_means_never_seen(released, tmp_path):
    contents = dict(released["fastclip-v2"])
    contents["u_im"] = contents["u_im"].clone()
    contents["u_im"][:6, 0] = torch.tensor([0.0, 1e-36, 1.1e-35, math.inf, math.nan, 2.0])
    contents["bound_im"] = torch.full_like(contents["bound_im"], 3.0)
    _, loss = converted(contents, tmp_path)
    log_u = loss.full_state()["log_u_image"][:6]
    assert log_u[[0, 1, 3, 4]].isneginf().all()
    torch.testing.assert_close(log_u[[2, 5]], torch.tensor([math.log(1.1e-35), math.log(2.0)]) + 3.0)
    assert loss.visited == 64 - 4


def test_tables_that_lie_in_a_file_a_rank(released, tmp_path):
    """A rank's file is up to date for the samples that it has seen, and holds initial values elsewhere."""
    contents = released["fastclip-v2"]
    _, expected = converted(contents, tmp_path)
    split, path, target = {}, tmp_path / "run[1].pt", tmp_path / "split"
    for rank in range(2):
        seen = torch.arange(64)[:, None] % 2 == rank
        part = {name: torch.where(seen, contents[name], 0.03 if name.startswith("tau") else 0.0) for name in TABLES}
        torch.save(part, tmp_path / f"run[1]_tau_rank_{rank}.pt")
        split[rank] = part
    torch.save(without(contents, *TABLES), path)
    _, loss = convert(path, target)
    assert loss.config.loss == "fastclip-v2"
    for name, column in expected.full_state().items():
        assert torch.equal(loss.full_state()[name], column), name

    last = tmp_path / "run[1]_tau_rank_1.pt"
    torch.save({**split[1], "tau_im": split[1]["tau_im"][:-1]}, last)
    assert f"{last}: its tables differ in size" in message_of(convert, path, tmp_path / "others")
    last.rename(tmp_path / "run[1]_tau_rank_2.pt")
    assert f"{last}: there is no such file" in message_of(convert, path, tmp_path / "others")


# ------------------------------------------------------------------ which algorithm


@pytest.mark.parametrize("loss", GOLDEN_LOSSES)
def test_algorithm_is_told_where_it_can_be(loss, released, tmp_path):
    torch.save(released[loss], tmp_path / "a.pt")
    possible = next(family for family in RELEASED_LOSSES.values() if loss in family)
    choice = "--loss " + " or --loss ".join(possible)
    if loss in INDIVIDUAL_TAU:
        assert convert(tmp_path / "a.pt", tmp_path / "default")[1].config.loss == "fastclip-v2"
    else:
        assert choice in message_of(convert, tmp_path / "a.pt", tmp_path / "default")
    for wrong in set(GOLDEN_LOSSES) - set(possible):
        assert choice in message_of(convert, tmp_path / "a.pt", tmp_path / "wrong", wrong)
    assert not (tmp_path / "wrong").exists()


# ------------------------------------------------------------------ what is refused


class Evil:
    def __reduce__(self):
        return (exec, ("open('executed', 'w')",))


def test_no_code_of_the_file_is_executed(released, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = message_of(converted, {**released["fastclip-v1"], "name": Evil()}, tmp_path, "fastclip-v1")
    assert "more than tensors and plain values" in message
    message = message_of(converted, {**released["fastclip-v1"], "name": np.zeros(3)}, tmp_path, "fastclip-v1")
    assert "more than tensors and plain values" in message
    assert not (tmp_path / "executed").exists() and not (tmp_path / "checkpoints").exists()


def test_learning_rates_of_another_numpy(released, tmp_path):
    """numpy 1 and 2 name the module of their scalars differently."""
    torch.save(released["fastclip-v1"], tmp_path / "one.pt")
    names = [b"numpy._core.multiarray\nscalar", b"numpy.core.multiarray\nscalar"]
    with zipfile.ZipFile(tmp_path / "one.pt") as one, zipfile.ZipFile(tmp_path / "other.pt", "w") as other:
        for entry in one.infolist():
            data = one.read(entry)
            if entry.filename.endswith("data.pkl"):
                here, there = names if names[0] in data else names[::-1]
                assert here in data
                data = data.replace(here, there)
            other.writestr(entry, data)
    path, _ = convert(tmp_path / "other.pt", tmp_path / "checkpoints", "fastclip-v1")
    group = torch.load(path, weights_only=True)["optimizer"]["param_groups"][0]
    assert group == released["fastclip-v1"]["optimizer"]["param_groups"][0]
    assert {type(value) for value in group.values()} <= {bool, int, float, str, list, tuple, type(None)}


def with_lamb(contents):
    groups = [without(group, "amsgrad") for group in contents["optimizer"]["param_groups"]]
    return {**contents, "optimizer": {**contents["optimizer"], "param_groups": groups}}


REFUSED = {
    "plain OpenCLIP": (lambda c: without(c, "u_im", "u_tt"), "needs no conversion"),
    "weights alone": (lambda c: c["state_dict"], "needs no conversion"),
    "no dict": (lambda c: [1, 2], "holds no dict"),
    "no epoch": (lambda c: without(c, "epoch"), "has no epoch"),
    "no optimizer": (lambda c: without(c, "optimizer"), "has no optimizer"),
    "no logit_scale": (lambda c: {**c, "state_dict": {"w": torch.zeros(1)}}, "no logit_scale"),
    "u of other size": (lambda c: {**c, "u_tt": c["u_tt"][1:]}, "tables have [63, 64] rows"),
    "u with two columns": (lambda c: {**c, "u_tt": c["u_tt"].repeat(1, 2)}, "u_tt is missing or is no table"),
    "u of integers": (lambda c: {**c, "u_im": c["u_im"].int()}, "u_im is missing or is no table"),
    "empty u": (lambda c: {**c, "u_im": c["u_im"][:0], "u_tt": c["u_tt"][:0]}, "tables have [0] rows"),
    "half of v2": (lambda c: {**c, "tau_im": c["u_im"]}, "tau_tt is missing"),
    "two groups": (
        lambda c: {**c, "optimizer": {"state": {}, "param_groups": c["optimizer"]["param_groups"][:2]}},
        "--fastclip-fresh-state",
    ),
    "LAMB": (with_lamb, "with LAMB only the weights can go on"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_released_checkpoint(case, released, tmp_path):
    change, expected = REFUSED[case]
    message = message_of(converted, change(released["fastclip-v1"]), tmp_path, "fastclip-v1")
    assert expected in message and str(tmp_path / "epoch_2.pt") in message
    assert not (tmp_path / "checkpoints").exists()


def test_truncated_missing_or_garbage_file(released, tmp_path):
    torch.save(released["fastclip-v1"], tmp_path / "a.pt")
    data = (tmp_path / "a.pt").read_bytes()
    for harm in (data[:-100], data[: len(data) // 2], b"", b"garbage", b"\x80\x02" + b"c" * 50):
        (tmp_path / "a.pt").write_bytes(harm)
        assert "a.pt cannot be read" in message_of(convert, tmp_path / "a.pt", tmp_path / "out", "fastclip-v1")
    assert "there is no such file" in message_of(convert, tmp_path / "b.pt", tmp_path / "out")
    assert "there is no such file" in message_of(convert, tmp_path, tmp_path / "out")


def test_nothing_is_overwritten(released, tmp_path):
    path, _ = converted(released["fastclip-v1"], tmp_path, "fastclip-v1")
    before = path.read_bytes()
    assert f"{path} exists" in message_of(converted, released["fastclip-v1"], tmp_path, "fastclip-v1")
    path.rename(tmp_path / "kept.pt")
    assert "epoch_2.fastclip exists" in message_of(converted, released["fastclip-v1"], tmp_path, "fastclip-v1")
    assert (tmp_path / "kept.pt").read_bytes() == before and not path.exists()


# ------------------------------------------------------------------ the command line


def test_command_line(released, tmp_path, capsys):
    torch.save(released["fastclip-v3"], tmp_path / "theirs.pt")
    assert main([str(tmp_path / "theirs.pt"), str(tmp_path / "out")]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "error: " in captured.err and captured.err.count("\n") == 1
    assert main([str(tmp_path / "theirs.pt"), str(tmp_path / "out"), "--loss", "fastclip-v3"]) == 0
    out = capsys.readouterr().out
    assert "64 of 64 samples visited" in out
    flags = f"--loss fastclip-v3 --resume {tmp_path / 'out' / 'epoch_2.pt'} --sample-id json-key --data-size 64"
    assert flags in out
    with pytest.raises(SystemExit) as caught:
        main([str(tmp_path / "theirs.pt"), str(tmp_path / "out"), "--loss", "fastclip-v9"])
    assert caught.value.code == 2


def test_module_has_a_help():
    command = [sys.executable, "-m", "open_clip_train_fastclip.convert", "--help"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0 and "released" in result.stdout


def shards_with_json_keys(folder):
    """Two shards of eight samples whose json keys are spread over 0 .. 63."""
    for shard in range(2):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for i in range(8):
                key = 32 * shard + 4 * i + 1
                image = io.BytesIO()
                Image.fromarray(np.full((32, 32, 3), 10 * i + shard, dtype=np.uint8)).save(image, format="PNG")
                texts = {"txt": b"a caption", "json": json.dumps({"key": f"{key:09d}"}).encode()}
                for ending, data in {"png": image.getvalue(), **texts}.items():
                    info = tarfile.TarInfo(f"{key:09d}.{ending}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return f"{folder}/{{00000..00001}}.tar"


@pytest.mark.parametrize("loss", ["fastclip-v1", "fastclip-v2", "fastclip-v3"])
def test_our_command_line_resumes_the_result(loss, released, tmp_path):
    contents = released_checkpoint(MODEL, loss)
    path, before = converted(contents, tmp_path, loss)
    flags = ["--loss", loss, "--resume", path, "--sample-id", "json-key", "--data-size", 64, "--epochs", 3]
    data = ["--train-data", shards_with_json_keys(tmp_path), "--logs", tmp_path / "logs", "--name", "run"]
    run = run_cli([*TINY, *flags, *data], tmp_path / "output")
    assert run.ok, run
    after = FastCLIPLoss(FastCLIPConfig(loss=loss, num_samples=64))
    folder = tmp_path / "logs" / "run" / "checkpoints" / "epoch_3.fastclip"
    index = load_state(after, folder, DataIdentity.of_json_keys(64))
    assert index["settings"]["eps"] == 1e-14, "the released code's, not our default"
    changed = after.full_state()["log_u_image"] != before.full_state()["log_u_image"]
    assert torch.equal(changed.nonzero().flatten(), torch.arange(1, 64, 4))
