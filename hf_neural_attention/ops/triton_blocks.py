"""How the Triton kernels cut their work, from sizes alone: no kernel is timed, so results do not differ from run to run."""

from typing import Any, NamedTuple


# Limits the weights in the second layer for a network to be unrolled; above, a loop counts the units of the first layer
MAX_UNROLLED_WEIGHTS = 16
# Limits the units of the second layer that are held at once: each is a tile in registers
MAX_UNITS = 8
# Gives queries, keys and warps for AMD's GPUs, whose matrix products are of 32 rows: several warps would share them, and
# each compute the whole tile
AMD_SIZES = (32, 32, 1)
# Limits the layers' units for the network to be multiplied by tensor cores, whose results are a tile with as many columns
MAX_CORES1 = 16
MAX_CORES2 = 8


class Blocks(NamedTuple):
    """How a kernel is cut and launched."""

    queries: int
    keys: int
    warps: int
    stages: int


def padded(size: int) -> int:
    """The power of two, at least 16, that a matrix product is padded to."""
    return max(16, 1 << (size - 1).bit_length())


def is_unrolled(hidden: tuple[int, int]) -> bool:
    return hidden[0] * hidden[1] <= MAX_UNROLLED_WEIGHTS


def uses_cores(hidden: tuple[int, int], itemsize: int, lanes: int) -> bool:
    """Whether the network is multiplied by tensor cores: numbers of 16 bits, and neither too few units nor too many.

    Not on AMD's GPUs, where half of the kernels take more instructions so, by count: gfx942 has no arithmetic of bfloat16.
    """
    return itemsize <= 2 and lanes == 32 and not is_unrolled(hidden) and hidden[0] <= MAX_CORES1 and hidden[1] <= MAX_CORES2


def needed_bytes(blocks: Blocks, kernel: str, sizes: tuple[int, int], itemsize: int) -> int:
    """Upper estimate of the shared memory of a kernel; `sizes`: padded sizes of query (0 in replace mode) and value."""
    rows, columns = (blocks.keys, blocks.queries) if kernel == "key" else (blocks.queries, blocks.keys)
    owned = rows * (sum(sizes) if kernel != "forward" else sizes[0])
    streamed = columns * sum(sizes) * blocks.stages
    return itemsize * (owned + streamed + rows * columns) + 4 * (rows + columns) * 8


def preferred_sizes(kernel: str, residual: bool, wide: bool, unrolled: bool, half: bool, cores: bool) -> tuple[int, int, int]:
    """Queries, keys and warps for which registers spill least, by what `recipes/compile_triton_kernels.py` tabulates.

    Args:
        kernel: `"forward"`, `"query"` or `"key"`.
        residual: there is a dot product of queries and keys.
        wide: heads are of more than 64 numbers.
        unrolled: the network has few weights.
        half: numbers of 16 bits, which are multiplied by tensor cores; those of 32 bits take many more registers.
        cores: so is the network.
    """
    if cores:
        # gives each warp of forward 16 rows of its own, with which a softmax is computed once
        return {"forward": (128, 16, 8) if wide else (64, 16, 4), "query": (32, 16, 8), "key": (16, 32, 8)}[kernel]
    if half:
        if not unrolled:
            return 32, 32, 4
        if kernel == "key":
            return (32, 32, 4) if wide else (32, 64, 4)
        if wide or residual:
            return (32, 32, 4) if kernel == "query" and residual else (64, 32, 4)
        return 64, 64, 4
    if kernel == "forward":
        if not residual:
            return 32, 32, 4
        return (16, 16, 4) if wide else (32 if unrolled else 16, 32, 8)
    if kernel == "query":
        if residual:
            return 16, 16, 8 if wide else 4
        return (32, 16, 4) if wide and unrolled else (32, 32, 4 if unrolled else 8)
    return (32, 32, 4) if unrolled and not residual and not wide else (16, 16, 4)


def choose_blocks(
    kernel: str,
    head_dim: int,
    value_dim: int,
    hidden: tuple[int, int],
    itemsize: int,
    shared: int,
    lanes: int = 32,
    cores: bool | None = None,
) -> Blocks:
    """Blocks of a kernel: a fixed choice, so that results do not differ from run to run.

    Args:
        kernel: `"forward"`, `"query"` or `"key"` (the two of backward).
        head_dim: size of a query where its dot product counts, 0 in replace mode.
        value_dim: size of a value.
        hidden: `(h1, h2)`.
        itemsize: bytes of a number of the values.
        shared: shared memory of the device in bytes. Where even the smallest blocks may need more, they are chosen: the
            need is an upper estimate, and Triton raises an error if it is true.
        lanes: threads of a warp, 32 or 64 (AMD's GPUs for computing).
        cores: whether the network is multiplied by tensor cores; by default as `uses_cores` says.
    """
    sizes = (padded(head_dim) if head_dim else 0, padded(value_dim))
    if lanes == 64:
        queries, keys, warps = AMD_SIZES
    else:
        cores = uses_cores(hidden, itemsize, lanes) if cores is None else cores
        queries, keys, warps = preferred_sizes(
            kernel, head_dim > 0, max(sizes) > 64, is_unrolled(hidden), itemsize <= 2, cores
        )
    blocks = Blocks(queries, keys, warps, stages=2)
    while needed_bytes(blocks, kernel, sizes, itemsize) > shared:
        if blocks.stages > 1:
            blocks = blocks._replace(stages=blocks.stages - 1)
        elif max(blocks.queries, blocks.keys) > 16:
            wider = "queries" if blocks.queries >= blocks.keys else "keys"
            blocks = blocks._replace(**{wider: getattr(blocks, wider) // 2})
        else:
            break
    return blocks


def kernel_constants(
    kernel: str, blocks: Blocks, head_dim: int, value_dim: int, hidden: tuple[int, int], cores: bool, **flags: Any
) -> dict[str, Any]:
    """The `tl.constexpr` arguments of a kernel, `flags` among them. `cores`: see `uses_cores`."""
    first, second = hidden
    unrolled = is_unrolled(hidden)
    # cuts the units of the second layer into as few parts as can be, of nearly equal size
    units = second if unrolled else -(-second // -(-second // MAX_UNITS))
    constants = {
        "D": head_dim,
        "D_PADDED": padded(head_dim),
        "DV": value_dim,
        "DV_PADDED": padded(value_dim),
        "H1": first,
        "H2": second,
        "UNITS": units,
        "UNROLL": unrolled,
        "CORES1": padded(first) if cores else 0,
        # multiplies by twice as many in backward, where the least is 16
        "CORES2": max(2 if kernel == "forward" else 8, 1 << (second - 1).bit_length()) if cores else 0,
        "BLOCK_M": blocks.queries,
        "BLOCK_N": blocks.keys,
        **flags,
    }
    if kernel != "forward":
        # sums weights in as many parts as there are warps, or multiplies in as many batches
        constants["PARTS" if kernel == "query" else "BATCHES"] = blocks.warps
        # counts a column more than there are units, for the gradient of the bias
        constants |= {"H1_PADDED": 1 << first.bit_length(), "H2_PADDED": 1 << (second - 1).bit_length()}
    return constants
