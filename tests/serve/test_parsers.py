"""Parsers of untrusted bytes: multipart, JSON with base64 and frames, tested with hypothesis."""

import base64
import json
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.http import request_body
from serve.http.responses import Problem
from serve.wire import Answer, Job, pack_answer, pack_job, take_answers, take_jobs

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789'()+_-./:=?"
boundaries = st.text(LETTERS, min_size=1, max_size=70)
files = st.lists(st.binary(min_size=1, max_size=300), min_size=1, max_size=5)
U32, U16 = st.integers(0, 2**32 - 1), st.integers(0, 2**16 - 1)
jobs = st.builds(Job, U32, st.floats(0, 1e9), U16, U16, st.binary(max_size=200))
answers = st.builds(
    Answer,
    id=U32,
    status=U16,
    version=U32,
    body=st.binary(max_size=200),
    class_index=U32,
    confidence=st.floats(0, 1, width=32),
    queue_us=U32,
    decode_us=U32,
    infer_us=U32,
)


def form(contents: list[bytes], boundary: str, extra: bytes = b"") -> bytes:
    parts = [
        b'--%b\r\nContent-Disposition: form-data; name="f"; filename="%d"\r\n%b\r\n%b\r\n'
        % (boundary.encode(), i, extra, content)
        for i, content in enumerate(contents)
    ]
    return b"".join(parts) + b"--%b--\r\n" % boundary.encode()


def images(content: bytes, kind: bytes) -> list[bytes | int] | int:
    """The images, or the status of the problem; anything else is an error of the parser."""
    try:
        return [
            image.status if isinstance(image, Problem) else image
            for image in request_body.parse_images(content, kind, 10)
        ]
    except Problem as problem:
        return problem.status


@given(files, boundaries, st.booleans())
def test_multipart_round_trip(contents, boundary, quoted):
    contents = [c for c in contents if boundary.encode() not in c] or [b"x" * 71]
    kind = (
        f'multipart/form-data; boundary="{boundary}"'
        if quoted
        else f"multipart/form-data; boundary={boundary}"
    )
    assert (
        images(form(contents, boundary, b"Content-Type: image/png\r\n"), kind.encode()) == contents
    )


@given(files, st.integers(0, 2000))
def test_truncated_multipart_is_refused(contents, cut):
    contents = [c.replace(b"--b", b"xxx") for c in contents]
    whole = form(contents, "b")
    found = images(whole[:cut], b"multipart/form-data; boundary=b")
    assert found == 400 or found == contents


@given(st.binary(max_size=500), st.sampled_from([b"--b\r\n", b"--b\r\n\r\n\r\n", b"--b--", b""]))
def test_arbitrary_multipart(content, start):
    found = images(start + content, b"multipart/form-data; boundary=b")
    assert found in (400, 413) or all(piece in content for piece in found)


def test_a_boundary_inside_a_file_does_not_end_it():
    content = b"one\r\n-two\r\n--c\r\n b"
    assert images(form([content], "b"), b"multipart/form-data; boundary=b") == [content]


def test_fields_that_are_not_files_are_skipped():
    for head in (
        b'Content-Disposition: form-data; name="x"',
        b'Content-Disposition: form-data; name="filename"',
        b'X-Note: ; filename=x\r\nContent-Disposition: form-data; name="x"',
    ):
        field = b"--b\r\n%b\r\n\r\nhello\r\n" % head
        assert images(field + form([b"image"], "b"), b"multipart/form-data; boundary=b") == [
            b"image"
        ]


def test_too_many_fields_are_refused():
    field = b'--b\r\nContent-Disposition: form-data; name="x"\r\n\r\nhello\r\n'
    assert images(20 * field + form([b"image"], "b"), b"multipart/form-data; boundary=b") == [
        b"image"
    ]
    assert images(100 * field + form([b"image"], "b"), b"multipart/form-data; boundary=b") == 413


@pytest.mark.parametrize(
    "name", [b'filename="a.png"', b"FILENAME=a", b"filename*=UTF-8''a", b' filename="a"']
)
def test_spellings_of_the_file_name(name):
    part = b"--b\r\ncontent-disposition: form-data; name=x;%b\r\n\r\nhello\r\n--b--" % name
    assert images(part, b"multipart/form-data; boundary=b") == [b"hello"]


@given(files)
def test_json_round_trip(contents):
    texts = [base64.b64encode(c).decode() for c in contents]
    assert images(json.dumps({"images": texts}).encode(), b"application/json") == contents


def test_base64_may_have_the_line_breaks_of_mime():
    content = bytes(range(256))
    for text in (base64.encodebytes(content), base64.encodebytes(content).replace(b"\n", b"\r\n")):
        assert images(json.dumps({"image": text.decode()}).encode(), b"application/json") == [
            content
        ]


@given(
    st.binary(max_size=200)
    | st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=20),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.sampled_from(["image", "images", "x"]), inner)
        ),
        max_leaves=8,
    ).map(lambda value: json.dumps(value).encode())
)
def test_arbitrary_json(content):
    found = images(content, b"application/json; charset=utf-8")
    assert found in (400, 413) or all(isinstance(piece, bytes) or piece == 400 for piece in found)


def test_deeply_nested_json_is_refused():
    assert images(b"[" * 100_000, b"application/json") == 400


@pytest.mark.parametrize(
    ("values", "status"), [(b"{}", 400), (b"[]", 400), (b"0", 413), (b'"aGk="', 413)]
)
def test_json_does_not_take_more_memory_than_its_images(values, status):
    content = b'{"images":[%b]}' % b",".join([values] * 1_000_000)
    tracemalloc.start()
    try:
        assert images(content, b"application/json") == status
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("pack", "take", "kind"), [(pack_job, take_jobs, jobs), (pack_answer, take_answers, answers)]
)
def test_frames_are_complete_however_reads_cut_them(pack, take, kind):
    @given(st.lists(kind, max_size=6), st.lists(st.integers(1, 64), min_size=1, max_size=50))
    def check(sent, sizes):
        data, buffer, found, at = b"".join(map(pack, sent)), bytearray(), [], 0
        while at < len(data):
            size = sizes[at % len(sizes)]
            buffer += data[at : at + size]
            found += take(buffer)
            at += size
        assert found == sent
        assert not buffer

    check()
