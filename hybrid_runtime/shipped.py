"""The models that the package itself carries: small, trained by this project, and there without a network.

Each is a store in `shipped_models/`, made by the commands that models.md gives.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

DEFAULT_MODEL = "tinystories-moe"

_FOLDER = Path(__file__).parent / "shipped_models"
SHIPPED_MODELS: Mapping[str, Path] = MappingProxyType({DEFAULT_MODEL: _FOLDER / DEFAULT_MODEL})
"""Folder of each store by the model's name."""
