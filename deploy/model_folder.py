"""From what a user calls a model to a folder on this machine."""

from __future__ import annotations

from pathlib import Path

from ..cluster.errors import CheckpointError

DEMO_MODELS = [str(Path(__file__).parent / "demo_models" / name) for name in ("demo-large", "demo-small")]
"""Served when the user names no model."""

_FILES = ["*.json", "*.safetensors", "tokenizer.model", "*.jinja"]


def find_model_folder(model: str) -> Path:
    """The folder of `model`: a path, the name of an embedded model, or a hub id, whose files are downloaded unless they
    are cached.

    Raises:
        CheckpointError: there is no such folder and no such hub id, or the hub cannot be reached.
    """
    folder = Path(model).expanduser()
    if not folder.exists():
        folder = next((path for path in map(Path, DEMO_MODELS) if path.name == model), folder)
    if folder.is_dir():
        return folder.resolve()
    if folder.exists():
        raise CheckpointError(f"{model} is a file; name the folder with config.json and *.safetensors")
    if not _is_hub_id(model):
        raise CheckpointError(f"{model}: no such folder")
    return _download(model)


def _is_hub_id(model: str) -> bool:
    """`name` or `owner/name`, as opposed to a path."""
    parts = model.split("/")
    return len(parts) <= 2 and all(part and not part.startswith(".") for part in parts) and not model.startswith("~")


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(hub_id, allow_patterns=_FILES))
    except HFValidationError:
        raise CheckpointError(f"{hub_id}: neither a folder nor a hub id (owner/name)") from None
    except LocalEntryNotFoundError:
        raise CheckpointError(
            f"{hub_id}: no such folder, and the model hub cannot be reached to look for a model of that name"
        ) from None
    except (HfHubHTTPError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(f"{hub_id}: no such folder, and the model hub says: {reason}") from None
