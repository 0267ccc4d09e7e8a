"""Counts the instructions that a compiled kernel issues for a tile of pairs, by kind, from its disassembly.

The loop over tiles is the innermost one that takes exponentials. What it holds is counted once, and what loops inside it hold,
over hidden units, as often as these turn, which is read off their counters. Branches count as if all were taken: a warp
issues a guarded instruction where any of its threads needs it.
"""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple


KINDS = (
    "fma",
    "arithmetic",
    "exponential",
    "conversion",
    "integer",
    "tensor core",
    "shared memory",
    "global memory",
    "control",
)

# Looks an instruction up by the longest prefix of its name that is here. What is not here is integer arithmetic, addresses and
# moves, which are most of either machine's list
NVIDIA_KINDS = {
    **dict.fromkeys(("FFMA", "HFMA2", "FSWZADD"), "fma"),
    **dict.fromkeys(("FADD", "FMUL", "FMNMX", "FSEL", "FSET", "FCHK", "HADD2", "HMUL2", "HMNMX2", "HSET"), "arithmetic"),
    "MUFU": "exponential",
    **dict.fromkeys(("F2", "I2F", "FRND"), "conversion"),
    **dict.fromkeys(("HMMA", "HGMMA", "DMMA", "IMMA", "BMMA", "QMMA", "QGMMA", "UTCHMMA"), "tensor core"),
    **dict.fromkeys(("LDS", "STS", "STSM", "SHFL", "ATOMS", "REDUX"), "shared memory"),
    **dict.fromkeys(("LDG", "STG", "LDGSTS", "LDL", "STL", "ATOMG", "RED", "UBLKCP", "UTMA"), "global memory"),
    **dict.fromkeys(
        ("BRA", "BAR", "BSSY", "BSYNC", "CALL", "RET", "EXIT", "NOP", "DEPBAR", "LDGDEPBAR", "LDGDEPBAR"), "control"
    ),
    **dict.fromkeys(("WARP", "YIELD", "SYNCS", "FENCE", "ERRBAR", "MEMBAR", "BREAK", "UCGABAR"), "control"),
    "HFMA2.MMA": "fma",
}
AMD_KINDS = {
    **dict.fromkeys(("v_fma", "v_pk_fma", "v_pk_mad", "v_mad_f", "v_mac_f", "v_dot"), "fma"),
    **dict.fromkeys(("v_exp", "v_log", "v_rcp", "v_rsq", "v_sqrt", "v_sin", "v_cos"), "exponential"),
    "v_cvt": "conversion",
    "v_mfma": "tensor core",
    "ds_": "shared memory",
    **dict.fromkeys(("global_", "flat_", "buffer_", "scratch_", "s_load", "s_buffer"), "global memory"),
    **dict.fromkeys(("s_branch", "s_cbranch", "s_wait", "s_barrier", "s_nop", "s_endpgm", "s_sleep", "s_setprio"), "control"),
}
AMD_ARITHMETIC = re.compile(
    r"v_(pk_)?(add|sub|subrev|mul|max|min|max3|min3|med3|ldexp|cmp_\w+|cmpx_\w+)_(legacy_)?(f16|f32|f64|bf16)"
)
EXPONENTIALS = ("MUFU.EX2", "v_exp_f32", "v_exp_bf16", "v_exp_f16")


class Instruction(NamedTuple):
    name: str
    operands: str


@dataclass
class Loop:
    """Instructions of a loop but not those of loops inside it, in their order."""

    instructions: list[Instruction] = field(default_factory=list)
    inner: list["Loop"] = field(default_factory=list)

    @property
    def has_exponentials(self) -> bool:
        return any(item.name.startswith(EXPONENTIALS) for item in self.instructions)

    def with_inner(self) -> Iterator["Loop"]:
        yield self
        for loop in self.inner:
            yield from loop.with_inner()


def kind_of(name: str) -> str:
    table = AMD_KINDS if name.islower() else NVIDIA_KINDS
    if AMD_ARITHMETIC.match(name):
        return "arithmetic"
    prefixes = [prefix for prefix in table if name.startswith(prefix)]
    return table[max(prefixes, key=len)] if prefixes else "integer"


