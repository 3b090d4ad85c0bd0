"""A plug-in for pytest (-p no_triton) under which Triton cannot be imported, as where it is not installed: macOS."""

import sys

sys.modules["triton"] = None  # type: ignore[assignment]
