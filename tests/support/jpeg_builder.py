"""JPEG files that no encoder writes: any frame type, any number and order of scans."""

import struct

BASELINE = 0xC0
PROGRESSIVE = (0xC2, 0xCA)

# DC coefficient of flat green: Y is 192, Cb and Cr are 64; each lies 64 from the middle.
DC = 512
COEFFICIENT_BITS = 10
MAX_FILLED_SCANS = 30


def segment(marker: int, content: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content


def green_jpeg(scans: list[list[int]], side: int = 32, frame: int = BASELINE) -> bytes:
    """A flat green JPEG; `scans` lists the components of each scan.

    Scans have content in Huffman coding, where they are not too many; decoders take gray for what
    is missing.
    """
    component_count = max(max(scan) for scan in scans) + 1
    parts = [
        b"\xff\xd8",
        segment(0xDB, b"\0" + b"\1" * 64),
        segment(frame, frame_header(component_count, side)),
        *huffman_tables(),
    ]
    for scan in scans:
        parts.append(segment(0xDA, scan_header(scan, frame)))
        if len(scans) <= MAX_FILLED_SCANS and frame in (BASELINE, PROGRESSIVE[0]):
            parts.append(scan_data(scan, side, frame))
    parts.append(b"\xff\xd9")
    return b"".join(parts)


def frame_header(component_count: int, side: int) -> bytes:
    """Eight bits a sample, no subsampling."""
    components = b"".join(bytes((component, 0x11, 0)) for component in range(component_count))
    return struct.pack(">BHHB", 8, side, side, component_count) + components


def huffman_tables() -> list[bytes]:
    """DC: `0` for no difference, `10` for one of ten bits. AC: `0` for the end of the block."""
    tables = []
    for table, values in ((0x00, bytes([0, COEFFICIENT_BITS])), (0x10, b"\0")):
        counts = bytes([1, len(values) - 1, *bytes(14)])
        tables.append(segment(0xC4, bytes([table]) + counts + values))
    return tables


def scan_header(scan: list[int], frame: int) -> bytes:
    components = b"".join(bytes((component, 0)) for component in scan)
    last_coefficient = 0 if frame in PROGRESSIVE else 63  # a progressive one holds DC only
    return bytes([len(scan)]) + components + bytes([0, last_coefficient, 0])


def scan_data(scan: list[int], side: int, frame: int) -> bytes:
    """The entropy-coded blocks of a scan: the first of each component holds its DC.

    The others hold no change. A block of a baseline image ends with a code, one of a progressive
    scan of DC only does not.
    """
    block_end = "" if frame in PROGRESSIVE else "0"
    bits = ""
    for component in scan:
        is_positive = component in (0, 3)
        complement = (1 << COEFFICIENT_BITS) - 1 - DC  # how JPEG stores a negative coefficient
        value = DC if is_positive else complement
        bits += f"10{value:010b}{block_end}"

    block_count = ((side + 7) // 8) ** 2
    bits += ("0" + block_end) * len(scan) * (block_count - 1)
    bits += "1" * (-len(bits) % 8)
    data = int(bits, 2).to_bytes(len(bits) // 8, "big")
    return data.replace(b"\xff", b"\xff\0")
