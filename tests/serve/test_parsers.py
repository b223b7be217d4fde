"""Parsers of untrusted bytes: multipart, JSON with base64 and frames, tested with hypothesis."""

import base64
import binascii
import json
import tracemalloc
from email import policy
from email.message import EmailMessage

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.http import request_body
from serve.http.responses import Problem
from serve.wire import Answer, Job, pack_answer, pack_job, take_answers, take_jobs
from support import tiny_bundle

JSON = b"application/json"
MULTIPART = b"multipart/form-data; boundary=b"
IMAGE = tiny_bundle.make_image("red")
DATA_URL = "data:image/png;base64," + base64.b64encode(IMAGE).decode()
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789'()+_-./:=?"
boundaries = st.text(LETTERS, min_size=1, max_size=70)
# A part that begins with data: is read as a URL with base64.
contents = st.binary(min_size=1, max_size=300).filter(lambda file: not file.startswith(b"data:"))
files = st.lists(contents, min_size=1, max_size=5)
U32 = st.integers(0, 2**32 - 1)
U16 = st.integers(0, 2**16 - 1)
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


def build_form(contents: list[bytes], boundary: str, extra: bytes = b"") -> bytes:
    """Build a multipart body with these files; `extra` is added to the head of each."""
    parts = [
        b'--%b\r\nContent-Disposition: form-data; name="f"; filename="%d"\r\n%b\r\n%b\r\n'
        % (boundary.encode(), i, extra, content)
        for i, content in enumerate(contents)
    ]
    return b"".join(parts) + b"--%b--\r\n" % boundary.encode()


def parse_images(content: bytes, content_type: bytes) -> list[bytes | int] | int:
    """Return each image or the status of its Problem, or the status if the body is refused.

    Any other exception is an error of the parser.
    """
    try:
        parsed = request_body.parse_images(content, content_type, 10)
    except Problem as problem:
        return problem.status
    return [image.status if isinstance(image, Problem) else image for image in parsed]


@given(files, boundaries, st.booleans())
def test_multipart_round_trip(contents, boundary, quoted):
    contents = [content for content in contents if boundary.encode() not in content]
    contents = contents or [b"x" * 71]
    parameter = f'"{boundary}"' if quoted else boundary
    content_type = f"multipart/form-data; boundary={parameter}"
    body = build_form(contents, boundary, b"Content-Type: image/png\r\n")
    assert parse_images(body, content_type.encode()) == contents


@given(files, st.integers(0, 2000))
def test_truncated_multipart_is_refused_or_complete(contents, cut):
    contents = [content.replace(b"--b", b"xxx") for content in contents]
    body = build_form(contents, "b")
    assert parse_images(body[:cut], MULTIPART) in (400, contents)


@given(st.binary(max_size=500), st.sampled_from([b"--b\r\n", b"--b\r\n\r\n\r\n", b"--b--", b""]))
def test_any_multipart_is_parsed_or_refused(content, start):
    parsed = parse_images(start + content, MULTIPART)
    assert parsed in (400, 413) or all(image in content for image in parsed)


def test_a_boundary_inside_a_file_does_not_end_it():
    content = b"one\r\n-two\r\n--c\r\n b"
    assert parse_images(build_form([content], "b"), MULTIPART) == [content]


def test_fields_that_are_not_files_are_skipped():
    for head in (
        b'Content-Disposition: form-data; name="x"',
        b'Content-Disposition: form-data; name="filename"',
        b'X-Note: ; filename=x\r\nContent-Disposition: form-data; name="x"',
    ):
        field = b"--b\r\n%b\r\n\r\nhello\r\n" % head
        assert parse_images(field + build_form([b"image"], "b"), MULTIPART) == [b"image"]


def test_too_many_fields_are_refused():
    field = b'--b\r\nContent-Disposition: form-data; name="x"\r\n\r\nhello\r\n'
    form = build_form([b"image"], "b")
    assert parse_images(20 * field + form, MULTIPART) == [b"image"]
    assert parse_images(100 * field + form, MULTIPART) == 413


