"""What a causal language model does with labels, and whether it is one: families differ, and few say so."""

from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from training.data_files import in_one_line


NOTHING = -100  # a label where nothing is to be predicted
TOKENS = 8
ROUNDING = 1e-5  # of the largest logit


@torch.no_grad()
def predicts_the_next_token(model: PreTrainedModel, name: str, length: int = TOKENS, hint: str = "") -> bool:
    """Whether a model's loss compares what it says at a token with the next label, as most families do. Decoders that are
    taken from an encoder-decoder (Marian, BART, Pegasus ...) compare it with that of the same token, which they have read.

    Args:
        name: of the model, in errors.
        length: how many tokens it must be able to read at once.
        hint: what to do where it cannot.

    Raises:
        SystemExit: if it cannot read so many, or sees tokens that are still to come.
    """
    config: Any = model.config.get_text_config()
    few = min(TOKENS, length)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, config.vocab_size, (2, few), generator=generator).to(model.device)
    changed = tokens.clone()
    changed[:, -1] = (changed[:, -1] + 1) % config.vocab_size
    was_training = model.training
    model.eval()
    try:
        outputs, others = model(input_ids=tokens, labels=tokens), model(input_ids=changed)
        model(input_ids=tokens[:1].repeat(1, -(-length // few))[:, :length])
    except Exception as error:  # noqa: BLE001, since models of hundreds of families may raise anything
        raise SystemExit(
            f"{name} fails on blocks of {length} tokens: {type(error).__name__}: {in_one_line(error)}{hint}"
        ) from None
    finally:
        model.train(was_training)
    difference = (outputs.logits - others.logits)[:, :-1].abs().max()
    if difference > ROUNDING * outputs.logits.abs().max():
        raise SystemExit(
            f"{name} is no causal language model: what its {type(model).__name__} says of a token depends on later ones. A "
            "family of encoders may have decoders as well: --config_overrides is_decoder=true."
        )
    logits = outputs.logits.float()
    of_next = cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    of_same = cross_entropy(logits.flatten(0, 1), tokens.flatten())
    return bool((outputs.loss - of_next).abs() <= (outputs.loss - of_same).abs())


def loss_of_the_next_token(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    """For `Trainer`'s `compute_loss_func`: that of most families, where a model has another.

    Args:
        outputs: with logits `[batch, tokens, vocabulary]`.
        labels: `[batch, tokens]`, the tokens themselves; -100 where nothing is to be predicted.
        num_items_in_batch: to divide the sum by, in place of their number here.
    """
    logits, targets = outputs["logits"][:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten().to(outputs["logits"].device)
    if num_items_in_batch is None:
        return cross_entropy(logits, targets)
    return cross_entropy(logits, targets, reduction="sum") / num_items_in_batch
