"""`python -m open_clip_train_fastclip` is the same as `python -m open_clip_train_fastclip.main`."""

from .main import console

console()
