"""WebP files that no encoder writes: of any chunks, and with many sets of code tables."""

import struct

_BLOCK_SIDE = 4
_SETS_CODES = 5  # green, red, blue, alpha, distance
_SINGLE_ZERO = "1000"  # a simple code of one symbol of one bit: 0


def webp(*chunks: tuple[bytes, bytes]) -> bytes:
    """A file of these chunks: type, content."""
    body = b"WEBP"
    for kind, content in chunks:
        body += kind + struct.pack("<I", len(content)) + content + bytes(len(content) & 1)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def build_table_bomb(side: int = 1024) -> bytes:
    """A black picture of side x side pixels with up to 65,536 sets of code tables."""
    blocks = (side // _BLOCK_SIDE) ** 2
    parts = [
        _field(0x2F, 8),  # signature
        _field(side - 1, 14),
        _field(side - 1, 14),
        _field(0, 4),  # no alpha, version 0
        _field(0, 2),  # no transforms, no colour cache
        _field(1, 1) + _field(0, 3),  # sets of tables in blocks of 4x4 pixels
        _field(0, 1),  # no colour cache
        _code_of_all_bytes() * 2 + _SINGLE_ZERO * 3,
    ]
    # The number of a block's set: its low byte in green, its high byte in red.
    for block in range(blocks):
        parts.append(f"{block & 255:08b}{block >> 8:08b}")
    parts.append(_SINGLE_ZERO * _SETS_CODES * blocks)  # pixels take no bits

    content = _pack("".join(parts)) + bytes(16)
    content += bytes(len(content) & 1)
    chunk = b"VP8L" + struct.pack("<I", len(content)) + content
    return b"RIFF" + struct.pack("<I", 4 + len(chunk)) + b"WEBP" + chunk


def _field(value: int, width: int) -> str:
    """Bits of a number, least significant first."""
    return f"{value:0{width}b}"[::-1]


def _code_of_all_bytes() -> str:
    """A prefix code whose first 256 symbols all have eight bits."""
    code_lengths = [0] * 11 + [1]  # of the lengths 17, 18, 0, 1, 2, 3, 4, 5, 16, 6, 7 and 8
    lengths = "".join(_field(length, 3) for length in code_lengths)
    symbol_count = _field(1, 1) + _field(3, 3) + _field(256 - 2, 8)
    return _field(0, 1) + _field(len(code_lengths) - 4, 4) + lengths + symbol_count


def _pack(bits: str) -> bytes:
    bits += "0" * (-len(bits) % 8)
    return int(bits[::-1], 2).to_bytes(len(bits) // 8, "little")
