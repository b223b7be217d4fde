"""The frames on the Unix socket between an HTTP process and a worker process.

An HTTP process sends jobs, one image each. A worker sends one answer for each job. When a
connection opens and after each model swap, it also describes its model, in an answer with the id
`MODEL_INFO`.

Each frame is a head of fixed size followed by a body. One read may bring many frames or a part of
one; `take_jobs` and `take_answers` take the complete frames.

All numbers are little-endian. Times are those of CLOCK_MONOTONIC, which all processes of a machine
share.
Used by `serve.http.dispatcher` and `serve.worker.batcher`.
"""

import struct
from typing import NamedTuple

import numpy as np

# id, bytes of body, deadline [s], top_k, flags, bytes of name
JOB_HEAD = struct.Struct("<IIdHHH")

# id, bytes of body, status, padding, version, class index, confidence, queue [us], decode [us],
# inference [us]
ANSWER_HEAD = struct.Struct("<IIHxxIIfIII")

# Begins the body of an answer with ARRAYS: bytes of the label, classes K, size of the embedding D,
# height and width of the activation map. D, or the height and width, are 0 if it is not asked for.
ARRAYS_HEAD = struct.Struct("<IIIII")

MAX_U32 = 0xFFFFFFFF

# The id of the answer with which a worker announces its model; no job has it.
MODEL_INFO = 0

# How many classes an answer lists if the request does not say.
DEFAULT_TOP_K = 5

# Flags of a job.
CANCEL = 1  # drop the job of this id: its client left or its deadline passed
CAM = 2  # add the class-activation map to the answer
TENSOR = 4  # the body is uint8 [height, width, channels] as the network takes it, not an image file
ARRAYS = 8  # the answer is not JSON but `pack_arrays` of the outputs
EMBEDDING = 16  # add the embedding to the answer
BASE64 = 32  # with EMBEDDING: as float16 in base64, not as numbers
ALONE = 64  # run the graph on this image alone: it was in a run that failed
LABEL = 128  # no image: the body is the true label of the earlier image `name`; it gets no answer
FORGET = 256  # no image: drop what is stored of the images of the request `name`
OUTPUT_FLAGS = CAM | EMBEDDING  # need further outputs of the graph


class Job(NamedTuple):
    """One image for a worker, or the cancellation of one."""

    id: int  # unique among the unanswered jobs of the connection
    deadline: float  # seconds of time.monotonic(); the job is dropped after it
    top_k: int
    flags: int
    body: bytes
    name: bytes = b""  # of `build_image_name`; empty if the service keeps no images


class Answer(NamedTuple):
    """The answer to one job, or the model that a worker serves (id MODEL_INFO).

    With status 200 `body` holds a prediction, or the description of the model, as JSON. With any
    other status it holds one line of text, the reason.
    """

    id: int
    status: int  # an HTTP status
    version: int  # of the model that answered; 0 if no model did
    body: bytes
    class_index: int = 0  # of the predicted class
    confidence: float = 0.0  # probability of the predicted class
    queue_us: int = 0  # microseconds between arrival in the worker and the start of the batch
    decode_us: int = 0
    infer_us: int = 0


class Arrays(NamedTuple):
    """The outputs of the graph for one image, as float32."""

    label: bytes  # of the predicted class
    probabilities: np.ndarray  # [K]
    energy: float
    embedding: np.ndarray  # [D]; empty if not asked for
    activation_map: np.ndarray  # [h, w] of the predicted class; empty if not asked for


NO_EMBEDDING = np.zeros(0, np.float32)
NO_ACTIVATION_MAP = np.zeros((0, 0), np.float32)


def pack_arrays(arrays: Arrays) -> bytes:
    """Return the body of an answer with ARRAYS: a head, the label, and the numbers."""
    height, width = arrays.activation_map.shape
    head = ARRAYS_HEAD.pack(
        len(arrays.label), len(arrays.probabilities), len(arrays.embedding), height, width
    )
    numbers = (
        arrays.probabilities,
        np.array([arrays.energy]),
        arrays.embedding,
        arrays.activation_map.ravel(),
    )
    return head + arrays.label + np.concatenate(numbers).astype("<f4").tobytes()


def unpack_arrays(body: bytes) -> Arrays:
    """Return the outputs that `pack_arrays` packed."""
    label_bytes, classes, features, height, width = ARRAYS_HEAD.unpack_from(body)
    label_end = ARRAYS_HEAD.size + label_bytes
    numbers = np.frombuffer(body, "<f4", offset=label_end)
    embedding_end = classes + 1 + features
    return Arrays(
        label=body[ARRAYS_HEAD.size : label_end],
        probabilities=numbers[:classes],
        energy=numbers.item(classes),
        embedding=numbers[classes + 1 : embedding_end],
        activation_map=numbers[embedding_end:].reshape(height, width),
    )


def build_image_name(request_id: bytes, index: int) -> bytes:
    """Return the name of one image of a request. A request id has no spaces."""
    return b"%b %d" % (request_id, index) if index else request_id


def parse_image_name(name: bytes) -> tuple[str, int]:
    """Return the request id and the position of the image of a name."""
    request_id, _, index = name.partition(b" ")
    return request_id.decode(), int(index or b"0")


def pack_job(job: Job) -> bytes:
    """Return the frame of a job."""
    head = JOB_HEAD.pack(job.id, len(job.body), job.deadline, job.top_k, job.flags, len(job.name))
    return head + job.name + job.body


def pack_answer(answer: Answer) -> bytes:
    """Return the frame of an answer. A time that does not fit is sent as the largest that does."""
    head = ANSWER_HEAD.pack(
        answer.id,
        len(answer.body),
        answer.status,
        answer.version,
        answer.class_index,
        answer.confidence,
        min(answer.queue_us, MAX_U32),
        min(answer.decode_us, MAX_U32),
        min(answer.infer_us, MAX_U32),
    )
    return head + answer.body


def take_jobs(buffer: bytearray) -> list[Job]:
    """Remove the complete frames from the start of `buffer` and return their jobs."""
    jobs: list[Job] = []
    position = 0
    end = len(buffer)

    while end - position >= JOB_HEAD.size:
        head = JOB_HEAD.unpack_from(buffer, position)
        job_id, length, deadline, top_k, flags, name_length = head
        name_start = position + JOB_HEAD.size
        body_start = name_start + name_length
        if end - body_start < length:
            break
        position = body_start + length
        body = bytes(buffer[body_start:position])
        name = bytes(buffer[name_start:body_start])
        jobs.append(Job(job_id, deadline, top_k, flags, body, name))

    del buffer[:position]
    return jobs


def take_answers(buffer: bytearray) -> list[Answer]:
    """Remove the complete frames from the start of `buffer` and return their answers."""
    answers: list[Answer] = []
    position = 0
    end = len(buffer)

    while end - position >= ANSWER_HEAD.size:
        answer_id, length, status, version, *numbers = ANSWER_HEAD.unpack_from(buffer, position)
        body_start = position + ANSWER_HEAD.size
        if end - body_start < length:
            break
        position = body_start + length
        body = bytes(buffer[body_start:position])
        answers.append(Answer(answer_id, status, version, body, *numbers))

    del buffer[:position]
    return answers
