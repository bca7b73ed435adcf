"""The error of a clip that cannot be had; a run counts these and goes on."""


class ClipError(RuntimeError):
    """A clip that could not be decoded; the message names the file and the reason."""
