"""The one exception a user is meant to read."""


class UserError(Exception):
    """Bad input from outside: a file, a flag, a device.

    The message is one line that says what was expected, what was found and what to do. The command
    line prints it without a traceback and exits with status 2 (``--verbose`` shows the traceback).
    """

    def __init__(self, message: str):
        # Other libraries' reasons, quoted in a message, may have lines of their own.
        super().__init__(" ".join(message.splitlines()))
