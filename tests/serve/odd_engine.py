"""An engine's process without an engine: it speaks the messages, and misbehaves as the first token of a prompt says.

1 answers at once, 2 never answers, 3 ends with status 3, 4 fails, 5 sends garbage, 6 answers slowly, 7 reads no more,
8 kills itself. Models named `broken` do not open, models named `slow` never do.
"""

import os
import signal
import socket
import sys
import threading
import time

from refold.serve.messages import (
    Cancel,
    ChoiceEnd,
    Ended,
    EngineFacts,
    EngineState,
    Fault,
    GenerationJob,
    Open,
    TextPart,
    TokenPart,
    WireMessage,
    read_to_engine,
    write_line,
)

FACTS = EngineFacts(
    line="engine: odd",
    num_depths=2,
    max_context=1000,
    max_tokens=1000,
    max_rows=8,
    vocab_size=100,
    num_pages=4,
    page_size=4,
    weight_bytes=8,
    memory_bytes=8,
    parameters=2,
)
STATE = EngineState(
    waiting=0, running=0, used_pages=0, free_pages=4, new_tokens=0, launches=0, depths={}, acceptance=0, preemptions=0
)


def answer(connection: socket.socket, job: GenerationJob, seconds: float, cancelled: set[int]) -> None:
    for number in range(job.sampling.max_new_tokens or 3):
        if job.id in cancelled:
            break
        send(connection, TextPart(id=job.id, choice=0, text=f"{number} ", token=TokenPart(token=number, depth=2)))
        time.sleep(seconds)
    send(connection, TextPart(id=job.id, choice=0, text="", reason="length"))
    end = ChoiceEnd(reason="length", num_tokens=job.sampling.max_new_tokens or 3)
    send(connection, Ended(id=job.id, choices=(end,), cached_tokens=0, seconds={}))


def send(connection: socket.socket, message: WireMessage) -> None:
    connection.sendall(write_line(message))


def obey(connection: socket.socket, job: GenerationJob, cancelled: set[int]) -> None:
    match job.prompt_ids[0]:
        case 1:
            answer(connection, job, 0, cancelled)
        case 3:
            os._exit(3)
        case 4:
            send(connection, Fault(error="RuntimeError", message="engine: /secret/place.py:3 is broken"))
            os._exit(1)
        case 5:
            connection.sendall(b"what is this?\n")
        case 6:
            threading.Thread(target=answer, args=(connection, job, 0.02, cancelled), daemon=True).start()
        case 7:
            time.sleep(1000)
        case 8:
            os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    connection, cancelled = socket.socket(fileno=int(sys.argv[1])), set[int]()
    for line in connection.makefile("rb"):
        message = read_to_engine(line)
        if isinstance(message, Open):
            if message.model.endswith("broken"):
                send(connection, Fault(error="SourceError", message="model: a whole one is required"))
                os._exit(1)
            if message.model.endswith("slow"):
                continue
            send(connection, FACTS)
            send(connection, STATE)
        elif isinstance(message, GenerationJob):
            obey(connection, message, cancelled)
        elif isinstance(message, Cancel):
            cancelled.add(message.id)
        else:
            break
    os._exit(0)


if __name__ == "__main__":
    main()
