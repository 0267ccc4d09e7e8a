"""Run by `test_deepspeed.py` in each of two processes: makes, loads, patches and trains models under DeepSpeed's ZeRO-3.

torchrun --nproc_per_node 2 zero3.py FOLDER

It finds checkpoints in FOLDER/given and leaves what it saw in FOLDER: weights of all models, brought together, and losses.
"""

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageClassification
from transformers.integrations import HfDeepSpeedConfig, unset_hf_deepspeed_config

from hf_neural_attention import calibrate, compact, from_pretrained, patch, patch_status, save_patch, start_scores
from hf_neural_attention.analysis import scorer_health
from hf_neural_attention.introspection import compact_layers
from hf_neural_attention.patching import PatchError
from tests.helpers.neural_models import ALL, GPT2, VIT, scorers
from tests.helpers.spread_models import BORN, RATE, SPREAD_MODELS, WHOLE, SpreadModel, share_of


# Shares all parameters out, also the small ones, which DeepSpeed would leave together
CONFIG: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "zero_allow_untested_optimizer": True,
    "gradient_clipping": 0.0,  # of 1.0 otherwise
}


def together(model: Any) -> dict[str, torch.Tensor]:
    """All weights of a model, none of which is here before and after."""
    assert all(parameter.numel() == 0 for parameter in model.parameters() if hasattr(parameter, "ds_id"))
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def make_all(given: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Weights of new models, made in every way there is."""
    ways: dict[str, Callable[[Any, Any], Any]] = {
        "from_config": lambda family, fields: auto_class(family).from_config(family.config(**fields)),
        "zero.Init": lambda family, fields: family.neural_class()(family.config(**fields)),
        "from_pretrained": lambda family, fields: family.neural_class().from_pretrained(given / family.stem, **fields),
    }
    made = {}
    for way, make in ways.items():
        for family in (GPT2, VIT):
            for variant, fields in BORN.items():
                if way == "from_pretrained" and "compact" in variant:
                    continue
                with deepspeed.zero.Init(config_dict_or_path=copy.deepcopy(CONFIG), enabled=way == "zero.Init"):
                    model = make(family, ALL | fields)
                made[f"{way}, {family.stem}, {variant}"] = together(model)
    for family in (GPT2, VIT):
        with pytest.raises(ValueError, match="shared out among processes"):
            family.neural_class().from_pretrained(given / family.stem, **ALL, neural_compact=True)
        model = family.neural_class().from_pretrained(given / f"{family.stem} that lacks scorers")
        made[f"lacking, {family.stem}, compact"] = together(model)
    return made


def auto_class(family: Any) -> Any:
    return AutoModelForCausalLM if family is GPT2 else AutoModelForImageClassification


def engine_of(model: Any) -> Any:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=RATE)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=copy.deepcopy(CONFIG))[0]


def train(engine: Any, spread: SpreadModel) -> list[float]:
    """Losses of both processes together."""
    losses = []
    for batch in spread.batches():
        loss = engine(**share_of(batch, torch.distributed.get_rank())).loss
        engine.backward(loss)
        engine.step()
        total = loss.detach().clone()
        torch.distributed.all_reduce(total)
        losses.append(total.item() / 2)
    return losses


def train_loaded(given: Path, folder: Path) -> dict[str, Any]:
    """Models that are shared out from the start: what they start with, and what comes of them."""
    seen: dict[str, Any] = {}
    for name, spread in SPREAD_MODELS.items():
        model = from_pretrained(given / name).train()
        start = together(model)
        seen[name] = {"start": start} | train_and_save(model, spread, folder / name)
    return seen


def train_whole(folder: Path) -> dict[str, Any]:
    """Models that are whole until training starts."""
    unset_hf_deepspeed_config()
    return {name: train_and_save(SPREAD_MODELS[name].build(), SPREAD_MODELS[name], folder / name) for name in WHOLE}


def train_and_save(model: Any, spread: SpreadModel, folder: Path) -> dict[str, Any]:
    engine = engine_of(model)
    losses = train(engine, spread)
    end = together(model)
    model.save_pretrained(folder, state_dict=dict(end), is_main_process=torch.distributed.get_rank() == 0)
    if not compact_layers(model):
        save_patch(model, folder / "patch")
    engine.destroy()
    return {"losses": losses, "end": end}


def look(given: Path) -> dict[str, Any]:
    """At a model of which DeepSpeed's engine has run nothing yet."""
    spread = SPREAD_MODELS["replace"]
    model = from_pretrained(given / "replace")
    with pytest.raises(ValueError, match="DeepSpeed does not run this model yet"):
        scorers(model)[0].weights()
    engine = engine_of(model)
    health = [tuple(layer) for layer in scorer_health(model, **spread.inputs())]
    counted = sum(layer.num_parameters for layer in patch_status(model))
    engine.destroy()
    neural = GPT2.neural_class().from_pretrained(given / "neural GPT-2")
    engine = engine_of(neural.eval())
    ids = neural.generate(torch.arange(3, 9)[None], cache_implementation="neural", do_sample=False, max_new_tokens=8)
    engine.destroy()
    return {"health": health, "counted": counted, "ids": ids}


def patch_shared_out(given: Path) -> dict[str, torch.Tensor]:
    """Weights of a model that was patched when processes shared its weights already, each with other random numbers."""
    model = AutoModelForCausalLM.from_pretrained(given / "llama")
    torch.manual_seed(torch.distributed.get_rank())
    plan = patch(model, "all", mode="replace", proj_dim=4, dry_run=True)
    patch(model, "all", mode="replace", proj_dim=4)
    assert plan.layers.num_parameters == patch_status(model).num_parameters and plan.model_parameters > 1000
    with pytest.raises(PatchError, match="cannot be calibrated: its weights are shared out"):
        calibrate(model, [SPREAD_MODELS["replace"].inputs()])
    with pytest.raises(PatchError, match="cannot be started: its weights are shared out"):
        start_scores(model)
    with pytest.raises(PatchError, match="shared out among processes"):
        compact(model)
    engine = engine_of(model)
    weights = together(model)
    engine.destroy()
    stock = AutoModelForCausalLM.from_pretrained(given / "llama")
    engine = engine_of(stock)
    with pytest.raises(PatchError, match="has taken over the parameters"):
        patch(stock)
    engine.destroy()
    return weights


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    given = folder / "given"
    deepspeed.init_distributed()
    settings = HfDeepSpeedConfig(copy.deepcopy(CONFIG))  # counts while it is alive
    seen = {
        "born": make_all(given),
        "patched": patch_shared_out(given),
        "looks": look(given),
        "loaded": train_loaded(given, folder / "loaded"),
        "whole": train_whole(folder / "whole"),
    }
    if torch.distributed.get_rank() == 0:
        torch.save(seen, folder / "seen.pt")
    torch.distributed.destroy_process_group()
