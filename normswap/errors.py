"""Every refusal normswap makes. Each message says what was expected, what was found, where, and what to do."""

from __future__ import annotations


class NormswapError(Exception):
    """Base of all errors a user can meet; the command line prints the message and exits with 2."""


class SourceError(NormswapError):
    """The folder, file or Hub id given is no checkpoint that can be read."""


class ObserveError(NormswapError):
    """The model could not be built or run once for observation."""


class RefusedError(NormswapError):
    """The request cannot be met exactly as asked; nothing was written.

    Attributes:
        refusals: `(module path, reason)` for each site that stands in the way.
    """

    def __init__(self, message: str, refusals: tuple[tuple[str, str], ...] = ()):
        super().__init__(message)
        self.refusals = refusals


class PlanError(NormswapError):
    """A plan does not fit the model or checkpoint it is applied to, or its file is malformed."""


class VerificationError(NormswapError):
    """The result measures otherwise than its claim; nothing was published."""


class DestinationError(NormswapError):
    """The destination exists, is the source, or cannot be written."""


class HubError(NormswapError):
    """The Hub cannot be reached or does not take what is to be pushed; what was published locally is there."""


class KernelError(NormswapError):
    """Fused kernels that were asked for cannot be had here, or cannot go under this model."""


class RecipeError(NormswapError):
    """A recipe is not understood, or does not fit its model or data; nothing was trained."""


class DivergedError(NormswapError):
    """A training was stopped because it diverged; its last good checkpoint is kept."""
