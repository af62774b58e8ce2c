"""Count the samples of shards before a run, and cache the counts.

python -m open_clip_train_fastclip.shard_sizes "folder/{00000..00331}.tar"
"""

import argparse
import sys

from .errors import EXIT_USER_ERROR, UserError


def main(argv: list[str] | None = None) -> int:
    """Scan shards before a run; returns the exit code: 0, or 2 for wrong input."""
    parser = argparse.ArgumentParser(
        prog="python -m open_clip_train_fastclip.shard_sizes",
        description="Count the samples of shards before a run, and cache the counts.",
    )
    parser.add_argument("train_data", help="as for --train-data: folder/{00000..00331}.tar, joined by ::")
    parser.add_argument("--logs", help="the run's log folder, where the counts go if the data folder is read-only")
    args = parser.parse_args(argv)
    from .openclip.pipeline import manifest_of  # OpenCLIP's imports take seconds

    try:
        manifest = manifest_of(args.train_data, cache_dir=args.logs, progress=True)
    except UserError as error:
        print(f"shard_sizes: error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    print(f"{len(manifest.urls):,} shards, {manifest.num_samples:,} samples")
    return 0


if __name__ == "__main__":
    sys.exit(main())
