"""The command line: one help, what every flag resolves to, and what is refused with one line."""

import math
import re
import shlex
from pathlib import Path

import flag_table
import pytest
import timm.optim
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from resolved_flags import STOCK, TRAIN, V3, config, parse, released_command, resolved

from open_clip_train_fastclip.errors import UserError
from open_clip_train_fastclip.loss.config import LOSSES, FastCLIPConfig, default_gamma, default_rho
from open_clip_train_fastclip.main import main
from open_clip_train_fastclip.openclip import released_flags, settings
from open_clip_train_fastclip.openclip.flags import FLAGS

# ---- the eight released commands


CC3M = {
    "num_samples": 2_723_840,
    "epochs": 37,
    "gamma": 0.2,
    "gamma_schedule": "cosine",
    "gamma_decay_epochs": 18,
    "eps": 1e-14,
    "beta1": 0.9,
    "beta2": 0.999,
    "adam_eps": 1e-8,
    "lr": 1e-3,
    "warmup_steps": 10_000,
    "total_steps": 98_420,
    "lr_min": 0.0,
    "gradients": "released",
}
VIT = CC3M | {"beta2": 0.98, "adam_eps": 1e-6}
STEP_THRESH = {"loss": "fastclip-v3", "temperature": 0.07, "tau_lr_schedule": "step_thresh"}
RELEASED_RUNS = {
    "cc3m v0": CC3M
    | {"loss": "fastclip-v0", "temperature": 0.07, "tau_lr": 1e-3, "tau_lr_schedule": "cosine", "rho": 0.0},
    "cc3m v1": CC3M
    | {"loss": "fastclip-v1", "temperature": 0.07, "tau_lr": 0.0, "tau_lr_schedule": "const", "rho": 0.0},
    "cc3m v2": CC3M
    | {"loss": "fastclip-v2", "temperature": 0.03, "tau_lr": 0.0133, "tau_lr_schedule": "const", "rho": 7.0},
    "cc3m v3": CC3M | STEP_THRESH | {"tau_lr": 2e-4, "rho": 6.5},
    "cc12m v3": VIT
    | STEP_THRESH
    | {"num_samples": 9_187_328, "epochs": 33, "gamma_decay_epochs": 16, "lr": 4e-4, "tau_lr": 1e-4, "rho": 8.5},
    "laion400m v3": VIT
    | STEP_THRESH
    | {"num_samples": 315_658_316, "epochs": 30, "gamma": 0.8, "gamma_decay_epochs": 10, "eps": 1e-6, "lr": 2e-4}
    | {"lr_min": 4e-5, "tau_lr": 5e-5, "rho": 16.0, "warmup_steps": 13_200},
}


@pytest.mark.parametrize("name", RELEASED_RUNS)
def test_released_fastclip_commands_resolve_to_the_published_settings(name):
    args = resolved(*released_command(name))
    expected = FastCLIPConfig(**RELEASED_RUNS[name])
    assert args.loss == expected.loss and not args.siglip
    assert config(args, args.train_num_samples, 1024, total_steps=98_420) == expected
    assert args.full_epochs == expected.epochs
    assert args.epochs == (3 if name == "laion400m v3" else expected.epochs)
    assert (args.sample_id, args.data_size) == ("position", None)
    assert args.opt == "adamw" and args.profile and args.seed == 2024 and args.local_loss
    notes = " ".join(args.fastclip_notes)
    assert all(flag in notes for flag in ("--data-size", "--local-loss")) and "--profile" not in notes


def test_released_openclip_command_is_plain_openclip():
    args = resolved(*released_command("cc3m openclip"))
    assert args.loss == "clip" and args.fastclip == {} and not args.siglip and args.temperature is None
    assert args.local_loss and args.gather_with_grad and args.profile
    assert (args.lr, args.beta2, args.epochs, args.full_epochs, args.data_size) == (1e-3, 0.999, 37, 37, None)
    assert [note.split()[0] for note in args.fastclip_notes] == ["--data-size"]


def test_released_evaluation_command_is_plain_openclip():
    args = resolved(*released_command("evaluation"))
    assert args.loss == "clip" and args.fastclip == {} and args.fastclip_notes == []
    assert args.resume.endswith("epoch_37.pt") and args.imagenet_val == "imagenet/val"
    assert (args.epochs, args.full_epochs, args.zeroshot_frequency, args.model) == (0, 0, 1, "RN50")


