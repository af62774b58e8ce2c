"""One run of OpenCLIP's main(): the functions that it calls instead of its own, in the order in which it calls them.

Each takes the original as `stock`. What one of them learns (the manifest, the model, a checkpoint's index, the
loss) the later ones need, so they are methods of one object.
"""

import argparse
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import open_clip_train.main
import torch
import torch.distributed as dist
from open_clip_train.data import DataInfo
from torch import Tensor, nn

from ..checkpoint.retention import unfinished_checkpoints
from ..checkpoint.table import load_state
from ..data.agreed import AgreedLoader
from ..data.manifest import ShardManifest
from ..data.shard_list import check_shards
from ..errors import UserError
from ..loss.config import FastCLIPConfig
from ..loss.fastclip import FastCLIPLoss
from ..loss.nonfinite import NonfiniteGuard
from ..ranks import agree
from ..training.batches import FastCLIPCallback, ProgressBatches, ResumableBatches, StepCallback
from ..training.checkpointer import AsyncCheckpointer
from ..training.profiling import Trace, marked
from ..training.progress import LoopSettings
from ..training.signals import Preempted, PreemptionSignals
from . import checkpoints, checks, register_models, resume, run_args, schedules, settings
from .checkpoints import EpochCheckpoints, RunState
from .environment import check_environment
from .evaluation import Evaluation, accuracy
from .files import FileHooks, keep_content_of_images, pin_batches
from .logs import EarlyLog
from .loop import LoopLoss, MetricsLog
from .patches import applied
from .pipeline import TrainingData, read_shard_sizes, with_ids
from .resume import ResumedRun
from .temperature import check_temperature, settle_temperature
from .torch_hooks import TorchHooks
from .usable import watch

GAVE_UP = -1  # what main() returns when it has printed why it does not train


