"""OpenCLIP 3.3: its training scripts with FastCLIP in them. The only package that imports OpenCLIP."""

from pathlib import Path

import open_clip


def register_models() -> None:
    """Make open_clip know the models of model_configs/ by their names."""
    open_clip.add_model_config(Path(__file__).parent / "model_configs")
