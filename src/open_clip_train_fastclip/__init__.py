"""FastCLIP for OpenCLIP: contrastive training on the whole data set with small batches (arXiv 2407.01445)."""

from .checkpoint.table import load_state, save_state
from .errors import UserError
from .loss.config import FastCLIPConfig
from .loss.fastclip import FastCLIPLoss

__all__ = ["FastCLIPConfig", "FastCLIPLoss", "UserError", "load_state", "save_state"]
__version__ = "0.1.0"
