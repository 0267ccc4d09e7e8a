"""Compiles the Triton kernels ahead of time, without a GPU, and tabulates what they need of one, or what they issue.

    python recipes/compile_triton_kernels.py --output model_cards/benchmarks/triton_kernels
    python recipes/compile_triton_kernels.py --instructions --output model_cards/benchmarks/triton_instructions

Registers, spilled bytes and shared memory are the compilers' own figures: of ptxas, which Triton brings along, for NVIDIA, and
of LLVM for AMD. They say whether a kernel fits and whether registers spill, not how fast it is. `--instructions` counts those
of the loop over pairs, by kind, beside plain flash-attention kernels'. Where either tensor cores or vector units may multiply
the network, it counts both ways. A count is no time either.
"""

import argparse
import itertools
import re
import subprocess
import tempfile
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.instruction_counts import KINDS, instructions_per_pair
from hf_neural_attention.ops.triton_blocks import Blocks, choose_blocks, kernel_constants, uses_cores
from tools.command_lines import make_folder_of
from tools.json_files import write_json
from tools.markdown import markdown_table
from tools.provenance import command_line


class Target(NamedTuple):
    backend: str
    arch: int | str
    warp_size: int
    shared_bytes: int  # that one program may use


# Stands for an A100, an RTX 4090, an H100 and an MI300X
TARGETS = {
    "sm_80": Target("cuda", 80, 32, 166912),
    "sm_89": Target("cuda", 89, 32, 101376),
    "sm_90": Target("cuda", 90, 32, 232448),
    "gfx942": Target("hip", "gfx942", 64, 65536),
}
KERNELS = ("forward", "query", "key")
FLASH = "flash "  # before the name of the dot product's kernel, which is counted for comparison
DTYPES = {"fp32": 4, "bf16": 2, "fp16": 2}
# Lists head_dim and hidden_dims: the defaults of heads of 64 and 128, and proj_dim 16 as in the paper and with fewer units
SIZES = ((64, (2, 1)), (128, (4, 2)), (64, (16, 8)), (64, (16, 2)))
# Adds to "residual" a float mask, its gradient, dropout and grouped heads in "masked", a soft cap and sinks in "capped"
MODES = ("replace", "residual", "masked", "capped")
COUNTED: dict[str, list[Any]] = {
    "dtypes": ["bf16"],
    "modes": ["replace"],
    "sizes": [0, 3, 2],
}


def kernel_function(kernel: str) -> Any:
    from hf_neural_attention.ops import triton_backward, triton_forward

    return {
        "forward": triton_forward.neural_attention_fwd_kernel,
        "query": triton_backward.neural_attention_bwd_query_kernel,
        "key": triton_backward.neural_attention_bwd_key_kernel,
    }[kernel]


def compile_kernel(
    kernel: str, target: Target, dtype: str, head_dim: int, hidden: tuple[int, int], mode: str, cores: bool | None = None
) -> tuple[Any, Blocks]:
    """One causal kernel as `ops/triton.py` would launch it on contiguous inputs: what Triton compiled, and its blocks.

    `cores`: whether the network is multiplied by tensor cores; by default as it would be launched.
    """
    residual = mode != "replace"
    query_dim = head_dim if residual else 0
    if cores is None:
        cores = uses_cores(hidden, DTYPES[dtype], target.warp_size)
    sizes = query_dim, head_dim, hidden, DTYPES[dtype]
    blocks = choose_blocks(kernel, *sizes, target.shared_bytes, target.warp_size, cores)
    flags = {"PER_HEAD": False, "IS_CAUSAL": True, "MASK": 2 if mode == "masked" else 0, "WIDEN": False}
    flags["SOFTCAP"] = mode == "capped"
    constants = kernel_constants(kernel, blocks, query_dim, head_dim, hidden, cores, **flags)
    pointers = dict.fromkeys(("p_v", "p_o", "p_do", "p_dv", "p_q", "p_k", "p_dq", "p_dk"), f"*{dtype}") | {"p_seed": "*i64"}
    absent = set() if residual else {"p_q", "p_k", "p_dq", "p_dk"}
    absent |= set() if mode == "masked" else {"p_mask", "p_seed", "p_dmask"}
    absent |= set() if mode == "capped" else {"p_sinks"}

    function = kernel_function(kernel)
    signature: dict[str, Any] = {}
    values: dict[tuple[int, ...], Any] = {}
    hints: dict[tuple[int, ...], list] = {}
    aligned = [["tt.divisibility", 16]]
    for index, name in enumerate(function.arg_names):
        if name in constants or name in absent:
            signature[name] = "constexpr"
            values[index,] = constants.get(name)
        elif name.startswith("p_"):
            signature[name] = pointers.get(name, "*fp32")
            hints[index,] = aligned
        elif name.startswith("s_"):
            signature[name] = ("i32", "i32", "i32", "constexpr")
            values[index, 3] = 1
            if name in ("s_v", "s_q", "s_k", "s_do"):
                hints |= {(index, position): aligned for position in range(3)}
        else:
            signature[name] = "fp32" if name == "softcap" else "i32"
    return compile_source(function, signature, values, hints, target, blocks), blocks


