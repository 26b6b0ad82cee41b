from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from hf_ssl_or.training import memory

SCRIPT = f"""
import resource, runpy, sys, torch
if sys.argv[1] == "keep":
    runpy.run_path({memory.__file__!r})["keep_freed_memory"]()
for _ in range(10):
    torch.ones(16_000_000)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    torch.ones(16_000_000)
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) * resource.getpagesize() / 20 / 64_000_000)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc's malloc")
def test_a_tensor_takes_the_memory_that_another_has_freed() -> None:
    fresh = [
        float(subprocess.run([sys.executable, "-c", SCRIPT, what], capture_output=True, check=True).stdout)
        for what in ("return", "keep")
    ]
    assert fresh[0] > 0.9, "each tensor got pages of its own"
    assert fresh[1] < 0.1
