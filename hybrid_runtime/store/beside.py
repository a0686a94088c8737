"""Where what is learned about a store lies: its profile, predictors that were trained for it, plans.

In the store's own folder where that can be written to. A store that the package carries, or one that belongs to
somebody else, gets a folder in the user's cache.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from hybrid_runtime.shipped import SHIPPED_MODELS
from hybrid_runtime.store.reader import Store


def store_digest(store: Store) -> str:
    """Hex sha256 that names the store's weights and how they are packed: of its manifest, which has every part's."""
    return hashlib.sha256(store.manifest.to_json().encode()).hexdigest()


def beside(store: Store, cache_dir: Path) -> Path:
    """The folder; what is in it may be of an older store in the same place, so its files name their store's digest."""
    is_shipped = store.folder.resolve() in {path.resolve() for path in SHIPPED_MODELS.values()}
    if not is_shipped and os.access(store.folder, os.W_OK):
        return store.folder
    return cache_dir / "beside" / f"{store.folder.name}-{store_digest(store)[:16]}"
