"""Who chooses the backend, and what "auto" takes."""

import asyncio
import contextvars
import importlib.util
import logging
import threading
from collections.abc import Iterator

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from hf_neural_attention import NeuralScorer, neural_attention, set_backend, use_backend
from hf_neural_attention.models.neural_attention_backends import BACKENDS, choose_backend, warn_once
from hf_neural_attention.models.neural_attention_pytorch import Inputs
from hf_neural_attention.ops import choice
from hf_neural_attention.ops.choice import ENVIRONMENT_VARIABLE, asked_backend
from tests.helpers.numerics import CPU_BACKENDS


needs_native = pytest.mark.skipif("native" not in CPU_BACKENDS, reason="there is no native kernel")
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

CPU = Inputs("cpu", torch.float32, 64)
GPU = Inputs("cuda", torch.bfloat16, 64)


@pytest.fixture(autouse=True)
def nobody_asks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    before = choice.process_choice
    set_backend(None)
    warn_once.cache_clear()
    yield
    set_backend(before)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the backends that have run."""
    names: list[str] = []

    def recording(name: str):
        def run(*arguments, **options):
            names.append(name)
            return backend.run(*arguments, **options)

        backend = BACKENDS[name]
        return backend._replace(run=run)

    for name in BACKENDS:
        monkeypatch.setitem(BACKENDS, name, recording(name))
    return names


def call(backend: str | None = None, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return neural_attention(*torch.randn(3, 1, 2, 5, 8, dtype=dtype), NeuralScorer(8).to(dtype), backend=backend)


@needs_native
def test_the_nearest_one_chooses(runs: list[str], monkeypatch: pytest.MonkeyPatch):
    call()
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "reference")
    call()
    set_backend("blockwise")
    call()
    with use_backend("reference"):
        call()
        call("native")
        call("auto")
        with use_backend("auto"):
            call()
        call()
    call()
    set_backend(None)
    call()
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "")
    call()
    first, last = ["native", "reference", "blockwise"], ["reference", "blockwise", "reference", "native"]
    assert runs == [*first, "reference", "native", "native", "native", *last]


def test_every_backend_can_be_asked_for():
    assert tuple(BACKENDS) == choice.NAMES


def test_who_asked(monkeypatch: pytest.MonkeyPatch):
    assert asked_backend().name == "auto"
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "reference")
    assert asked_backend() == ("reference", "the environment variable HF_NEURAL_ATTENTION_BACKEND")
    set_backend("blockwise")
    assert asked_backend() == ("blockwise", "`set_backend`")
    with use_backend("auto"):
        assert asked_backend() == ("auto", "`use_backend`")
        assert asked_backend("native") == ("native", "the argument `backend`")


def test_errors_say_whose_name_is_unknown(monkeypatch: pytest.MonkeyPatch):
    names = "it must be one of 'auto', 'native', 'triton', 'blockwise', 'reference'"
    with pytest.raises(ValueError, match=f"`set_backend`'s `name` is 'fast'; {names}"):
        set_backend("fast")
    with pytest.raises(ValueError, match=f"`use_backend`'s `name` is 'fast'; {names}"), use_backend("fast"):
        pass
    assert asked_backend().name == "auto"
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "fast")
    with pytest.raises(ValueError, match=f"^The environment variable HF_NEURAL_ATTENTION_BACKEND is 'fast'; {names}"):
        call()
    with pytest.raises(ValueError, match=f"`backend` is 'Native'; {names}"):
        call("Native")
    call("blockwise")  # does not ask the environment


def test_a_block_ends_with_an_error():
    with pytest.raises(KeyError), use_backend("reference"), use_backend("blockwise"):
        raise KeyError
    assert asked_backend().name == "auto"


def test_threads_and_tasks():
    def ask(answers: list[str]) -> None:
        answers.append(asked_backend().name)

    async def task() -> str:
        with use_backend("reference"):
            await asyncio.sleep(0)
            return asked_backend().name

    async def tasks() -> tuple[str, str]:
        running = asyncio.create_task(task())
        await asyncio.sleep(0)
        return asked_backend().name, await running

    answers: list[str] = []
    set_backend("native")
    with use_backend("blockwise"):
        for target in (ask, contextvars.copy_context().run):
            arguments = (answers,) if target is ask else (ask, answers)
            thread = threading.Thread(target=target, args=arguments)
            thread.start()
            thread.join()
        assert asyncio.run(tasks()) == ("blockwise", "reference")
    assert answers == ["native", "blockwise"]  # tells apart a fresh thread and one that was given this context


def has_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Old GPU")


@needs_native
def test_auto_on_the_cpu():
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        assert choose_backend(None, CPU._replace(dtype=dtype)) == ("native", {})


@needs_triton
@pytest.mark.parametrize(
    ("inputs", "capability", "name", "reason"),
    [
        (GPU, (9, 0), "triton", None),
        (GPU._replace(dtype=torch.float32), (8, 0), "triton", None),
        (GPU, (7, 5), "blockwise", "it needs compute capability 8.0, which Old GPU has not"),
        (GPU._replace(dtype=torch.float64), (9, 0), "blockwise", "it computes in float64 in its interpreter only"),
        (GPU._replace(head_dim=257), (9, 0), "blockwise", "its heads have at most 256 numbers, not 257"),
        (GPU._replace(device_type="mps"), (9, 0), "blockwise", "it runs on GPUs, and the tensors are on 'mps'"),
        (GPU._replace(device_type="meta"), (9, 0), "blockwise", "it runs on GPUs, and the tensors are on 'meta'"),
    ],
    ids=str,
)
def test_auto_elsewhere(inputs: Inputs, capability, name: str, reason: str | None, monkeypatch: pytest.MonkeyPatch):
    has_gpu(monkeypatch, capability)
    chosen = choose_backend("auto", inputs)
    assert chosen.name == name
    assert chosen.reasons.pop("native") == f"it runs on the CPU, and the tensors are on {inputs.device_type!r}"
    assert chosen.reasons.keys() == ({"triton"} if reason else set())
    assert chosen.reasons.get("triton", "").startswith(reason or "")


@needs_triton
def test_each_gpu_is_asked_what_it_can(monkeypatch: pytest.MonkeyPatch):
    has_gpu(monkeypatch, (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0) if device == 1 else (7, 5))
    names = [choose_backend("auto", GPU._replace(device_index=index)).name for index in (0, 1)]
    assert names == ["blockwise", "triton"]


@needs_triton
def test_an_imaginary_gpu(monkeypatch: pytest.MonkeyPatch):
    """As fake tensors are on, which have shapes alone."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    chosen = choose_backend("auto", GPU)
    assert chosen.name == "blockwise" and chosen.reasons["triton"].startswith("this machine has no GPU")


