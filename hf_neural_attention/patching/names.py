"""What the names of attention modules say."""

import re

from torch import nn


# Matches names of cross-attention modules: BERT's, GPT-2's, T5's, Pix2Struct's, BART's
CROSS_ATTENTION = r"cross|enc(oder)?_?dec(oder)?_?att|encoder_attn"

# Matches names of self-attention modules, the queries of some of which look at other keys beside their own
SELF_ATTENTION = r"self_?att"


def stack_name(name: str) -> str:
    """Equal for layers whose names differ in numbers only: `encoder.block.*.layer.*.SelfAttention`."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name)


def says_self_attention(stack: str) -> bool:
    """Whether the name of a stack says that its layers look at themselves."""
    return re.search(SELF_ATTENTION, stack, re.IGNORECASE) is not None


def is_cross_attention(name: str, module: nn.Module) -> bool:
    """Whether a module's name, or the module itself, says so."""
    said = getattr(module, "is_cross_attention", False) is True
    return said or re.search(CROSS_ATTENTION, stack_name(name), re.IGNORECASE) is not None
