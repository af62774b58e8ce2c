"""FastCLIP's flags, as tables: what they are called, what they take, what --help says about them."""

from ..loss.config import LOSSES

# Field of FastCLIPConfig: the flag that sets it.
CONFIG_FLAGS = {
    "gamma": "--fastclip-gamma",
    "gamma_schedule": "--fastclip-gamma-schedule",
    "gamma_decay_epochs": "--fastclip-gamma-decay-epochs",
    "rho": "--fastclip-rho",
    "eps": "--fastclip-eps",
    "temperature": "--fastclip-temperature",
    "tau_lr": "--fastclip-tau-lr",
    "tau_lr_schedule": "--fastclip-tau-lr-schedule",
    "gradients": "--fastclip-gradients",
}

# Our flags with their options for argparse. A flag of CONFIG_FLAGS that is not given stays None.
FLAGS = {
    "--loss": {
        "choices": ["clip", "siglip", *LOSSES],
        "help": "clip and siglip: OpenCLIP's own losses, unchanged. sogclr, fastclip-v1: one constant temperature; "
        "fastclip-v0, fastclip-v3: one learned temperature; isogclr, fastclip-v2: one learned temperature per sample. "
        "Default: clip.",
    },
    "--fastclip-gamma": {
        "type": float,
        "help": "Smallest weight of the new estimate in the per-sample average u, in (0, 1]; 1: no memory. "
        "Default: min(1, 4.177 * epochs^-0.7265), 0.3 at 37 epochs.",
    },
    "--fastclip-gamma-schedule": {
        "choices": ["cosine", "constant"],
        "help": "How gamma falls from 1 in the first epoch: along a cosine, or at once from the second epoch on. "
        "Default: constant for sogclr and isogclr, else cosine.",
    },
    "--fastclip-gamma-decay-epochs": {
        "type": int,
        "help": "Epochs until the cosine of gamma reaches --fastclip-gamma. Default: half of --epochs.",
    },
    "--fastclip-rho": {
        "type": float,
        "help": "Margin of the robust losses, 0 or more: a larger rho gives a smaller temperature. Default: "
        "6.5 (fastclip-v3) or 7.0 (fastclip-v2, isogclr) times ln(B-1)/ln(1023) for a global batch of B pairs, "
        "at least 1.",
    },
    "--fastclip-eps": {"type": float, "help": "Added to u, in the unit of u, in (0, 1). Default: 1e-14."},
    "--fastclip-temperature": {
        "type": float,
        "help": "Temperature tau at the start, in [0.01, 1] (the logit scale is 1/tau). With --loss clip: OpenCLIP's "
        "own start. Default: 0.03 for fastclip-v2 and isogclr, else 0.07.",
    },
    "--fastclip-tau-lr": {
        "type": float,
        "help": "Learning rate of the temperature, per step; -1: --lr. Default: --lr / 5 for fastclip-v3, --lr for "
        "fastclip-v0, 0.0133 for fastclip-v2 and isogclr.",
    },
    "--fastclip-tau-lr-schedule": {
        "choices": ["cosine", "const", "step_thresh"],
        "help": "cosine: warm-up and cosine like the model's rate; const; step_thresh: a third while tau <= 0.03. "
        "Default: step_thresh for fastclip-v3, cosine for fastclip-v0, else const.",
    },
    "--fastclip-gradients": {
        "choices": ["released", "paper"],
        "help": "Gradients of the released code, which made the published numbers, or of the paper's formulas. "
        "Default: released.",
    },
    "--fastclip-fresh-state": {
        "action": "store_true",
        "help": "With --resume FILE: take only the model's weights from it; optimizer and FastCLIP state start anew "
        "at epoch 0. Default: off.",
    },
    "--save-every": {
        "metavar": "INTERVAL",
        "help": "Save inside an epoch as well, as checkpoints/epoch_E_step_I/: every so many steps or so much time, "
        "such as 1000steps, 30min or 2h. Default: only before the run ends because of SIGUSR1 or SIGTERM.",
    },
    "--keep": {
        "type": int,
        "default": 2,
        "help": "How many of the newest checkpoints/epoch_E_step_I/ stay. Default: 2.",
    },
    "--save-async": {
        "action": "store_true",
        "help": "Train on while what --save-every saves is written, from a copy in the CPU's memory. Default: off.",
    },
    "--sample-id": {
        "choices": ["position", "json-key"],
        "default": "position",
        "help": "Number of a sample for FastCLIP: its position in the data, or the number under 'key' in its json. "
        "Default: position.",
    },
    "--samples-per-shard": {
        "type": int,
        "help": "Most samples that a shard holds, for remote shards without sizes.json. Default: read from the data.",
    },
    "--data-size": {
        "type": int,
        "help": "Samples in the per-sample table, above the largest key: needed with --sample-id json-key, ignored "
        "with position; -1: not given. Default: -1.",
    },
    "--lr-min": {
        "type": float,
        "default": 0.0,
        "help": "Floor of the cosine of the learning rate, from 0 to --lr. Default: 0.",
    },
    "--stop-epochs": {
        "type": int,
        "help": "Stop when this many epochs are done; all schedules keep the horizon of --epochs; -1: do not stop "
        "early. Default: -1.",
    },
    "--freeze-temperature": {
        "action": "store_true",
        "help": "With --loss clip: keep the temperature constant, at --temperature. Default: off.",
    },
    "--grad-compression": {
        "choices": ["none", "bf16"],
        "default": "none",
        "help": "Compress the all-reduce of the parameters' gradients, for slow networks, with every loss: bf16 halves "
        "the bytes. Default: none.",
    },
    "--dist-timeout": {
        "type": float,
        "default": 1800.0,
        "help": "Seconds after which a rank that waits for another in training gives up with an error. Default: 1800.",
    },
}
