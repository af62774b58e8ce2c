"""States of this process's random generators as plain tensors, so that a resumed run draws what it would have drawn."""

import random

import numpy as np
import torch
from torch import Tensor


def generator_states() -> dict[str, Tensor]:
    """States of torch's generators (CPU and, where it is in use, the current GPU), numpy's and random's."""
    _, words, position, has_gauss, gauss = np.random.get_state()
    _, numbers, normal = random.getstate()
    states = {
        "torch": torch.get_rng_state(),
        "numpy": torch.tensor([*words.tolist(), position, has_gauss], dtype=torch.int64),
        "numpy_gauss": torch.tensor([gauss], dtype=torch.float64),
        "random": torch.tensor(numbers, dtype=torch.int64),
        "random_gauss": torch.tensor([] if normal is None else [normal], dtype=torch.float64),
    }
    if torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_generator_states(states: dict[str, Tensor]) -> None:
    """Put back what generator_states() gave; a GPU's state is left out where there is none."""
    torch.set_rng_state(states["torch"])
    *words, position, has_gauss = states["numpy"].tolist()
    words = np.array(words, dtype=np.uint32)
    np.random.set_state(("MT19937", words, position, has_gauss, states["numpy_gauss"].item()))
    normal = states["random_gauss"].tolist()
    random.setstate((3, tuple(states["random"].tolist()), normal[0] if normal else None))
    if "cuda" in states and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(states["cuda"])
