"""Python's own language reference, present in every CPython."""


def topics_text() -> str:
    """The language reference as one text, in the order in which CPython stores its topics."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics.values())