# ---- the flags


def test_clip_leaves_every_value_of_openclip_as_it_is():
    for argv in ([], TRAIN, [*TRAIN, "--lr", "1e-3", "--model", "ViT-B-32", "--epochs", "3"], ["--siglip"]):
        stock = vars(parse(*argv, parser=STOCK.ArgumentParser))
        ours = vars(resolved(*argv))
        assert {name: ours[name] for name in stock} == stock
    assert resolved(*TRAIN, "--loss", "clip").loss == resolved(*TRAIN).loss == "clip"


def test_names_of_the_losses():
    assert resolved(*TRAIN, "--loss", "siglip").siglip
    assert resolved(*TRAIN, "--siglip").loss == "siglip"
    for loss in LOSSES:
        args = resolved(*TRAIN, "--loss", loss)
        assert (args.loss, args.siglip, args.fastclip) == (loss, False, {})


def test_defaults_without_any_other_flag():
    v3 = config(resolved(*V3, "--epochs", "14", "--lr", "1e-3", "--model", "ViT-B-32"))
    assert (v3.gamma, v3.gamma_schedule, v3.gamma_decay_epochs) == (default_gamma(14), "cosine", 7)
    assert (v3.rho, v3.tau_lr, v3.tau_lr_schedule, v3.temperature) == (6.5, 1e-3 / 5, "step_thresh", 0.07)
    assert (v3.eps, v3.beta1, v3.beta2, v3.adam_eps, v3.gradients) == (1e-4, 0.9, 0.98, 1e-6, "released")
    assert config(resolved(*V3), global_batch_size=64).rho == pytest.approx(6.5 * 4.143 / 6.931, rel=1e-3)
    v0 = config(resolved(*TRAIN, "--loss", "fastclip-v0"))
    assert (v0.tau_lr, v0.tau_lr_schedule) == (v0.lr, "cosine") == (5e-4, "cosine")
    for loss in ("fastclip-v2", "isogclr"):
        individual = config(resolved(*TRAIN, "--loss", loss))
        assert (individual.tau_lr, individual.tau_lr_schedule) == (0.0133, "const")
        assert (individual.temperature, individual.rho, individual.eps) == (0.03, 7.0, 1e-14)
    assert config(resolved(*TRAIN, "--loss", "sogclr")).gamma_schedule == "constant"


def test_rho_default_is_the_same_to_the_last_bit_in_every_release():
    """Multiplied before divided: the other order ends in another bit, and a resumed run would not repeat itself."""
    assert 7.0 * (math.log(23) / math.log(1023)) != 7.0 * math.log(23) / math.log(1023)
    assert default_rho("fastclip-v2", 24) == 7.0 * math.log(23) / math.log(1023)


OURS = {
    "gamma": ("0.3", 0.3),
    "gamma-schedule": ("constant", "constant"),
    "rho": ("2.5", 2.5),
    "eps": ("1e-6", 1e-6),
    "temperature": ("0.05", 0.05),
    "tau-lr": ("3e-4", 3e-4),
    "tau-lr-schedule": ("const", "const"),
    "gradients": ("paper", "paper"),
    "products": ("tf32", "tf32"),
}


@pytest.mark.parametrize("flag", OURS)
def test_every_flag_reaches_the_config_in_both_spellings(flag):
    text, value = OURS[flag]
    for spelling in filter(None, (f"--fastclip-{flag}", released_flags.SPELLINGS.get(f"--fastclip-{flag}"))):
        args = resolved(*V3, spelling, text)
        field = flag.replace("-", "_")
        assert args.fastclip == {field: value} and getattr(config(args), field) == value
    decay = resolved(*V3, "--gamma_decay_epochs", "4")
    assert decay.fastclip == {"gamma_decay_epochs": 4} and config(decay).gamma_decay_epochs == 4


