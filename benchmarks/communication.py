"""What crosses the network in a step, counted from real steps over gloo ranks, and what that means on large machines.

    python -m benchmarks.communication [--ranks 4] [--batch 128] [--width 512] [--dtype bf16]

Counted beyond DDP's all-reduce of the parameters, which is the same for all losses. OpenCLIP's ClipLoss runs with
--local-loss --gather-with-grad and takes the branch that it takes on NCCL (on gloo it would scatter instead of
reduce-scatter). The last line is JSON, and each row is appended to benchmarks/results/communication.jsonl.
"""

import argparse
import sys
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
from open_clip.loss import ClipLoss
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.nn.parallel import DistributedDataParallel

from open_clip_train_fastclip import FastCLIPConfig, FastCLIPLoss
from open_clip_train_fastclip.loss.collectives import ALL_GATHER
from open_clip_train_fastclip.loss.config import LOSSES

from .harness.network import ASSUMPTIONS, SETTINGS, Collective, projections, table_memory
from .harness.one_rank import OPEN_CLIP
from .harness.processes import in_processes
from .harness.records import RESULTS, finish

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}
RELEASED_BYTES = {"fastclip-v2": (8, 64), "fastclip-v3": (8, 24)}  # a pair's bytes into a rank: a*d + b
STEPS = 2
PURPOSES = ("ids", "table rows", "features", "new values")  # of FastCLIP's collectives in a step, in order


class Towers(nn.Module):
    """Two linear towers, enough of a model for a step."""

    def __init__(self, d: int):
        super().__init__()
        self.image, self.text = nn.Linear(16, d), nn.Linear(16, d)

    def forward(self, images: Tensor, texts: Tensor) -> list[Tensor]:
        return [normalize(self.image(images), dim=1), normalize(self.text(texts), dim=1)]


@contextmanager
def recorded(calls: list[tuple[str, int, int]]):
    """Append (kind, bytes given, bytes got) to `calls` for each call on torch.distributed meanwhile."""
    real = {name: getattr(dist, name) for name in COUNTED}

    def all_gather(tensors, tensor, *args, **kwargs):
        calls.append(("all-gather", tensor.nbytes, sum(t.nbytes for t in tensors)))
        return real["all_gather"](tensors, tensor, *args, **kwargs)

    def all_gather_single(output, tensor, *args, **kwargs):
        calls.append(("all-gather", tensor.nbytes, output.nbytes))
        return real[ALL_GATHER](output, tensor, *args, **kwargs)

    def all_reduce(tensor, *args, **kwargs):
        calls.append(("all-reduce", tensor.nbytes, tensor.nbytes))
        return real["all_reduce"](tensor, *args, **kwargs)

    def reduce_scatter(output, tensors, *_, **__):
        calls.append(("reduce-scatter", sum(t.nbytes for t in tensors), output.nbytes))
        everything = torch.stack(tensors)  # gloo has no reduce-scatter of a list
        real["all_reduce"](everything)
        output.copy_(everything[dist.get_rank()])

    def refused(*_, **__):
        raise RuntimeError("a collective that this benchmark does not count")

    replaced = dict(zip(COUNTED, (all_gather, all_gather_single, all_reduce, reduce_scatter), strict=True))
    with ExitStack() as stack:
        for name in (*COUNTED, *UNCOUNTED):
            stack.enter_context(patch.object(dist, name, replaced.get(name, refused)))
        stack.enter_context(patch.object(dist, "get_backend", lambda group=None: dist.Backend.NCCL))
        yield


COUNTED = ("all_gather", ALL_GATHER, "all_reduce", "reduce_scatter")
UNCOUNTED = ("all_to_all", "all_to_all_single", "broadcast", "gather", "reduce", "reduce_scatter_tensor", "scatter")


