"""What can go wrong that a caller can cause, as one small tree.

    HybridError
    ├── UsageError             an argument or a flag that cannot be honoured
    │   └── ContextOverflow    prompt + answer longer than the context
    ├── CheckpointError        a published file is broken, incomplete or inconsistent
    │   └── UnsupportedModel   a sound checkpoint of something this runtime does not compute
    ├── StoreError             a converted model on disk cannot be used
    │   └── IncompleteStore    its conversion has not finished
    ├── TokenizerError         a vocabulary is broken or of an unknown kind
    ├── TemplateError          a chat template failed, ran too long or is not there
    ├── DownloadError          a file could not be fetched or is not what was promised
    ├── BudgetError            the model does not fit the memory or the disk
    ├── NumericsError          the model computed NaN or Inf
    └── WorkerError            a thread that computes has ended

Every message names the file or flag, the field, what was found, what was expected, and what to do. The command line
prints it as one line and exits with code 2; kernels, which know no files, raise ValueError and TypeError instead.
"""

from __future__ import annotations


class HybridError(Exception):
    """Base of every error that a caller of hybrid-runtime can cause."""


class UsageError(HybridError):
    """An argument or a flag that cannot be honoured."""


class ContextOverflow(UsageError):
    """The prompt, or the prompt and the answer, do not fit the context."""


class CheckpointError(HybridError):
    """A published model file is broken, incomplete or contradicts another."""


class UnsupportedModel(CheckpointError):
    """The checkpoint is sound, but no family of this runtime computes it."""


class StoreError(HybridError):
    """A converted model on disk cannot be used."""


class IncompleteStore(StoreError):
    """The conversion that writes this store has not finished."""


class TokenizerError(HybridError):
    """A vocabulary is broken or of a kind that is not known."""


class TemplateError(HybridError):
    """A chat template failed, ran too long, or is missing."""


class DownloadError(HybridError):
    """A file could not be fetched, or its contents are not what was promised."""


class BudgetError(HybridError):
    """The model does not fit the memory or the disk that it was given."""


class NumericsError(HybridError):
    """The model computed NaN or Inf."""


class WorkerError(HybridError):
    """A thread of this process that computes has ended, killed by the system or by a library."""
