"""`python -m open_clip_train_fastclip.convert`: a checkpoint of the authors' released code becomes one of ours."""

import sys

from .checkpoint.released import convert, main

__all__ = ["convert", "main"]

if __name__ == "__main__":
    sys.exit(main())
