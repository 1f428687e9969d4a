"""A server of files that speaks as much S3 as a reader needs, as fast as the system sends files.

    python benchmarks/_static_s3.py FOLDER

It prints its port, and serves the folders of FOLDER as buckets until its standard input ends: GET
with ranges, HEAD, and listings that fit into one answer. It checks no signature, and is no store.
"""

from __future__ import annotations

import os
import re
import socket
import sys
import threading
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

_RANGE = re.compile(rb"\r\nrange: bytes=(\d+)-(\d+)\r\n", re.IGNORECASE)
_END = b"\r\n\r\n"


def serve(folder: Path) -> None:
    """Serve the folders in *folder*; see the top of the file."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=64)
    print(listener.getsockname()[1], flush=True)
    threading.Thread(target=_accept, args=(listener, folder), daemon=True).start()
    sys.stdin.read()


def _accept(listener: socket.socket, folder: Path) -> None:
    while True:
        client = listener.accept()[0]
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        threading.Thread(target=_answer_all, args=(client, folder), daemon=True).start()


def _answer_all(client: socket.socket, folder: Path) -> None:
    rest = b""
    with client, suppress(OSError):
        while True:
            while _END not in rest:
                if not (data := client.recv(1 << 16)):
                    return
                rest += data
            head, rest = rest.split(_END, 1)
            _answer(client, folder, head + b"\r\n")


def _answer(client: socket.socket, folder: Path, head: bytes) -> None:
    method, target, _ = head.decode().split(" ", 2)
    url = urlsplit(target)
    path, query = folder / unquote(url.path).strip("/"), parse_qs(url.query)
    if "list-type" in query:
        body = _listing(path, query.get("prefix", [""])[0]).encode()
        client.sendall(_head(200, len(body), []) + body)
        return
    try:
        file = os.open(path, os.O_RDONLY)
    except OSError:
        client.sendall(_head(404, 0, []))
        return
    try:
        size = os.fstat(file).st_size
        start, end, lines = 0, size, []
        if (match := _RANGE.search(head)) is not None:
            start, end = int(match[1]), min(int(match[2]) + 1, size)
            lines.append(f"Content-Range: bytes {start}-{end - 1}/{size}")
        client.sendall(_head(206 if lines else 200, end - start, lines))
        while method == "GET" and start < end:
            start += os.sendfile(client.fileno(), file, start, end - start)
    finally:
        os.close(file)


def _head(status: int, length: int, lines: list[str]) -> bytes:
    always = ['ETag: "x"', "Last-Modified: Sun, 29 Nov 2026 00:00:00 GMT"]
    text = [f"HTTP/1.1 {status} -", f"Content-Length: {length}", *always, *lines]
    return "\r\n".join([*text, "", ""]).encode()


def _listing(bucket: Path, prefix: str) -> str:
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")
    found = sorted(path for path in (bucket / prefix).rglob("*") if path.is_file())
    items = "".join(
        f"<Contents><Key>{path.relative_to(bucket)}</Key><LastModified>{now}</LastModified>"
        f'<ETag>"x"</ETag><Size>{path.stat().st_size}</Size></Contents>'
        for path in found
    )
    return f"<ListBucketResult><IsTruncated>false</IsTruncated>{items}</ListBucketResult>"


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
