"""Data sets by their name on the Hub, with errors that say what to do."""

from datasets import DatasetDict, load_dataset
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
from huggingface_hub.errors import OfflineModeIsEnabled

from training.data_files import ALIASES, cause_of, in_one_line


def load_hub_dataset(name: str, config: str | None) -> DatasetDict:
    """All splits of a data set on the Hub, or of its copy in the cache, by the names that files in a folder get, too.

    Raises:
        SystemExit: if there is no such data set or configuration, or no network and no copy, or its files are damaged.
    """
    try:
        splits = load_dataset(name, config)
    except (DatasetNotFoundError, ConnectionError, OfflineModeIsEnabled) as error:
        raise SystemExit(
            f"{name} is no file or folder here, and cannot be had from the Hub: {error} Check the name; without a network, "
            "give --dataset_name a local folder."
        ) from None
    except DatasetGenerationError as error:
        raise SystemExit(f"{name} cannot be read: {in_one_line(cause_of(error))}") from None
    except ValueError as error:  # comes from `datasets` for a configuration that is missing or unknown
        raise SystemExit(f"{name}: {error} Choose one with --dataset_config_name.") from None
    return DatasetDict({ALIASES.get(split, split): data for split, data in splits.items()})
