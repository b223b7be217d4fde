"""Read the sequence header and the frame header of an AV1 picture, as an AVIF holds it.

AV1 Bitstream and Decoding Process Specification, 5.3 to 5.9. The names of fields are those of the
specification. A picture is accepted only if it is one key frame whose size is that of the sequence
header: a frame may otherwise state a size of its own, and a decoder would allocate that.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from models.image.errors import UndecodableImage

NOT_ONE_FRAME = "the avif holds more than one frame in one picture, which is not supported"

_SEQUENCE_HEADER = 1
_FRAME_HEADER = 3
_TILE_GROUP = 4
_FRAME = 6
_PIXEL_UNITS = frozenset((_FRAME_HEADER, _TILE_GROUP, _FRAME))
_MAX_UNITS = 5000  # a frame has up to 4096 tiles
_MAX_HEADER_BYTES = 1024  # a sequence header describes up to 32 operating points
_KEY_FRAME = 0
_SELECT = 2  # the frame header decides
_SRGB_BT709 = 1  # color_primaries
_SRGB_TRANSFER = 13
_IDENTITY_MATRIX = 0


@dataclass(frozen=True, slots=True)
class Picture:
    """The size and kind of an AV1 picture, and the units that make its pixels."""

    width: int
    height: int
    colours: "Colours"
    configuration: bytes  # the four bytes that begin an av1C box
    units: bytes  # sequence header and one frame


_SUBSAMPLED_IN_X = 0x08  # of the third byte of an av1C box


@dataclass(frozen=True, slots=True)
class Colours:
    """The kind of samples."""

    bits: int  # a sample: 8, 10 or 12
    is_gray: bool
    is_full_range: bool  # otherwise black and white are 16 and 235, of 8 bits
    configuration: int  # the third byte of an av1C box, without the tier

    @property
    def is_subsampled(self) -> bool:
        """Whether colour is stored at half the width or less."""
        return bool(self.configuration & _SUBSAMPLED_IN_X)


@dataclass(frozen=True, slots=True)
class _Sequence:
    """What a frame header depends on, and what the picture is."""

    width: int
    height: int
    colours: Colours
    configuration: bytes
    has_reduced_header: bool
    time_bits: int  # of the presentation time in a frame header
    frame_id_bits: int
    screen_content_tools: int
    integer_motion: int


class _BitReader:
    """Reads numbers, most significant bit first. Raises IndexError at the end."""

    def __init__(self, data: bytes) -> None:
        self.number = int.from_bytes(data, "big")
        self.left = 8 * len(data)

    def read(self, count: int) -> int:
        if count > self.left:
            raise IndexError("the header is cut short")
        self.left -= count
        return self.number >> self.left & ((1 << count) - 1)

    def read_flag(self) -> bool:
        return self.read(1) == 1

    def skip_variable_length(self) -> None:
        """Skip uvlc(): as many bits as there were leading zeros."""
        zeros = 0
        while not self.read_flag():
            zeros += 1
        if zeros < 32:
            self.read(zeros)


def read_picture(data: bytes) -> Picture:
    """Read the open bitstream units of one picture.

    Raises UndecodableImage for several frames, layers or sizes. IndexError and struct.error mean
    damaged data.
    """
    sequence: _Sequence | None = None
    parts: list[bytes] = []
    frames = 0
    for unit_type, start, payload, end in _iterate_units(data):
        header = data[payload : min(end, payload + _MAX_HEADER_BYTES)]
        if unit_type == _SEQUENCE_HEADER:
            if sequence is not None:
                raise UndecodableImage(NOT_ONE_FRAME)
            sequence = _read_sequence_header(_BitReader(header))
        elif unit_type in (_FRAME, _FRAME_HEADER):
            frames += 1
            if sequence is None or frames > 1:
                raise UndecodableImage(NOT_ONE_FRAME)
            _check_frame_header(_BitReader(header), sequence)
        elif unit_type not in _PIXEL_UNITS:
            continue  # delimiters, metadata, padding
        parts.append(data[start:end])

    if sequence is None or not frames:
        raise UndecodableImage("the avif holds no picture")
    return Picture(
        sequence.width,
        sequence.height,
        sequence.colours,
        sequence.configuration,
        b"".join(parts),
    )


def _iterate_units(data: bytes) -> Iterator[tuple[int, int, int, int]]:
    """Yield the type of each unit, its start, the start of its payload, and its end."""
    position = 0
    for _ in range(_MAX_UNITS):
        if position >= len(data):
            return
        start = position
        unit_header = data[position]
        position += 1
        if unit_header & 0x04:  # obu_extension_flag
            if data[position] & 0x18:  # spatial_id
                raise UndecodableImage(NOT_ONE_FRAME)
            position += 1
        end = len(data)
        if unit_header & 0x02:  # obu_has_size_field
            size, position = _read_leb128(data, position)
            end = position + size
        if end > len(data):
            raise struct.error("the unit is cut short")
        yield unit_header >> 3 & 15, start, position, end
        position = end
    raise UndecodableImage(f"the avif has more than {_MAX_UNITS} units in one picture")


def _read_leb128(data: bytes, position: int) -> tuple[int, int]:
    """Return a number of seven bits a byte, the least significant first, and where it ends."""
    value = 0
    for i in range(8):
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << 7 * i
        if not byte & 0x80:
            return value, position
    raise struct.error("the number has no end")


def _read_sequence_header(bits: _BitReader) -> _Sequence:
    """Read sequence_header_obu() up to the colours."""
    profile = bits.read(3)
    bits.read_flag()  # still_picture
    has_reduced_header = bits.read_flag()
    if has_reduced_header:
        level = bits.read(5)
        tier = 0
        time_bits = 0
    else:
        level, tier, time_bits = _read_operating_points(bits)

    width_bits = bits.read(4) + 1
    height_bits = bits.read(4) + 1
    width = bits.read(width_bits) + 1
    height = bits.read(height_bits) + 1

    frame_id_bits = 0
    if not has_reduced_header and bits.read_flag():
        frame_id_bits = bits.read(4) + bits.read(3) + 3
    bits.read(3)  # use_128x128_superblock, enable_filter_intra, enable_intra_edge_filter
    screen_content_tools = _SELECT
    integer_motion = _SELECT
    if not has_reduced_header:
        screen_content_tools, integer_motion = _read_tools(bits)
    bits.read(3)  # enable_superres, enable_cdef, enable_restoration

    colours = _read_colours(bits, profile)
    configuration = bytes((0x81, profile << 5 | level, tier << 7 | colours.configuration, 0))
    return _Sequence(
        width,
        height,
        colours,
        configuration,
        has_reduced_header,
        time_bits,
        frame_id_bits,
        screen_content_tools,
        integer_motion,
    )


def _read_operating_points(bits: _BitReader) -> tuple[int, int, int]:
    """Return level and tier of the first operating point, and the bits of a presentation time.

    The latter are 0 where frame headers have none.
    """
    delay_bits = 0
    time_bits = 0
    has_decoder_model = False
    if bits.read_flag():  # timing_info_present_flag
        bits.read(64)  # num_units_in_display_tick, time_scale
        has_equal_intervals = bits.read_flag()
        if has_equal_intervals:
            bits.skip_variable_length()
        has_decoder_model = bits.read_flag()
        if has_decoder_model:
            delay_bits = bits.read(5) + 1
            bits.read(32 + 5)  # num_units_in_decoding_tick, buffer_removal_time_length_minus_1
            time_bits = 0 if has_equal_intervals else bits.read(5) + 1
            if has_equal_intervals:
                bits.read(5)

    has_display_delay = bits.read_flag()
    first_level = 0
    first_tier = 0
    for number in range(bits.read(5) + 1):
        bits.read(12)  # operating_point_idc
        level = bits.read(5)
        tier = bits.read(1) if level > 7 else 0
        if has_decoder_model and bits.read_flag():
            bits.read(2 * delay_bits + 1)
        if has_display_delay and bits.read_flag():
            bits.read(4)
        if number == 0:
            first_level = level
            first_tier = tier
    return first_level, first_tier, time_bits


def _read_tools(bits: _BitReader) -> tuple[int, int]:
    """Return seq_force_screen_content_tools and seq_force_integer_mv."""
    bits.read(4)  # interintra, masked compound, warped motion, dual filter
    has_order_hint = bits.read_flag()
    if has_order_hint:
        bits.read(2)  # enable_jnt_comp, enable_ref_frame_mvs
    screen_content_tools = _SELECT if bits.read_flag() else bits.read(1)
    integer_motion = _SELECT
    if screen_content_tools and not bits.read_flag():
        integer_motion = bits.read(1)
    if has_order_hint:
        bits.read(3)
    return screen_content_tools, integer_motion


def _read_colours(bits: _BitReader, profile: int) -> Colours:
    """Read color_config()."""
    has_high_depth = bits.read_flag()
    is_twelve_bit = profile == 2 and has_high_depth and bits.read_flag()
    is_gray = profile != 1 and bits.read_flag()
    description = (2, 2, 2)  # unspecified
    if bits.read_flag():  # color_description_present_flag
        description = (bits.read(8), bits.read(8), bits.read(8))

    is_srgb = description == (_SRGB_BT709, _SRGB_TRANSFER, _IDENTITY_MATRIX)
    is_full_range = (is_srgb and not is_gray) or bits.read_flag()
    halves_x, halves_y, chroma_position = 1, 1, 0
    if is_srgb and not is_gray:
        halves_x, halves_y = 0, 0
    elif not is_gray:
        halves_x, halves_y = _read_subsampling(bits, profile, is_twelve_bit)
        if halves_x and halves_y:
            chroma_position = bits.read(2)

    depth = 8
    if has_high_depth:
        depth = 12 if is_twelve_bit else 10
    configuration = has_high_depth << 6 | is_twelve_bit << 5 | is_gray << 4
    configuration |= halves_x << 3 | halves_y << 2 | chroma_position
    return Colours(depth, is_gray, is_full_range, configuration)


def _read_subsampling(bits: _BitReader, profile: int, is_twelve_bit: bool) -> tuple[int, int]:
    """Return whether the chroma planes have half the width, and half the height."""
    if profile == 0:
        return 1, 1
    if profile == 1:
        return 0, 0
    if not is_twelve_bit:
        return 1, 0
    halves_x = bits.read(1)
    return halves_x, bits.read(1) if halves_x else 0


def _check_frame_header(bits: _BitReader, sequence: _Sequence) -> None:
    """Raise UndecodableImage unless the frame is a key frame of the size of the sequence."""
    if sequence.has_reduced_header:
        return
    is_repeated = bits.read_flag()  # show_existing_frame
    frame_type = bits.read(2)
    is_shown = bits.read_flag()
    if is_repeated or frame_type != _KEY_FRAME or not is_shown:
        raise UndecodableImage(NOT_ONE_FRAME)

    bits.read(sequence.time_bits)
    bits.read_flag()  # disable_cdf_update
    has_screen_content = sequence.screen_content_tools
    if has_screen_content == _SELECT:
        has_screen_content = bits.read(1)
    if has_screen_content and sequence.integer_motion == _SELECT:
        bits.read_flag()  # force_integer_mv
    bits.read(sequence.frame_id_bits)
    if bits.read_flag():  # frame_size_override_flag
        raise UndecodableImage("the avif states a frame of another size than its picture")
