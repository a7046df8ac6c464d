"""What is raised when a model cannot be served."""

from __future__ import annotations


class ModelError(Exception):
    """The model cannot be served; the message is one line that says what to change."""


class ArchitectureError(ModelError):
    """Model code or kernels cannot run the model, or run it wrong."""
