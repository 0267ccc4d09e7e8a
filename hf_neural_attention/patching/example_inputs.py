"""Small inputs for a model that nobody has described: from its config and the names of its forward's arguments."""

import inspect
from collections.abc import Callable, Iterator
from itertools import zip_longest
from typing import Any

import torch
from torch import nn


# Differ, so that cross-attention shows: it has other keys than queries
NUM_TOKENS = 7
NUM_DECODER_TOKENS = 5
NUM_ENCODER_STATES = 6
NUM_PATCHES = 4  # along each side of an image
NUM_SAMPLES = 16000  # of a waveform: a second


def first_of(config: Any, *names: str, default: Any = None) -> Any:
    """The first of these fields that a config, or a part of it, has."""
    configs = [config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", {}))]
    found = (getattr(each, name, None) for each in configs if each is not None for name in names)
    return next((value for value in found if value is not None), default)


def tokens(length: int) -> list[torch.Tensor]:
    return [torch.arange(3, 3 + length).unsqueeze(0)]  # skips the first ones, which are often special


def states(config: Any, length: int, *names: str) -> list[torch.Tensor]:
    size = first_of(config, *names, "hidden_size", "d_model", "n_embd", "dim")
    return [] if size is None else [torch.zeros(1, length, size)]


def images(config: Any) -> list[torch.Tensor]:
    size = first_of(config, "image_size", default=64)
    height, width = (size, size) if isinstance(size, int) else tuple(size)[-2:]
    channels = first_of(config, "num_channels", "in_channels", "in_chans", default=3)
    image = torch.zeros(1, channels if isinstance(channels, int) else 3, height, width)
    frames = first_of(config, "num_frames", "frames_per_clip", default=2)
    return [image, image.unsqueeze(1).expand(-1, frames, -1, -1, -1)]


def patches(config: Any) -> list[torch.Tensor]:
    """Of one image, as Qwen2-VL and its kin take them beside `grid_thw`."""
    channels, frames = first_of(config, "in_channels", "num_channels", default=3), first_of(config, "temporal_patch_size") or 1
    return [torch.zeros(NUM_PATCHES**2, channels * frames * first_of(config, "patch_size", default=14) ** 2)]


def patches_with_places(config: Any) -> list[torch.Tensor]:
    """As Gemma 4 takes them beside `pixel_position_ids`."""
    return [flat.unsqueeze(0) for flat in patches(config)]


def waveforms(config: Any) -> list[torch.Tensor]:
    waveform = torch.zeros(1, NUM_SAMPLES)
    return [waveform, waveform.unsqueeze(1), *spectrograms(config)]


def spectrograms(config: Any) -> list[torch.Tensor]:
    bins = first_of(config, "num_mel_bins", "feature_projection_input_dim", "input_feat_per_channel", "input_dim", default=80)
    positions = first_of(config, "max_source_positions", default=1500)
    # offers both orders: Whisper takes bins first, and twice as many frames as it has positions
    spectrogram = torch.zeros(1, first_of(config, "max_length", default=2 * positions), bins)
    return [torch.zeros(1, bins, 2 * positions), spectrogram]


# Maps an argument of a forward to what may be meant by it
MAKERS: dict[str, Callable[[Any], list[torch.Tensor]]] = {
    "input_ids": lambda config: tokens(NUM_TOKENS),
    "decoder_input_ids": lambda config: tokens(NUM_DECODER_TOKENS),
    "pixel_values": images,
    "pixel_values_videos": lambda config: images(config)[::-1],
    "input_values": waveforms,
    "input_features": spectrograms,
    "hidden_states": lambda config: states(config, NUM_TOKENS),
    "inputs_embeds": lambda config: states(config, NUM_TOKENS),
    "grid_thw": lambda config: [torch.tensor([[1, NUM_PATCHES, NUM_PATCHES]])],
    "pixel_position_ids": lambda config: [torch.cartesian_prod(*[torch.arange(NUM_PATCHES)] * 2).unsqueeze(0)],
    "query_embeds": lambda config: states(config, NUM_DECODER_TOKENS),
    "context": lambda config: states(config, NUM_ENCODER_STATES),
    "attention_mask": lambda config: [torch.ones(1, length, dtype=torch.long) for length in (NUM_TOKENS, NUM_ENCODER_STATES)],
    "noise_embeds": lambda config: states(config, NUM_DECODER_TOKENS),
    "context_hidden_states": lambda config: [
        each.repeat(1, 1, len(first_of(config, "target_layer_ids", default=[0])))
        for each in states(config, NUM_ENCODER_STATES)
    ],
    "encoder_hidden_states": lambda config: states(
        config, NUM_ENCODER_STATES, "cross_attention_hidden_size", "encoder_hidden_size"
    ),
}


def is_needed(parameter: inspect.Parameter) -> bool:
    """Whether a forward cannot be called without this argument."""
    variable = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    return parameter.default is parameter.empty and not variable


def possible_inputs(model: nn.Module, device: torch.device, dtype: torch.dtype) -> Iterator[dict[str, torch.Tensor]]:
    """Arguments for a model's forward, the likeliest first; none if it needs one that is not known here.

    Given are those that have no default, the model's main input, both sides of an encoder-decoder, texts with images, and
    what cross-attention looks at.
    """
    config, parameters = getattr(model, "config", None), inspect.signature(model.forward).parameters
    required = {name for name, parameter in parameters.items() if is_needed(parameter)}
    main = getattr(model, "main_input_name", "input_ids")
    wanted = required | {"input_ids", "decoder_input_ids"} | set([main] if isinstance(main, str) else main)
    if first_of(config, "image_token_id", "image_token_index") is None:  # leaves out images that stand for tokens of the text
        wanted |= {"pixel_values"}
    if getattr(config, "add_cross_attention", False):
        wanted |= {"encoder_hidden_states"}
    names = [name for name in MAKERS if name in parameters and name in wanted] or ["inputs_embeds"]
    if not required <= MAKERS.keys() or not parameters.keys() >= set(names):
        return
    makers = MAKERS
    if "grid_thw" in required:
        makers = MAKERS | {"hidden_states": patches, "pixel_values": patches}
    elif "pixel_position_ids" in required:
        makers = MAKERS | {"pixel_values": patches_with_places}
    options = [makers[name](config) for name in names]
    for values in zip_longest(*options):
        chosen = (value if value is not None else option[0] for value, option in zip(values, options, strict=True) if option)
        yield {
            name: value.to(device, dtype if value.is_floating_point() else None)
            for name, value in zip(names, chosen, strict=False)
        }


def attention_inputs(module: nn.Module, device: torch.device, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    """Arguments for the forward of an attention module by itself, by the names that they have in Transformers. What else it
    needs is None."""
    parameters = inspect.signature(module.forward).parameters
    sizes = [child.in_features for child in module.modules() if isinstance(child, nn.Linear)]
    head_dim = first_of(module, "head_dim", "attention_head_size")
    if not sizes:
        return
    for shape in ((1, NUM_TOKENS, sizes[0]), (NUM_TOKENS, sizes[0]), (1, 1, NUM_TOKENS, sizes[0])):
        hidden_states = torch.zeros(shape, device=device, dtype=dtype)
        known: dict[str, Any] = dict.fromkeys(("hidden_states", "query", "key", "value", "queries"), hidden_states)
        known["cu_seqlens"] = torch.tensor([0, NUM_TOKENS], device=device, dtype=torch.int32)
        known["max_seqlen"] = NUM_TOKENS
        known["position_ids"] = torch.arange(NUM_TOKENS, device=device).unsqueeze(0)
        rotations: list[Any] = [None]
        if "position_embeddings" in parameters and isinstance(head_dim, int):
            turn = torch.zeros(*shape[:-1], head_dim, device=device, dtype=dtype)
            rotations = [(turn, turn), None]
        for known["position_embeddings"] in rotations:
            yield {name: known.get(name) for name, parameter in parameters.items() if is_needed(parameter) or name in known}
