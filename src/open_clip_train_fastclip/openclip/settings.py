"""The command line: FastCLIP's flags inside OpenCLIP's own parser, and what they resolve to.

flags.py and released_flags.py are the tables of our flags and of the released code's; flag_checks.py refuses what
contradicts itself.
"""

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn

import timm.optim
from open_clip_train.params import get_default_params

from ..errors import UserError, one_line
from ..loss.config import ALGORITHMS, CONSTANT, LOSSES, PUBLISHED_EPS, FastCLIPConfig, default_gamma, default_rho
from . import flag_checks, released_flags
from .flags import CONFIG_FLAGS, FLAGS


class MergedParser(argparse.ArgumentParser):
    """ArgumentParser that adds FastCLIP's flags to those it has when it is asked to parse.

    Put in the place of argparse.ArgumentParser in open_clip_train.params, it gives one parser and one --help.
    """

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """Parse like argparse, but raise UserError for what cannot be parsed."""
        group = self.add_argument_group("FastCLIP")
        self._ours: set[argparse.Action] = set()
        for flag in (*FLAGS, *released_flags.FLAGS):
            spellings = [name for name in (flag.name, released_flags.SPELLINGS.get(flag.name)) if name]
            options = flag.options
            if "type" in options:
                options = {"metavar": "N" if options["type"] is int else "X", **options}
            self._ours.add(group.add_argument(*spellings, help=flag.help, **options))
        try:
            return super().parse_args(args, namespace)
        except UserError:
            raise
        except (ValueError, SyntaxError) as error:  # OpenCLIP's own action for --aug-cfg
            raise UserError(f"--aug-cfg takes NAME=VALUE pairs ({one_line(error)}): correct it") from None

    def _get_option_tuples(self, option_string: str) -> list[Any]:
        # An abbreviation that OpenCLIP understands keeps its meaning; ours come second.
        found = super()._get_option_tuples(option_string)
        return [match for match in found if match[0] not in self._ours] or found

    def error(self, message: str) -> NoReturn:
        # One line, printed once by main(), without the usage, which is a page long here.
        _, _, words = message.partition("unrecognized arguments: ")
        if words and not words.startswith("-"):
            names = words.split()
            others = f" and {len(names) - 3} more" if len(names) > 3 else ""
            message = (
                f"unrecognized arguments: {' '.join(names[:3])}{others}: if the shell has made several words of one "
                "pattern, quote it, as '{00000..00331}.tar'"
            )
        raise UserError(f"{message} (--help lists all flags)")


def resolve(args: argparse.Namespace) -> None:
    """Turn what OpenCLIP's parse_args returned into settled values, in place, and refuse contradictions.

    Sets loss; siglip; opt, and lr, beta1, beta2, eps where a timm optimizer left them empty; full_epochs (the horizon
    of all schedules) and epochs (lowered by --stop-epochs); data_size (None with position ids); temperature (of
    --loss clip, else None); fastclip (field of FastCLIPConfig: value, only what the user or --fastclip has set);
    temperature_given, whether it has a temperature of the user's; and fastclip_notes, lines to log once logging is set
    up. Raises UserError that names the flags and the cure.
    """
    args.fastclip_notes = []
    given = {field: vars(args).pop(flag[2:].replace("-", "_")) for field, flag in CONFIG_FLAGS.items()}
    given = {field: value for field, value in given.items() if value is not None}
    args.loss = _choose_loss(args, given.get("gamma_schedule"))
    args.siglip = args.loss == "siglip"
    _choose_optimizer(args)
    args.temperature = given.pop("temperature", None) if args.loss == "clip" else None
    args.temperature_given = "temperature" in given
    args.fastclip = _choose_settings(args, given)
    args.full_epochs = args.epochs
    if args.stop_epochs == -1:
        args.stop_epochs = None
    if args.data_size == -1:
        args.data_size = None
    flag_checks.check_flags(args)
    if args.stop_epochs is not None:
        args.epochs = min(args.stop_epochs, args.epochs)
    if args.data_size is not None and args.sample_id == "position":
        args.fastclip_notes.append("--data-size is ignored: ids are positions, so the data say how many there are")
        args.data_size = None
    if args.loss in LOSSES:
        _check_ranges(args)
    for name in ("released", "multiply_tau", "temperature_scheme", "optimizer"):
        delattr(args, name)


def _choose_loss(args: argparse.Namespace, gamma_schedule: str | None) -> str:
    loss = args.loss
    naming = {
        "--fastclip": args.released,
        "--temperature_scheme": args.temperature_scheme,
        "--multiply_tau": args.multiply_tau,
    }
    words = " ".join(flag for flag, value in naming.items() if value)
    if words:
        named = released_flags.loss_named_by(args.temperature_scheme, args.multiply_tau, gamma_schedule)
        if not (loss or args.released):
            raise UserError(f"{words} works only with --fastclip: add it, or write --loss {named} instead")
        if loss not in (None, named):
            raise UserError(f"--loss {loss} contradicts {words}, which means {named}: leave one of them out")
        loss = named
    if args.siglip and loss not in (None, "siglip"):
        raise UserError(f"--siglip contradicts the loss {loss}: leave one of them out")
    return "siglip" if args.siglip else str(loss or "clip")


