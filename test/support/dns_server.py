"""A small real name server on loopback, UDP and TCP on one port, for whoever tests names.

    with DnsServer() as dns:
        dns.set("a.test", "A", "192.0.2.1", "192.0.2.2", ttl=5)
        DNSResolver(server=dns.address).resolve("a.test")
        assert dns.queries == [("a.test", "A"), ("a.test", "AAAA")]

`behaviour` says what happens to queries: ANSWER (default), SILENCE, SERVFAIL.  A name without
any record is NXDOMAIN; a CNAME is answered with its chain as far as the server knows it, unless
`chains` is False, when the asker is left to follow it.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading

import dns.flags
import dns.message
import dns.rcode
import dns.rdatatype
import dns.rrset

ANSWER, SILENCE, SERVFAIL = "answer", "silence", "servfail"


class DnsServer:
    """Serves what set() gave it, until the with block ends; for any thread."""

    def __init__(self, host="127.0.0.1"):
        self._records_lock = threading.Condition()       # guards records, queries and behaviour
        self._records = {}
        self.queries = []
        self.behaviour = ANSWER
        self.silent_types = set()                        # record types that are never answered
        self.chains = True
        self.truncates_udp = False
        self._udp, self._tcp = _one_port(host)
        self.host, self.port = self._udp.getsockname()[:2]
        self.address = f"{self.host}:{self.port}"
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._serve_udp, self._serve_tcp)]

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *problem):
        for sock in (self._udp, self._tcp):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as waker:
            waker.sendto(b"", (self.host, self.port))
        for thread in self._threads:
            thread.join(5)
        self._udp.close()
        self._tcp.close()

    def set(self, name, record_type, *texts, ttl=60):
        """Replace the records of one name and type; without texts there are none."""
        with self._records_lock:
            types = self._records.setdefault(name.lower(), {})
            types[record_type] = (ttl, texts)

    def remove(self, name):
        """Make a name unknown."""
        with self._records_lock:
            self._records.pop(name.lower(), None)

    def wait_for_queries(self, count, seconds=15):
        """Return whether at least `count` queries have come within the time."""
        with self._records_lock:
            return self._records_lock.wait_for(lambda: len(self.queries) >= count, seconds)

    def _serve_udp(self):
        while True:
            try:
                data, client = self._udp.recvfrom(4096)
            except OSError:
                return
            if not data:
                return
            reply = self._reply(data, is_udp=True)
            if reply:
                self._udp.sendto(reply, client)

    def _serve_tcp(self):
        while True:
            try:
                client, _ = self._tcp.accept()
            except OSError:
                return
            with client, contextlib.suppress(OSError):
                client.settimeout(5)
                length, = struct.unpack("!H", _exactly(client, 2))
                reply = self._reply(_exactly(client, length), is_udp=False)
                if reply:
                    client.sendall(struct.pack("!H", len(reply)) + reply)

    def _reply(self, data, *, is_udp):
        query = dns.message.from_wire(data)
        question = query.question[0]
        name = question.name.to_text(omit_final_dot=True).lower()
        record_type = dns.rdatatype.to_text(question.rdtype)
        with self._records_lock:
            self.queries.append((name, record_type))
            self._records_lock.notify_all()
            if self.behaviour == SILENCE or record_type in self.silent_types:
                return None
            response = dns.message.make_response(query, recursion_available=True)
            if self.behaviour == SERVFAIL:
                response.set_rcode(dns.rcode.SERVFAIL)
            elif is_udp and self.truncates_udp:
                response.flags |= dns.flags.TC
            else:
                self._fill(response, name, record_type)
        return response.to_wire()

    def _fill(self, response, name, record_type):
        if name not in self._records:
            response.set_rcode(dns.rcode.NXDOMAIN)
            return
        seen = set()
        while name in self._records and name not in seen:
            seen.add(name)
            types = self._records[name]
            kind = "CNAME" if "CNAME" in types else record_type
            ttl, texts = types.get(kind, (0, ()))
            if texts:
                response.answer.append(dns.rrset.from_text(f"{name}.", ttl, "IN", kind, *texts))
            if kind == record_type or not self.chains:
                return
            name = texts[0].removesuffix(".").lower()


def _exactly(client, size):
    data = b""
    while len(data) < size:
        more = client.recv(size - len(data))
        if not more:
            raise ConnectionError("client gone")
        data += more
    return data


def _one_port(host):
    """Return a UDP and a listening TCP socket on the same free port."""
    while True:
        udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        udp.bind((host, 0))
        tcp = socket.socket()
        try:
            tcp.bind(udp.getsockname())
        except OSError:
            udp.close()
            tcp.close()
            continue
        tcp.listen()
        return udp, tcp
