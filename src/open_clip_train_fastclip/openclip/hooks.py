"""One run of OpenCLIP's main(): the functions that it calls instead of its own, in the order in which it calls them.

Each takes the original as `stock`. What one of them learns (the manifest, the model, a checkpoint's index, the
loss) the later ones need, so they are methods of one object.
"""

import functools
import logging
import math
import os
import shutil
from datetime import timedelta
from pathlib import Path

import pandas as pd
import torch
import torch.distributed as dist
from open_clip import get_input_dtype
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook

from ..checkpoint import mid_epoch as snapshot
from ..checkpoint.atomic import one_line
from ..checkpoint.table import load_state
from ..data.manifest import ShardManifest
from ..data.shard_list import check_shards
from ..errors import UserError, agree
from ..loss.fastclip import FastCLIPLoss
from ..loss.nonfinite import NonfiniteGuard
from ..loss.schedules import cosine_lr_at
from ..training.batches import FastCLIPBatches, LoopLoss, ProgressBatches, ResumableBatches
from ..training.checkpointer import SnapshotSaver
from ..training.first_step import arrange_buckets
from ..training.profiling import marked
from ..training.signals import Stopped, StopSignals
from . import checks
from . import settings as params
from .checkpoints import ResumedRun, check_snapshot, go_on_inside, load_checkpoint, newest_checkpoint
from .saving import LATEST_IN_THE_MAKING, Saver
from .training_data import read_shard_sizes, with_ids

EVALUATION_LIMIT = timedelta(days=1)


class View:
    """A module with some of its names replaced, for one caller only; everything else passes through."""

    def __init__(self, module, **replaced):
        self._module = module
        self.__dict__.update(replaced)

    def __getattr__(self, name):
        return getattr(self._module, name)