def count_step(name: str, b: int, d: int, dtype: torch.dtype) -> tuple[dict[str, list[int]], int]:
    """Collectives of one step of the calling rank by purpose, and the table's bytes a sample. Needs a process group."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    model = DistributedDataParallel(Towers(d))
    log_scale = torch.tensor(2.66, requires_grad=True)
    num_samples = 4 * b * world_size
    is_fastclip = name != OPEN_CLIP
    if is_fastclip:
        loss = FastCLIPLoss(FastCLIPConfig(loss=name, num_samples=num_samples))
    else:
        loss = ClipLoss(local_loss=True, gather_with_grad=True, rank=rank, world_size=world_size)
    for _ in range(STEPS):  # the last one counts
        calls: list[tuple[str, int, int]] = []
        with recorded(calls):
            if is_fastclip:
                loss.begin_step(torch.randperm(num_samples)[rank * b : (rank + 1) * b])
            image, text = (f.to(dtype) for f in model(torch.randn(b, 16), torch.randn(b, 16)))
            value = loss(image, text) if is_fastclip else loss(image, text, log_scale.exp())
            value.backward()
    if not is_fastclip:
        return summed(calls), 0
    table = loss.table.rows
    named = [(purpose, *call[1:]) for purpose, call in zip(PURPOSES, calls, strict=True)]
    return summed(named), table.element_size() * table.shape[1]


def summed(calls: list[tuple[str, int, int]]) -> dict[str, list[int]]:
    """[calls, bytes given, bytes got] by the first entry of each call."""
    counts: dict[str, list[int]] = {}
    for name, given, got in calls:
        entry = counts.setdefault(name, [0, 0, 0])
        entry[:] = entry[0] + 1, entry[1] + given, entry[2] + got
    return counts


def count_all(sizes: list[tuple[int, int]], dtype: torch.dtype) -> dict:
    """On every rank: (name, b, d) -> what count_step gives."""
    return {(name, b, d): count_step(name, b, d, dtype) for b, d in sizes for name in (OPEN_CLIP, *LOSSES)}


def counted_rows(counts: dict, b: int, d: int, ranks: int, dtype: str) -> list[dict]:
    """A row a loss: its collectives, their sums, and their share of OpenCLIP's bytes on the wire."""
    rows = []
    for name in (OPEN_CLIP, *LOSSES):
        collectives = [Collective(purpose, *entry) for purpose, entry in counts[name, b, d][0].items()]
        rows.append(
            {
                "kind": "counted",
                "loss": name,
                "ranks": ranks,
                "batch": b,
                "width": d,
                "dtype": dtype,
                "calls": sum(c.calls for c in collectives),
                "bytes_given": sum(c.given for c in collectives),
                "bytes_got": sum(c.got for c in collectives),
                "wire_bytes": sum(c.wire_bytes(ranks) for c in collectives),
                "collectives": [c.as_dict(ranks) for c in collectives],
            }
        )
        rows[-1]["wire_share_of_open_clip"] = round(rows[-1]["wire_bytes"] / rows[0]["wire_bytes"], 4)
    return rows


def show_counted(rows: list[dict]) -> None:
    """The counted rows as a table, and the released code's bytes."""
    b, d, ranks, dtype = (rows[0][key] for key in ("batch", "width", "ranks", "dtype"))
    print(f"\nOne rank's step: {b} pairs a rank, width {d}, {ranks} ranks, {dtype} features. Bytes on the wire: what a")
    print("rank sends in a ring: all-gather and reduce-scatter (K-1)/K of the whole, all-reduce twice that.\n")
    print(f"{'':30} {'calls':>5} {'bytes given':>12} {'bytes got':>10} {'on the wire':>12}")
    alike: dict[str, list[dict]] = {}
    for row in rows:
        alike.setdefault(repr(row["collectives"]), []).append(row)
    for group in alike.values():
        print(", ".join(row["loss"] for row in group))
        row = group[0]
        for c in row["collectives"]:
            label = c["type"] if c["type"] == c["purpose"] else f"{c['purpose']} ({c['type']})"
            print(f"  {label:28} {c['calls']:5} {c['given']:12,} {c['got']:10,} {c['wire_bytes']:12,.0f}")
        total = f"{row['calls']:5} {row['bytes_given']:12,} {row['bytes_got']:10,} {row['wire_bytes']:12,.0f}"
        print(f"  {'in all':28} {total}  {row['wire_share_of_open_clip']:.3f} of OpenCLIP's")
    if dtype == "float32":
        print("\nBytes that a rank gives, beyond the rows of the table, which the released code has on every rank:")
        for name, (features, rest) in RELEASED_BYTES.items():
            (row,) = (row for row in rows if row["loss"] == name)
            ours = row["bytes_given"] - sum(c["given"] for c in row["collectives"] if c["purpose"] == "table rows")
            released = b * (features * d + rest)
            print(f"{name}: {ours:,}; the released code {released:,} in 3 all-gathers (by its formula, not run)")


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="python -m benchmarks.communication", description="Bytes of a step.")
    parser.add_argument("--ranks", type=int, default=4, help="2 or more (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=128, help="pairs a rank (default: %(default)s)")
    parser.add_argument("--width", type=int, default=512, help="of the embedding (default: %(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the features (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of communication.jsonl")
    args = parser.parse_args(argv)
    if args.ranks < 2:
        parser.error("--ranks must be 2 or more: one rank sends nothing")
    sizes = [(args.batch, args.width), *((s.b, s.d) for s in SETTINGS)]
    counts = in_processes(args.ranks, count_all, list(dict.fromkeys(sizes)), DTYPES[args.dtype])[0]
    rows = counted_rows(counts, args.batch, args.width, args.ranks, args.dtype)
    show_counted(rows)
    print(f"\n{ASSUMPTIONS}")
    rows += projections(counts, args.ranks, args.dtype)
    rows += table_memory(counts)
    finish("communication", argv, rows, args.results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
