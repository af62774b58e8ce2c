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

import torch
import torch.distributed as dist
from open_clip_train.data import get_dataset_size

from . import checks, params
from .checkpoint import json_key_hash, load_state
from .errors import UserError, agree
from .loss import FastCLIPLoss
from .reduction import compress_gradients
from .resume import ResumedRun, load_checkpoint
from .sample_ids import attach_row_ids, attach_webdataset_ids, rows_hash
from .saving import LATEST_IN_THE_MAKING, Saver
from .schedules import cosine_lr_at
from .seeding import seed_sample_order
from .shard_sizes import ShardManifest, read_manifest
from .shards import check_shards, check_shards_for_workers
from .training import FastCLIPBatches, LoopLoss, ProgressBatches

EVALUATION_LIMIT = timedelta(days=1)


class View:
    """A module with some of its names replaced, for one caller only; everything else passes through."""

    def __init__(self, module, **replaced):
        self._module = module
        self.__dict__.update(replaced)

    def __getattr__(self, name):
        return getattr(self._module, name)


def _counted(train_data: str) -> bool:
    """Whether OpenCLIP finds the size of the data set in its sizes.json or __len__."""
    try:
        return bool(get_dataset_size(train_data)[0])
    except (KeyError, ValueError, SyntaxError):  # a table that lacks a shard, or is none
        return False


class Run:
    """The state of one run and the replacements named in patches.PATCHES."""

    def __init__(self):
        self.args = None
        self.manifest: ShardManifest | None = None
        self.model = None
        self.num_samples = 0  # rows of the per-sample table
        self.resumed: ResumedRun | None = None
        self.batches: FastCLIPBatches | None = None
        self.loss: FastCLIPLoss | None = None
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
        if args.train_data and checks.is_webdataset(args.train_data, args.dataset_type):
            self._read_manifest(args)
        if args.val_data and checks.is_webdataset(args.val_data, args.dataset_type):
            agree(check_shards, args.val_data, "--val-data")
        return device

    def _read_manifest(self, args) -> None:
        """Shard sizes: for the ids, and for --train-num-samples when it is not given."""
        by_position = checks.is_fastclip(args) and args.sample_id == "position"
        # OpenCLIP's own losses keep OpenCLIP's count where it has one
        uncounted = args.train_num_samples is None and (checks.is_fastclip(args) or not _counted(args.train_data))
        if by_position or uncounted:
            self.manifest = read_manifest(
                args.train_data,
                samples_per_shard=args.samples_per_shard,
                cache_dir=args.logs if checks.logs_are_written(args) else None,
                progress=args.rank == 0,
            )
            num_shards = len(self.manifest.listed)
        else:
            num_shards = len(agree(check_shards, args.train_data))
        agree(check_shards_for_workers, num_shards, args.workers, args.world_size, args.dataset_resampled)
        if uncounted:
            args.train_num_samples = self.manifest.num_listed_samples

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
            compress_gradients(ddp, self.args.grad_compression)
            return ddp

        parallel = View(stock.nn.parallel, DistributedDataParallel=distributed)
        return View(stock, save=self.saver.save_checkpoint, nn=View(stock.nn, parallel=parallel))

    def get_latest_checkpoint(self, stock, path, remote):
        """The newest epoch_*.pt; a tmp.pt that a killed run left behind is none."""
        if remote:
            return stock(path, remote)
        leftover = Path(path) / LATEST_IN_THE_MAKING
        if leftover.exists():
            logging.warning(f"{leftover} is what an interrupted save left behind: removed")
            leftover.unlink()
        return stock(path, remote)

    def copy_codebase(self, stock, args):
        """Copy the training code alone: of an installed package OpenCLIP would copy all of site-packages."""
        import open_clip_train

        if args.rank == 0:
            for package in (Path(open_clip_train.__file__).parent, Path(__file__).parent):
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
        self.resumed, contents = agree(load_checkpoint, stock, file_path, self.args, self.model)
        return contents

    def get_data(self, stock, args, preprocess_fns, epoch=0, tokenizer=None):
        """OpenCLIP's data; the training batches are told apart by sample ids and shown with a bar."""
        if args.rank == 0:
            for note in args.fastclip_notes:
                logging.info(note)
        data = stock(args, preprocess_fns, epoch=epoch, tokenizer=tokenizer)
        train = data.get("train")
        if train is None:
            return data
        agree(checks.check_steps, train.dataloader, args)
        if not checks.is_fastclip(args):
            train.dataloader = ProgressBatches(train.dataloader, args, epoch)
            return data
        if train.shared_epoch is not None:  # shards
            by_key = args.sample_id == "json-key"
            self.num_samples = args.data_size if by_key else self.manifest.num_samples
            self.saver.data_hash = json_key_hash(self.num_samples) if by_key else self.manifest.hash
            attach_webdataset_ids(train.dataloader, self.manifest, args.sample_id, self.num_samples)
            seed_sample_order(train.dataloader, args.seed, train.shared_epoch)
            dataloader = train.dataloader
        else:
            self.num_samples = len(train.dataloader.dataset)
            self.saver.data_hash = rows_hash(train.dataloader.dataset)
            dataloader = attach_row_ids(train.dataloader)
        self.batches = train.dataloader = FastCLIPBatches(dataloader, args, epoch, self.model)
        return data

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
        steps_per_epoch = self.batches.num_batches // args.accum_freq
        config = self._config(self.num_samples, steps_per_epoch * args.full_epochs)
        self.loss = FastCLIPLoss(config, device=args.device)
        if self.resumed:
            index = self.resumed.index
            load_state(self.loss, self.resumed.folder, manifest_hash=self.saver.data_hash)
            self.loss.step = steps_per_epoch * self.resumed.epoch  # another number of ranks has other steps an epoch
            then, now = index["global_batch_size"], checks.global_batch_size(args)
            if then not in (None, now) and args.rank == 0:
                logging.warning(f"the global batch was {then} and is {now} now: rho and the rates stay as they were")
        if args.rank == 0:
            logging.info(f"FastCLIP: {config}")
        self.batches.loss = self.saver.loss = self.loss
        return LoopLoss(self.loss)

    def evaluate(self, stock, *args, **kwargs):
        """OpenCLIP's evaluation, on rank 0 alone; the others wait for it without --dist-timeout running out."""
        metrics = stock(*args, **kwargs)
        if self.patient_group is not None:
            dist.barrier(self.patient_group)
        return metrics

    def accuracy(self, stock, output, target, topk=(1,)):
        """How many of logits [n, classes] have their target [n] among the first k, for each k.

        OpenCLIP's own makes a number of an array of one entry, which numpy 2.4 and newer refuse.
        """
        hits = output.topk(max(topk)).indices == target[:, None]
        return [hits[:, :k].sum().item() for k in topk]

    def train_one_epoch(self, stock, model, data, loss, epoch, *args, tb_writer=None):
        """OpenCLIP's epoch; then FastCLIP's state, complete before the .pt that it belongs to appears."""
        self.loss.start_epoch(epoch)
        self.batches.tb_writer = tb_writer
        stock(model, data, loss, epoch, *args, tb_writer=tb_writer)
        self.saver.save_state_of_epoch(epoch + 1)

    def finish(self) -> None:
        """What is left to do when main() has returned."""
        self.saver.prune()
        if dist.is_initialized():
            dist.barrier(self.patient_group)  # rank 0 may still have logs to send
