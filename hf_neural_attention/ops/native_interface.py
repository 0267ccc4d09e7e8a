"""What Python and the native kernel hand each other, as native/interface.h has it; and whether a library agrees with that.

Were a field moved or of another type on one side alone, the kernels would read and write memory that is not theirs. So both
sides describe what they have, and are compared when a library is loaded.
"""

import ctypes
import functools
import struct
from typing import Any

import torch


# Goes up where the meaning of a field, or the arguments of a function, change while all fields stay as they are
INTERFACE_VERSION = 2

Int = ctypes.c_int64
Pointer = ctypes.c_void_p

# Gives the numbers of `ElementType`
ELEMENT_TYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3, torch.bool: 4}

# Says what the functions of a library return
FUNCTIONS = {
    "describe_interface": ctypes.c_char_p,
    "has_threads": Int,
    "working_memory": Int,
    "forward": None,
    "backward": Int,  # zero, or not if there was not memory enough
}

TOKENS = ("query", "key", "value")
PARAMETERS = ("query_weight", "query_bias", "key_weight", "key_bias", "weight2", "bias2", "weight3")


class Tensor(ctypes.Structure):
    _fields_ = [("data", Pointer), ("strides", Int * 4), ("type", Int)]


class Problem(ctypes.Structure):
    _fields_ = [
        *((name, Int) for name in ("batch", "heads", "kv_heads", "queries", "keys", "head_dim", "value_dim")),
        *((name, Int) for name in ("hidden1", "hidden2")),
        *((name, Int) for name in ("weight_sets", "queries_projected", "keys_projected", "is_causal")),
        *((name, Int) for name in ("residual", "num_threads", "drop_below", "has_dropout", "seed")),
        ("residual_scale", ctypes.c_double),
        ("softcap", ctypes.c_double),
        *((name, Tensor) for name in (*TOKENS, "mask")),
        *((name, Pointer) for name in (*PARAMETERS, "sinks")),
    ]


class ForwardResult(ctypes.Structure):
    _fields_ = [("output", Tensor), ("softmax", Pointer)]


class BackwardResult(ctypes.Structure):
    _fields_ = [
        *((name, Tensor) for name in ("output", "grad_output")),
        ("softmax", Pointer),
        *((f"grad_{name}", Tensor) for name in TOKENS),
        *((f"grad_{name}", Pointer) for name in (*PARAMETERS, "mask")),
    ]


STRUCTURES = (Tensor, Problem, ForwardResult, BackwardResult)
TYPE_NAMES = {Int: "int64", Int * 4: "int64[4]", ctypes.c_double: "float64", Pointer: "pointer", Tensor: "Tensor"}
FORMATS = {Int: "q", Int * 4: "4q", ctypes.c_double: "d", Pointer: "P"}

# Holds the fields of a `Tensor`, one after the other
TensorFields = tuple[int, ...]


def describe_tensor(tensor: torch.Tensor | None) -> TensorFields:
    """Address, strides and type of a tensor with four dimensions, which must outlive the description."""
    if tensor is None:
        return 0, 0, 0, 0, 0, 0
    return tensor.data_ptr(), *tensor.stride(), ELEMENT_TYPES[tensor.dtype]


def format_of(structure: type[ctypes.Structure]) -> str:
    """As `struct` writes it: native sizes and alignment."""
    kinds = (kind for _, kind, *_ in structure._fields_)
    return "".join(format_of(kind) if kind is Tensor else FORMATS[kind] for kind in kinds)


@functools.cache
def layout_of(structure: type[ctypes.Structure]) -> tuple[struct.Struct, dict[str, TensorFields | int]]:
    """How a structure is packed, and its fields in their order, all of them zero."""
    zeros = {Tensor: describe_tensor(None), Int * 4: (0, 0, 0, 0)}
    return struct.Struct(f"@{format_of(structure)}"), {name: zeros.get(kind, 0) for name, kind, *_ in structure._fields_}


def pack(structure: type[ctypes.Structure], **fields: Any) -> bytes:
    """A structure as the kernels read it; what is not given is zero. Quicker than by `ctypes`, which a step of decoding
    feels.

    Args:
        fields: integers (and addresses), float numbers, and what `describe_tensor` returns.
    """
    packer, nothing = layout_of(structure)
    numbers: list[Any] = []
    for value in (nothing | fields).values():
        if isinstance(value, tuple):
            numbers += value
        else:
            numbers.append(value)
    return packer.pack(*numbers)


def describe_interface(dtype: torch.dtype) -> dict[str, str]:
    """All that both sides must see alike, by name: what `describe_interface` of a library for `dtype` must say."""

    def plain(dtype: torch.dtype) -> str:
        return str(dtype).removeprefix("torch.")

    facts = {"INTERFACE_VERSION": str(INTERFACE_VERSION), "Real": plain(dtype)}
    facts |= {f"ElementType.{plain(element)}": str(number) for element, number in ELEMENT_TYPES.items()}
    for structure in STRUCTURES:
        for name, kind, *_ in structure._fields_:
            facts[f"{structure.__name__}.{name}"] = f"{TYPE_NAMES[kind]} at byte {getattr(structure, name).offset}"
    return facts | {structure.__name__: f"{ctypes.sizeof(structure)} bytes" for structure in STRUCTURES}


def declare_functions(library: ctypes.CDLL, dtype: torch.dtype) -> str | None:
    """Readies a library for calls, if it agrees with this file.

    Returns:
        None, or what the library and this file see differently.
    """
    for name, kind in FUNCTIONS.items():
        if not hasattr(library, name):
            return f"the library has no function `{name}`"
        getattr(library, name).restype = kind
    lines = library.describe_interface().decode(errors="replace").splitlines()
    theirs, ours = dict(line.partition(": ")[::2] for line in lines), describe_interface(dtype)
    # goes by the library's order, since what follows a field that was put in has moved with it
    for name in (*theirs, *ours):
        if theirs.get(name) != ours.get(name):
            there, here = (facts.get(name, "unknown") for facts in (theirs, ours))
            return f"`{name}` is {there} in the library and {here} in Python"
    return None