def compile_source(function: Any, signature: dict[str, Any], values: dict, hints: dict, target: Target, blocks: Blocks) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    options = {"num_warps": blocks.warps, "num_stages": blocks.stages}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")  # ignores it: kernels write fused products out
        return triton.compile(
            ASTSource(function, signature, values, hints), GPUTarget(target.backend, target.arch, target.warp_size), options
        )


def compile_flash_kernel(kernel: str, target: Target, dtype: str, head_dim: int) -> tuple[Any, Blocks]:
    """A plain flash-attention kernel, causal: what Triton compiled, and its blocks."""
    from benchmarks import flash_kernel

    function = {
        "forward": flash_kernel.flash_fwd_kernel,
        "query": flash_kernel.flash_bwd_query_kernel,
        "key": flash_kernel.flash_bwd_key_kernel,
    }[kernel]
    blocks = flash_kernel.FLASH_BLOCKS[kernel]
    constants = {"D": head_dim, "BLOCK_M": blocks.queries, "BLOCK_N": blocks.keys}
    types = {"p_stats": "*fp32", "p_delta": "*fp32", "scale": "fp32", "T": "i32", **dict.fromkeys(constants, "constexpr")}
    names = function.arg_names
    signature = {name: types.get(name, f"*{dtype}") for name in names}
    values = {(index,): constants[name] for index, name in enumerate(names) if name in constants}
    hints = {(index,): [["tt.divisibility", 16]] for index, name in enumerate(names) if name.startswith("p_")}
    return compile_source(function, signature, values, hints, target, blocks), blocks


def resource_usage(compiled: Any, target: Target) -> dict[str, int]:
    """Registers of a thread, bytes that spill (in a thread's local memory), and shared memory of a program."""
    shared = compiled.metadata.shared
    if target.backend == "hip":
        fields = dict(re.findall(r"\.(vgpr_count|agpr_count|private_segment_fixed_size):\s+(\d+)", compiled.asm["amdgcn"]))
        return {
            "registers": int(fields["vgpr_count"]),
            "spilled_bytes": int(fields["private_segment_fixed_size"]),
            "shared_bytes": shared,
        }
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    (found,) = re.findall(r"REG:(\d+) STACK:(\d+)", text)
    return {"registers": int(found[0]), "spilled_bytes": int(found[1]), "shared_bytes": shared}


def measure(kernel: str, name: str, dtype: str, head_dim: int, hidden: tuple[int, int], mode: str) -> dict[str, Any]:
    target = TARGETS[name]
    compiled, blocks = compile_kernel(kernel, target, dtype, head_dim, hidden, mode)
    return {
        "kernel": kernel,
        "target": name,
        "dtype": dtype,
        "head_dim": head_dim,
        "hidden_dims": list(hidden),
        "mode": mode,
        **blocks._asdict(),
        **resource_usage(compiled, target),
        "shared_limit": target.shared_bytes,
    }


def count_instructions(
    kernel: str, name: str, dtype: str, head_dim: int, hidden: tuple[int, int], mode: str, cores: bool
) -> dict[str, Any]:
    target = TARGETS[name]
    row: dict[str, Any] = {"kernel": kernel, "target": name, "dtype": dtype, "head_dim": head_dim}
    if kernel.startswith(FLASH):
        compiled, blocks = compile_flash_kernel(kernel.removeprefix(FLASH), target, dtype, head_dim)
    else:
        compiled, blocks = compile_kernel(kernel, target, dtype, head_dim, hidden, mode, cores)
        chosen = cores == uses_cores(hidden, DTYPES[dtype], target.warp_size)
        row |= {"hidden_dims": list(hidden), "mode": mode, "network": "tensor cores" if cores else "vector", "chosen": chosen}
    counted = instructions_per_pair(compiled, blocks.queries * blocks.keys, blocks.warps * target.warp_size)
    return {**row, **blocks._asdict(), "instructions": counted}


def ways(kernel: str, name: str, dtype: str, head_dim: int, hidden: tuple[int, int], mode: str) -> tuple[bool, ...]:
    """Whether the network may be multiplied by tensor cores, by vector units, or by either."""
    lanes = 32  # counts both ways on AMD's GPUs too, for which only vector units are chosen
    return (True, False) if uses_cores(hidden, DTYPES[dtype], lanes) else (False,)


def block_cells(row: dict[str, Any]) -> dict[str, str]:
    hidden = ", ".join(map(str, row.get("hidden_dims", ())))
    network = row.get("network", "") + ("" if row.get("chosen", True) else " (not chosen)")
    absent = {"hidden_dims": hidden, "network": network, "mode": row.get("mode", "")}
    return row | {"block": f"{row['queries']} x {row['keys']}"} | absent


