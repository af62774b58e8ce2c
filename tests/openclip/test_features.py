"""FastCLIP beside OpenCLIP's other features, on two ranks: each trains and leaves a complete state."""

import os
import signal
import time

import pytest
import torch
from cli import TINY, run_cli, run_forked
from make_data import make_csv, make_shards
from safetensors.torch import load_file

FEATURES = {
    "torchcompile": ["--torchcompile"],
    "grad-checkpointing": ["--grad-checkpointing"],
    "lock-image": ["--lock-image"],
    "patch-dropout": ["--force-patch-dropout", "0.5"],
    "grad-clip": ["--grad-clip-norm", "0.5"],
    "bf16": ["--precision", "amp_bf16"],
    "accumulation": ["--accum-freq", "2"],
    "lamb": ["--opt", "timm/lamb"],
    "lion": ["--opt", "timm/lion", "--lr", "1e-4"],
    "sgd": ["--opt", "timm/sgd", "--momentum", "0.9"],
    "compressed": ["--grad-compression", "bf16"],
    "static graph": ["--ddp-static-graph"],
}


@pytest.fixture(scope="module")
def csv(tmp_path_factory):
    return make_csv(tmp_path_factory.mktemp("csv"), rows=48)


def log_u(logs):
    folder = logs / "run" / "checkpoints" / "epoch_1.fastclip"
    return torch.cat([load_file(f)["log_u_image"] for f in sorted(folder.glob("*.safetensors"))])


@pytest.mark.parametrize("feature", FEATURES)
def test_trains_with(feature, csv, tmp_path):
    flags = [*TINY, "--loss", "fastclip-v3", "--train-data", csv, "--logs", tmp_path, "--name", "run"]
    run = run_cli([*flags, *FEATURES[feature]], tmp_path / "out", ranks=2, timeout=300)
    assert run.ok, run
    # 48 rows in batches of 8 on 2 ranks: 3 steps, of which accumulation drops the incomplete last one
    assert torch.isfinite(log_u(tmp_path)).sum() == (32 if feature == "accumulation" else 48)


def test_resampled_shards(tmp_path):
    make_shards(tmp_path / "data", shards=4, per_shard=12)
    flags = [*TINY, "--loss", "fastclip-v3", "--train-data", f"{tmp_path}/data/{{00000..00003}}.tar"]
    flags += ["--dataset-resampled", "--logs", tmp_path, "--name", "run"]
    run = run_cli(flags, tmp_path / "out", ranks=2)
    assert run.ok, run
    assert torch.isfinite(log_u(tmp_path)).any()


def test_sync_batch_norm_on_a_cpu_is_refused(csv, tmp_path):
    flags = [*TINY, "--loss", "fastclip-v3", "--train-data", csv, "--logs", tmp_path, "--use-bn-sync"]
    run = run_cli(flags, tmp_path / "out", ranks=2)
    assert run.codes == [2, 2] and "--use-bn-sync" in run.output[0] and "Traceback" not in run.output[0], run


def stalled_or_killed(how):
    """A command line whose rank 1 dies or stops for good, in its second step or at an evaluation."""
    import open_clip_train.main

    from open_clip_train_fastclip.loss import fastclip as loss_module
    from open_clip_train_fastclip.main import main

    in_step, in_evaluation = loss_module.FastCLIPLoss._evaluate, open_clip_train.main.evaluate

    def lose_rank_1():
        if os.environ["RANK"] == "1":
            if how == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(12)  # rank 0 has given up by then
            os.kill(os.getpid(), signal.SIGKILL)

    def faulty_step(self, *features):
        if self.step == 1:
            lose_rank_1()
        return in_step(self, *features)

    def faulty_evaluation(model, data, epoch, args, tb_writer=None, tokenizer=None):
        lose_rank_1()
        return in_evaluation(model, data, epoch, args, tb_writer=tb_writer, tokenizer=tokenizer)

    def run(argv):
        if how == "stalls at an evaluation":
            open_clip_train.main.evaluate = faulty_evaluation
        else:
            loss_module.FastCLIPLoss._evaluate = faulty_step
        return main(argv)

    return run


@pytest.mark.parametrize("how", ["dies", "stalls", "stalls at an evaluation"])
def test_a_lost_rank_ends_the_others(how, csv, tmp_path):
    flags = [*TINY, "--loss", "fastclip-v3", "--train-data", csv, "--val-data", csv, "--logs", tmp_path]
    flags = [str(f) for f in [*flags, "--name", "run", "--dist-timeout", 5]]
    run = run_forked(stalled_or_killed(how), (flags,), tmp_path / "out", ranks=2, timeout=60)
    assert run.codes[0] > 0 and "--dist-timeout" in run.output[0] and "Traceback" not in run.output[0], run
    assert run.codes[1] == -signal.SIGKILL
    assert how == "dies" or "by peer" not in run.output[0], "a stalled rank was waited for until it died"


def test_evaluation_may_take_longer_than_the_timeout(csv, tmp_path):
    def slow_evaluation(argv):
        import open_clip_train.main

        from open_clip_train_fastclip.main import main

        stock = open_clip_train.main.evaluate

        def evaluate(model, data, epoch, args, tb_writer=None, tokenizer=None):
            if args.rank == 0:
                time.sleep(9)
            return stock(model, data, epoch, args, tb_writer=tb_writer, tokenizer=tokenizer)

        open_clip_train.main.evaluate = evaluate
        return main(argv)

    flags = [*TINY, "--loss", "fastclip-v3", "--train-data", csv, "--val-data", csv, "--logs", tmp_path]
    flags = [str(f) for f in [*flags, "--name", "run", "--dist-timeout", 6]]
    run = run_forked(slow_evaluation, (flags,), tmp_path / "out", ranks=2)
    assert run.ok, run