def test_auto_without_triton(monkeypatch: pytest.MonkeyPatch):
    has_gpu(monkeypatch, (9, 0))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert choose_backend("auto", GPU).name == "blockwise"
    assert choose_backend("auto", GPU).reasons["triton"] == "Triton is not installed (`pip install triton`)"


@pytest.mark.parametrize("asked", ["auto", "native", "blockwise", "reference"])
@pytest.mark.parametrize("inputs", [CPU, GPU], ids=["cpu", "cuda"])
def test_exported_graphs_take_the_reference(inputs: Inputs, asked: str):
    chosen = choose_backend(asked, inputs._replace(exporting=True))
    assert chosen.name == "reference"
    assert set(chosen.reasons.values()) == {"an exported graph may only hold PyTorch's own operators"}


@needs_native
def test_exported_graphs_are_plain():
    set_backend("native")
    scorer, tensors = NeuralScorer(8), tuple(torch.randn(3, 1, 2, 5, 8))
    program = torch.export.export(scorer, tensors)
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert called and not any("hf_neural_attention" in name for name in called)
    torch.testing.assert_close(program.module()(*tensors)[0], scorer(*tensors)[0])


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int64, torch.complex64], ids=str)
@pytest.mark.parametrize("device_type", ["cpu", "cuda", "meta"])
def test_dtypes_that_nothing_computes_in(device_type: str, dtype: torch.dtype, caplog: pytest.LogCaptureFixture):
    reason = f"it computes in torch.float16, torch.bfloat16, torch.float32, torch.float64, and the query is in {dtype}"
    inputs = Inputs(device_type, dtype, 64)
    for exporting in (False, True):
        with pytest.raises(ValueError, match=f"^Neural Attention cannot run: {reason}.$"):
            choose_backend("auto", inputs._replace(exporting=exporting))
    for name in BACKENDS:
        with pytest.raises(ValueError, match=f"^The backend '{name}' cannot run here: {reason}.$"):
            choose_backend(name, inputs)
    assert not caplog.records


