"""Mail dialogues as plays: what client and server say, and what each gets to hear.

    with mail(OpenSmtp) as play:
        play('''
            S> 220 mx.example ESMTP
            C< 220 mx.example ESMTP
            C> HELO a
            S< HELO a
            S> 250 mx.example
            C< 250 mx.example
        ''')

Speakers and directions, one line each, CRLF added:

    C>  the client sends this line         S>  the server sends this line
    C<  the client receives exactly this   S<  the server receives exactly this
    C|  the client sees the connection end S|  the server sees the connection end
    C*  the client sends these bytes       S*  the server sends these bytes      (no CRLF added)

Python's escapes (\\r \\n \\x00) may be used in texts.  A play that waits for something that does
not come fails after ten seconds and shows the log.  Since everything is in order, a line that
the server must not get is noticed at the next `S<`.

The methods greet(), envelope(), begin_login() and the like are scenes that many plays have in common.
"""

from __future__ import annotations

import contextlib
import functools
import select
import textwrap

import pytest

from Zorp.Smtp import SmtpProxy

EXTENSIONS = (
    "PIPELINING",
    "SIZE 10240000",
    "ETRN",
    "8BITMIME",
    "DSN",
    "CHUNKING",
    "AUTH PLAIN LOGIN",
    "STARTTLS",
    "VRFY",
    "SMTPUTF8",
    "BINARYMIME",
)
CLOSING = "421 Service not available, closing transmission channel."


class OpenSmtp(SmtpProxy):
    """SmtpProxy for whom every client zone may send anywhere; `settings` are applied after config()."""

    settings: dict = {}

    def config(self):
        SmtpProxy.config(self)
        self.relay_zones = ("*",)
        for name, value in self.settings.items():
            setattr(self, name, value)


def open_smtp(permit=(), **settings):
    """Return a subclass of OpenSmtp with these attributes set and these extensions permitted."""

    class Configured(OpenSmtp):
        def config(self):
            OpenSmtp.config(self)
            for keyword in permit:
                self.extensions[keyword] = 1

    Configured.settings = settings
    return Configured


class _Peer:
    """One of the two outer ends."""

    def __init__(self, name, sock, log):
        self.name, self._sock, self._log = name, sock, log
        self._received = b""

    def send(self, data):
        self._sock.sendall(data)

    def line(self):
        while b"\n" not in self._received:
            self._received += self._some("a line") or self._fail("a line", "the end of the connection")
        line, _, self._received = self._received.partition(b"\n")
        return line + b"\n"

    def bytes(self, count):
        """Return exactly that many bytes."""
        while len(self._received) < count:
            self._received += self._some(f"{count} bytes") or self._fail(f"{count} bytes", repr(self._received))
        data, self._received = self._received[:count], self._received[count:]
        return data

    def rest(self):
        """Return everything up to the end of the connection."""
        while data := self._some("the end of the connection"):
            self._received += data
        data, self._received = self._received, b""
        return data

    def _some(self, what):
        try:
            return self._sock.recv(65536)
        except ConnectionResetError:
            return b""
        except TimeoutError:
            return self._fail(what, "nothing")

    def _fail(self, wanted, got):
        pytest.fail(f"the {self.name} waits for {wanted} and gets {got}; the log ends:\n" + _last_lines(self._log))


def _last_lines(log):
    texts = [text for text in log.texts() if not text.startswith("Attribute ")]
    return "\n".join(texts[-15:])


