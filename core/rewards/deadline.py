"""Plain HTTP whose time-out is that of the whole request.

The standard library's counts anew with every byte: a server that sends its headers one letter at a time, or answers
"100 Continue" for ever, is never late.
"""

import contextlib
import http.client
import socket
import threading
import time
import urllib.request


class Deadline:
    """`with Deadline(seconds) as deadline`: what is on the network then is cut off; `cut` says whether it was."""

    def __init__(self, seconds: float):
        self.seconds, self.cut, self._socket = seconds, False, None
        self._timer = threading.Timer(seconds, self._cut)
        self._timer.daemon = True

    def __enter__(self):
        self._end = time.monotonic() + self.seconds
        self._timer.start()
        return self

    def __exit__(self, *_):
        self._timer.cancel()

    def handlers(self) -> list[urllib.request.BaseHandler]:
        """For urllib: http and https under this deadline."""
        return [_Http(self), _Https(self)]

    def watch(self, connected: socket.socket) -> socket.socket:
        self._socket = connected
        if self.cut:
            raise TimeoutError
        return connected

    def connect(self, address: tuple[str, int], *_) -> socket.socket:
        """As socket.create_connection, which would give each of a host's numbers the whole time."""
        failed = None
        for *_, place in socket.getaddrinfo(*address, type=socket.SOCK_STREAM):
            left = self._end - time.monotonic()
            if left <= 0:
                raise TimeoutError
            try:
                return self.watch(socket.create_connection(place[:2], left))
            except OSError as error:
                failed = error
        raise failed or OSError("the host has no address")

    def _cut(self) -> None:
        self.cut = True
        with contextlib.suppress(OSError, AttributeError):  # it is closed already, or there is none yet
            socket.socket.shutdown(self._socket, socket.SHUT_RDWR)  # whoever reads or writes there wakes up


class _Timed:
    """A connection under a deadline: a mixin for http.client's two."""

    def __init__(self, *arguments, deadline: Deadline, **options):
        super().__init__(*arguments, **options)
        self._deadline, self._create_connection = deadline, deadline.connect

    def connect(self):
        super().connect()
        self._deadline.watch(self.sock)  # for https it is another one now


class _Plain(_Timed, http.client.HTTPConnection):
    pass


class _Encrypted(_Timed, http.client.HTTPSConnection):
    pass


class _Http(urllib.request.HTTPHandler):
    def __init__(self, deadline: Deadline):
        super().__init__()
        self._deadline = deadline

    def http_open(self, request):
        return self.do_open(_Plain, request, deadline=self._deadline)


class _Https(urllib.request.HTTPSHandler):
    def __init__(self, deadline: Deadline):
        super().__init__()
        self._deadline = deadline

    def https_open(self, request):
        return self.do_open(_Encrypted, request, deadline=self._deadline)