def test_stored_settings_lie_between_flags_and_defaults():
    first = config(resolved(*V3, "--fastclip-gamma", "0.4"), global_batch_size=64)
    stored = first.resolved()
    resumed = config(resolved(*V3, "--fastclip-tau-lr", "1e-5", "--epochs", "90"), stored=stored)
    assert (resumed.rho, resumed.gamma, resumed.gamma_decay_epochs) == (first.rho, 0.4, first.gamma_decay_epochs)
    assert (resumed.tau_lr, first.tau_lr) == (1e-5, 1e-4)


@pytest.mark.parametrize(
    "flags, loss",
    [
        ("--fastclip", "fastclip-v0"),
        ("--fastclip --multiply_tau", "fastclip-v3"),
        ("--fastclip --temperature_scheme global_learnable --gamma_schedule constant", "fastclip-v0"),
        ("--fastclip --temperature_scheme global_constant", "fastclip-v1"),
        ("--fastclip --temperature_scheme global_constant --gamma_schedule constant", "sogclr"),
        ("--fastclip --temperature_scheme individual_learnable", "fastclip-v2"),
        ("--fastclip --temperature_scheme individual_learnable --gamma_schedule constant", "isogclr"),
        ("--fastclip --multiply_tau --loss fastclip-v3", "fastclip-v3"),
        ("--loss fastclip-v3 --multiply_tau --temperature_scheme global_learnable", "fastclip-v3"),
    ],
)
def test_released_words_for_the_loss(flags, loss):
    assert resolved(*TRAIN, *flags.split()).loss == loss


def test_fastclip_implies_the_released_defaults():
    args = resolved(*TRAIN, "--fastclip", "--multiply_tau", "--lr", "1e-3", "--epochs", "90")
    released = released_flags.DEFAULTS | {"tau_lr": 1e-3}
    assert args.fastclip == released
    built = config(args, global_batch_size=16)
    assert {field: getattr(built, field) for field in released} == released
    args = resolved(*TRAIN, *"--fastclip --temperature_scheme global_constant --rho 8.5 --lr_tau 1e-4".split())
    assert "rho" not in args.fastclip
    assert "--fastclip-rho (--rho)" in args.fastclip_notes[0] and "--lr_tau" in args.fastclip_notes[0]


def test_tau_lr_of_minus_one_is_the_learning_rate():
    args = resolved(*V3, "--fastclip-tau-lr", "-1", "--opt", "timm/lamb", "--lr", "2e-3")
    assert config(args).tau_lr == 2e-3
    assert config(resolved(*V3, "--lr_tau=-1")).tau_lr == 5e-4


def test_stop_epochs_lowers_epochs_and_keeps_the_horizon():
    for flags, epochs in (("3", 3), ("99", 32), ("-1", 32)):
        args = resolved(*V3, "--stop-epochs", flags)
        assert (args.epochs, args.full_epochs) == (epochs, 32)
        assert config(args).epochs == 32 and config(args).gamma_decay_epochs == 16
    assert resolved(*TRAIN, "--stop_epochs", "2").epochs == 2


def test_temperature_of_openclip():
    args = resolved(*TRAIN, "--temperature", "0.05", "--freeze-temperature")
    assert args.temperature == 0.05 and args.freeze_temperature and args.fastclip == {}
    assert resolved(*TRAIN, "--fastclip-temperature", "0.1").temperature == 0.1
    assert resolved(*V3, "--temperature", "0.05").temperature is None


def test_json_keys():
    args = resolved(*V3, *"--sample-id json-key --data_size 3318333".split())
    assert (args.sample_id, args.data_size) == ("json-key", 3318333)
    assert not any("data-size" in note for note in args.fastclip_notes)


def test_evaluation_of_a_fastclip_run_with_its_own_flags():
    for source in ("--resume", "--pretrained"):
        assert resolved("--loss", "fastclip-v3", source, "epoch_3.pt", "--imagenet-val", "val").loss == "fastclip-v3"


def test_names_of_models_from_elsewhere_pass():
    for model in ("hf-hub:someone/some-clip", "local-dir:/some/folder", "ViT-B/32"):
        assert resolved(*V3, "--model", model).model == model


# ---- optimizers


