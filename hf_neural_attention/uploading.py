"""Uploads a folder to the Hub."""

import re
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.utils import filter_repo_objects
from transformers.utils import ADAPTER_CONFIG_NAME


# Matches the files that `from_pretrained` looks for: weights, parts of them, and what says where the parts are
WEIGHT_FILES = re.compile(
    r"model(-\d{5}-of-\d{5})?\.safetensors|pytorch_model(-\d{5}-of-\d{5})?\.bin|"
    r"(model\.safetensors|pytorch_model\.bin)\.index\.json"
)


def title_of(folder: Path, repo_id: str | None, is_pushed: bool, token: str | bool | None) -> str:
    """What a card calls its repository: by default as the folder is called, and with its owner's name where it is pushed, as
    others have to write it."""
    name = repo_id or folder.resolve().name
    if not is_pushed or "/" in name:
        return name
    try:
        return f"{HfApi(token=token).whoami()['name']}/{name}"
    except Exception:  # noqa: BLE001, leaves it to `upload` to say what is wrong, once everything is saved
        return name


def upload(
    folder: Path,
    repo_id: str,
    token: str | bool | None,
    private: bool | None,
    commit_message: str,
    whole_model: bool = False,
    **options: Any,
) -> None:
    """Uploads a folder, to a repository that is made if there is none.

    Args:
        whole_model: files of weights that are there from before are deleted if none takes their place, since they would be
            loaded with the new ones, or instead.
        options: for `HfApi.upload_folder` (`allow_patterns`, `ignore_patterns` ...).

    Raises:
        RuntimeError: if that fails, or the repository has adapters, which would be loaded into the model; it says how to go
            on. Nothing of the folder is changed.
    """
    api = HfApi(token=token)
    try:
        repo = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        there = api.list_repo_files(repo) if whole_model else []
        options["delete_patterns"] = [name for name in there if WEIGHT_FILES.fullmatch(name)]
        if ADAPTER_CONFIG_NAME not in there:
            api.upload_folder(repo_id=repo, folder_path=folder, commit_message=commit_message, **options)
    except Exception as error:
        command = command_for(folder, repo_id, private, **options)
        raise RuntimeError(
            f"The upload to {repo_id} failed: {error}. {folder} is complete; go on with `{command}`, or try this again."
        ) from error
    if ADAPTER_CONFIG_NAME in there:
        raise RuntimeError(
            f"Nothing was uploaded to {repo_id}: it has adapters ({ADAPTER_CONFIG_NAME}), which would be loaded into this "
            f"model. Remove them there, or give another repository. {folder} is complete."
        )


def command_for(
    folder: Path,
    repo_id: str,
    private: bool | None,
    delete_patterns: Iterable[str] = (),
    allow_patterns: Any = None,
    ignore_patterns: Any = None,
) -> str:
    """A command line that uploads and deletes the same files, in a repository that is private if it was to be."""
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    chosen = list(filter_repo_objects(files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns))
    words = ["hf", "upload", repo_id, str(folder), *(["--private"] if private else [])]
    if chosen != files:  # names the top of each path, since folders go as a whole
        tops = sorted({f"{Path(name).parts[0]}/**" if len(Path(name).parts) > 1 else name for name in chosen})
        words += [word for top in tops for word in ("--include", top)]
    words += [word for name in delete_patterns if name not in chosen for word in ("--delete", name)]
    return shlex.join(words)
