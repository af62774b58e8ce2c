"""From the counted collectives of a few ranks to large machines: an alpha-beta model of a ring, and the table's memory.

Symbols: K GPUs; the whole of a collective is what all ranks have after an all-gather or before a reduce-scatter.
"""

import math
from dataclasses import dataclass

from .one_rank import OPEN_CLIP


@dataclass(frozen=True)
class Collective:
    """One collective of a step as counted on one rank: bytes that it gave and got, over all calls."""

    purpose: str
    calls: int
    given: int
    got: int

    @property
    def type(self) -> str:
        if self.given == self.got:
            return "all-reduce"
        return "all-gather" if self.given < self.got else "reduce-scatter"

    @property
    def passes(self) -> int:
        """Passes through the ring: an all-reduce is a reduce-scatter and an all-gather."""
        return 2 if self.type == "all-reduce" else 1

    def share(self, ranks: int) -> float:
        """The part of the whole that belongs to one rank, in bytes: it does not depend on the number of ranks."""
        return self.given / ranks if self.type == "all-reduce" else min(self.given, self.got)

    def wire_bytes(self, ranks: int, gpus: int | None = None) -> float:
        """Bytes that a rank sends in a ring of `gpus`, counted on `ranks`."""
        return self.passes * ((gpus or ranks) - 1) * self.share(ranks)

    def as_dict(self, ranks: int) -> dict:
        return {
            "purpose": self.purpose,
            "type": self.type,
            "calls": self.calls,
            "given": self.given,
            "got": self.got,
            "wire_bytes": self.wire_bytes(ranks),
        }


@dataclass(frozen=True)
class Interconnect:
    name: str
    gigabytes: float  # a second, of all adapters of a node together, one way, nominal
    alpha: float  # seconds a message from node to node


@dataclass(frozen=True)
class Setting:
    """A published run: its GPUs are those of the paper."""

    name: str
    b: int
    d: int
    published_gpus: int


SETTINGS = (
    Setting("medium: CC3M, RN50", 128, 1024, 8),
    Setting("large: CC12M, ViT-B-32", 256, 512, 8),
    Setting("xlarge: LAION400M, ViT-B-16", 320, 512, 16),
)
INTERCONNECTS = (
    Interconnect("InfiniBand NDR, 8 x 400 Gb/s a node", 400, 5e-6),
    Interconnect("InfiniBand HDR, 4 x 200 Gb/s a node", 100, 5e-6),
    Interconnect("Ethernet with RoCE, 100 Gb/s a node", 12.5, 10e-6),
    Interconnect("Ethernet with TCP, 25 Gb/s a node", 3.125, 30e-6),
)
GPUS = (8, 32, 256, 1024)
NODE, NVLINK_GIGABYTES, NVLINK_ALPHA, EFFICIENCY = 8, 450, 2e-6, 0.8
HIDDEN = ("table rows",)  # fetched while the model runs forward; the ids, without which it cannot begin, are waited for
DATA = {
    "CC12M": 12_423_374,
    "LAION400M": 414_080_000,
    "LAION-2B": 2_322_161_807,
    "DataComp-12.8B": 12_800_000_000,
}
RELEASED_BYTES_A_SAMPLE = {"fastclip-v3": 8, "fastclip-v2": 40}  # in every process
ASSUMPTIONS = f"""Projection, an alpha-beta model of one ring through all GPUs (assumed, not measured):
- {NODE} GPUs a node; {NVLINK_GIGABYTES} GB/s and {NVLINK_ALPHA * 1e6:g} us a message inside a node (NVLink of an H100);
- between nodes {"; ".join(f"{i.name}: {i.gigabytes:g} GB/s, {i.alpha * 1e6:g} us" for i in INTERCONNECTS)};
- {EFFICIENCY:.0%} of the nominal bandwidth is reached; a ring that leaves a node has the bandwidth of its adapters;
- seconds of a pass = the sum of alpha over the K-1 hops + bytes on the wire / bandwidth; an all-reduce is two passes
  (for its few bytes NCCL has faster ways);
- nothing else uses the network, and no rank waits for another one.
Sizes are those of the published runs with float32 features, which autocast on a GPU leaves after normalising."""


