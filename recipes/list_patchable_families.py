"""Tries every model family of the installed Transformers that can be built small: patches it, runs it, and unpatches it.

    python recipes/list_patchable_families.py --output model_cards/families/patchable_families

A family is a folder of `transformers.models`. Its model is random, with two layers and the sizes of its config shrunk by the
names of its fields. Tried are all self-attention layers: in mode "residual" the outputs must be the stock model's (to the bit
under eager attention), in mode "replace" others, and once unpatched the stock model's again.
"""

import argparse
import inspect
import json
import logging
import re
import warnings
from collections import Counter
from collections.abc import Iterator
from itertools import starmap
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import logging as transformers_logging

from hf_neural_attention.patching import NoPatchableLayerError, PatchError, ProbeError, patch, patched, unpatch
from hf_neural_attention.patching.inputs import possible_inputs
from hf_neural_attention.patching.layers import attention_modules, stack_name
from hf_neural_attention.patching.probing import probe, recording
from tools.json_files import write_json
from tools.markdown import markdown_table
from tools.provenance import command_line, environment


LARGEST = 60_000_000  # parameters of a model that counts as small
VOCABULARY = 160
NUM_LAYERS = 2

# Fields of configs, by name, and the most that they may be
DEPTHS = {
    r"(num_)?((encoder|decoder)_)?(hidden_)?(layers|blocks)|n_layers?|depth|num_(encoder|decoder)_layers": NUM_LAYERS,
    r"(.*_)?vocab_size": VOCABULARY,
    r"max_position_embeddings|n_positions|max_(source|target)_positions": 64,
}
SIZES = DEPTHS | {
    r"(num_|n_)?((encoder|decoder)_)?(num_)?(attention_)?heads?": 4,
    r"(.*_)?num_key_value_heads": 2,
    r"hidden_size|d_model|n_embd|(embed_|hidden_|projection_|word_embed_proj_)?dim|embedding_size": 64,
    r"(encoder|decoder|out|text)_hidden_size|(.*_)?intermediate_size|((encoder|decoder)_)?ffn_dim|d_ff|mlp_dim": 64,
    r"((v|qk_nope|qk_rope|linear_key|linear_value|global)_)?head_dim|d_kv|hidden_size_per_layer_input|k?[qv]_lora_rank": 16,
    r"(moe_)?num_(local_)?experts|n_routed_experts": 4,
    r"num_experts_per_tok|moe_(top)?k": 2,
    r"n_group|topk_group": 1,
    r"image_size|crop_size": 32,
    r"frames_per_clip": 4,
    r"patch_size|sliding_window|local_attention": 8,
}


def families() -> dict[str, list[str]]:
    """Model types by folder, the one named as the folder first."""
    found: dict[str, list[str]] = {}
    for model_type in CONFIG_MAPPING:
        try:
            package, _, folder, *_ = CONFIG_MAPPING[model_type].__module__.split(".")
        except (ImportError, AttributeError, KeyError):
            continue
        if package == "transformers" and folder != "auto":
            found.setdefault(folder, []).append(model_type)
    return {
        folder: sorted(types, key=lambda name: (name.replace("-", "_") != folder, len(name)))
        for folder, types in sorted(found.items())
    }


