"""The two kinds of trouble: the user's input (exit code 2) and our own fault (exit code 1, a traceback).

Every message for a user is one line with three parts: what is wrong, where, and the mend.
"""

from __future__ import annotations


class UserError(Exception):
    """Something in the user's input is wrong; the command line prints it as one line and exits with code 2.

    Args:
        what: what is wrong, with the offending value.
        where: the key, file, row or folder it was found in (may be empty).
        mend: what to type or change to make it right (may be empty).
    """

    def __init__(self, what: str, where: str = "", mend: str = "") -> None:
        self.what, self.where, self.mend = what, where, mend
        super().__init__(str(self))

    def __str__(self) -> str:
        text = self.what if not self.where else f"{self.what} (in {self.where})"
        text = text if not self.mend else f"{text}; {self.mend}"
        return " ".join(text.split())


class TrainingDiverged(UserError):
    """The loss became NaN or infinite. Names the step and the rows of the batch."""