def nvidia_loops(text: str) -> list[Loop]:
    """Loops of what `nvdisasm -c` writes: a branch backwards and all between it and its label."""
    labels: dict[str, int] = {}
    instructions: list[Instruction] = []
    for line in text.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif found := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);", line):
            instructions.append(Instruction(found[1], found[2].strip()))
    ends: dict[int, int] = {}
    for index, item in enumerate(instructions):
        target = re.search(r"`\((\.L_x_\d+)\)", item.operands)
        if item.name.startswith("BRA") and target and labels[target[1]] < index:
            ends[labels[target[1]]] = index  # takes the last branch to a label
    loops: dict[int, Loop] = {start: Loop() for start in sorted(ends)}
    outermost: list[Loop] = []
    for start, loop in loops.items():
        around = [other for other in loops if other < start and ends[other] >= ends[start]]
        (loops[max(around)].inner if around else outermost).append(loop)
    for index, item in enumerate(instructions):
        around = [start for start in loops if start <= index <= ends[start]]
        if around:
            loops[max(around)].instructions.append(item)
    return outermost


def amd_loops(text: str) -> list[Loop]:
    """Loops of LLVM's assembly, by the comments that say of each block which loop it belongs to."""
    loops: dict[str, Loop] = {}
    outermost: list[Loop] = []
    block = ""
    current: Loop | None = None
    parents: list[str] = []
    for line in text.splitlines():
        code, _, comment = line.partition(";")
        if label := re.match(r"\.L(BB\d+_\d+):", code) or re.match(r" (%bb)\.\d+:", comment):
            block, current, parents = label[1], None, []
        if found := re.search(r"Parent Loop (BB\d+_\d+)", comment):
            parents.append(found[1])
        elif re.search(r"=>\s*This (Inner )?Loop Header", comment):
            current = loops.setdefault(block, Loop())
            (loops[parents[-1]].inner if parents else outermost).append(current)
        elif found := re.search(r"in Loop: Header=(BB\d+_\d+)", comment):
            # may come before its header, which says what the loop lies in
            current = loops.setdefault(found[1], Loop())
        if current is not None and (found := re.match(r"\s+([a-z]\w+)\s*(.*)", code)):
            current.instructions.append(Instruction(found[1], found[2].strip()))
    return outermost


def turns(loop: Loop) -> int:
    """How often a loop turns that counts to a constant."""
    for item in loop.instructions:
        if not re.match(r"U?ISETP\.NE|s_cmp_(lg|eq)_u(32|64)", item.name):
            continue
        compared = re.search(r"\b(U?R\d+|s\d+)(?:\.reuse)?, (0x[0-9a-f]+|\d+)(?:,|$)", item.operands)
        if compared is None:
            continue
        counter, limit = compared[1], int(compared[2], 0)
        for other in loop.instructions:
            step = re.match(rf"{counter}(?:, U?P\d)?, {counter}(?:\.reuse)?, (0x[0-9a-f]+|\d+)(?:,|$)", other.operands)
            if re.match(r"U?IADD3$|VIADD$|s_add_(i|u)32$", other.name) and step and limit % int(step[1], 0) == 0:
                return limit // int(step[1], 0)
    raise ValueError("A loop inside the loop over tiles counts to no constant that is found.")


def tile_loop(loops: list[Loop]) -> Loop:
    """The innermost loop that takes exponentials."""
    for outer in loops:
        for loop in outer.with_inner():
            if loop.has_exponentials and not any(part.has_exponentials for part in list(loop.with_inner())[1:]):
                return loop
    raise ValueError("No loop takes exponentials.")


def count(loop: Loop) -> Counter[str]:
    """Instructions of one turn, by kind."""
    total = Counter(kind_of(item.name) for item in loop.instructions)
    for inner in loop.inner:
        for kind, number in count(inner).items():
            total[kind] += turns(inner) * number
    return total


def disassemble(compiled: Any) -> list[Loop]:
    """Loops of a kernel that Triton compiled."""
    if "amdgcn" in compiled.asm:
        return amd_loops(compiled.asm["amdgcn"])
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(compiled.asm["cubin"])
        command = [knobs.nvidia.nvdisasm.path, "-c", str(path)]
        return nvidia_loops(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def instructions_per_pair(compiled: Any, pairs: int, threads: int) -> dict[str, float]:
    """Instructions that a thread issues in the loop over tiles for each of its pairs, by kind, and in all.

    That is what a warp issues for as many pairs as it has threads: 32 on NVIDIA's GPUs, 64 on AMD's.
    """
    counted = count(tile_loop(disassemble(compiled)))
    per_pair = {kind: counted[kind] * threads / pairs for kind in KINDS}
    return {**per_pair, "all": sum(per_pair.values())}
