"""`python -m open_clip_train_fastclip.shard_sizes`: counts the samples of shards before a run."""

import sys

from .data.manifest import main

if __name__ == "__main__":
    sys.exit(main())