@pytest.mark.parametrize(
    "name", [b'filename="a.png"', b"FILENAME=a", b"filename*=UTF-8''a", b' filename="a"']
)
def test_spellings_of_the_file_name(name):
    part = b"--b\r\ncontent-disposition: form-data; name=x;%b\r\n\r\nhello\r\n--b--" % name
    assert parse_images(part, MULTIPART) == [b"hello"]


def build_part(head: bytes, content: bytes, newline: bytes = b"\r\n") -> bytes:
    """Build one part of a multipart body with the boundary `b`."""
    return b"--b" + newline + head + 2 * newline + content + newline


FILE_HEAD = b'Content-Disposition: form-data; name="f"; filename="a.png"'
CLOSED = b"--b--\r\n"


@pytest.mark.parametrize(
    "body",
    [
        build_part(b"Content-Type: image/png", IMAGE) + CLOSED,
        build_part(b'Content-Disposition: form-data; name="f"', IMAGE) + CLOSED,
        b"--b\r\n\r\n" + IMAGE + b"\r\n--b--",
        b"For old mailers.\r\n\r\n" + build_part(FILE_HEAD, IMAGE) + CLOSED + b"an epilogue",
        build_part(FILE_HEAD, IMAGE).replace(b"--b\r\n", b"--b \t\r\n") + CLOSED,
        build_part(FILE_HEAD.replace(b";", b";\r\n\t"), IMAGE) + CLOSED,
        build_part(FILE_HEAD.replace(b":", b" :").replace(b"=", b" = "), IMAGE) + CLOSED,
        b"preamble\n" + build_part(FILE_HEAD, IMAGE, b"\n") + b"--b--\n",
        build_part(FILE_HEAD + b"\r\ncontent-transfer-encoding: BASE64", base64.encodebytes(IMAGE))
        + CLOSED,
        build_part(FILE_HEAD + b"\r\nContent-Transfer-Encoding: binary", IMAGE) + CLOSED,
        build_part(
            FILE_HEAD + b"\r\nContent-Transfer-Encoding: quoted-printable",
            binascii.b2a_qp(IMAGE, istext=False),
        )
        + CLOSED,
        build_part(b"Content-Disposition: form-data; name=f", DATA_URL.encode()) + CLOSED,
        build_part(FILE_HEAD.replace(b"a.png", b""), b"") + build_part(FILE_HEAD, IMAGE) + CLOSED,
    ],
    ids=[
        "no file name",
        "no file name, no media type",
        "no headers",
        "preamble and epilogue",
        "blanks after the boundary",
        "folded header",
        "blanks in the header",
        "lines that end with LF",
        "base64",
        "binary",
        "quoted-printable",
        "data: URL in a field",
        "a form without a chosen file",
    ],
)
def test_multipart_as_it_is_written_elsewhere(body):
    """By browsers, mailers and libraries. A field of text precedes the image."""
    text = build_part(b'Content-Disposition: form-data; name="note"', b"BM is no bitmap")
    assert parse_images(text + body if body.startswith(b"--b\r\n") else body, MULTIPART) == [IMAGE]
    for content_type in (
        b'Multipart/Mixed; x=1; Boundary = "b"',
        b"multipart/related;boundary=b;x=1",
    ):
        assert parse_images(body, content_type) == [IMAGE]


@pytest.mark.parametrize("mail_policy", [policy.default, policy.SMTP], ids=["LF", "CRLF"])
def test_a_mail_with_attachments(mail_policy):
    mail = EmailMessage(mail_policy)
    mail.set_content("Two photos.")
    for subtype, name in (("png", "one.png"), ("jpeg", "é.jpg")):
        mail.add_attachment(IMAGE, maintype="image", subtype=subtype, filename=name)
    _, _, body = mail.as_bytes().partition(mail_policy.linesep.encode() * 2)
    content_type = str(mail["Content-Type"]).encode()
    assert parse_images(body, content_type) == [IMAGE, IMAGE]