def build_as_main_does(args):
    """What OpenCLIP's main() passes to timm."""
    kwargs = {}
    assert (args.beta1 is None) == (args.beta2 is None)
    if args.beta1 is not None:
        kwargs["betas"] = (args.beta1, args.beta2)
    if args.momentum is not None:
        kwargs["momentum"] = args.momentum
    name = args.opt.lower().split("timm/")[-1]
    model = torch.nn.Linear(2, 2)
    return timm.optim.create_optimizer_v2(model, name, lr=args.lr, weight_decay=args.wd, eps=args.eps, **kwargs)


@pytest.mark.parametrize("loss", ["clip", "fastclip-v3"])
@pytest.mark.parametrize(
    "name, expected",
    [
        ("lamb", {"lr": 5e-4, "betas": (0.9, 0.98), "eps": 1e-6}),
        ("lion", {"lr": 5e-4, "betas": (0.9, 0.98)}),
        ("sgd", {"lr": 5e-4, "momentum": 0.9}),
        ("lookahead_adamw", {"lr": 5e-4, "betas": (0.9, 0.98), "eps": 1e-6}),
    ],
)
def test_timm_optimizers_are_built_with_the_defaults_of_the_model(name, expected, loss):
    args = resolved(*TRAIN, "--loss", loss, "--opt", f"timm/{name}", "--model", "ViT-B-32")
    defaults = build_as_main_does(args).defaults
    assert {key: defaults[key] for key in expected} == expected
    assert len(args.fastclip_notes) == 1 and f"timm/{name}" in args.fastclip_notes[0]


def test_given_values_of_a_timm_optimizer_stay():
    args = resolved(*V3, *"--opt timm/lamb --lr 1e-3 --beta2 0.95 --eps 1e-5 --model ViT-B-32".split())
    optimizer = build_as_main_does(args)
    assert {key: optimizer.defaults[key] for key in ("lr", "betas", "eps")} == {
        "lr": 1e-3,
        "betas": (0.9, 0.95),
        "eps": 1e-5,
    }
    built = config(args)  # tau keeps the defaults of the model
    assert (built.beta2, built.adam_eps, built.lr) == (0.98, 1e-6, 1e-3)
    adamw = config(resolved(*V3, "--beta2", "0.95", "--eps", "1e-5"))
    assert (adamw.beta1, adamw.beta2, adamw.adam_eps) == (0.9, 0.95, 1e-5)


def test_released_optimizer_flag():
    assert resolved(*V3, "--optimizer", "lamb").opt == "timm/lamb"
    assert resolved(*V3, "--optimizer", "adamw").opt == "adamw"
    assert build_as_main_does(resolved(*V3, "--optimizer", "lamb")).defaults["betas"] == (0.9, 0.999)


# ---- what is refused

