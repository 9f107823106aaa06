"""What a user did wrong, said in one sentence. The command line prints it and exits with 2."""


class UserError(ValueError):
    """A mistake in the input: what was given, where, and what is allowed."""
