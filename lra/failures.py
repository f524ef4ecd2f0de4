"""What an error that no check has foreseen means to whoever reads it: one line, with what to do."""

import errno


def explain(error: BaseException) -> str:
    """The message of an error in one line; a full disk is called that, with the cure."""
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", None)):
        where = f" of {error.filename}" if error.filename else ""
        return (
            f"the disk{where} is full ({error.strerror}): free some space and run the same command again; "
            "what was written before is whole"
        )
    return text
