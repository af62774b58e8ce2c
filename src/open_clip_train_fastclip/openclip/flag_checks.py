"""Contradictions between flags, refused before anything is built."""

import difflib

import open_clip

from ..errors import UserError
from ..loss.config import LOSSES, TAU_MAX, TAU_MIN
from ..training.save_trigger import parse_interval
from .checks import has_evaluation_data, has_training_data, is_webdataset, logs_are_written


def check(args) -> None:
    """Raise UserError for the first contradiction in `args`, whose loss is settled; names the flags and the cure."""
    _check_model_name(args)
    _check_sizes(args)
    _check_data(args)
    _check_saving(args)
    _check_compression(args)
    if args.loss in LOSSES:
        _check_fastclip(args)
    elif args.temperature is not None:
        _require(
            TAU_MIN <= args.temperature <= TAU_MAX,
            f"--temperature is {args.temperature}: it must be in [{TAU_MIN}, {TAU_MAX}]",
        )
    _require(
        args.loss == "clip" or not args.freeze_temperature,
        f"--freeze-temperature works only with --loss clip, and the loss is {args.loss}: leave it out "
        "(sogclr and fastclip-v1 have a constant temperature)",
    )
    _require(
        args.resume or not args.fastclip_fresh_state,
        "--fastclip-fresh-state works only with --resume: add --resume FILE, or leave it out",
    )
    _require(
        args.resume != "latest" or not args.fastclip_fresh_state,
        "--fastclip-fresh-state with --resume latest would begin at epoch 0 at every restart: name the file",
    )


def _require(ok, message):
    if not ok:
        raise UserError(message)


def _check_model_name(args):
    if args.model.startswith(("hf-hub:", "local-dir:")):
        return
    names = {name.lower(): name for name in open_clip.list_models()}
    wanted = args.model.replace("/", "-")
    if wanted not in names.values():
        near = [names[name] for name in difflib.get_close_matches(wanted.lower(), names, n=3, cutoff=0.5)]
        cure = f"the nearest are {', '.join(near)}" if near else "open_clip.list_models() names all"
        raise UserError(f"--model {args.model} is unknown: {cure}")


def _check_sizes(args):
    for flag, value in (
        ("--data-size", args.data_size),
        ("--samples-per-shard", args.samples_per_shard),
        ("--stop-epochs", args.stop_epochs),
        ("--batch-size", args.batch_size),
        ("--accum-freq", args.accum_freq),
    ):
        _require(value is None or value >= 1, f"{flag} is {value}: it must be 1 or more")
    _require(
        args.lr_scheduler != "const-cooldown" or args.epochs_cooldown is not None,
        "--lr-scheduler const-cooldown needs --epochs-cooldown: add it",
    )
    _require(args.dist_timeout > 0, f"--dist-timeout is {args.dist_timeout}: it must be above 0 seconds")
    if not args.lr_min:
        return
    cosine = args.lr_scheduler == "cosine" and not args.skip_scheduler
    _require(
        cosine,
        "--lr-min is the floor of the cosine, and there is none with --skip-scheduler or --lr-scheduler "
        f"{args.lr_scheduler}: leave one of them out",
    )
    _require(0 <= args.lr_min <= args.lr, f"--lr-min is {args.lr_min}: it must be between 0 and --lr {args.lr}")


def _check_data(args):
    factors = args.train_data_upsampling_factors
    if factors is not None and args.train_data:
        _require(
            args.dataset_resampled,
            "--train-data-upsampling-factors works only with --dataset-resampled: add it, or leave the factors out",
        )
        sources, given = len(args.train_data.split("::")), len(factors.split("::"))
        _require(
            sources == given,
            f"--train-data-upsampling-factors has {given} factors and --train-data {sources} sources: give one each",
        )
    _require(
        args.dataset_type != "synthetic" or args.train_num_samples,
        "--dataset-type synthetic needs --train-num-samples: add it",
    )
    if args.sample_id == "position" or args.loss not in LOSSES or not has_training_data(args):
        return
    _require(
        args.train_data and is_webdataset(args.train_data, args.dataset_type),
        "--sample-id json-key needs webdataset shards as --train-data, and the data are rows: leave it out",
    )
    _require(args.data_size, "--sample-id json-key needs --data-size, a number above the largest key: add it")


def _check_saving(args):
    _require(args.keep >= 1, f"--keep is {args.keep}: it must be 1 or more")
    if args.loss in LOSSES or args.save_every:
        _require(
            not args.delete_previous_checkpoint or args.save_frequency <= 1,
            f"--delete-previous-checkpoint removes a checkpoint one epoch later, and with --save-frequency "
            f"{args.save_frequency} nothing newer is saved by then: use --save-frequency 1, or leave one of them out",
        )
    if args.save_every is None:
        _require(not args.save_async, "--save-async works only with --save-every: add it, or leave --save-async out")
        return
    parse_interval(args.save_every)
    _require(logs_are_written(args), "--save-every has no place to save to with --logs none: give a folder")
    _require(
        has_training_data(args), "--save-every works only in training: add --train-data, or leave --save-every out"
    )
    refused = {"--horovod": args.horovod, "--trace": args.trace, "--remote-sync": args.remote_sync}
    for flag, value in refused.items():
        _require(not value, f"{flag} does not go with --save-every: leave one of them out")


def _check_compression(args):
    _require(
        args.grad_compression == "none" or not args.horovod,
        "--grad-compression compresses torch's all-reduce, which --horovod replaces: leave one of them out",
    )


def _check_fastclip(args):
    _require(
        has_training_data(args) or (has_evaluation_data(args) and (args.resume or args.pretrained)),
        f"--loss {args.loss} needs training data: add --train-data (to evaluate only, give --resume or "
        "--pretrained, and --val-data or --imagenet-val)",
    )
    remote = args.resume and ("://" in args.resume or (args.resume == "latest" and args.remote_sync))
    _require(
        not remote,
        f"--resume {args.resume}: the state of --loss {args.loss} is read from a folder, not from a remote store: "
        "copy epoch_N.pt and epoch_N.fastclip here and name the .pt",
    )
    refused = {
        "--distill-model": args.distill_model,
        "--distill-pretrained": args.distill_pretrained,
        "--horovod": args.horovod,
        "--trace": args.trace,
    }
    for flag, value in refused.items():
        _require(not value, f"{flag} does not go with --loss {args.loss}: leave it out, or use --loss clip")
    config = {} if ":" in args.model else open_clip.get_model_config(args.model.replace("/", "-"))
    coca = "coca" in args.model.lower() or "multimodal_cfg" in config
    _require(
        not coca,
        f"--model {args.model} is a CoCa model, whose captioning --loss {args.loss} does not train: "
        "choose a CLIP model",
    )
    _require(
        config.get("init_logit_bias") is None,
        f"--model {args.model} has a logit bias, which --loss "
        f"{args.loss} does not have: choose a model without, such as ViT-B-16",
    )
    if args.local_loss or args.gather_with_grad:
        args.fastclip_notes.append(
            f"--local-loss and --gather-with-grad are without effect: with --loss {args.loss} every rank always "
            "computes only its own part"
        )
