"""Archives, which take as many bits as an exact likelihood says.

``compress(flow, indices)`` encodes events in -log₂ p(y) bits, and ``decompress`` decodes them, in
the passes of generation. ``python -m dflows.compress`` does so with texts.
"""

from dflows.codec.archive import ArchiveError
from dflows.codec.arrays import compress, decompress
from dflows.codec.texts import TextCodec

__all__ = ["ArchiveError", "TextCodec", "compress", "decompress"]
