"""Run by `test_distributed.py` in each of two processes, which share the heads of patched models: gradients and outputs are
those of one process, and what cannot be right is refused.

torchrun --nproc_per_node 2 tensor_parallel.py FOLDER
"""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.experimental import context_parallel
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from hf_neural_attention import NeuralCache, analysis, calibrate, compact, from_pretrained, load_patch, patch, save_patch
from hf_neural_attention.patching import PatchError
from tests.helpers.comparing import assert_near, assert_same_gradients, assert_same_state
from tests.helpers.stock_models import FAMILIES


LLAMA, BERT = FAMILIES["llama"], FAMILIES["bert"]
SETTINGS: tuple[dict[str, Any], ...] = (
    {"mode": "residual"},
    {"mode": "replace"},
    {"mode": "replace", "per_head": True},
    {"mode": "thin", "per_head": True},
)


def whole(tensor: Any) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def backward(model: Any) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model.train()(**LLAMA.inputs(), labels=LLAMA.inputs()["input_ids"]).loss.backward()
    gradients = {name: whole(each.grad) for name, each in model.named_parameters() if each.grad is not None}
    model.eval()
    return gradients


def check_gradients_and_outputs(folder: Path) -> None:
    for number, settings in enumerate(SETTINGS):
        saved = folder / str(number)
        loaded, alone = share(saved), from_pretrained(saved)
        assert loaded.model.layers[0].self_attn.q_proj.weight.to_local().shape == (16, 32)
        with torch.no_grad():
            assert_near(loaded(**LLAMA.inputs()).logits, alone(**LLAMA.inputs()).logits)
        assert_same_gradients(backward(loaded), backward(alone))
        loaded.gradient_checkpointing_enable()
        assert_same_gradients(backward(loaded), backward(alone))
        tokens = loaded.generate(**LLAMA.inputs(), max_new_tokens=5)
        assert torch.equal(tokens, alone.generate(**LLAMA.inputs(), max_new_tokens=5))
        if settings["mode"] == "replace":
            fresh = share(saved)  # projects keys before its first forward
            assert torch.equal(tokens, fresh.generate(**LLAMA.inputs(), max_new_tokens=5, past_key_values=NeuralCache(fresh)))
        loaded.save_pretrained(folder / f"{number} again")
        torch.distributed.barrier()
        assert_same_state(from_pretrained(folder / f"{number} again"), alone)
    # shares by the words that many scripts still use, and Transformers calls deprecated
    old = from_pretrained(folder / "0", tp_plan="auto", tp_size=2)
    assert old.model.layers[0].self_attn.q_proj.weight.to_local().shape == (16, 32)
    with torch.no_grad():
        assert_near(old(**LLAMA.inputs()).logits, from_pretrained(folder / "0")(**LLAMA.inputs()).logits)


def figures_of(model: Any) -> list[Any]:
    """What analysis says of a model, by kind."""
    inputs = LLAMA.inputs()
    found: list[Any] = [analysis.score_statistics(model, **inputs), analysis.attention_maps(model, **inputs)]
    if hasattr(model.model.layers[0].self_attn, "scorer"):
        found += [analysis.dot_product_maps(model, **inputs), analysis.queries_and_keys(model, **inputs)]
        if model.model.layers[0].self_attn.scorer.mode != "thin":
            found.append(analysis.scorer_health(model, **inputs))
    return [list(each.values()) if isinstance(each, dict) else list(each) for each in found]


def check_figures(folder: Path) -> None:
    """Analysis sees all heads in each process, before the first forward and after."""
    for name, loader in (*((str(number), None) for number in range(len(SETTINGS))), ("stock", AutoModelForCausalLM)):
        alone = figures_of((loader.from_pretrained if loader else from_pretrained)(folder / name))
        model = share(folder / name, loader)
        for _ in range(2):
            for ours, expected in zip(tree_leaves(figures_of(model)), tree_leaves(alone), strict=True):
                if isinstance(expected, torch.Tensor):
                    assert_near(ours, expected)
                else:
                    assert ours == (pytest.approx(expected, rel=1e-3) if isinstance(expected, float) else expected)


def check_steps(folder: Path) -> None:
    """Shared by torch's own means, and trained: processes stay together, and where one process goes."""
    models = [from_pretrained(folder / "1") for _ in range(2)]
    plan = {f"model.layers.*.self_attn.{name}_proj": ColwiseParallel() for name in "qkv"}
    parallelize_module(models[0], init_device_mesh("cpu", (2,)), plan | {"model.layers.*.self_attn.o_proj": RowwiseParallel()})
    for model in models:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, foreach=False)
        for _ in range(2):
            backward(model)
            optimizer.step()
    for shared, alone in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert_near(whole(shared.detach()), alone.detach(), 1e-4)


def check_what_is_refused(folder: Path) -> None:
    stock = share(folder / "stock", AutoModelForCausalLM)
    before = dict(stock.named_modules())
    loaded = share(folder / "1")
    changes: tuple[Any, ...] = (
        lambda: patch(stock),
        lambda: load_patch(stock, folder / "patch"),
        lambda: calibrate(loaded, [LLAMA.inputs()]),
    )
    for change in changes:
        with pytest.raises(PatchError, match=r"shared by 2 processes \(tensor parallelism\)"):
            change()
    assert dict(stock.named_modules()) == before
    with pytest.raises(PatchError, match="taken over"):
        compact(loaded)
    with pytest.raises(PatchError, match="is compact, and `distributed_config` would share"):
        share(folder / "compact")
    alone, ids = from_pretrained(folder / "1"), LLAMA.inputs(padded=False)["input_ids"][:, :8]
    mesh = init_device_mesh("cpu", (2,))
    with pytest.raises(ValueError, match="as torch's `context_parallel` does"):  # noqa: SIM117
        with context_parallel(mesh, buffers=[ids], buffer_seq_dims=[1]):
            alone(input_ids=ids)
    assert alone(input_ids=ids).logits.isfinite().all()

    # stands for what DeepSpeed puts in place of a stock function
    def ulysses(*arguments: Any) -> None: ...

    ulysses.__module__ = "deepspeed.runtime.sequence_parallel.ulysses_sp"
    AttentionInterface.register("sdpa", ulysses)
    with pytest.raises(ValueError, match="as DeepSpeed's Ulysses does"):
        alone(input_ids=ids)


def share(saved: Path, loader: Any = None, **arguments: Any) -> Any:
    load = from_pretrained if loader is None else loader.from_pretrained
    return load(saved, distributed_config=DistributedConfig(tp_size=2), **arguments)


def make_models(folder: Path) -> None:
    for number, settings in enumerate(SETTINGS):
        model = patch(LLAMA.model(), "all", proj_dim=2, **settings)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if ".scorer." in name:  # draws biases too, since some gradients at their start are nothing but rounding
                    parameter.add_(0.3 * torch.randn_like(parameter))
        model.save_pretrained(folder / str(number))
    save_patch(model, folder / "patch")
    LLAMA.model().save_pretrained(folder / "stock")
    compact(patch(BERT.model(), "all", mode="replace")).save_pretrained(folder / "compact")


if __name__ == "__main__":
    torch.distributed.init_process_group("gloo")
    path = Path(sys.argv[1])
    if torch.distributed.get_rank() == 0:
        make_models(path)
    torch.distributed.barrier()
    check_gradients_and_outputs(path)
    check_figures(path)
    check_steps(path)
    check_what_is_refused(path)
    torch.distributed.destroy_process_group()
