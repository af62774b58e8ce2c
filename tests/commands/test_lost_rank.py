"""What a backend says of a lost rank is one line with its last words; every other error of a backend stays whole."""

import pytest
import torch.distributed as dist

from open_clip_train_fastclip.main import _explained

NCCL = "NCCL error in: /pytorch/torch/csrc/distributed/c10d/ProcessGroupNCCL.cpp:3690, {}, NCCL version 2.27.5\n{}\n"
GLOO = "[/__w/pytorch/pytorch/third_party/gloo/gloo/transport/tcp/{}"
LOST = [  # kind of error, its text, the words that are shown
    (
        RuntimeError,
        GLOO.format("pair.cc:547] Connection closed by peer [127.0.0.1]:61617"),
        "Connection closed by peer",
    ),
    (RuntimeError, GLOO.format("pair.cc:545] Read error [127.0.0.1]:61617: Connection reset by peer"), "reset by peer"),
    (RuntimeError, GLOO.format("pair.cc:444] writev [10.0.0.1]:24: Broken pipe"), "Broken pipe"),
    (
        RuntimeError,
        GLOO.format("unbound_buffer.cc:84] Timed out waiting 1800000ms for recv operation to complete"),
        "Timed out waiting 1800000ms",
    ),
    (RuntimeError, GLOO.format("pair.cc:601] Application timeout caused pair closure"), "Application timeout"),
    (
        dist.DistBackendError,
        NCCL.format(
            "unhandled system error (run with NCCL_DEBUG=INFO for details)",
            "ncclSystemError: System call (e.g. socket, malloc) or external library call failed or device error. \n"
            "Last error:\nsocketProgress: Connection closed by remote peer n2<43210>",
        ),
        "(socketProgress: Connection closed by remote peer n2<43210>)",
    ),
    (
        dist.DistBackendError,
        NCCL.format(
            "remote process exited or there was a network error",
            "ncclRemoteError: A call failed possibly due to a network error or a remote process exiting prematurely.\n"
            "Last error:\nNET/IB: Got completion from peer 10.0.0.2<4791> with status=IBV_WC_RETRY_EXC_ERR(12)",
        ),
        "(NET/IB: Got completion from peer 10.0.0.2<4791> with status=IBV_WC_RETRY_EXC_ERR(12))",
    ),
    (
        dist.DistBackendError,
        "[Rank 0] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=51, OpType=ALLREDUCE, NumelIn=1, "
        "NumelOut=1, Timeout(ms)=1800000) ran for 1800021 milliseconds before timing out.",
        "Watchdog caught collective operation timeout",
    ),
    (dist.DistBackendError, "NCCL communicator was aborted on rank 1.", "aborted on rank 1"),
    (dist.DistStoreError, "wait timeout after 300000ms, keys: /default_pg/0//cuda//1", "wait timeout after"),
    (
        dist.DistNetworkError,
        "failed to recv, got 0 bytes. Connection was likely closed. Did the remote server shutdown or crash?",
        "likely closed",
    ),
    (
        dist.DistNetworkError,
        "The client socket has timed out after 600000ms while trying to connect to (n1, 29500).",
        "(n1, 29500)",
    ),
]
OTHERS = [
    (
        dist.DistBackendError,
        NCCL.format(
            "invalid usage (run with NCCL_DEBUG=WARN for details)",
            "ncclInvalidUsage: This usually reflects invalid usage of NCCL library.\n"
            "Last error:\nDuplicate GPU detected : rank 1 and rank 0 both on CUDA device 1000",
        ),
    ),
    (
        dist.DistBackendError,
        NCCL.format(
            "unhandled cuda error (run with NCCL_DEBUG=INFO for details)",
            "ncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\nCuda failure 2 'out of memory'",
        ),
    ),
    (
        dist.DistNetworkError,
        "The server socket has failed to listen on any local network address. port: 29500, useIpv6: false, "
        "code: -98, name: EADDRINUSE, message: address already in use",
    ),
    (RuntimeError, GLOO.format("pair.cc:452] op.preamble.length <= op.nbytes. 8192 vs 4096")),
    (RuntimeError, "a database connection timed out"),
    (ValueError, "Connection closed by peer"),
]


@pytest.mark.parametrize("kind, text, words", LOST, ids=[words for *_, words in LOST])
def test_a_lost_rank_is_one_line(kind, text, words):
    code, line = _explained(kind(text))
    assert code == 1 and words in line and "--dist-timeout" in line and "\n" not in line


@pytest.mark.parametrize("kind, text", OTHERS, ids=[text.split("\n")[0][-40:] for _, text in OTHERS])
def test_other_errors_are_raised_again(kind, text):
    assert _explained(kind(text)) == (None, "")


def rebuild_storage_fd(error):
    """As the function of torch that fetches a batch's memory from the worker that made it."""
    raise error


@pytest.mark.parametrize("kind", [ConnectionResetError, EOFError, FileNotFoundError])
def test_a_worker_that_is_killed_in_the_midst_of_a_batch_is_told_in_one_line(kind):
    try:
        rebuild_storage_fd(kind("gone"))
    except kind as error:
        code, line = _explained(error)
    assert code == 1 and "a process that loads data was killed (gone)" in line and "\n" not in line
    assert _explained(kind("gone")) == (None, ""), "an error of something else keeps its traceback"
