"""Small models of every family, from their default configurations: two layers, and sizes shrunk by names of fields."""

import re
from collections.abc import Iterator
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from families.patch_examination import in_a_line


LARGEST = 60_000_000  # parameters of a model that counts as small
VOCABULARY = 160
NUM_LAYERS = 2

# Maps fields of configs, by name, to the most that they may be
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
    r"context_size": 32,
}
EQUAL_HEADS = SIZES | {r"(.*_)?num_key_value_heads": 4}


def families() -> dict[str, list[str]]:
    """Model types by folder, the one named as the folder first."""
    found: dict[str, list[str]] = {}
    for model_type in CONFIG_MAPPING:
        try:
            package, _, rest = CONFIG_MAPPING[model_type].__module__.partition(".models.")
        except (ImportError, AttributeError, KeyError):
            continue
        if package != "transformers":  # is registered by others
            continue
        folder = rest.split(".")[0]
        if folder != "auto":
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
    if isinstance(rope, dict) and "mrope_section" in rope and limits is not DEPTHS:
        rotated = int(changes.get("head_dim", 16) * rope.get("partial_rotary_factor", 1.0)) // 2
        section = [rotated // 4, (rotated - rotated // 4) // 2]
        changes["rope_parameters"] = {**rope, "mrope_section": [*section, rotated - sum(section)]}
    parts = {name: getattr(config, name, None) for name in config.sub_configs}
    changes |= {name: shrink(part, limits) for name, part in parts.items() if part is not None}
    return type(config)(**changes)


def shrunk_models(model_types: list[str]) -> Iterator[tuple[PreTrainedModel, None]]:
    """Models of a family that can be built small, from the smallest on, without inputs.

    Raises:
        RuntimeError: at the end, with the reasons for those that cannot.
    """
    reasons = []
    for model_type in model_types:
        for limits in (SIZES, EQUAL_HEADS, DEPTHS):
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
                yield wanted(config), None
            except Exception as error:  # noqa: BLE001, goes on, since any config may object in its own way
                reasons.append(f"{model_type}: {in_a_line(error)}")
    raise RuntimeError("; ".join(dict.fromkeys(reasons)) or "no Auto class has a model of it")
