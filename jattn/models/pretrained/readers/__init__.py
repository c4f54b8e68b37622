"""Readers of weight files, one file a format: `read(path)` gives arrays by name, or says what is wrong with the file.

Files are not trusted. A reader runs no code of a file, follows none of its paths, compares every size with the length
of the file before it allocates, and raises `UnreadableFile` for whatever is truncated, corrupt or made to do harm. What
a reader cannot notice is a flipped bit in a weight; that is what the hashes of packages are for.
"""


class UnreadableFile(ValueError):
    """A file is not what its format demands; the message names the file and what is wrong.

    Example:
        >>> raise UnreadableFile("weights.gguf cannot be read as GGUF: it ends at byte 12")
        Traceback (most recent call last):
        ...
        jattn.models.pretrained.readers.UnreadableFile: weights.gguf cannot be read as GGUF: it ends at byte 12
    """
