"""Compiles the Triton kernels ahead of time, without a GPU, and tabulates what they need of one.

    python recipes/compile_triton_kernels.py --output model_cards/benchmarks/triton_kernels

Registers, spilled bytes and shared memory are the compilers' own figures: of ptxas, which Triton brings along, for NVIDIA, and
of LLVM for AMD. They say whether a kernel fits and whether registers spill, not how fast it is.
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

from hf_neural_attention.ops.triton_blocks import Blocks, choose_blocks, kernel_constants
from tools.json_files import write_json
from tools.markdown import markdown_table
from tools.provenance import command_line


class Target(NamedTuple):
    backend: str
    arch: int | str
    warp_size: int
    shared_bytes: int  # that one program may use


# An A100, an RTX 4090, an H100 and an MI300X
TARGETS = {
    "sm_80": Target("cuda", 80, 32, 166912),
    "sm_89": Target("cuda", 89, 32, 101376),
    "sm_90": Target("cuda", 90, 32, 232448),
    "gfx942": Target("hip", "gfx942", 64, 65536),
}
KERNELS = ("forward", "query", "key")
DTYPES = {"fp32": 4, "bf16": 2, "fp16": 2}
# head_dim and hidden_dims: the defaults of heads of 64 and 128, and proj_dim 16
SIZES = ((64, (2, 1)), (128, (4, 2)), (64, (16, 8)))
MODES = ("replace", "residual", "masked")  # masked: residual with a float mask, its gradient, dropout and grouped heads


def kernel_function(kernel: str) -> Any:
    from hf_neural_attention.ops import triton_backward, triton_forward

    return {
        "forward": triton_forward.neural_attention_fwd_kernel,
        "query": triton_backward.neural_attention_bwd_query_kernel,
        "key": triton_backward.neural_attention_bwd_key_kernel,
    }[kernel]


def compile_kernel(
    kernel: str, target: Target, dtype: str, head_dim: int, hidden: tuple[int, int], mode: str, blocks: Blocks | None = None
) -> tuple[Any, Blocks]:
    """One causal kernel as `ops/triton.py` would launch it on contiguous inputs: what Triton compiled, and its blocks."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    residual = mode != "replace"
    query_dim = head_dim if residual else 0
    if blocks is None:
        blocks = choose_blocks(kernel, query_dim, head_dim, hidden, DTYPES[dtype], target.shared_bytes)
    flags = {"PER_HEAD": False, "IS_CAUSAL": True, "MASK": 2 if mode == "masked" else 0, "WIDEN": False}
    constants = kernel_constants(kernel, blocks, query_dim, head_dim, hidden, **flags)
    pointers = dict.fromkeys(("p_v", "p_o", "p_do", "p_dv", "p_q", "p_k", "p_dq", "p_dk"), f"*{dtype}") | {"p_seed": "*i64"}
    absent = set() if residual else {"p_q", "p_k", "p_dq", "p_dk"}
    absent |= set() if mode == "masked" else {"p_mask", "p_seed", "p_dmask"}

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
            signature[name] = "i32"
    source = ASTSource(function, signature, values, hints)
    options = {"num_warps": blocks.warps, "num_stages": blocks.stages}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")  # ignores it: kernels write fused products out
        compiled = triton.compile(source, GPUTarget(target.backend, target.arch, target.warp_size), options)
    return compiled, blocks


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
    rows = []
    for row in results:
        hidden = ", ".join(map(str, row["hidden_dims"]))
        cells = row | {"block": f"{row['queries']} x {row['keys']}", "hidden_dims": hidden}
        rows.append([str(cells[name]) for name in columns])
    return markdown_table(list(columns.values()), rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=list(KERNELS))
    parser.add_argument("--sizes", nargs="+", type=int, choices=range(len(SIZES)), default=list(range(len(SIZES))))
    parser.add_argument("--output", help="Write NAME.md and NAME.json, e.g. model_cards/benchmarks/triton_kernels.")
    arguments = parser.parse_args()

    results = []
    for size, name, dtype, mode, kernel in itertools.product(
        arguments.sizes, arguments.targets, arguments.dtypes, arguments.modes, arguments.kernels
    ):
        results.append(measure(kernel, name, dtype, *SIZES[size], mode))
        print(results[-1], flush=True)
    text = table(results)
    print(text)
    if arguments.output:
        record = {"command": command_line(), "environment": {"triton": version("triton")}, "results": results}
        write_json(Path(arguments.output).with_suffix(".json"), record)
        Path(arguments.output).with_suffix(".md").write_text(
            "# What the Triton kernels need of a GPU\n\n"
            f"Compiled without one by `{record['command']}` with Triton {version('triton')}; nothing here was run or timed. "
            "All kernels are causal. `query` and `key` are the two of backward. Mode `masked` is residual with a float mask, "
            "its gradient, and dropout. Registers are those of a thread (at most 255 on NVIDIA, 512 on AMD), spilled bytes "
            f"the local memory of a thread, shared bytes those of a program.\n\n{text}\n"
        )


if __name__ == "__main__":
    main()
