"""What a user can do wrong: one line that names the key, the value and the remedy."""

USER_MISTAKE = 2  # the exit status


def reason(error: BaseException) -> str:
    """What an error of somebody else's code says, in one short line."""
    text = " ".join(str(error).split())
    return text[:200] or type(error).__name__


class SparsityError(Exception):
    """A mistake that the user can mend; its message is one line."""


class ConfigError(SparsityError):
    """A setting that is unknown, of the wrong type, out of range or in conflict with another."""


class DataError(SparsityError):
    """A data set that is missing, damaged or unusable."""


class WeightsError(SparsityError):
    """A weights file that is missing, damaged, unsafe or made for another network."""


class DivergedError(SparsityError):
    """A loss that became NaN or infinite."""