class Play:
    """One session and its two peers; see the module's docstring."""

    def __init__(self, session):
        self.session = session
        self.log = session.log
        self.proxy = session.proxy
        self.client = _Peer("client", session.client, session.log)

    @functools.cached_property
    def server(self):
        """The server's end; waits for the proxy's connection."""
        return _Peer("server", self.session.server, self.log)

    def __call__(self, text):
        for line in textwrap.dedent(text).strip("\n").splitlines():
            if line.strip():
                self._line(line.strip()[:2], line.strip()[3:])

    def _line(self, cue, text):
        peer = self.server if cue[0] == "S" else self.client
        data = text.encode("latin-1").decode("unicode_escape").encode("latin-1")
        if cue[1] == ">":
            peer.send(data + b"\r\n")
        elif cue[1] == "*":
            peer.send(data)
        elif cue[1] == "<":
            got = peer.line()
            assert got == data + b"\r\n", f"the {peer.name} hears {got!r}, not {data!r}; the log ends:\n" + _last_lines(
                self.log
            )
        elif cue[1] == "|":
            assert peer.rest() == b"", f"the {peer.name} hears more"
        else:
            raise ValueError(f"no such cue: {cue}")

    def wait_until_the_server_is_heard(self):
        """Return when what the server sent has reached the proxy's socket."""
        if not select.select([self.proxy._server], [], [], 10)[0]:
            pytest.fail("the server's bytes do not arrive")

    # scenes

    def greet(self, *extensions, verb="EHLO"):
        """From the banner to EHLO; return the lines of the EHLO reply as the client gets them."""
        self("""
            S> 220 mx.example ESMTP
            C< 220 mx.example ESMTP
        """)
        return self.ehlo(*extensions, verb=verb)

    def ehlo(self, *extensions, verb="EHLO"):
        self(f"""
            C> {verb} client.example
            S< {verb} client.example
        """)
        lines = ["mx.example", *extensions]
        self.server.send(
            "".join(f"250{'-' if i < len(lines) - 1 else ' '}{line}\r\n" for i, line in enumerate(lines)).encode()
        )
        return self.reply()

    def reply(self):
        """Return the lines of the client's next reply, without line ends."""
        lines = [self.client.line()]
        while lines[-1][3:4] == b"-":
            lines.append(self.client.line())
        return [line.rstrip(b"\r\n").decode("latin-1") for line in lines]

    def envelope(self, *recipients):
        """MAIL and RCPTs, all accepted."""
        self("""
            C> MAIL FROM:<a@x.example>
            S< MAIL From:<a@x.example>
            S> 250 sender ok
            C< 250 sender ok
        """)
        for recipient in recipients or ("b@y.example",):
            self(f"""
                C> RCPT TO:<{recipient}>
                S< RCPT To:<{recipient}>
                S> 250 recipient ok
                C< 250 recipient ok
            """)

    def data(self):
        """DATA, answered 354."""
        self("""
            C> DATA
            S< DATA
            S> 354 go ahead
            C< 354 go ahead
        """)

    def data_refused(self, reply):
        """DATA, refused by the server with this reply."""
        self(f"""
            C> DATA
            S< DATA
            S> {reply}
            C< {reply}
        """)

    def begin_login(self):
        """From the banner to the server's question for a name in AUTH LOGIN."""
        self.greet("AUTH LOGIN")
        self("""
            C> AUTH LOGIN
            S< AUTH LOGIN
            S> 334 VXNlcm5hbWU6
            C< 334 VXNlcm5hbWU6
        """)

    def begin_chunks(self):
        """From the banner to the point where BDAT may come."""
        self.greet("CHUNKING")
        self.envelope()

    def body(self, data, passed=None):
        """Send a body with its end; the server must get `passed`, by default the same bytes."""
        self.client.send(data)
        wanted = data if passed is None else passed
        assert self.server.bytes(len(wanted)) == wanted

    def stored(self):
        self("""
            S> 250 stored
            C< 250 stored
        """)

    def send_mail(self, body=b"Subject: t\r\n\r\nhello\r\n.\r\n"):
        """A whole message."""
        self.envelope()
        self.data()
        self.body(body)
        self.stored()

    def goes_on(self):
        """Prove that the session lives and that the server got nothing that this play does not show."""
        self("""
            C> NOOP
            S< NOOP
            S> 250 still here
            C< 250 still here
        """)

    def quit(self):
        self("""
            C> QUIT
            S< QUIT
            S> 221 bye
            C< 221 bye
            C|
        """)


@contextlib.contextmanager
def _performance(serve, proxy_class, *, connected=True, **options):
    with serve(proxy_class, server_listens=connected, **options) as session:
        yield Play(session)


@pytest.fixture
def mail(serve):
    """Return a function: context manager for a play with a proxy class (connected=False: no server)."""
    return lambda proxy_class=OpenSmtp, **options: _performance(serve, proxy_class, **options)
