"""Uploads a folder to the Hub."""

from pathlib import Path
from typing import Any

from huggingface_hub import HfApi


def upload(
    folder: Path, repo_id: str, token: str | bool | None, private: bool | None, commit_message: str, **options: Any
) -> None:
    """Uploads a folder, to a repository that is made if there is none.

    Args:
        options: for `HfApi.upload_folder` (`allow_patterns`, `ignore_patterns` ...).

    Raises:
        RuntimeError: if that fails, saying how to go on. Nothing of the folder is changed.
    """
    api = HfApi(token=token)
    try:
        repo = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message=commit_message, **options)
    except Exception as error:
        raise RuntimeError(
            f"The upload to {repo_id} failed: {error}. {folder} is complete; go on with `hf upload {repo_id} {folder}`, or "
            "try this again."
        ) from error