class Run:
    """The state of one run and the replacements named in patches.PATCHES."""

    def __init__(self):
        self.args = None
        self.manifest: ShardManifest | None = None
        self.model = None
        self.num_samples = 0  # rows of the per-sample table
        self.resumed: ResumedRun | None = None
        self.batches: ResumableBatches | None = None
        self.loss: FastCLIPLoss | None = None
        self.signals = StopSignals()
        self.save_most_recent = False
        self.training = False  # since the first step
        self.saver: Saver | None = None
        self.patient_group = None  # waits for rank 0's evaluation

    def parse_args(self, stock, argv):
        """Flags, with everything that they alone can tell checked."""
        try:
            self.args = stock(argv)
            params.resolve(self.args)
        except UserError as error:
            error.on_all_ranks = True  # all have the same flags
            raise
        self.saver = Saver(self.args)
        if self.args.resume and ("wandb" in self.args.report_to or "all" in self.args.report_to):
            # main() replaces 'latest' by a path before it compares it for wandb, so a resumed run would start anew
            os.environ.setdefault("WANDB_RESUME", "allow")
        return self.args

    def init_distributed_device(self, stock, args):
        """The process group, then all checks that need nothing built, agreed on by all ranks."""
        device = stock(args)
        if dist.is_initialized() and checks.has_evaluation_data(args):
            # gloo notices at once if rank 0 dies, so the limit may be long
            self.patient_group = dist.new_group(backend="gloo", timeout=EVALUATION_LIMIT)
        agree(checks.check_before_building, args)
        self.save_most_recent = args.save_most_recent
        if args.rank == 0 and args.resume == "latest" and args.remote_sync is None:
            # with it main() looks at epoch_latest.pt alone; get_latest_checkpoint() puts it back
            folder = Path(args.logs, args.name or "", "checkpoints")
            args.save_most_recent = self.save_most_recent and not snapshot.snapshots(folder)
        if args.train_data and checks.is_webdataset(args.train_data, args.dataset_type):
            self.manifest = read_shard_sizes(args)
        if args.val_data and checks.is_webdataset(args.val_data, args.dataset_type):
            agree(check_shards, args.val_data, "--val-data")
        return device

    def torch_of_distributed(self, stock):
        """torch as OpenCLIP's distributed module sees it: process groups get --dist-timeout."""
        timeout = timedelta(seconds=self.args.dist_timeout)
        init = functools.partial(dist.init_process_group, timeout=timeout)
        return View(stock, distributed=View(stock.distributed, init_process_group=init))

    def torch_of_main(self, stock):
        """torch as main() sees it: atomic saves; DDP that takes a model on the CPU, and compresses if asked to."""

        def distributed(model, device_ids=None, **kwargs):
            if device_ids and torch.device(device_ids[0]).type == "cpu":
                device_ids = None
            ddp = torch.nn.parallel.DistributedDataParallel(model, device_ids=device_ids, **kwargs)
            if self.args.grad_compression == "bf16":
                ddp.register_comm_hook(None, bf16_compress_hook)
            return ddp

        parallel = View(stock.nn.parallel, DistributedDataParallel=distributed)
        return View(stock, save=self.saver.save_checkpoint, nn=View(stock.nn, parallel=parallel))

    def get_latest_checkpoint(self, stock, path, remote):
        """The newest checkpoint, also inside an epoch; what a killed run left half written is none."""
        if remote:
            return stock(path, remote)
        self.args.save_most_recent = self.save_most_recent
        leftover = Path(path) / LATEST_IN_THE_MAKING
        if leftover.exists():
            logging.warning(f"{leftover} is what an interrupted save left behind: removed")
            leftover.unlink()
        for folder in snapshot.leftovers(path):
            logging.warning(f"{folder} is what an interrupted save left behind: passed over")
        return newest_checkpoint(path) or stock(path, remote)

    def copy_codebase(self, stock, args):
        """Copy the training code alone: of an installed package OpenCLIP would copy all of site-packages."""
        import open_clip_train

        if args.rank == 0:
            for package in (Path(open_clip_train.__file__).parent, Path(__file__).parents[1]):
                target = Path(args.logs, args.name, "code", package.name)
                shutil.copytree(package, target, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)

    def create_model_and_transforms(self, stock, *args, **kwargs):
        """The model with its temperature handed to the loss (or frozen): out of DDP and of the optimizer."""
        model, preprocess_train, preprocess_val = stock(*args, **kwargs)
        if self.model is None:  # a second one would be a teacher
            self.model = model
            agree(checks.check_model, model, self.args)
            temperature = self.args.temperature
            if checks.is_fastclip(self.args):
                temperature = self._config(num_samples=1, total_steps=None).temperature
            if temperature is not None and checks.has_training_data(self.args):
                model.logit_scale.data.fill_(math.log(1 / temperature))
            if checks.is_fastclip(self.args) or self.args.freeze_temperature:
                model.logit_scale.requires_grad_(False)
        return model, preprocess_train, preprocess_val

    def pt_load(self, stock, file_path, map_location=None):
        """The checkpoint, refused where it does not fit the run; FastCLIP's state is found beside it."""
        agree(check_snapshot, file_path, self.args)
        self.resumed, contents = agree(load_checkpoint, stock, file_path, self.args, self.model)
        return contents

    def get_data(self, stock, args, preprocess_fns, epoch=0, tokenizer=None):
        """OpenCLIP's data; the training batches are told apart by sample ids and shown with a bar."""
        if args.rank == 0:
            for note in args.fastclip_notes:
                logging.info(note)
        try:
            data = stock(args, preprocess_fns, epoch=epoch, tokenizer=tokenizer)
        except (pd.errors.ParserError, UnicodeError) as error:
            error = UserError(f"--train-data or --val-data is no table ({one_line(error)}): check the file")
            error.on_all_ranks = True  # all read the same one
            raise error from None
        train = data.get("train")
        if train is None:
            return data
        agree(checks.check_steps, train.dataloader, args)
        if not checks.is_resumable(args):
            train.dataloader = ProgressBatches(train.dataloader, args, epoch)
            return data
        self.batches = train.dataloader = self._resumable_batches(train, epoch)
        return data

    def _resumable_batches(self, train, epoch: int) -> ResumableBatches:
        """The training batches with their sample ids, from where the run that is resumed was saved."""
        args = self.args
        data = with_ids(train, args, self.manifest, epoch)
        self.num_samples, self.saver.data_hash, self.saver.data_text = data.num_samples, data.hash, data.text
        if checks.is_fastclip(args):
            batches = FastCLIPBatches(data.dataloader, args, epoch, data.position, self.model)
        else:
            batches = ResumableBatches(data.dataloader, args, epoch, data.position)
        if self.resumed is not None and self.resumed.snapshot is not None:
            go_on_inside(*self.resumed.snapshot, batches, data, args)
        if checks.logs_are_written(args):
            start = batches.progress(batches.first)
            batches.snapshots = SnapshotSaver(args, self.saver, self.signals, data.position, start)
            self.signals.watch()
        return batches

    def cosine_lr(self, stock, optimizer, base_lr, warmup_length, steps):
        """OpenCLIP's cosine over the full horizon, with a floor."""
        steps = self._full_steps(steps)

        def adjust(step):
            lr = cosine_lr_at(step, base_lr, warmup_length, steps, self.args.lr_min)
            for group in optimizer.param_groups:
                group["lr"] = lr
            return lr

        return adjust

    def const_lr(self, stock, optimizer, base_lr, warmup_length, steps):
        """OpenCLIP's constant rate, over the full horizon."""
        return stock(optimizer, base_lr, warmup_length, self._full_steps(steps))

    def const_lr_cooldown(self, stock, optimizer, base_lr, warmup_length, steps, *cooldown):
        """OpenCLIP's constant rate with cool-down, at the end of the full horizon."""
        return stock(optimizer, base_lr, warmup_length, self._full_steps(steps), *cooldown)

    def _full_steps(self, steps: int) -> int:
        return steps // max(self.args.epochs, 1) * self.args.full_epochs

    def _config(self, num_samples: int, total_steps: int | None):
        args = self.args
        return params.config_from_args(
            args,
            num_samples=num_samples,
            global_batch_size=checks.global_batch_size(args),
            total_steps=total_steps,
            stored=self.resumed.index["settings"] if self.resumed else None,
        )

    def create_loss(self, stock, args):
        """The FastCLIP loss on the training device, with its state if the run is resumed."""
        if not checks.is_fastclip(args):
            return marked(stock(args))
        steps_per_epoch = self.batches.num_batches // args.accum_freq
        config = self._config(self.num_samples, steps_per_epoch * args.full_epochs)
        self.loss = FastCLIPLoss(config, device=args.device)
        if self.resumed:
            index = self.resumed.index
            load_state(
                self.loss, self.resumed.folder, manifest_hash=self.saver.data_hash, data_text=self.saver.data_text
            )
            # not the stored step, since another number of ranks has other steps an epoch
            self.loss.step = self.batches.progress(self.batches.first).global_step
            then, now = index["global_batch_size"], checks.global_batch_size(args)
            if then not in (None, now) and args.rank == 0:
                logging.warning(f"the global batch was {then} and is {now} now: rho and the rates stay as they were")
        if args.rank == 0:
            logging.info(f"FastCLIP: {config}")
        self.batches.loss = self.saver.loss = self.loss
        loss = LoopLoss(self.loss)
        return marked(loss) if args.profile else loss

    def evaluate(self, stock, *args, **kwargs):
        """OpenCLIP's evaluation, on rank 0 alone; the others wait for it without --dist-timeout running out."""
        metrics = stock(*args, **kwargs)
        self._wait_for_rank_0()
        return metrics

    def accuracy(self, stock, output, target, topk=(1,)):
        """How many of logits [n, classes] have their target [n] among the first k, for each k.

        OpenCLIP's own makes a number of an array of one entry, which numpy 2.4 and newer refuse.
        """
        hits = output.topk(max(topk)).indices == target[:, None]
        return [hits[:, :k].sum().item() for k in topk]

    def enumerate(self, stock, iterable, start=0):
        """enumerate as OpenCLIP's loop sees it: an epoch that is resumed inside counts on from there."""
        return stock(iterable, iterable.first if iterable is self.batches else start)

    def train_one_epoch(self, stock, model, data, loss, epoch, optimizer, scaler, *args, tb_writer=None):
        """OpenCLIP's epoch; then FastCLIP's state, complete before the .pt that it belongs to appears."""
        if not self.training:
            self.training = True
            self._before_first_step(model, optimizer, scaler)
        if self.loss is not None:
            self.loss.start_epoch(epoch)
            self.batches.tb_writer = tb_writer
        try:
            stock(model, data, loss, epoch, optimizer, scaler, *args, tb_writer=tb_writer)
        except Stopped:
            self._close_logs(tb_writer)
            if dist.is_initialized():  # srun ends all tasks when the first has ended, and rank 0 has logs to send
                dist.barrier(self.batches.snapshots.group)
            raise
        if self.loss is not None:
            self.saver.save_state_of_epoch(epoch + 1)

    def _before_first_step(self, model, optimizer, scaler) -> None:
        """Tell those who act at a step's end what is trained."""
        batches, args = self.batches, self.args
        if batches.snapshots is not None:
            batches.snapshots.model, batches.snapshots.optimizer, batches.snapshots.scaler = model, optimizer, scaler
        if self.loss is not None:
            batches.guard = NonfiniteGuard(self.loss, optimizer, model)
        if args.resume and args.distributed and args.device.startswith("cpu"):  # a GPU's sums have no order anyway
            dtype = get_input_dtype(args.precision)
            batches.before_first = lambda images, texts: arrange_buckets(model, images.to(dtype), texts)

    def _close_logs(self, tb_writer) -> None:
        """What main() does at its end, which it does not reach."""
        if tb_writer is not None:
            tb_writer.close()
        if self.args.wandb and self.args.rank == 0:
            import wandb

            wandb.finish()

    def finish(self) -> None:
        """What is left to do when main() has returned."""
        if self.batches is not None and self.batches.snapshots is not None:
            self.batches.snapshots.finish()
        self.saver.prune()
        if dist.is_initialized():
            self._wait_for_rank_0()  # it may still have logs to send
            dist.barrier()

    def _wait_for_rank_0(self) -> None:
        """As long as its evaluation takes. It waits for the others in the next collective, for --dist-timeout."""
        if self.patient_group is not None:
            work = dist.broadcast(torch.zeros(1), 0, self.patient_group, async_op=True)
            if self.args.rank != 0:
                work.wait()
