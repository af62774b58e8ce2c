"""Cost of a large per-sample table, split over two gloo ranks: set-up, read and write of a step, save, load."""

import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist

from open_clip_train_fastclip import FastCLIPConfig, FastCLIPLoss
from open_clip_train_fastclip.checkpoint.table import load_state, save_state

from .memory import status_bytes
from .processes import in_processes
from .records import quartiles

RANKS, BATCH, STEPS = 2, 320, 50  # 320 pairs a rank: the published batch of LAION400M
LOSS = "fastclip-v3"


def measure(num_samples: int, folder: str) -> dict:
    """On every rank: seconds and bytes."""
    clock = time.perf_counter
    before = status_bytes("VmRSS")
    dist.barrier()
    start = clock()
    loss = FastCLIPLoss(FastCLIPConfig(loss=LOSS, num_samples=num_samples))
    dist.barrier()
    seconds = {"set_up": clock() - start}
    table_bytes, held = loss.table.rows.nbytes, status_bytes("VmRSS") - before
    generator = torch.Generator().manual_seed(0)  # the same ids on both ranks, as after their all-gather
    reads, writes = [], []
    for _ in range(STEPS):
        ids_B = torch.randint(num_samples, (BATCH * RANKS,), generator=generator)
        start = clock()
        places_B = loss.table.locate(ids_B)
        rows_BC = loss.table.read(places_B)()
        middle = clock()
        loss.table.write(places_B, torch.zeros_like(rows_BC))
        reads.append(middle - start)
        writes.append(clock() - middle)
    seconds["read_a_step"], seconds["write_a_step"] = quartiles(reads)[1], quartiles(writes)[1]
    state = Path(folder) / "epoch_1.fastclip"
    start = clock()
    save_state(loss, state, epoch=1)
    seconds["save"] = clock() - start
    disk_bytes = sum(file.stat().st_size for file in state.iterdir())
    start = clock()
    load_state(loss, state)
    seconds["load"] = clock() - start
    peak = status_bytes("VmHWM") - before
    return {"seconds": seconds, "table": table_bytes, "held": held, "disk": disk_bytes, "peak": peak}


def table_rows(num_samples: int) -> list[dict]:
    """One row: seconds of the slower rank, bytes of one rank (on the disk: of both); printed."""
    with tempfile.TemporaryDirectory(prefix="table-cost-") as folder:
        results = in_processes(RANKS, measure, num_samples, folder)
    seconds = {name: round(max(r["seconds"][name] for r in results), 7) for name in results[0]["seconds"]}
    row = {"kind": "table", "loss": LOSS, "samples": num_samples, "ranks": RANKS, "batch": BATCH, "seconds": seconds}
    row |= {
        "table_bytes_a_rank": max(r["table"] for r in results),
        "held_bytes_a_rank": max(r["held"] for r in results),
        "peak_bytes_a_rank": max(r["peak"] for r in results),
        "disk_bytes": results[0]["disk"],
    }
    print(f"\n{LOSS}, table of {num_samples:,} samples over {RANKS} ranks, {BATCH} pairs a rank")
    print(f"memory a rank: {row['table_bytes_a_rank']:,} bytes (highest, while saving or loading: "
          f"{row['peak_bytes_a_rank']:,}); on the disk: {row['disk_bytes']:,} bytes")  # fmt: skip
    print(", ".join(f"{name.replace('_', ' ')}: {value:.3g} s" for name, value in seconds.items()), flush=True)
    return [row]
