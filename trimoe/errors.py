"""What a user did wrong, said in one sentence. The command line prints it and exits with 2."""


class UserError(ValueError):
    """A mistake in the input: what was given, where, and what is allowed."""


def first_line(error: BaseException) -> str:
    """What an exception of someone else's code says, as it can stand in a sentence of ours: its first line, cut."""
    said = str(error).strip().splitlines()
    return said[0].strip()[:160] if said else type(error).__name__
