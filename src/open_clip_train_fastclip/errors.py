"""The one exception for a user's mistakes, and errors in one line."""

import re

EXIT_FAILED, EXIT_USER_ERROR, EXIT_INTERRUPTED = 1, 2, 130  # exit codes


class UserError(ValueError):
    """A mistake in the user's input: its text is one line that says what is wrong, where, and what to do.

    The command line prints it without a traceback and ends with EXIT_USER_ERROR. on_all_ranks: all of them raise it.
    """

    def __init__(self, text: str, on_all_ranks: bool = False):
        super().__init__(" ".join(text.splitlines()))  # a name in a file may hold line breaks
        self.on_all_ranks = on_all_ranks


def user_message(error: UserError) -> str:
    """The one line of a UserError, also of one that a data worker raised and torch wrapped in a traceback."""
    return str(error).strip().split("UserError: ")[-1].splitlines()[0]


def one_line(error: BaseException) -> str:
    """The first line of an error; torch.save hides what the disk said in the context of its own error."""
    while not isinstance(error, OSError) and isinstance(error.__context__, OSError):
        error = error.__context__
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def named_line(error: BaseException) -> str:
    """The kind of an error and its first line; of one that a data worker raised what torch wrapped in a traceback."""
    text = str(error).strip().splitlines()
    if text and re.match("Caught .* in DataLoader worker", text[0]):
        return text[-1]
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
