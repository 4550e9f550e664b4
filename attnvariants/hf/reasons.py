"""Why the self-test of a patch, or a part of it, compares nothing."""


class InapplicableError(Exception):
    """The property of a model or of its inputs that leaves a test nothing to compare."""


class VanishedError(ValueError):
    """A test that ought to apply cannot be made."""


class UntestableError(ValueError):
    """Nothing can be told of a patch on these inputs."""


class UnavailableError(Exception):
    """Why a figure cannot be computed in float64."""
