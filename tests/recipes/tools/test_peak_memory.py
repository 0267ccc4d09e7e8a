"""Peaks of memory are those since the measurement began, whatever was held before and by whom."""

import subprocess
import sys

from tests.helpers.running import RECIPES
from tools.peak_memory import peak_memory


MIB = 2**20


def test_the_peak_counts_from_what_was_held_before():
    held = bytearray(64 * MIB)
    for size in (96, 32):  # the second time from a mark that was higher
        with peak_memory("cpu") as peak:
            bytearray(size * MIB)
        assert size - 8 < peak.size / MIB < size + 24, size
    with peak_memory("cpu") as nothing:
        pass
    assert nothing.size < 8 * MIB
    assert len(held) == 64 * MIB


def test_a_process_does_not_count_what_its_starter_held():
    code = """
from tools.peak_memory import high_water_mark
print(high_water_mark())
"""
    held = bytearray(512 * MIB)
    done = subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": str(RECIPES)}, capture_output=True, text=True)
    assert 0 < int(done.stdout) < 512 * MIB, done.stderr
    assert len(held) == 512 * MIB
