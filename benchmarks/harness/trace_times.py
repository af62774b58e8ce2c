"""Where the time of the steps in one Chrome trace of torch.profiler goes. Times in a trace are microseconds.

A span is (begin, end); a list of spans is sorted, and none overlaps the next.
"""

import gzip
import json
import zlib
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

from open_clip_train_fastclip.errors import UserError
from open_clip_train_fastclip.training.profiling import LOSS

Span = tuple[float, float]

ON_GPU = {"kernel", "gpu_memcpy", "gpu_memset"}
# A shorter pause of the training thread is the interpreter's, not a wait.
SHORTEST_WAIT = 50


def merged(spans: Iterable[Span]) -> list[Span]:
    """The union of any spans."""
    union: list[Span] = []
    for begin, end in sorted(spans):
        if union and begin <= union[-1][1]:
            union[-1] = union[-1][0], max(union[-1][1], end)
        else:
            union.append((begin, end))
    return union


def common(first: list[Span], second: list[Span]) -> list[Span]:
    """What lies in both lists."""
    shared, i, j = [], 0, 0
    while i < len(first) and j < len(second):
        begin, end = max(first[i][0], second[j][0]), min(first[i][1], second[j][1])
        if begin < end:
            shared.append((begin, end))
        if first[i][1] < second[j][1]:
            i += 1
        else:
            j += 1
    return shared


def gaps(spans: list[Span], begin: float, end: float) -> list[Span]:
    """What of (begin, end) the spans, which lie in it, leave free."""
    edges = [begin, *(edge for span in spans for edge in span), end]
    return [(a, b) for a, b in zip(edges[::2], edges[1::2], strict=True) if a < b]


def length(spans: list[Span]) -> float:
    return sum(end - begin for begin, end in spans)


def read_trace(path: Path) -> list[dict]:
    """The events with a duration. Raises UserError for a file that is no whole trace."""
    try:
        with gzip.open(path, "rt") as file:
            events = json.load(file)["traceEvents"]
    except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no whole trace ({error}): train with --profile again") from None
    events = [event for event in events if event.get("ph") == "X"]
    if not any(_is_step(event) for event in events):
        raise UserError(f"{path} holds no step: train with --profile again")
    return events


def step_times(events: list[dict]) -> dict:
    """Milliseconds a step by part, with how many `steps` they are the mean of and the `kind` of trace."""
    steps = [event for event in events if _is_step(event)]
    if any(event.get("cat") == "kernel" for event in events):
        kind, parts = "cuda", _on_gpu(events, steps)
    else:
        kind, parts = "cpu", _on_cpu(events, steps)
    milliseconds = {name: round(us / 1000 / len(steps), 4) for name, us in parts.items()}
    return {"kind": kind, "steps": len(steps), **milliseconds}


def _is_step(event: dict) -> bool:
    return event["name"].startswith("ProfilerStep") and event.get("cat") == "user_annotation"


def _span(event: dict) -> Span:
    return event["ts"], event["ts"] + event["dur"]


def _on_gpu(events: list[dict], steps: list[dict]) -> dict[str, float]:
    """The parts of the FastCLIP paper's figure: total = computation + pure_communication + others."""
    window = [(min(e["ts"] for e in steps), max(_span(e)[1] for e in steps))]
    on_gpu = [event for event in events if event.get("cat") in ON_GPU]
    nccl = [event["name"].startswith("nccl") for event in on_gpu]
    computation, communication = (
        common(merged(_span(e) for e, is_nccl in zip(on_gpu, nccl, strict=True) if is_nccl == wanted), window)
        for wanted in (False, True)
    )
    overlapped = length(common(computation, communication))
    pure = length(communication) - overlapped
    return {
        "total": length(window),
        "computation": length(computation),
        "pure_communication": pure,
        "overlapped": overlapped,
        "others": length(window) - length(computation) - pure,
    }


PHASES = ("forward", "loss", "backward", "optimizer", "data")


def _on_cpu(events: list[dict], steps: list[dict]) -> dict[str, float]:
    """Phases of the training thread without its waiting; total = the phases + waiting + others.

    Transfers run on gloo's threads: `collectives` is all of their time, `waiting` the part in which the training
    thread does nothing. A collective's time includes waiting for the slowest rank.
    """
    parts = dict.fromkeys(("total", *PHASES, "waiting", "others", "collectives"), 0.0)
    transfers = merged(_span(event) for event in events if event["name"].startswith("gloo:"))
    thread = steps[0]["tid"]
    on_thread = sorted(
        (e for e in events if e["tid"] == thread and not _is_step(e)), key=lambda e: (e["ts"], -e["dur"])
    )
    for step in steps:
        begin, end = _span(step)
        inside = [event for event in on_thread if begin <= event["ts"] < end]
        transferred = common(transfers, [(begin, end)])
        idle = [gap for gap in gaps(_busy(inside, end), begin, end) if gap[1] - gap[0] >= SHORTEST_WAIT]
        waiting = common(transferred, idle)
        accounted = length(waiting)
        for name, spans in _phases(inside, begin, end).items():
            phase = length(spans) - length(common(spans, waiting))
            parts[name] += phase
            accounted += phase
        parts["total"] += end - begin
        parts["waiting"] += length(waiting)
        parts["collectives"] += length(transferred)
        parts["others"] += end - begin - accounted
    return parts


def _busy(events: list[dict], end: float) -> list[Span]:
    """When the thread is in an operation that calls no other; handing a collective over is none.

    The optimizer and the loader work in Python or without operations: all of their time counts.
    """
    busy = []
    for event, following in pairwise([*events, {"ts": end}]):
        is_leaf = following["ts"] >= event["ts"] + event["dur"] and not event["name"].startswith("c10d::")
        if (is_leaf and event.get("cat") == "cpu_op") or _phase_of(event) in ("optimizer", "data"):
            busy.append((event["ts"], min(_span(event)[1], end)))
    return merged(busy)


def _phase_of(event: dict) -> str | None:
    name = event["name"]
    if name == LOSS:
        return "loss"
    if name.startswith("Optimizer."):
        return "optimizer"
    if name.startswith("enumerate(DataLoader)"):
        return "data"
    if name.startswith(("autograd::engine::evaluate_function", "torch.distributed.ddp.reducer::")):
        return "backward"
    return None


def _phases(events: list[dict], begin: float, end: float) -> dict[str, list[Span]]:
    """Spans of each phase in a step. Forward: what follows zero_grad or leads to the loss."""
    phases: dict[str, list[Span]] = {name: [] for name in PHASES}
    last, last_name, after = None, "", begin  # the phase before, its event's name, its end
    for event in events:
        phase = _phase_of(event)
        if phase is None or event["ts"] < after:  # none, or inside the one before
            continue
        if phase == "backward" == last:
            phases["backward"].append((after, event["ts"]))  # between its operations, too
        elif phase == "loss" or last_name.startswith("Optimizer.zero_grad"):
            phases["forward"].append((after, event["ts"]))
        last, last_name, after = phase, event["name"], min(_span(event)[1], end)
        phases[phase].append((event["ts"], after))
    return {name: merged(spans) for name, spans in phases.items()}
