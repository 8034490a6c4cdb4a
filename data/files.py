"""Files that are whole or not there, and that are known by their content, not by their name."""

import contextlib
import hashlib
import json
import os
from pathlib import Path

from data import UserError


@contextlib.contextmanager
def writing(path: Path):
    """What goes wrong while `path` is written becomes a sentence."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch.save's is a RuntimeError
        reason = getattr(error, "strerror", None) or "is the disk full?"
        raise UserError(f"{path} could not be written ({reason}): mend that and start again, "
                        "what was there is intact") from None


def write_atomically(path: Path, write) -> None:
    """write(file) fills a file beside `path`, which then takes its place: a reader sees the old
    file or the new one. Raises UserError.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with writing(path), open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())  # some file systems say only now that they are full
        with writing(path):
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_json(path: str | Path) -> dict:
    """The object in a file of JSON. Raises UserError."""
    try:
        return dict(json.loads(Path(path).read_text(encoding="utf-8-sig")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} cannot be read as an object in JSON ({error}): bring it back, or "
                        "choose another") from None


def nested(value, *keys) -> dict:
    """The object value[key][key]...; {} where there is none."""
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value if isinstance(value, dict) else {}


def fingerprint(value) -> str:
    """A short checksum of a model's weights and shape, or of plain data."""
    if hasattr(value, "state_dict"):
        value = {name: hashlib.sha256(weight.cpu().numpy()).hexdigest()
                 for name, weight in value.state_dict().items()} | vars(value.config)
    return hashlib.sha256(repr(value).encode()).hexdigest()[:16]