def seconds(collective: Collective, ranks: int, gpus: int, interconnect: Interconnect) -> float:
    """Time of the collective's calls in one step, counted on `ranks`, on `gpus`."""
    crossings = math.ceil(gpus / NODE) - 1
    hops_seconds = (gpus - 1 - crossings) * NVLINK_ALPHA + crossings * interconnect.alpha
    gigabytes = min(NVLINK_GIGABYTES, interconnect.gigabytes) if crossings else NVLINK_GIGABYTES
    on_wire = collective.wire_bytes(ranks, gpus) / (EFFICIENCY * gigabytes * 1e9)
    return collective.calls * collective.passes * hops_seconds + on_wire


def projections(counts: dict, ranks: int, dtype: str) -> list[dict]:
    """Milliseconds a step for every setting, interconnect and number of GPUs; printed as tables."""
    rows = []
    for setting in SETTINGS:
        print(f"\n{setting.name}, {setting.b} pairs a GPU (published on {setting.published_gpus} GPUs); ms a step:")
        print("OpenCLIP > fastclip-v3 in all (without the table's rows, which come while the model runs forward)")
        print(f"{'':36}" + "".join(f"{f'{gpus} GPUs':>25}" for gpus in GPUS))
        for interconnect in INTERCONNECTS:
            cells = []
            for gpus in GPUS:
                row = {"kind": "projected", "setting": setting.name, "batch": setting.b, "width": setting.d}
                row |= {"dtype": dtype, "interconnect": interconnect.name, "gpus": gpus}
                for name in (OPEN_CLIP, "fastclip-v3", "fastclip-v2"):
                    times = {
                        purpose: 1000 * seconds(Collective(purpose, *entry), ranks, gpus, interconnect)
                        for purpose, entry in counts[name, setting.b, setting.d][0].items()
                    }
                    row[f"{name}_ms"] = round(sum(times.values()), 4)
                    waited = sum(time for purpose, time in times.items() if purpose not in HIDDEN)
                    row[f"{name}_waited_ms"] = round(waited, 4)
                rows.append(row)
                ours = f"{row['fastclip-v3_ms']:.4g} ({row['fastclip-v3_waited_ms']:.4g})"
                cells.append(f"{row[f'{OPEN_CLIP}_ms']:.4g} > {ours}")
            print(f"{interconnect.name:36}" + "".join(f"{cell:>25}" for cell in cells))
    return rows


def table_memory(counts: dict) -> list[dict]:
    """Bytes of the per-sample table a GPU, against the released code's copy in every process; printed as a table."""
    rows = []
    print("\nPer-sample table, GB a GPU; the released code keeps a full copy in every process")
    columns = "".join(f"{f'{gpus} GPUs':>11}" for gpus in GPUS)
    print(f"{'data':16} {'samples':>14} {'loss':12} {'released':>9}{columns}")
    bytes_of = {name: sample_bytes for (name, _, _), (_, sample_bytes) in counts.items()}
    for data, samples in DATA.items():
        for name, released in RELEASED_BYTES_A_SAMPLE.items():
            row = {"kind": "table", "data": data, "samples": samples, "loss": name}
            row |= {"bytes_a_sample": bytes_of[name], "released_bytes_a_process": released * samples}
            row["bytes_a_gpu"] = {str(gpus): bytes_of[name] * math.ceil(samples / gpus) for gpus in GPUS}
            rows.append(row)
            cells = "".join(f"{row['bytes_a_gpu'][str(gpus)] / 1e9:11.4f}" for gpus in GPUS)
            print(f"{data:16} {samples:14,} {name:12} {row['released_bytes_a_process'] / 1e9:9.2f}{cells}")
    return rows
