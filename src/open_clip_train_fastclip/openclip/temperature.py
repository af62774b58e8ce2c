"""What --fastclip-temperature (--temperature), tau at the start of a run, says to a run that is resumed.

A resumed run goes on with the tau of its state. A constant tau is a setting, so one that is given anew is obeyed. A
learned one is where training has brought it: its start may be given again, by a command that is run again, and another
one is refused.
"""

import argparse
import logging
import math

import torch
from torch import Tensor

from ..checkpoint.index import Index
from ..errors import UserError
from ..loss.config import ALGORITHMS, CONSTANT
from ..loss.fastclip import FastCLIPLoss


def check_temperature(index: Index, args: argparse.Namespace) -> None:
    """Raise UserError if the flags give a learned temperature another start than it had in the run of a state."""
    start = index["settings"].get("temperature")  # a converted checkpoint does not know it
    given = args.fastclip.get("temperature") if args.temperature_given else None
    if None not in (start, given) and given != start and ALGORITHMS[args.loss].tau != CONSTANT:
        raise UserError(
            f"--fastclip-temperature (--temperature) {given} is another start than {start}, from where --loss "
            f"{args.loss} has learned its temperature: leave it out, or start anew with --fastclip-fresh-state"
        )


def settle_temperature(loss: FastCLIPLoss, args: argparse.Namespace) -> None:
    """Put a constant temperature that the flags give in the place of the state's, and log which is in force."""
    stored = loss.temperature.item()
    text = f"tau goes on at {stored:.5g}"
    if loss.global_tau is not None and loss.config.algorithm.tau == CONSTANT and args.temperature_given:
        loss.global_tau.log_inv_tau.fill_(-math.log(loss.config.temperature))
        text = f"tau is {loss.config.temperature:.5g}, as --fastclip-temperature says; in the state it was {stored:.5g}"
    if args.rank == 0:
        logging.info(text)


def settle_logit_scale(weights: dict[str, Tensor], args: argparse.Namespace) -> None:
    """The same for --loss clip, whose weights hold log(1/tau): the start of a learned one is not known any more."""
    stored = math.exp(-weights["logit_scale"].item())
    text = f"tau goes on at {stored:.5g}: --temperature is where it starts, and it is learned"
    if args.freeze_temperature:
        weights["logit_scale"] = torch.full_like(weights["logit_scale"], math.log(1 / args.temperature))
        text = f"tau is {args.temperature:.5g}, as --temperature says; in the checkpoint it was {stored:.5g}"
    args.fastclip_notes.append(text)