def table(results: list[dict[str, Any]]) -> str:
    """Markdown: a row per kernel."""
    columns = {
        "kernel": "kernel",
        "target": "target",
        "dtype": "dtype",
        "head_dim": "head_dim",
        "hidden_dims": "h1, h2",
        "mode": "mode",
        "block": "queries x keys",
        "warps": "warps",
        "stages": "stages",
        "registers": "registers",
        "spilled_bytes": "spilled bytes",
        "shared_bytes": "shared bytes",
    }
    return markdown_table(list(columns.values()), ([str(block_cells(row)[name]) for name in columns] for row in results))


def instructions_table(results: list[dict[str, Any]]) -> str:
    """Markdown: a row per kernel, with the columns that tell the rows apart."""
    columns = {"kernel": "kernel", "target": "target", "hidden_dims": "h1, h2", "network": "network"}
    columns |= {"block": "queries x keys", "warps": "warps"}
    columns |= {name: name for name in ("dtype", "head_dim", "mode") if len({row.get(name, "") for row in results} - {""}) > 1}
    rows = []
    for row in results:
        cells = [str(block_cells(row)[name]) for name in columns]
        rows.append([*cells, *(f"{row['instructions'][kind]:.1f}" for kind in (*KINDS, "all"))])
    return markdown_table([*columns.values(), *KINDS, "all"], rows)


RESOURCES_CARD = """# What the Triton kernels need of a GPU

Compiled without one by `{command}` with Triton {triton}; nothing here was run or timed. \
All kernels are causal. `query` and `key` are the two of backward. Mode `masked` is residual with a float mask, \
its gradient, and dropout; `capped` is residual with a soft cap on its dot products, and attention sinks. Registers are those \
of a thread (at most 255 on NVIDIA, 512 on AMD), spilled bytes the local memory of a thread, shared bytes those of a program.

{table}
"""
INSTRUCTIONS_CARD = """# What the Triton kernels issue for a pair

Compiled and disassembled without a GPU by `{command}` with Triton {triton}; nothing here was run or timed. \
Instructions that a thread issues in the loop over tiles for each of its pairs, which is what a warp issues for as many pairs \
as it has threads: 32 on NVIDIA's GPUs, 64 on AMD's. All kernels are causal; `query` and `key` are the two of backward; \
`flash` ones are the dot product's of `recipes/benchmarks/flash_kernel.py`. Loops over hidden units count as often as \
they turn. Packed instructions (two numbers of 32 bits on AMD, of 16 bits on both) count as one. `network` says what \
multiplies the second layer; where there are two ways, both are counted.

Kinds differ in what they take of a GPU, and a tensor core instruction of sm_90 may be one of four warps together: compare \
kinds, and sums only where the kinds are alike.

{table}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--instructions", action="store_true", help="Count instructions; for less than all by default.")
    parser.add_argument("--targets", nargs="+", choices=TARGETS)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES)
    parser.add_argument("--modes", nargs="+", choices=MODES)
    parser.add_argument("--kernels", nargs="+", choices=KERNELS)
    parser.add_argument("--sizes", nargs="+", type=int, choices=range(len(SIZES)))
    parser.add_argument("--output", help="Write NAME.md and NAME.json, e.g. model_cards/benchmarks/triton_kernels.")
    arguments = parser.parse_args()
    if arguments.output:
        make_folder_of("--output", arguments.output)
    axes: dict[str, list[Any]] = {
        "sizes": list(range(len(SIZES))),
        "targets": list(TARGETS),
        "dtypes": list(DTYPES),
        "modes": list(MODES),
        "kernels": list(KERNELS),
    }
    if arguments.instructions:
        axes |= COUNTED
    axes |= {name: value for name in axes if (value := getattr(arguments, name)) is not None}
    jobs: list[tuple[Any, ...]] = [
        (kernel, name, dtype, *SIZES[size], mode) for size, name, dtype, mode, kernel in itertools.product(*axes.values())
    ]
    if arguments.instructions:
        flash = [(FLASH + kernel, name, dtype, head_dim, (), "", False) for kernel, name, dtype, head_dim, _, _ in jobs]
        jobs = [(*job, cores) for job in jobs for cores in ways(*job)]
        jobs = sorted(dict.fromkeys(flash + jobs), key=lambda job: axes["targets"].index(job[1]))

    results = []
    for job in jobs:
        results.append((count_instructions if arguments.instructions else measure)(*job))
        print(results[-1], flush=True)
    text = (instructions_table if arguments.instructions else table)(results)
    print(text)
    if arguments.output:
        record = {"command": command_line(), "environment": {"triton": version("triton")}, "results": results}
        write_json(Path(f"{arguments.output}.json"), record)
        card = INSTRUCTIONS_CARD if arguments.instructions else RESOURCES_CARD
        words = {"command": record["command"], "triton": version("triton"), "table": text}
        Path(f"{arguments.output}.md").write_text(card.format(**words), encoding="utf-8")


if __name__ == "__main__":
    main()