REFUSED = [
    ("--loss fastclip-v3", "--loss fastclip-v3 needs training data: add --train-data"),
    ("--loss fastclip-v3 --resume x.pt", "needs training data"),
    ("--loss fastclip-v3 --imagenet-val val", "needs training data"),
    ("--loss fastclip-v3 --dataset-type synthetic", "needs --train-num-samples"),
    ("--loss fastclip-v3 T --distill-model ViT-B-32 --distill-pretrained x", "--distill-model does not go with"),
    ("--loss fastclip-v3 T --siglip", "--siglip contradicts the loss fastclip-v3"),
    ("--loss clip T --siglip", "--siglip contradicts the loss clip"),
    ("--loss fastclip-v3 T --horovod", "--horovod does not go with"),
    ("--loss clip T --horovod --grad-compression bf16", "which --horovod replaces"),
    ("--loss fastclip-v3 T --trace", "--trace does not go with"),
    ("--loss fastclip-v3 T --gamma 0", "--fastclip-gamma (--gamma) is 0.0: it must be in (0, 1]"),
    ("--loss fastclip-v3 T --fastclip-gamma 1.1", "is 1.1: it must be in (0, 1]"),
    ("--loss fastclip-v3 T --fastclip-gamma nan", "--fastclip-gamma (--gamma) is nan"),
    ("--loss fastclip-v3 T --fastclip-gamma-decay-epochs 0", "--fastclip-gamma-decay-epochs"),
    ("--loss fastclip-v3 T --fastclip-rho -2", "--fastclip-rho (--rho) is -2.0: it must be 0 or more"),
    ("--loss fastclip-v3 T --fastclip-eps 0", "--fastclip-eps (--fastclip_eps) is 0.0"),
    ("--loss fastclip-v3 T --temperature 0.001", "--fastclip-temperature (--temperature) is 0.001: it must be in"),
    ("--loss clip T --temperature 2", "--temperature is 2.0: it must be in [0.01, 1.0]"),
    ("--loss fastclip-v3 T --fastclip-tau-lr -2", "--fastclip-tau-lr (--lr_tau) is -2.0"),
    ("--loss fastclip-v3 T --lr 0", "--lr is 0.0: it must be above 0"),
    ("--loss fastclip-v3 T --eps -1", "--eps is -1.0"),
    ("--loss fastclip-v3 T --lr-min 1", "--lr-min is 1.0: it must be between 0 and --lr 0.0005"),
    ("--loss clip T --lr-min=-1e-5", "--lr-min is -1e-05"),
    ("--loss clip T --lr-min 1e-5 --lr-scheduler const", "--lr-min is the floor of the cosine"),
    ("--loss clip T --stop-epochs 0", "--stop-epochs is 0: it must be 1 or more"),
    ("--loss clip T --data-size 0", "--data-size is 0"),
    ("--loss clip T --samples-per-shard 0", "--samples-per-shard is 0"),
    ("--loss fastclip-v2 T --lr_tau_scheduler step_thresh", "--fastclip-tau-lr-schedule (--lr_tau_scheduler)"),
    ("--loss isogclr T --fastclip-tau-lr-schedule step_thresh", "choose const or cosine"),
    ("--loss fastclip-v1 T --fastclip-rho 6", "--fastclip-rho (--rho): no effect with --loss fastclip-v1"),
    ("--loss sogclr T --lr_tau 1", "no effect with --loss sogclr"),
    ("--loss sogclr T --gamma_decay_epochs 4", "no effect with --loss sogclr and a constant gamma; leave it out"),
    ("--loss clip T --fastclip-gamma 0.2", "--loss clip; leave it out, or choose a loss such as fastclip-v3"),
    ("T --gamma 0.2", "no effect with --loss clip"),
    ("--loss siglip T --temperature 0.07", "no effect with --loss siglip"),
    ("--loss fastclip-v1 T --freeze-temperature", "--freeze-temperature works only with --loss clip"),
    ("--loss siglip T --freeze-temperature", "--freeze-temperature works only with --loss clip"),
    ("--loss fastclip-v3 T --fastclip-fresh-state", "works only with --resume"),
    ("--loss fastclip-v3 T --fastclip-fresh-state --resume latest", "name the file"),
    ("--loss fastclip-v3 --train-data x.csv --sample-id json-key", "--sample-id json-key needs webdataset shards"),
    ("--loss fastclip-v3 T --sample-id json-key", "--sample-id json-key needs --data-size"),
    ("--loss fastclip-v3 T --fastclip", "--loss fastclip-v3 contradicts --fastclip, which means fastclip-v0"),
    ("--loss clip T --fastclip", "contradicts --fastclip"),
    ("T --multiply_tau", "--multiply_tau works only with --fastclip: add it, or write --loss fastclip-v3"),
    ("T --fastclip --multiply_tau --temperature_scheme global_constant", "--multiply_tau has no meaning with"),
    ("T --fastclip --multiply_tau --temperature_scheme individual_learnable", "global_learnable for FastCLIP-v3"),
    ("T --model ViT-B32", "--model ViT-B32 is unknown: the nearest are ViT-B-32"),
    ("T --model vit-b-32", "ViT-B-32"),
    ("T --model zzzzzzzzzzzz", "open_clip.list_models()"),
    ("T --opt lamb", "--opt lamb is unknown: write adamw, or timm/NAME"),
    ("T --opt timm/lamp", "--opt timm/lamp is unknown to timm"),
    ("T --opt timm/lion --optimizer lamb", "--optimizer lamb contradicts --opt timm/lion"),
    ("T --opt timm/sgd --beta1 0.9", "--beta1, --beta2: no effect with --opt timm/sgd"),
]


