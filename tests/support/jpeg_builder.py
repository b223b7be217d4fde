"""JPEGs that no encoder at hand writes: any frame, any number of scans."""

import struct

DC = 512  # of the green below: Y 192, Cb and Cr 64, each 64 from the middle


def segment(marker: int, content: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content


def green_jpeg(scans: list[list[int]], side: int = 32, frame: int = 0xC0) -> bytes:
    """A flat green JPEG; `scans` says which components each of them holds.

    Only a scan of one component in a small baseline picture has content; decoders take gray for what is missing.
    """
    components = max(map(max, scans)) + 1
    parts = [b"\xff\xd8", segment(0xDB, b"\0" + b"\1" * 64)]
    parts.append(
        segment(
            frame,
            struct.pack(">BHHB", 8, side, side, components)
            + b"".join(bytes((c, 0x11, 0)) for c in range(components)),
        )
    )
    codes = {
        0x00: b"\0\x0a",
        0x10: b"\0",
    }  # DC: `0` for no difference, `10` for one of ten bits; AC: `0` for no more
    for table, values in codes.items():
        lengths = [1, len(values) - 1]
        parts.append(segment(0xC4, bytes([table, *lengths, *bytes(14)]) + values))
    last = 0 if frame in (0xC2, 0xCA) else 63  # progressive: only DC
    for scan in scans:
        parts.append(
            segment(0xDA, bytes([len(scan), *(b for c in scan for b in (c, 0)), 0, last, 0]))
        )
        if len(scan) == 1 and frame == 0xC0 and side <= 64:
            value = (
                DC if scan[0] in (0, 3) else 1023 - DC
            )  # a negative one is stored as its complement
            bits = f"10{value:010b}0" + "00" * ((side + 7 >> 3) ** 2 - 1)
            bits += "1" * (-len(bits) % 8)
            parts.append(int(bits, 2).to_bytes(len(bits) // 8, "big").replace(b"\xff", b"\xff\0"))
    return b"".join((*parts, b"\xff\xd9"))