def _choose_settings(args: argparse.Namespace, given: dict[str, Any]) -> dict[str, Any]:
    """What holds for the chosen loss, of the given settings and of --fastclip's defaults."""
    unused: set[str] = set(CONFIG_FLAGS)
    constant_gamma = False
    if args.loss in LOSSES:
        algorithm = ALGORITHMS[args.loss]
        constant_gamma = given.get("gamma_schedule", algorithm.gamma_schedule) == "constant"
        unused = {"gamma_decay_epochs"} if constant_gamma else set()
        unused |= {"tau_lr", "tau_lr_schedule"} if algorithm.tau == CONSTANT else set()
        unused |= set() if algorithm.rho else {"rho"}
    useless = ", ".join(_spellings(field) for field in given if field in unused)
    if useless:
        text = f"{useless}: no effect with --loss {args.loss}" + " and a constant gamma" * constant_gamma
        if not args.released:
            cure = "leave it out" if args.loss in LOSSES else "leave it out, or choose a loss such as fastclip-v3"
            raise UserError(f"{text}; {cure}")
        args.fastclip_notes.append(text)
    settings = (released_flags.DEFAULTS if args.released else {}) | given
    if settings.get("tau_lr") == -1:
        settings["tau_lr"] = args.lr
    return {field: value for field, value in settings.items() if field not in unused}


def _spellings(field: str) -> str:
    """The flag of a field of FastCLIPConfig, with the released spelling if there is one."""
    flag = (CONFIG_FLAGS | {"adam_eps": "--eps"}).get(field, "--" + field.replace("_", "-"))
    return f"{flag} ({released_flags.SPELLINGS[flag]})" if flag in released_flags.SPELLINGS else flag


def _choose_optimizer(args: argparse.Namespace) -> None:
    """Settle --opt; give a timm optimizer OpenCLIP's defaults of the model for what is empty, as adamw has them."""
    if args.optimizer:
        wanted = released_flags.OPTIMIZERS[args.optimizer]
        if args.opt not in ("adamw", wanted):
            raise UserError(f"--optimizer {args.optimizer} contradicts --opt {args.opt}: leave one of them out")
        args.opt = wanted
    name = args.opt.lower()
    if name == "adamw":
        return
    if not name.startswith("timm/"):
        raise UserError(f"--opt {args.opt} is unknown: write adamw, or timm/NAME such as timm/lamb")
    try:
        # timm takes lookahead_NAME too
        info = timm.optim.get_optimizer_info(  # type: ignore[attr-defined]
            name.removeprefix("timm/").rpartition("_")[2]
        )
    except ValueError:
        raise UserError(f"--opt {args.opt} is unknown to timm: timm.optim.list_optimizers() names all") from None
    takes_pair = info.has_betas and info.num_betas == 2
    if not takes_pair and (args.beta1, args.beta2) != (None, None):
        raise UserError(
            f"--beta1, --beta2: no effect with --opt {args.opt}, which does not take a pair of betas; leave them out"
        )
    takes = {"lr": True, "beta1": takes_pair, "beta2": takes_pair, "eps": info.has_eps}
    defaults = get_default_params(args.model)
    filled = {key: defaults[key] for key, taken in takes.items() if taken and getattr(args, key) is None}
    for key, value in filled.items():
        setattr(args, key, value)
    if filled:
        values = ", ".join(f"{key} {value}" for key, value in filled.items())
        args.fastclip_notes.append(f"--opt {args.opt} takes OpenCLIP's defaults for {args.model}: {values}")


def _check_ranges(args: argparse.Namespace) -> None:
    try:
        config_from_args(args, num_samples=1, global_batch_size=args.batch_size)
    except UserError as error:
        field, rule = str(error).split(" ", 1)
        raise UserError(f"{_spellings(field)} {rule}") from None


def config_from_args(
    args: argparse.Namespace,
    *,
    num_samples: int,
    global_batch_size: int,
    visits_per_epoch: float = 1.0,
    total_steps: int | None = None,
    stored: dict[str, Any] | None = None,
) -> FastCLIPConfig:
    """The settings of a run whose flags went through resolve().

    num_samples: rows of the per-sample table; global_batch_size: pairs that one step contrasts, over all ranks and
    accumulated batches; visits_per_epoch: how often an epoch sees a sample, on average; total_steps: steps of the full
    horizon; stored: FastCLIPConfig.resolved() of the run that is resumed, which wins over defaults but not over flags.
    Raises UserError that begins with the field's name.
    """
    _check_stored(stored or {})
    defaults = {
        "rho": default_rho(args.loss, global_batch_size),
        "gamma": default_gamma(args.full_epochs * visits_per_epoch),
    }
    if stored is not None:  # only a converted one has no eps of its own, and the released code's default is this
        defaults["eps"] = PUBLISHED_EPS
    settings = defaults | (stored or {}) | args.fastclip
    if stored and "temperature" in stored and not args.temperature_given:  # but by --fastclip
        settings["temperature"] = stored["temperature"]
    model_defaults = get_default_params(args.model)
    if args.opt.lower() == "adamw":
        model_defaults = {key: getattr(args, key) for key in model_defaults}
    return FastCLIPConfig(
        loss=args.loss,
        num_samples=num_samples,
        epochs=args.full_epochs,
        beta1=model_defaults["beta1"],
        beta2=model_defaults["beta2"],
        adam_eps=model_defaults["eps"],
        lr=args.lr,
        warmup_steps=args.warmup,
        total_steps=total_steps,
        lr_min=args.lr_min,
        **settings,
    )


def _check_stored(stored: dict[str, Any]) -> None:
    """Raise UserError for settings of a state that FastCLIPConfig.resolved() has not given."""
    defaults = FastCLIPConfig("fastclip-v3", 1, products="exact").resolved()
    for field, value in stored.items():
        expected = (str,) if isinstance(defaults.get(field), str) else (int, float)
        if field not in defaults or type(value) not in expected:
            raise UserError(f"{field!r} is {value!r} in the state of --resume: restore it from a copy")
