"""What the commands share."""

import subprocess
import sys


def test_output_that_nobody_reads_to_its_end_leaves_no_traceback():
    code = (
        "import sys\nfrom benchmarks.harness.command import exit_code_of\n"
        "sys.exit(exit_code_of(lambda: print('x' * 10**7)))"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.read(1)
        process.stdout.close()
        assert process.stderr.read() == b"" and process.wait() == 141
