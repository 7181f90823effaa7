"""Where pieces are encoded: in this process, or in several."""

from __future__ import annotations

import contextlib
import queue
import socket
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from ..errors import UserError
from .documents import InputError, Piece
from .encode import Encoded, Encoder
from .worker import Channel


class Inline:
    """The pool of one: encodes in this process."""

    workers = 1

    def start(self, encoder: Encoder) -> None:
        self._encoder = encoder

    def submit(self, piece: Piece) -> Future[Encoded]:
        future: Future[Encoded] = Future()
        try:
            future.set_result(self._encoder.encode(piece))
        except InputError as error:
            future.set_exception(error)
        return future

    def close(self) -> None:
        pass


class WorkerPool:
    """Worker processes, each served by a thread of this one, which only waits for its channel.

    They come up while the caller loads the tokenizer, and take pieces after `start`. They end when their channel
    closes, however the caller died.
    """

    def __init__(self, workers: int):
        self.workers = workers
        self._idle: queue.SimpleQueue[tuple[Channel, subprocess.Popen]] = queue.SimpleQueue()
        self._all: list[tuple[Channel, subprocess.Popen]] = []
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="encode")
        # -S: `site` would take as long as all of fastgpt's imports, for paths that are on sys.path already and for the
        # hook of an editable install, whose folder is named here. tiktoken is imported before the encoder comes.
        paths = [*(path for path in sys.path if isinstance(path, str)), str(Path(__file__).parents[2])]
        # Signals to the whole group are the caller's to answer, from the first moment on; it ends the workers.
        code = (
            "import signal; [signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)]; "
            f"import sys; sys.path[:] = {paths!r}; import tiktoken; from fastgpt.data.worker import serve; "
            "serve(int(sys.argv[1]))"
        )
        try:
            for _ in range(workers):
                ours, theirs = socket.socketpair()
                with theirs:
                    process = subprocess.Popen(
                        [sys.executable, "-S", "-c", code, str(theirs.fileno())],
                        pass_fds=[theirs.fileno()],
                        stdin=subprocess.DEVNULL,
                    )
                self._all.append((Channel(ours.detach()), process))
        except BaseException:
            self.close()
            raise

    def start(self, encoder: Encoder) -> None:
        """Give every worker the encoder, without waiting until it comes up."""
        for channel, process in self._all:
            self._threads.submit(self._give, channel, process, encoder)

    def submit(self, piece: Piece) -> Future[Encoded]:
        """The piece's ids, when a worker has made them."""
        return self._threads.submit(self._run, piece)

    def close(self) -> None:
        """End the workers; what they have in hand is dropped."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        for _, process in self._all:
            process.kill()
        self._threads.shutdown(wait=True)
        for channel, process in self._all:
            channel.close()
            process.wait()

    def _give(self, channel: Channel, process: subprocess.Popen, encoder: Encoder) -> None:
        with contextlib.suppress(OSError):  # that it has died is told when it gets a piece
            channel.send((encoder.tokenizer.__reduce__()[1], encoder.text_field, encoder.errors))
        self._idle.put((channel, process))

    def _run(self, piece: Piece) -> Encoded:
        channel, process = self._idle.get()
        try:
            lengths = [len(item) for item in piece.data]
            fields = {**vars(piece), "position": None}  # which is the caller's
            del fields["data"]
            channel.send((fields, lengths), b"".join(piece.data))
            reply, ids = channel.receive()
        except (EOFError, OSError):
            raise self._died(process) from None
        finally:
            self._idle.put((channel, process))
        if "input" in reply:
            raise InputError(reply["input"])
        if "failed" in reply:
            raise RuntimeError(f"a worker failed:\n{reply['failed']}")
        return Encoded(**{**reply, "ids": ids})

    @staticmethod
    def _died(process: subprocess.Popen) -> UserError:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=5)
        return UserError(
            f"a worker process ended with exit code {process.returncode} (-9 is mostly a lack of memory); run it again "
            f"to continue, with fewer workers"
        )