def model_class(config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    """The base model of a config, or else any model of it that the Auto classes know."""
    mappings = [getattr(modeling_auto, name) for name in dir(modeling_auto) if re.fullmatch(r"MODEL_(FOR_\w+_)?MAPPING", name)]
    for mapping in sorted(mappings, key=lambda mapping: mapping is not modeling_auto.MODEL_MAPPING):
        try:
            found = mapping[type(config)]
        except (KeyError, ValueError):  # skips a name without a class, an oversight in some families
            continue
        return found[0] if isinstance(found, list | tuple) else found
    return None


def shrink(config: PreTrainedConfig, limits: dict[str, int]) -> PreTrainedConfig:
    """The same config with at most `limits`."""
    changes: dict[str, Any] = {}
    fields = {name: value for name, value in config.to_dict().items() if name not in config.sub_configs}
    fields = {name: value for name, value in fields.items() if not isinstance(getattr(type(config), name, None), property)}
    depth = next((fields[name] for name in ("num_hidden_layers", "n_layer", "num_layers") if fields.get(name)), None)
    for name, value in fields.items():
        limit = next((limit for pattern, limit in limits.items() if re.fullmatch(pattern, name)), None)
        if type(value) is int and limit is not None:
            changes[name] = min(value, limit)
        elif type(value) is int and re.search(r"_token_(id|index)$", name) and value >= VOCABULARY:
            changes[name] = 100 + len(changes) % (VOCABULARY - 100)
        elif isinstance(value, list) and len(value) == depth:  # keeps one entry per layer, of each kind if there are few
            kinds = sorted(set(map(str, value)), key=lambda kind: ("attention" not in kind or "linear" in kind, kind))
            changes[name] = (kinds * NUM_LAYERS)[:NUM_LAYERS] if isinstance(value[0], str) else value[:NUM_LAYERS]
    rope = fields.get("rope_parameters")
    if isinstance(rope, dict) and "mrope_section" in rope and limits is SIZES:
        rotated = int(changes.get("head_dim", 16) * rope.get("partial_rotary_factor", 1.0)) // 2
        section = [rotated // 4, (rotated - rotated // 4) // 2]
        changes["rope_parameters"] = {**rope, "mrope_section": [*section, rotated - sum(section)]}
    parts = {name: getattr(config, name, None) for name in config.sub_configs}
    changes |= {name: shrink(part, limits) for name, part in parts.items() if part is not None}
    return type(config)(**changes)


def small_models(model_types: list[str]) -> Iterator[PreTrainedModel]:
    """Models of a family that can be built small, from the smallest on.

    Raises:
        RuntimeError: at the end, with the reasons for those that cannot.
    """
    reasons = []
    for model_type in model_types:
        for limits in (SIZES, DEPTHS):
            try:
                config = shrink(AutoConfig.for_model(model_type), limits)
                wanted = model_class(config)
                if wanted is None:  # leaves a type that is a part of others
                    break
                with torch.device("meta"):
                    numbers = sum(parameter.numel() for parameter in wanted(config).parameters())
                if numbers > LARGEST:
                    reasons.append(f"{model_type}: {numbers:,} parameters")
                    continue
                yield draw(wanted(config)).eval()
            except Exception as error:  # noqa: BLE001, goes on, since any config may object in its own way
                reasons.append(f"{model_type}: {one_line(error)}")
    raise RuntimeError("; ".join(dict.fromkeys(reasons)) or "no Auto class has a model of it")


@torch.no_grad()
def draw(model: PreTrainedModel) -> PreTrainedModel:
    """Weights that keep numbers at about one: as some configs have them, attention would not show in the outputs."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() > 1 and parameter.is_floating_point():
            parameter.normal_(std=(parameter.shape[0] / parameter.numel()) ** 0.5)
    return model


@torch.no_grad()
def outputs_of(model: nn.Module, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Every number that a model returns for random numbers; models that mask at random mask the same each time."""
    torch.manual_seed(0)
    # avoids equal tokens, which would get equal answers from any attention
    inputs = {name: torch.randn_like(tensor) if tensor.is_floating_point() else tensor for name, tensor in inputs.items()}
    leaves = tree_leaves(list(dict(model(**inputs)).values()))
    return [leaf.clone() for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]


def runnable_part(model: PreTrainedModel) -> tuple[str, PreTrainedModel, dict[str, torch.Tensor]]:
    """The outermost part of a model that runs on generic inputs: its name, itself, and those inputs."""
    reason = "its inputs are not known here"
    for name, part in model.named_modules():
        if not isinstance(part, PreTrainedModel):
            continue
        for inputs in possible_inputs(part, torch.device("cpu"), torch.float32):
            try:
                if outputs_of(part, inputs):
                    return name, part, inputs
            except Exception as error:  # noqa: BLE001, catches whatever a model says to inputs that it was not made for
                reason = one_line(error)
    raise RuntimeError(f"no run on generic inputs: {reason}")


def layers_within(model: PreTrainedModel, part_name: str) -> Any:
    """What `patch` is to be given: "all" if it can, else the names of those layers whose calls can be seen."""
    try:
        patch(model, "all", dry_run=True)
        return "all"
    except ProbeError:
        found = attention_modules(model)
        calls, _ = probe(model, found)
        seen = [name for name, module in found.items() if any(call.num_queries == call.num_keys for call in calls[module])]
        return [name for name in seen if name.startswith(f"{part_name}." if part_name else "")] or "all"


def examine(model: PreTrainedModel) -> dict[str, Any]:
    """What becomes of one model: "works", "in part", "refused", "no interface", or "fails"."""
    record: dict[str, Any] = {"class": type(model).__name__}
    try:
        found = attention_modules(model)
    except NoPatchableLayerError as error:
        return {**record, "status": "no interface", "reason": reason_in_brackets(error)}
    part_name, part, inputs = runnable_part(model)
    record |= {"attention_layers": len(found)}
    try:
        layers = layers_within(model, part_name)
        plan = patch(model, layers, dry_run=True)
    except ProbeError as error:
        raise RuntimeError(one_line(error)) from None
    except PatchError as error:
        return {**record, "status": "refused", "reason": one_line(error)}
    names = [layer.layer for layer in plan.layers]
    record |= {"patched_layers": len(names), "stacks": sorted({stack_name(name) for name in names})}
    expected = outputs_of(part, inputs)
    with recording(model, {name: [] for name in names}):  # makes their attention give zeros
        if max(map(relative, outputs_of(part, inputs), expected)) < 1e-5:
            raise RuntimeError("the outputs of its small random model do not depend on attention")
    for implementation in ("as built", "eager"):
        if implementation == "eager":
            model.set_attn_implementation("eager")
        expected = outputs_of(part, inputs)
        with patched(model, layers):
            residual = outputs_of(part, inputs)
        patch(model, layers, mode="replace")
        replaced = outputs_of(part, inputs)
        unpatch(model)
        difference = max(relative(a, b) for a, b in zip(residual, expected, strict=True))
        problems = {
            "residual mode changes the outputs": difference > (0.0 if implementation == "eager" else 1e-4),
            "replace mode changes nothing": all(map(torch.equal, replaced, expected)),
            "unpatching does not bring the outputs back": not all(map(torch.equal, outputs_of(part, inputs), expected)),
        }
        if wrong := [problem for problem, there in problems.items() if there]:
            return {**record, "status": "fails", "reason": f"{implementation}: {', '.join(wrong)} (by {difference:.1e})"}
    if layers == "all":
        return {**record, "status": "works"}
    missing = sorted({stack_name(name) for name in found} - set(record["stacks"]))
    return {**record, "status": "in part", "reason": f"`example_inputs` needed for {', '.join(missing)}"}


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference, relative to the largest number; equal infinities and NaN do not count."""
    difference = (actual - expected).masked_fill(actual == expected, 0.0).nan_to_num(0.0)
    finite = expected[expected.isfinite()]
    return difference.abs().max().item() / max(1e-6, finite.abs().max().item()) if finite.numel() else 0.0


def try_family(model_types: list[str]) -> dict[str, Any]:
    reasons = []
    try:
        for model in small_models(model_types):
            try:
                return examine(model)
            except Exception as error:  # noqa: BLE001, goes on, since the next model of the family may do better
                reasons.append(f"{type(model).__name__}: {one_line(error)}")
    except RuntimeError as error:
        reasons = reasons or [str(error)]
    return {"status": "not tried", "reason": "; ".join(dict.fromkeys(reasons))}


def one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    if library := re.search(r"requires the (\w+) library", text):
        return f"needs {library[1]}"
    return text if isinstance(error, PatchError) else text[:160]


def reason_in_brackets(error: Exception) -> str:
    found = re.search(r"`AttentionInterface` \((.*?)\)\.", str(error))
    return found[1] if found else str(error)


def markdown(record: dict[str, Any]) -> str:
    results = record["families"]
    counts = Counter(result["status"] for result in results.values())
    meanings = {
        "works": "all self-attention layers",
        "in part": "the layers named; others only with `example_inputs`, which this script has not",
        "refused": "by `patch`, for a reason that a user is told as well",
        "fails": "patched, but not as it should be",
        "no interface": "its attention does not fetch its function from Transformers' `AttentionInterface`",
        "not tried": "no small model of it could be built and run by this script; `patch` may well work",
    }
    lines = [
        "# Which model families can be patched",
        "",
        inspect.cleandoc(__doc__ or "").split("\n\n")[-1].replace("\n", " "),
        "",
        f"Made by `{record['command']}` with Transformers {record['environment']['transformers']} and torch "
        f"{record['environment']['torch']}.",
        "",
        markdown_table(
            ["", "families", ""], [[name, str(counts[name]), text] for name, text in meanings.items() if counts[name]]
        ),
        "",
        markdown_table(
            ["family", "result", "model", "layers patched, of all attention layers", ""], starmap(cells, results.items())
        ),
        "",
    ]
    return "\n".join(lines)


def cells(name: str, result: dict[str, Any]) -> list[str]:
    """A family's row of the table."""
    layers = f"{result['patched_layers']} of {result['attention_layers']}" if "patched_layers" in result else ""
    reason = (result.get("reason") or ", ".join(f"`{stack}`" for stack in result["stacks"])).replace("|", "\\|")
    return [name, result["status"], result.get("class", ""), layers, reason]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", help="Try only these; the results of the others stay as they are.")
    parser.add_argument(
        "--output", type=Path, help="Write NAME.md and NAME.json, e.g. model_cards/families/patchable_families."
    )
    arguments = parser.parse_args()
    transformers_logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")

    known = families()
    if unknown := set(arguments.families) - known.keys():
        parser.error(f"no such families: {', '.join(sorted(unknown))}")
    path = arguments.output.with_suffix(".json") if arguments.output else None
    before = json.loads(path.read_text(encoding="utf-8"))["families"] if path and path.exists() and arguments.families else {}
    results = {}
    for name in arguments.families or known:
        results[name] = try_family(known[name])
        print(f"{name}: {results[name]['status']} {results[name].get('reason', '')}", flush=True)
        if path:  # writes each time, so that a run that is stopped can go on with the other families
            command = " ".join(word for word in command_line().split() if word not in known)
            record = {"command": command, "environment": environment()}
            record["families"] = dict(sorted((before | results).items()))
            write_json(path, record)
            path.with_suffix(".md").write_text(markdown(record), encoding="utf-8")
    print(Counter(result["status"] for result in results.values()))


if __name__ == "__main__":
    main()