@pytest.mark.parametrize("flags, message", REFUSED)
def test_contradictions_are_refused_with_one_line(flags, message):
    argv = shlex.split(flags.replace(" T", " " + " ".join(TRAIN)).replace("T ", " ".join(TRAIN) + " ", 1))
    args = parse(*argv)
    with pytest.raises(UserError) as caught:
        settings.resolve(args)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--loss fastclip-v4", "fastclip-v3"),  # names the choices
        ("--fastclip-gama 0.2", "unrecognized arguments: --fastclip-gama 0.2"),
        ("--fastclip-gamma high", "invalid float value: 'high'"),
        ("--temperature_scheme individual_constant", "individual_learnable"),
        ("--precision fp8", "--precision"),
    ],
)
def test_misspelt_flags_end_with_one_line_and_exit_code_2(flags, message, capsys):
    assert main([*TRAIN, *flags.split()]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


VALUES = {
    "--loss": ["clip", "siglip", *LOSSES],
    "--fastclip-gamma": ["0.2", "1", "7"],
    "--gamma_schedule": ["cosine", "constant"],
    "--gamma_decay_epochs": ["1", "0"],
    "--rho": ["3", "-1"],
    "--lr_tau": ["-1", "1e-4"],
    "--lr_tau_scheduler": ["cosine", "const", "step_thresh"],
    "--temperature": ["0.07", "0"],
    "--temperature_scheme": list(released_flags.SCHEMES),
    "--stop-epochs": ["-1", "3"],
    "--opt": ["timm/lamb", "adamw", "timm/sgd"],
    "--optimizer": ["lamb", "adamw"],
}
SWITCHES = ["--fastclip", "--multiply_tau", "--siglip", "--freeze-temperature", "--profile"]


@hypothesis_settings(max_examples=150, deadline=None)
@given(
    st.fixed_dictionaries({}, optional={flag: st.sampled_from(values) for flag, values in VALUES.items()}),
    st.sets(st.sampled_from(SWITCHES)),
)
def test_any_combination_gives_a_config_or_one_line(valued, switches):
    args = parse(*TRAIN, *switches, *(f"{flag}={value}" for flag, value in valued.items()))
    try:
        settings.resolve(args)
    except UserError as error:
        assert "--" in str(error) and "\n" not in str(error)
        return
    assert args.siglip == (args.loss == "siglip")
    if args.loss in LOSSES:
        assert config(args).loss == args.loss
    else:
        assert args.fastclip == {}


# ---- the merged parser


def test_one_help_holds_both(capsys):
    with pytest.raises(SystemExit) as caught:
        parse("--help")
    text = capsys.readouterr().out
    assert caught.value.code == 0 and text.count("usage:") == 1
    theirs, ours = text.split("\nFastCLIP:\n")
    assert "--train-data" in theirs and "--zeroshot-frequency" in theirs
    for flag in (*FLAGS, *released_flags.FLAGS):
        assert re.search(rf"^  {flag.name}\b", ours, re.M)
    for spelling in released_flags.SPELLINGS.values():
        assert f", {spelling} " in ours


def test_the_documentation_says_what_help_says(capsys):
    """docs/flags.md has the table that tests/support/flag_table.py prints, and --help the same words."""
    documented = (Path(__file__).parents[2] / "docs" / "flags.md").read_text()
    assert flag_table.markdown() in documented, "python tests/support/flag_table.py prints the table to put there"
    with pytest.raises(SystemExit):
        parse("--help")
    text = "".join(capsys.readouterr().out.split())  # argparse breaks lines at hyphens, too
    for names, meaning, default in flag_table.rows():
        assert "".join(f"{meaning} Default: {default}.".split()) in text, names


def test_abbreviations_of_openclip_keep_their_meaning():
    parsers = {}
    for base in (STOCK.ArgumentParser, settings.MergedParser):

        class Recording(base):
            def parse_args(self, *args, **kwargs):
                parsers[len(parsers)] = self
                return super().parse_args(*args, **kwargs)

        parse(parser=Recording)
    stock, merged = parsers.values()
    ours = merged._option_string_actions.keys() - stock._option_string_actions.keys()
    for option in stock._option_string_actions:
        for end in range(4, len(option)):
            if option[:end] not in ours:
                dests = [
                    [action.dest for action, *_ in parser._get_option_tuples(option[:end])]
                    for parser in (stock, merged)
                ]
                assert dests[0] == dests[1], option[:end]
    assert parse("--ga", "--prec", "fp32").gather_with_grad