@pytest.mark.parametrize(
    ("body", "content_type", "message"),
    [
        (b"--b--", b"multipart/form-data", "no boundary"),
        (b"--c--", MULTIPART, "does not occur"),
        (
            build_part(FILE_HEAD + b"\r\nContent-Transfer-Encoding: x", b"x") + CLOSED,
            MULTIPART,
            "image 1",
        ),
        (
            build_part(FILE_HEAD + b"\r\nContent-Transfer-Encoding: base64", b"?") + CLOSED,
            MULTIPART,
            "image 1 is not valid base64",
        ),
        (b'{"images": ["?", 5]}', JSON, "images\\[0\\] is not valid base64"),
        (b'{"images": [5, "?"]}', JSON, "images\\[0\\] is not a string"),
        (b'{"image": "data:image/png,abc"}', JSON, "image is not valid base64"),
        (b'{"image": ["aGk="]}', JSON, "image is not a string"),
        (b'{"images": "aGk="}', JSON, "images is not a list"),
    ],
)
def test_messages_name_the_cause(body, content_type, message):
    with pytest.raises(Problem, match=message) as caught:
        request_body.parse_images(body, content_type, 10)
    assert caught.value.status == 400


@given(files)
def test_json_round_trip(contents):
    texts = [base64.b64encode(content).decode() for content in contents]
    assert parse_images(json.dumps({"images": texts}).encode(), JSON) == contents


@pytest.mark.parametrize("size", [254, 255, 256])
@pytest.mark.parametrize(
    "spell",
    [
        lambda content: base64.encodebytes(content).decode(),
        lambda content: base64.encodebytes(content).decode().replace("\n", "\r\n\t "),
        lambda content: base64.b64encode(content).decode().rstrip("="),
        lambda content: base64.urlsafe_b64encode(content).decode(),
        lambda content: base64.urlsafe_b64encode(content).decode().rstrip("="),
        lambda content: "DATA:image/png;charset=x;Base64," + base64.b64encode(content).decode(),
        lambda content: "data:;base64," + base64.urlsafe_b64encode(content).decode().rstrip("="),
    ],
    ids=["MIME", "blanks", "unpadded", "urlsafe", "urlsafe unpadded", "data: URL", "both"],
)
def test_base64_as_it_is_written_elsewhere(spell, size):
    content = bytes(range(256))[-size:]
    assert parse_images(json.dumps({"image": spell(content)}).encode(), JSON) == [content]


@pytest.mark.parametrize(
    "text", ["?", "a", "aaaaa", "aGk=aGk=", "é", "data:image/png,aGk=", "data:"]
)
def test_what_is_not_base64_is_refused(text):
    assert parse_images(json.dumps({"images": [text]}).encode(), JSON) == 400


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
def test_any_json_is_parsed_or_refused(content):
    parsed = parse_images(content, b"application/json; charset=utf-8")
    if parsed not in (400, 413):
        assert all(isinstance(image, bytes) or image == 400 for image in parsed)


def test_deeply_nested_json_is_refused():
    assert parse_images(b"[" * 100_000, JSON) == 400


@pytest.mark.parametrize(
    ("values", "status"), [(b"{}", 400), (b"[]", 400), (b"0", 413), (b'"aGk="', 413)]
)
def test_json_does_not_take_more_memory_than_its_images(values, status):
    content = b'{"images":[%b]}' % b",".join([values] * 1_000_000)
    tracemalloc.start()
    try:
        assert parse_images(content, JSON) == status
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("pack", "take", "kind"), [(pack_job, take_jobs, jobs), (pack_answer, take_answers, answers)]
)
def test_frames_are_complete_however_reads_cut_them(pack, take, kind):
    @given(st.lists(kind, max_size=6), st.lists(st.integers(1, 64), min_size=1, max_size=50))
    def check(sent, sizes):
        data = b"".join(map(pack, sent))
        buffer = bytearray()
        received = []
        position = 0
        while position < len(data):
            size = sizes[position % len(sizes)]
            buffer += data[position : position + size]
            received += take(buffer)
            position += size
        assert received == sent
        assert not buffer

    check()
