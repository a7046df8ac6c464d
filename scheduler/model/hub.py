"""A model on the hub: asked for once, with a bound, before transformers asks for each of its files, with retries."""

from __future__ import annotations

TIMEOUT_SECONDS = 10.0
# The same weights for other programs.
_OF_OTHERS = ("*.gguf", "*.onnx*", "*.h5", "*.msgpack", "*.ot", "*.tflite", "original/*")


class HubError(Exception):
    """The model cannot be had; the message says why and what would be right."""


def reachable_path(model: str) -> str:
    """What `from_pretrained` takes for a hub id: the id, or if the hub does not answer, the copy in its cache.

    Raises HubError.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    try:
        HfApi().model_info(model, timeout=TIMEOUT_SECONDS)
    except GatedRepoError as error:
        raise HubError(
            "the hub gives it only to those whom its owner allows; ask there, then `hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise HubError("the hub has no such model, or a private one: `hf auth login`, or a directory") from error
    except HFValidationError as error:
        raise HubError(f"no hub id: {_first_line(error)}") from error
    except Exception as error:  # of many kinds: a resolver's, a proxy's, the hub's own, or the hub is switched off
        return _cached(model, error)
    return model


def downloaded(model: str) -> str:
    """The directory of a hub id, with all that transformers may load of it. Raises HubError."""
    from huggingface_hub import snapshot_download

    try:
        return str(snapshot_download(model, ignore_patterns=list(_OF_OTHERS)))
    except Exception as error:  # of many kinds, as above
        raise HubError(f"it cannot be fetched: {_first_line(error)}") from error


def _cached(model: str, reason: Exception) -> str:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return str(snapshot_download(model, local_files_only=True))
    except LocalEntryNotFoundError:
        raise HubError(
            f"the hub cannot be reached ({_first_line(reason)}), and the model is not in its cache; name a directory"
        ) from reason


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
