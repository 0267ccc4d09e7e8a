"""What the names of attention modules say."""

import re

from torch import nn


# Matches names of cross-attention inside a layer: BERT's, GPT-2's, T5's, Pix2Struct's, BART's
CROSS_ATTENTION = r"cross|enc(oder)?_?dec(oder)?_?att|encoder_attn"

# Matches names of self-attention modules, the queries of some of which look at other keys beside their own
SELF_ATTENTION = r"self_?att"


def stack_name(name: str) -> str:
    """Equal for layers whose names differ in numbers only: `encoder.block.*.layer.*.SelfAttention`."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name)


def says_self_attention(stack: str) -> bool:
    """Whether the name of a stack says that its layers look at themselves."""
    return re.search(SELF_ATTENTION, stack, re.IGNORECASE) is not None


def name_in_layer(name: str) -> str:
    """What comes after the number of the layer: `crossattention.self` of `encoder.layer.0.crossattention.self`.

    What comes before may say something else: BridgeTower's `cross_modal_text_layers` have self-attention, too.
    """
    return re.split(r"\.(?:\d+|\*)\.", re.sub(r"(\.(?:\d+|\*))+$", "", name))[-1]


def is_cross_attention(name: str, module: nn.Module) -> bool:
    """Whether a module's name in its layer, or the module itself, says so."""
    said = getattr(module, "is_cross_attention", False) is True
    return said or re.search(CROSS_ATTENTION, name_in_layer(name), re.IGNORECASE) is not None