def test_eight_bits():
    query, key, value = torch.randn(3, 1, 2, 5, 8).to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match=r"the query is in torch\.float8_e4m3fn"):
        neural_attention(query, key, value, NeuralScorer(8))


def test_a_backend_that_cannot_do_what_it_is_asked():
    cannot = "^The backend '{}' cannot run here: {}".format
    with pytest.raises(ValueError, match=cannot("native", "it runs on the CPU, and the tensors are on 'meta'")):
        neural_attention(*torch.randn(3, 1, 2, 5, 8, device="meta"), NeuralScorer(8).to("meta"), backend="native")
    set_backend("triton")  # raises no error yet
    with pytest.raises(ValueError, match=cannot("triton", "(it runs on GPUs|Triton is not installed)")):
        call()


@pytest.mark.parametrize("name", ["key", "value", "attn_mask", "scorer"])
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_tensors_on_several_devices(backend: str, name: str):
    # expects an error, since torch would return uninitialised memory
    arguments = {key: torch.randn(1, 2, 5, 8) for key in ("query", "key", "value")}
    arguments |= {"attn_mask": torch.zeros(5, 5), "scorer": NeuralScorer(8)}
    neural_attention(**arguments, backend=backend)
    arguments[name] = arguments[name].to("meta")
    named = "`scorer`'s q_weight" if name == "scorer" else f"`{name}`"
    with pytest.raises(ValueError, match=f"^{named} is on device meta; expected that of `query`, cpu"):
        neural_attention(**arguments, backend=backend)


def test_one_warning_and_only_where_the_kernel_is_missed(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    missing = BACKENDS["native"]._replace(reason_against=lambda inputs: "broken")
    monkeypatch.setitem(BACKENDS, "native", missing)
    caplog.set_level(logging.WARNING)
    for asked, inputs in (
        ("blockwise", CPU),
        ("auto", CPU._replace(exporting=True)),
        ("auto", CPU._replace(device_type="meta")),
        ("auto", GPU._replace(head_dim=1000)),
    ):
        choose_backend(asked, inputs)
    assert not caplog.records
    for _ in range(3):
        assert choose_backend("auto", CPU).name == "blockwise"
        call(dtype=torch.float64)
    assert [record.getMessage() for record in caplog.records] == [
        "Neural Attention's native CPU kernel is not available, the blockwise PyTorch backend runs instead (same results, "
        "several times slower): broken."
    ]


@needs_native
def test_compiled_code_keeps_its_backend():
    graphs: list[str] = []

    def keep(module: torch.fx.GraphModule, inputs: list[torch.Tensor]):
        graphs.append(str(module.graph))
        return module.forward

    torch.compiler.reset()
    compiled, scorer, tensors = (
        torch.compile(neural_attention, fullgraph=True, backend=keep),
        NeuralScorer(8),
        torch.randn(3, 1, 2, 5, 8),
    )
    with use_backend("blockwise"):
        compiled(*tensors, scorer)
    assert len(graphs) == 1 and "blockwise_forward" in graphs[0]
    set_backend("native")
    compiled(*tensors, scorer)
    assert len(graphs) == 1
    compiled(*tensors, scorer, backend="native")  # compiles anew, since an argument is part of the code
    assert len(graphs) == 2 and "native_forward" in graphs[1]
    torch.compiler.reset()
    compiled(*tensors, scorer)
    assert len(graphs) == 3 and "native_forward" in graphs[2]
    torch.compiler.reset()


@needs_native
def test_checkpointed_layers_under_both_kinds_of_choice():
    scorer, query = NeuralScorer(8), torch.randn(1, 2, 5, 8, requires_grad=True)

    def attend(query: torch.Tensor) -> torch.Tensor:
        return neural_attention(query, query, query, scorer)

    with use_backend("blockwise"):
        output = checkpoint(attend, query, use_reentrant=False)
    with pytest.raises(torch.utils.checkpoint.CheckpointError):  # reruns by "auto", outside of the block, what blockwise began
        output.sum().backward()
    set_backend("blockwise")
    checkpoint(attend, query, use_reentrant=False).sum().backward()
    assert query.grad.abs().max() > 0
