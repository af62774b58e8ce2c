"""FastCLIP for OpenCLIP: contrastive training on the whole data set with small batches (arXiv 2407.01445)."""

from .loss.config import FastCLIPConfig
from .loss.fastclip import FastCLIPLoss

__all__ = ["FastCLIPConfig", "FastCLIPLoss"]
__version__ = "0.1.0"
