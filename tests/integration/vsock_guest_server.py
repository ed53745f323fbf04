"""What runs inside the test guest: one thread per stream on AF_VSOCK port 1024, told by its first line.

| line            | the guest then                                                               |
|-----------------|------------------------------------------------------------------------------|
| `echo`          | sends back what it reads; closes at end of file                              |
| `hash`          | reads to end of file, answers `<sha256> <bytes>`, closes                     |
| `sink`          | reads to end of file, answers how many bytes                                 |
| `source N SEED` | sends N bytes that start at SEED of the pattern, shuts down its sending side |
| `both N SEED`   | `source` and `hash` at once, the digest after the data                       |
| `stall`         | reads nothing until a line `go` arrives on another stream, then as `hash`    |
| `go`            | releases every stalled stream                                                |
| `deaf`          | shuts down its receiving side, answers `deaf`, then waits                    |
| `drop`          | closes at once, with unread data where there is some                         |
| `dial CID PORT` | connects to it and answers the errno                                         |
| `rebind`        | unbinds and binds the vsock driver: every queue starts anew                  |
| `reboot`        | restarts the machine                                                         |

Only modules of the standard library: the guest has nothing else.
"""

import hashlib
import os
import socket
import threading
import time

PATTERN = hashlib.shake_128(b"voidbox").digest(1 << 20)
released = threading.Condition()
generation = 0


def source(stream: socket.socket, count: int, seed: int) -> None:
    """Send `count` bytes of the pattern, which repeats."""
    position = seed % len(PATTERN)
    view = memoryview(PATTERN)
    while count:
        step = min(count, len(PATTERN) - position, 262144)
        stream.sendall(view[position : position + step])
        position, count = (position + step) % len(PATTERN), count - step


def digest(stream: socket.socket) -> bytes:
    """Read to the end and describe what was read."""
    seen, total = hashlib.sha256(), 0
    buffer = bytearray(262144)
    while got := stream.recv_into(buffer):
        seen.update(memoryview(buffer)[:got])
        total += got
    return b"%s %d\n" % (seen.hexdigest().encode(), total)


def rebind() -> None:
    """Take the driver off the device and put it on again."""
    root = "/sys/bus/virtio/drivers/vmw_vsock_virtio_transport/"
    device = next(name for name in os.listdir(root) if name.startswith("virtio"))
    for verb in ("unbind", "bind"):
        with open(root + verb, "w") as file:
            file.write(device)


def serve(stream: socket.socket) -> None:
    """Do what the first line says."""
    global generation
    line = b""
    while not line.endswith(b"\n"):
        byte = stream.recv(1)
        if not byte:
            return
        line += byte
    verb, *rest = line.split()
    if verb == b"echo":
        while data := stream.recv(262144):
            stream.sendall(data)
    elif verb == b"hash":
        stream.sendall(digest(stream))
    elif verb == b"sink":
        total, buffer = 0, bytearray(262144)
        while got := stream.recv_into(buffer):
            total += got
        stream.sendall(b"%d\n" % total)
    elif verb == b"source":
        source(stream, int(rest[0]), int(rest[1]))
        stream.shutdown(socket.SHUT_WR)
        while stream.recv(4096):
            pass
    elif verb == b"both":
        sender = threading.Thread(target=source, args=(stream, int(rest[0]), int(rest[1])))
        sender.start()
        answer = digest(stream)
        sender.join()
        stream.sendall(answer)
    elif verb == b"stall":
        with released:
            now = generation
            released.wait_for(lambda: generation != now)
        stream.sendall(digest(stream))
    elif verb == b"go":
        with released:
            generation += 1
            released.notify_all()
    elif verb == b"deaf":
        stream.shutdown(socket.SHUT_RD)
        stream.sendall(b"deaf\n")
        threading.Event().wait(30)
    elif verb == b"dial":
        with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as other:
            other.settimeout(10)
            stream.sendall(b"%d\n" % other.connect_ex((int(rest[0]), int(rest[1]))))
    elif verb == b"rebind":
        rebind()
    elif verb == b"reboot":
        with open("/proc/sysrq-trigger", "w") as file:
            file.write("b")


def handle(stream: socket.socket) -> None:
    """Serve one stream; whatever breaks it ends only it."""
    with stream:
        try:
            serve(stream)
        except OSError as error:
            print("stream:", error, flush=True)


def main() -> None:
    """Listen before anything else, as the agent does."""
    with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as listener:
        listener.bind((socket.VMADDR_CID_ANY, 1024))
        listener.listen(256)
        print("listening", time.monotonic(), flush=True)
        while True:
            stream, _ = listener.accept()
            threading.Thread(target=handle, args=(stream,), daemon=True).start()


if __name__ == "__main__":
    main()
