"""What crosses the unix socket between an HTTP process and a worker: one frame a job, one frame an answer.

A frame is a fixed head and a body. Many frames travel in one write, so a reader takes whatever whole frames there are.
Clocks are CLOCK_MONOTONIC, which all processes of a machine share.
"""

import struct
from typing import NamedTuple

JOB = struct.Struct("<IIdHH")  # id, bytes of body, deadline [s], top_k, flags
ANSWER = struct.Struct(
    "<IIHHIIII"
)  # id, bytes of body, status, reserved, version, queue, decode, infer [us]

CANCEL = 1  # the client went away: drop the job of this id
CAM = 2  # the heat map is wanted
TENSOR = 4  # the body is not a file: uint8 [height, width, channels] as the network takes it
ARRAYS = 8  # the answer is not JSON: the label, then probabilities [K] and energy, float32
LABEL = struct.Struct(
    "<I"
)  # bytes of the label that follows, as the Open Inference Protocol has it
HELLO = 0  # id of the answer that a worker sends on its own: the model that it serves, as JSON


class Job(NamedTuple):
    id: int
    deadline: float
    top_k: int
    flags: int
    body: bytes


class Answer(NamedTuple):
    """`status` is an HTTP status; 200 comes with a prediction as JSON, others with a line that says what is wrong."""

    id: int
    status: int
    version: int
    queue_us: int
    decode_us: int
    infer_us: int
    body: bytes


def pack_job(job: Job) -> bytes:
    return JOB.pack(job.id, len(job.body), job.deadline, job.top_k, job.flags) + job.body


def pack_answer(answer: Answer) -> bytes:
    times = (min(t, 0xFFFFFFFF) for t in answer[3:6])
    return (
        ANSWER.pack(answer.id, len(answer.body), answer.status, 0, answer.version, *times)
        + answer.body
    )


def take_jobs(buffer: bytearray) -> list[Job]:
    """Cut all whole frames off the front of `buffer`."""
    jobs, at, end = [], 0, len(buffer)
    while end - at >= JOB.size:
        number, length, deadline, top_k, flags = JOB.unpack_from(buffer, at)
        start = at + JOB.size
        if end - start < length:
            break
        at = start + length
        jobs.append(Job(number, deadline, top_k, flags, bytes(buffer[start:at])))
    del buffer[:at]
    return jobs


def take_answers(buffer: bytearray) -> list[Answer]:
    """Cut all whole frames off the front of `buffer`."""
    answers, at, end = [], 0, len(buffer)
    while end - at >= ANSWER.size:
        number, length, status, _, version, queue, decode, infer = ANSWER.unpack_from(buffer, at)
        start = at + ANSWER.size
        if end - start < length:
            break
        at = start + length
        answers.append(
            Answer(number, status, version, queue, decode, infer, bytes(buffer[start:at]))
        )
    del buffer[:at]
    return answers
