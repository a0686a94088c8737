"""Files that torch.save wrote, read as data: no code in them runs, and their size is known before they are unpacked."""

from __future__ import annotations

import zipfile
from pathlib import Path
from pickle import UnpicklingError

import torch

from hybrid_runtime.errors import CheckpointError

SPARE_BYTES = 1 << 20  # of names, shapes and torch's own records beside the values


def read_torch_file(path: Path, most_bytes: int) -> object:
    """What the file holds, in memory. Raise CheckpointError for more bytes than are expected, or anything but tensors.

    most_bytes: of the tensors' values. Files of torch before 1.6, which are no zip archives, are refused.
    """
    limit = most_bytes + SPARE_BYTES
    try:
        size = path.stat().st_size
        if size > limit:
            raise CheckpointError(f"{path}: is {size} bytes, expected at most {limit}; it is not such a file")
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
        unpacked = sum(member.file_size for member in members)
        if unpacked > limit:  # a small archive may unpack to anything
            raise CheckpointError(f"{path}: unpacks to {unpacked} bytes, expected at most {limit}; not such a file")
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file") from error
    except zipfile.BadZipFile as error:
        raise CheckpointError(
            f"{path}: is not a file that torch.save writes since 1.6; load it and save it again, or fetch it again"
        ) from error
    except UnpicklingError as error:  # whose text advises to read it as a program
        raise CheckpointError(f"{path}: holds more than tensors, or is damaged; fetch it again") from error
    except (RuntimeError, EOFError, KeyError, ValueError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path}: holds more than tensors, or is damaged: {reason}; fetch it again") from error