class Run(FileHooks, TorchHooks):
    """The state of one run and the replacements named in patches.PATCHES."""

    evaluation: Evaluation

    def __init__(self) -> None:
        self.signals = PreemptionSignals()
        self.manifest: ShardManifest | None = None
        self.val_shards: list[str] = []
        self.check_last_epoch: Callable[[], None] = lambda: None  # raises UserError if it left too much out
        self.model: Any = None
        self.resumed: ResumedRun | None = None
        self.data: TrainingData | None = None  # of a run that can be saved inside an epoch
        self.batches: ResumableBatches | None = None
        self.loss: FastCLIPLoss | None = None
        self.checkpointer: AsyncCheckpointer | None = None
        self.latest: Path | None = None  # what --resume latest takes, on rank 0
        self.save_most_recent = False
        self.state: RunState | None = None  # since the first step
        self.guard: NonfiniteGuard | None = None

    def parse_args(self, stock: Callable[..., argparse.Namespace], argv: list[str]) -> argparse.Namespace:
        """Flags, with everything that they alone can tell checked."""
        try:
            self.args = stock(argv)
            settings.resolve(self.args)
        except UserError as error:
            error.on_all_ranks = True  # all have the same flags
            raise
        self.checkpoints = EpochCheckpoints(self.args)
        if self.args.resume and ("wandb" in self.args.report_to or "all" in self.args.report_to):
            # main() replaces 'latest' by a path before it compares it for wandb, so a resumed run would start anew
            os.environ.setdefault("WANDB_RESUME", "allow")
        return self.args

    def init_distributed_device(self, stock: Callable[..., Any], args: argparse.Namespace) -> Any:
        """The process group, then all checks that need nothing built, agreed on by all ranks."""
        check_environment(args)
        device = stock(args)
        self.evaluation = Evaluation(args)
        agree(checks.check_before_building, args)
        if device.type == "cuda" and device.index is not None:
            # OpenCLIP does so for several processes alone; what pins batches, and torch's own, goes by the current GPU
            torch.cuda.set_device(device)
        self.latest, self.save_most_recent = agree(resume.find_latest, args), args.save_most_recent
        if args.rank == 0 and args.resume == "latest" and args.remote_sync is None:
            args.save_most_recent = False  # with it main() would look at epoch_latest.pt alone; put back below
        if args.train_data and run_args.is_webdataset(args.train_data, args.dataset_type):
            self.manifest = read_shard_sizes(args)
        if args.val_data and run_args.is_webdataset(args.val_data, args.dataset_type):
            self.val_shards = check_shards(args.val_data, "--val-data", args.skip_broken_shards)
        return device

    def get_latest_checkpoint(self, stock: Callable[..., str | None], path: str, remote: bool) -> str | None:
        """The newest checkpoint, also inside an epoch; what a killed run left half written is none."""
        if remote:
            return stock(path, remote)
        self.args.save_most_recent = self.save_most_recent
        leftover = Path(path) / checkpoints.LATEST_IN_THE_MAKING
        if leftover.exists():
            logging.warning(f"{leftover} is what an interrupted save left behind: removed")
            leftover.unlink()
        for folder in unfinished_checkpoints(path):
            logging.warning(f"{folder} is what an interrupted save left behind: passed over")
        return None if self.latest is None else str(self.latest)

    def copy_codebase(self, stock: Callable[..., Any], args: argparse.Namespace) -> None:
        """Copy the training code alone: of an installed package OpenCLIP would copy all of site-packages."""
        if args.rank == 0:
            for package in (Path(str(open_clip_train.__file__)).parent, Path(__file__).parents[1]):
                target = Path(args.logs, args.name, "code", package.name)
                shutil.copytree(package, target, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)

    def create_model_and_transforms(self, stock: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Any, Any, Any]:
        """The model with its temperature handed to the loss (or frozen): out of DDP and of the optimizer."""
        model, preprocess_train, preprocess_val = agree(checks.build_model, stock, self.args, *args, **kwargs)
        if self.model is None:  # a second one would be a teacher
            self.model = model
            agree(checks.check_model, model, self.args)
            temperature = self.args.temperature
            if run_args.is_fastclip(self.args):
                temperature = self._config(num_samples=1, total_steps=None).temperature
            if temperature is not None and run_args.has_training_data(self.args):
                model.logit_scale.data.fill_(math.log(1 / temperature))
            if run_args.is_fastclip(self.args) or self.args.freeze_temperature:
                model.logit_scale.requires_grad_(False)
            agree(checks.check_locks, model, self.args)
        return model, preprocess_train, preprocess_val

    def pt_load(self, stock: Callable[..., Any], file_path: str, map_location: Any = None) -> dict[str, Any]:
        """The checkpoint, refused where it does not fit the run; FastCLIP's state is found beside it."""
        agree(resume.check_mid_epoch, file_path, self.args)
        self.resumed, contents = agree(resume.load_checkpoint, stock, file_path, self.args, self.model)
        return contents

    def get_data(
        self, stock: Callable[..., dict[str, DataInfo]], args: argparse.Namespace, preprocess_fns: Any, epoch: int = 0,
        tokenizer: Any = None,
    ) -> dict[str, DataInfo]:  # fmt: skip
        """OpenCLIP's data; the training batches are told apart by sample ids and shown with a bar."""
        if args.rank == 0:
            for note in args.fastclip_notes:
                logging.info(note)
        data = stock(args, preprocess_fns, epoch=epoch, tokenizer=tokenizer)
        keep_content_of_images(data)
        pin_batches(data, args.device)
        watch(data, args, self.manifest, self.val_shards)
        train = data.get("train")
        if train is None:
            return data
        agree(checks.check_steps, train.dataloader, args)
        loop = LoopSettings(
            args.rank, args.world_size, args.batch_size, args.accum_freq, args.epochs, args.seed,
            torch.device(args.device),
        )  # fmt: skip
        if run_args.is_resumable(args):
            self.data = with_ids(train, args, self.manifest, epoch)
            self.batches = ResumableBatches(self.data.dataloader, loop, epoch, self._trace(), self.data.position)
            if self.resumed is not None and self.resumed.mid_epoch is not None:
                resume.go_on_inside(*self.resumed.mid_epoch, self.batches, self.data, args)
            if run_args.logs_are_written(args):
                self.signals.watch()
        loader: AgreedLoader = train.dataloader if self.data is None else self.data.dataloader
        self.check_last_epoch = loader.check
        train.dataloader = self.batches or ProgressBatches(loader, loop, epoch, self._trace())
        return data

    def _trace(self) -> Trace | None:
        args = self.args
        if not args.profile:
            return None
        folder = Path(args.logs, args.name) if run_args.logs_are_written(args) else None
        return Trace(args.name, folder, args.rank, args.accum_freq, torch.device(args.device))

    def cosine_lr(self, stock: Any, *of_model: Any) -> Callable[[int], float]:
        """OpenCLIP's cosine over the full horizon, with a floor."""
        return schedules.cosine_lr(self.args, *of_model)

    def const_lr(self, stock: Callable[..., Any], *of_model: Any) -> Any:
        """OpenCLIP's constant rate over the full horizon, with or without a cool-down at its end."""
        return schedules.const_lr(self.args, stock, *of_model)

    def _config(self, num_samples: int, total_steps: int | None, visits_per_epoch: float = 1.0) -> FastCLIPConfig:
        args = self.args
        state = self.resumed.state if self.resumed else None
        return settings.config_from_args(
            args,
            num_samples=num_samples,
            global_batch_size=run_args.global_batch_size(args),
            visits_per_epoch=visits_per_epoch,
            total_steps=total_steps,
            stored=state[1]["settings"] if state else None,
        )

    def create_loss(self, stock: Callable[..., Any], args: argparse.Namespace) -> Any:
        """The FastCLIP loss on the training device, with its state if the run is resumed."""
        if not run_args.is_fastclip(args):
            return marked(stock(args))
        assert self.data is not None and self.batches is not None  # get_data() has made them
        start = self.batches.progress(self.batches.first)
        config = self._config(
            self.data.num_samples, start.steps_per_epoch * args.full_epochs, self.data.visits_per_epoch
        )
        self.loss = FastCLIPLoss(config, device=args.device)
        if self.resumed is not None and self.resumed.state is not None:
            agree(check_temperature, self.resumed.state[1], args)
            index = load_state(self.loss, self.resumed.state[0], self.data.identity)
            settle_temperature(self.loss, args)
            # not the stored step, since another number of ranks has other steps an epoch
            self.loss.step = start.global_step
            then, now = index["global_batch_size"], run_args.global_batch_size(args)
            if then not in (None, now) and args.rank == 0:
                logging.warning(f"the global batch was {then} and is {now} now: rho and the rates stay as they were")
        if args.rank == 0:
            logging.info(f"FastCLIP: {self.loss.config}")
        loss = LoopLoss(self.loss)
        return marked(loss) if args.profile else loss

    def evaluate(self, stock: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """OpenCLIP's evaluation, whose failure costs no trained epoch."""
        return self.evaluation.run(stock, *args, **kwargs)

    def accuracy(self, stock: Any, output: Tensor, target: Tensor, topk: tuple[int, ...] = (1,)) -> list[int | float]:
        """The count of hits, with every numpy."""
        return accuracy(output, target, topk)

    def enumerate(self, stock: Callable[..., Iterator[Any]], iterable: Iterable[Any], start: int = 0) -> Iterator[Any]:
        """enumerate as OpenCLIP's loop sees it: an epoch that is resumed inside counts on from there."""
        return stock(iterable, iterable.first if isinstance(iterable, ResumableBatches) else start)

    def train_one_epoch(
        self, stock: Callable[..., Any], model: nn.Module, data: Any, loss: Any, epoch: int, optimizer: Any,
        scaler: Any, *args: Any, tb_writer: Any = None,
    ) -> None:  # fmt: skip
        """OpenCLIP's epoch; then, before main() saves its .pt: that it is good, and FastCLIP's state."""
        if self.state is None:
            self.state = RunState(self.args, model, optimizer, scaler, self.loss, self.data)
            if self.batches is not None:
                self._begin_training(self.state, self.batches, tb_writer)
        if self.loss is not None:
            self.loss.start_epoch(epoch)
        try:
            stock(model, data, loss, epoch, optimizer, scaler, *args, tb_writer=tb_writer)
            self._end_epoch(self.state, epoch + 1)
        except Preempted:
            self._close_logs(tb_writer)
            if self.checkpointer is not None and dist.is_initialized():
                # srun ends all tasks when the first has ended, and rank 0 has logs to send
                dist.barrier(self.checkpointer.trigger.group)
            raise
        except UserError as error:
            if self.checkpointer is not None and error.on_all_ranks:
                self.checkpointer.finish()  # what is being written is good
            raise

    def _end_epoch(self, state: RunState, epoch: int) -> None:
        if self.batches is None or self.guard is None:
            self.checkpoints.end_epoch(state, epoch)
            return
        if self.checkpointer is not None:
            self.checkpointer.finish()
        guard, progress = self.guard, self.batches.progress(0)  # of the next epoch
        is_bad = guard.in_a_row > 0 and guard.left_out >= progress.steps_per_epoch
        is_saved = self.checkpoints.end_epoch(state, epoch, not guard.left_out, is_bad)
        if self.checkpointer is not None and is_saved:
            self.checkpointer.saved_step = progress.global_step

    def _begin_training(self, state: RunState, batches: ResumableBatches, tb_writer: Any) -> None:
        """Bind the batches to what happens around a step (collective): all that it takes is there now."""
        self.guard = NonfiniteGuard(self.loss, state.optimizer, state.model, state.scaler)
        if run_args.logs_are_written(self.args):
            inside = self.resumed.mid_epoch if self.resumed else None
            start = batches.progress(batches.first)
            self.checkpointer = state.checkpointer(self.signals, start, inside[0] if inside else None)
        callback = StepCallback(self.guard, self.checkpointer)
        if self.loss is not None:
            log = MetricsLog(self.loss, self.args, tb_writer)
            callback = FastCLIPCallback(self.loss, self.guard, self.model.logit_scale, self.checkpointer, log)
        batches.bind(callback)

    def _close_logs(self, tb_writer: Any) -> None:
        """What main() does at its end, which it does not reach."""
        if tb_writer is not None:
            tb_writer.close()
        if self.args.wandb and self.args.rank == 0:
            import wandb

            wandb.finish()

    def finish(self) -> None:
        """What is left to do when main() has returned."""
        if self.checkpointer is not None and self.guard is not None:
            self.checkpointer.end(last_step_is_good=not self.guard.left_out)
        self.checkpoints.prune()
        if dist.is_initialized():
            self.evaluation.wait()
            dist.barrier()
        self.evaluation.require_success()
        self.check_last_epoch()


def train(argv: list[str]) -> bool:
    """OpenCLIP's main() with FastCLIP in it; whether it did what it was asked to: if not, it has said why."""
    register_models()
    run, early_log = Run(), EarlyLog()
    run.early_log = early_log
    try:
        with applied(run):
            done = bool(open_clip_train.main.main(argv) != GAVE_UP)
        if done:  # else perhaps rank 0 alone gave up: the others are not where a barrier would find them
            run.finish()
    finally:
        early_log.hand_on()
        run.signals.unwatch()
    return done
