"""Orders the notebooks of the gallery as they are best read."""

ORDER = ("classifier", "instruct", "lora", "look", "users", "format")


def position(file: str) -> int:
    """Return the place of a notebook; one that is not in the order is an error."""
    return ORDER.index(file.removesuffix(".py"))
