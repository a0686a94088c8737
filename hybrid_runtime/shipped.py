"""What the package itself carries: small models that this project trained, and a text, there without a network.

Each model is a store in `shipped_models/`, made by the commands that models.md gives.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

DEFAULT_MODEL = "tinystories-moe"

_FOLDER = Path(__file__).parent / "shipped_models"
SHIPPED_MODELS: Mapping[str, Path] = MappingProxyType({DEFAULT_MODEL: _FOLDER / DEFAULT_MODEL})
"""Folder of each store by the model's name."""

SHIPPED_TEXT = Path(__file__).parent / "shipped_texts" / "general.txt"
"""Stories by our own model, and pages and code of this project: what hybrid-run profiles on when nobody did."""
