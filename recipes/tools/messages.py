"""What recipes say on the way."""

import torch


def say(text: str) -> None:
    """Prints a line, in the first process alone where several do the same."""
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        print(text, flush=True)
