"""Peaks of memory are those since the measurement began, whatever was held before and by whom."""

import os
import subprocess
import sys

import pytest

from tests.helpers.running import RECIPES
from tools.peak_memory import CLEAR, peak_memory


MIB = 2**20
MARGIN = 8 * MIB  # allows for what the interpreter may take or give back meanwhile

resettable = pytest.mark.skipif(not CLEAR.exists(), reason="the kernel has no mark that can be reset")


@resettable
def test_the_peak_counts_from_what_was_held_before():
    held = bytearray(64 * MIB)
    for size in (96 * MIB, 32 * MIB):  # measures again after a peak that was higher
        with peak_memory("cpu") as peak:
            bytearray(size)
        assert abs(peak.size - size) < MARGIN
    with peak_memory("cpu") as nothing:
        pass
    assert nothing.size < MARGIN and len(held) == 64 * MIB


@resettable
def test_a_process_does_not_count_what_its_starter_held():
    command = [sys.executable, "-c", "from tools.peak_memory import high_water_mark; print(high_water_mark())"]
    held = bytearray(512 * MIB)  # holds more than importing torch takes
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(RECIPES)}, capture_output=True, text=True, check=True)
    assert 0 < int(done.stdout) < len(held)
