"""A native library that sees what it shares with Python differently is refused before anything is computed."""

import ctypes
import shutil
import struct
from pathlib import Path

import pytest
import torch

from hf_neural_attention import NeuralScorer, explain, neural_attention
from hf_neural_attention.ops import native_build, native_interface
from hf_neural_attention.ops.native_build import load_library
from tests.helpers.building import Build, forget, messages, needs_compiler


pytestmark = needs_compiler


def assert_refused(build: Build, difference: str, caplog: pytest.LogCaptureFixture) -> None:
    """By all who ask for the kernel, saying what differs and what to do, before anything is computed."""
    forget()
    refusal = load_library(torch.float32)
    assert isinstance(refusal, native_build.BuildError)
    (library,) = build.cache.glob("*float32*.so")
    assert str(refusal) == (
        f"the compiled kernel and Python do not agree ({difference}), so nothing is computed with it: the package's files are "
        f"damaged, or of several versions. Install hf_neural_attention again and delete {library}, which is then compiled anew"
    )
    scorer, tensors = NeuralScorer(8), torch.randn(3, 1, 2, 5, 8)
    with pytest.raises(ValueError, match="The backend 'native' cannot run here: the compiled kernel and Python do not agree"):
        neural_attention(*tensors, scorer, backend="native")
    assert torch.equal(neural_attention(*tensors, scorer), neural_attention(*tensors, scorer, backend="blockwise"))
    (warning,) = [message for message in messages(caplog) if not message.startswith("Compiling")]
    assert str(refusal) in warning
    assert str(refusal) in str(explain(*tensors, scorer))


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        (("Problem.keys: int64 at byte 32", "Problem.keys: int64 at byte 40"),
         "`Problem.keys` is int64 at byte 40 in the library and int64 at byte 32 in Python"),
        (("Problem.residual_scale: float64", "Problem.residual_scale: int64"),
         "`Problem.residual_scale` is int64 at byte 144 in the library and float64 at byte 144 in Python"),
        (("Tensor.type", "Tensor.kind"), "`Tensor.kind` is int64 at byte 40 in the library and unknown in Python"),
        (("Tensor.type: int64 at byte 40\n", ""), "`Tensor.type` is unknown in the library and int64 at byte 40 in Python"),
        (("ForwardResult: 56", "ForwardResult: 64"), "`ForwardResult` is 64 bytes in the library and 56 bytes in Python"),
        (("ElementType.bool: 4", "ElementType.bool: 5"), "`ElementType.bool` is 5 in the library and 4 in Python"),
        (("INTERFACE_VERSION: ", "INTERFACE_VERSION: 10"), "`INTERFACE_VERSION` is 102 in the library and 2 in Python"),
        (("Real: float32", "Real: float64"), "`Real` is float64 in the library and float32 in Python"),
    ],
    ids=["moved", "another type", "another name", "missing", "size", "number of a type", "version", "arithmetic"],
)  # fmt: skip
def test_a_library_that_sees_the_interface_differently_is_refused(
    change: tuple[str, str], difference: str, build: Build, caplog: pytest.LogCaptureFixture
):
    build.write_source(lambda text: text.replace(*change))
    assert_refused(build, difference, caplog)


@pytest.mark.parametrize("name", native_interface.FUNCTIONS)
def test_a_library_without_one_of_the_functions_is_refused(name: str, build: Build, caplog: pytest.LogCaptureFixture):
    source = build.sources / native_build.MAIN_SOURCE
    source.write_text(source.read_text().replace(f" {name}(", f" other_{name}("))
    assert_refused(build, f"the library has no function `{name}`", caplog)


@pytest.mark.parametrize(
    ("old", "new", "difference"),
    [
        ("heads, kv_heads, queries", "heads, queries, kv_heads",
         "`Problem.kv_heads` is int64 at byte 24 in the library and int64 at byte 16 in Python"),
        pytest.param(
            "double residual_scale;", "int64_t residual_scale;",
            "`Problem.residual_scale` is int64 at byte 144 in the library and float64 at byte 144 in Python",
            marks=pytest.mark.slow,
        ),
    ],
    ids=["moved", "another type"],
)  # fmt: skip
def test_a_field_that_is_changed_in_the_sources_alone_is_refused(
    old: str, new: str, difference: str, build: Build, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    shutil.copytree(Path(native_build.__file__).parent / "native", build.sources, dirs_exist_ok=True)
    monkeypatch.setenv("HF_NEURAL_ATTENTION_CXXFLAGS", "-O0")  # sooner compiled
    interface = build.sources / "interface.h"
    assert old in interface.read_text()
    interface.write_text(interface.read_text().replace(old, new))
    assert_refused(build, difference, caplog)


@pytest.mark.parametrize("structure", native_interface.STRUCTURES, ids=lambda structure: structure.__name__)
def test_structures_are_packed_as_ctypes_lays_them_out(structure: type[ctypes.Structure]):
    kinds = {name: kind for name, kind, *_ in structure._fields_}
    fields = {name: number for number, name in enumerate(kinds, start=1)}
    fields |= {
        name: tuple(range(number, number + 6)) for name, number in fields.items() if kinds[name] is native_interface.Tensor
    }
    if structure is native_interface.Tensor:
        fields |= {"strides": (2, 3, 4, 5)}
    expected = structure()
    for name, value in fields.items():
        tensor = kinds[name] is native_interface.Tensor
        value = native_interface.Tensor(value[0], value[1:5], value[5]) if tensor else value
        setattr(expected, name, value)
    assert native_interface.pack(structure, **fields) == bytes(expected)
    assert native_interface.pack(structure) == bytes(structure())


def test_a_field_that_a_structure_does_not_have_is_an_error():
    with pytest.raises(struct.error):
        native_interface.pack(native_interface.Problem, batches=2)
