"""What the process that steps are forked from has imported: all that takes seconds."""

from common.output import quiet

quiet()  # some messages come while packages are imported
import callbacks.command_line  # noqa: E402, F401
from bench import report  # noqa: E402, F401
