"""SmtpInvalidRecipientMatcher against a server that answers as told (addressing-helpers 4.2)."""

import contextlib
import socket
import threading
import time

import pytest

from test.support.logged import captured_log
from Zorp import Cache
from Zorp.matching import host_names
from Zorp.matching import recipient_probe
from Zorp.Exceptions import MatcherException
from Zorp.matching.host_names import SystemNames
from Zorp.Matcher import SmtpInvalidRecipientMatcher

VRFY_OFFERED = {"EHLO": "250-mx\r\n250-SIZE\r\n250 VRFY\r\n"}


class MailServer:
    """Answers each command by the longest prefix that it was told about, one connection after the other.

    `commands` are those it has seen, `sessions` the number of connections; `gate` holds back
    the greeting until it is set.
    """

    def __init__(self, answers=(), greeting="220 mx ESMTP\r\n"):
        self.answers = {"EHLO": "250-mx\r\n250 SIZE\r\n", "MAIL": "250 ok\r\n", "RCPT": "250 ok\r\n",
                        "VRFY": "250 ok\r\n", "QUIT": "221 bye\r\n", **dict(answers)}
        self.greeting = greeting
        self.commands = []
        self.peers = []
        self.gate = threading.Event()
        self.gate.set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *problem):
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join(10)
        self._listener.close()

    @property
    def sessions(self):
        return len(self.peers)

    def _serve(self):
        while True:
            try:
                client, peer = self._listener.accept()
            except OSError:
                return
            self.peers.append(peer)
            self.gate.wait(10)
            with client, contextlib.suppress(OSError):
                client.settimeout(10)
                client.sendall(self.greeting.encode())
                for line in client.makefile("rb"):
                    command = line.decode("latin-1").removesuffix("\r\n")
                    self.commands.append(command)
                    answer = self._answer(command)
                    if answer is None:
                        break
                    client.sendall(answer.encode())
                    if command == "QUIT":
                        break

    def _answer(self, command):
        prefix = max((known for known in self.answers if command.startswith(known)), key=len)
        return self.answers[prefix]


def matcher_for(server, **options):
    return SmtpInvalidRecipientMatcher("127.0.0.1", server.port, **options)


@pytest.fixture
def logged():
    with captured_log() as messages:
        yield messages


def verbs(server):
    return [command.partition(" ")[0] for command in server.commands]


# ------------------------------------------------------------------ the dialogue

def test_scenario_21_vrfy_where_it_is_offered_and_a_memory_for_valid_addresses(logged):
    with MailServer(VRFY_OFFERED) as server:
        matcher = matcher_for(server)
        assert matcher.checkMatch("user@example.com") == 0
        assert verbs(server) == ["EHLO", "VRFY", "QUIT"]
        assert server.commands[1] == "VRFY user@example.com"
        assert matcher.checkMatch("user@example.com") == 0
        assert server.sessions == 1
    assert [m.text for m in logged.messages if m.tag.startswith("core.")] == [
        "Recipient validity not cached, trying the direct way; email='user@example.com'",
        "Trying to use VRFY to check email address validity; email='user@example.com'",
        "Server accepted recipient; email='user@example.com'",
        "Cached recipient match found; email='user@example.com', cached='0'",
    ]


def test_scenario_22_a_delivery_is_begun_where_that_is_wanted(logged):
    with MailServer({**VRFY_OFFERED, "RCPT": "550 5.1.1 no such user\r\n"}) as server:
        matcher = matcher_for(server, force_delivery_attempt=True)
        assert matcher.checkMatch("user@example.com") == 1
        assert server.commands[1:] == ["MAIL FROM:<>", "RCPT TO:<user@example.com>", "QUIT"]
        # a refusal is not remembered
        assert matcher.checkMatch("user@example.com") == 1
        assert server.sessions == 2
    assert logged.find("Attempting delivery to check email address validity; email='user@example.com'")
    assert [(m.tag, m.level) for m in logged.find("Server rejected recipient; email='user@example.com'")] == [
        ("core.info", 4)] * 2


def test_scenario_22_a_dead_server_is_no_verdict(logged):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(MatcherException, match="SMTP error or socket failure while checking user validity"):
        SmtpInvalidRecipientMatcher("127.0.0.1", port).checkMatch("user@example.com")
    message = logged.find("SMTP error during recipient validity checking; info='Connection refused'")[0]
    assert (message.tag, message.level) == ("core.error", 3)


@pytest.mark.parametrize("email", [
    "a@b\r\nRSET", "a@b\nRSET", "a@b\0", "a b@c", "a@b> SIZE=1", "<a@b", "a@b\x7f", "", "a" * 400, "a@b\t",
])
def test_scenario_23_what_could_be_a_second_command_is_never_sent(email):
    with MailServer() as server:
        with pytest.raises(MatcherException, match="cannot be sent"):
            matcher_for(server).checkMatch(email)
        assert server.sessions == 0


def test_plain_smtp_is_greeted_with_helo_and_asked_by_vrfy():
    with MailServer({"EHLO": "502 what\r\n", "HELO": "250 mx\r\n"}) as server:
        assert matcher_for(server).checkMatch("user@example.com") == 0
        assert verbs(server) == ["EHLO", "HELO", "VRFY", "QUIT"]


def test_a_server_that_refuses_both_greetings(logged):
    with MailServer({"EHLO": "502 what\r\n", "HELO": "502 what\r\n"}) as server, \
            pytest.raises(MatcherException) as problem:
        matcher_for(server).checkMatch("user@example.com")
    assert problem.value.detail == "Server refused our EHLO/HELO command."
    assert verbs(server) == ["EHLO", "HELO", "QUIT"]


@pytest.mark.parametrize("answer", ["252 send some mail\r\n", "502 disabled\r\n", "500 unknown\r\n"])
def test_a_vrfy_that_says_nothing_is_followed_by_a_delivery(answer):
    with MailServer({**VRFY_OFFERED, "VRFY": answer, "RCPT": "550 no\r\n"}) as server:
        assert matcher_for(server).checkMatch("user@example.com") == 1
        assert verbs(server) == ["EHLO", "VRFY", "MAIL", "RCPT", "QUIT"]


def test_a_sender_of_ones_own_and_its_refusal(logged):
    with MailServer({"MAIL": "250 ok\r\n", "MAIL FROM:<bad@": "550 no\r\n"}) as server:
        assert matcher_for(server, sender_address="probe@example.com").checkMatch("user@example.com") == 0
        assert "MAIL FROM:<probe@example.com>" in server.commands
        with pytest.raises(MatcherException) as problem:
            matcher_for(server, sender_address="bad@example.com").checkMatch("user@example.com")
    assert problem.value.detail == "Server has not accepted our sender (bad@example.com)."
    assert logged.has("SMTP sender was rejected, unable to verify user existence; email='%s', server_address='%s', "
                      "server_port='%d'", ("user@example.com", "127.0.0.1", server.port))


@pytest.mark.parametrize("answers", [
    {"RCPT": "450 greylisted\r\n"}, {"RCPT": "354 what\r\n"}, {"RCPT": "no reply\r\n"}, {"RCPT": None},
    {"RCPT": "250-x\r\n550 y\r\n"}, {"EHLO": None}, {**VRFY_OFFERED, "VRFY": "450 later\r\n"},
    {"RCPT": "2" * 100_000},
], ids=lambda answers: str(answers)[:40])
def test_anything_but_a_clear_answer_is_no_verdict(answers):
    with MailServer(answers) as server, pytest.raises(MatcherException, match="SMTP error or socket failure"):
        matcher_for(server).checkMatch("user@example.com")


@pytest.mark.parametrize("greeting", ["554 go away\r\n", "250 odd\r\n", "nonsense\r\n", ""])
def test_a_server_that_does_not_greet(greeting):
    with MailServer(greeting=greeting) as server, pytest.raises(MatcherException):
        matcher_for(server, timeout=0.3).checkMatch("user@example.com")
    assert "EHLO" not in verbs(server)


def test_each_step_has_a_deadline():
    with MailServer() as server:
        server.answers["RCPT"] = ""                  # the server falls silent
        started = time.monotonic()
        with pytest.raises(MatcherException):
            matcher_for(server, timeout=0.3).checkMatch("user@example.com")
        assert time.monotonic() - started < 4


def test_addresses_beyond_ascii_need_smtputf8():
    email = "jürgen@example.com".encode().decode("latin-1")
    with MailServer() as server, pytest.raises(MatcherException):
        matcher_for(server).checkMatch(email)
    with MailServer({"EHLO": "250-mx\r\n250-8BITMIME\r\n250 SMTPUTF8\r\n"}) as server:
        assert matcher_for(server).checkMatch(email) == 0
        assert server.commands[1:3] == ["MAIL FROM:<> SMTPUTF8", f"RCPT TO:<{email}>"]


def test_we_call_ourselves_by_name_or_by_address(monkeypatch):
    with MailServer() as server:
        for hostname, name in (("fw.example.com", "fw.example.com"), ("fw", "[127.0.0.1]"), ("a b.c", "[127.0.0.1]")):
            monkeypatch.setattr(socket, "gethostname", lambda hostname=hostname: hostname)
            matcher_for(server).checkMatch(f"{hostname.replace(' ', '')}@example.com")
            assert [c for c in server.commands if c.startswith("EHLO")][-1] == f"EHLO {name}"


# ------------------------------------------------------------------ connecting

def test_all_addresses_of_the_server_are_tried(monkeypatch, tmp_path):
    hosts = tmp_path / "hosts"
    hosts.write_text("127.0.0.77 mx.test\n127.0.0.1 mx.test\n127.0.0.42 us.test\n")
    monkeypatch.setattr(host_names, "system_names", SystemNames(str(hosts), "127.0.0.1"))
    with MailServer() as server:
        matcher = SmtpInvalidRecipientMatcher("mx.test", server.port, bind_name="us.test")
        assert matcher.checkMatch("user@example.com") == 0
        # and we come from the address that was wanted
        assert server.peers[0][0] == "127.0.0.42"


def test_a_server_or_own_name_without_address_is_no_verdict():
    for names in ({"server_name": "nosuch.invalid"}, {"server_name": "127.0.0.1", "bind_name": "nosuch.invalid"}):
        with pytest.raises(MatcherException, match=r"does not resolve|no local address"):
            SmtpInvalidRecipientMatcher(**names).checkMatch("user@example.com")


# ------------------------------------------------------------------ memory

def test_valid_addresses_are_forgotten_after_their_time(monkeypatch):
    ahead = [0.0]
    monkeypatch.setattr(Cache, "monotonic", lambda: time.monotonic() + ahead[0])
    with MailServer() as server:
        matcher = matcher_for(server, cache_timeout=60)
        matcher.checkMatch("user@example.com")
        ahead[0] = 59.0
        matcher.checkMatch("user@example.com")
        assert server.sessions == 1
        ahead[0] = 61.0
        matcher.checkMatch("user@example.com")
        assert server.sessions == 2
    assert matcher.cache.name == "smtp_valid_recipients(127.0.0.1)"


def test_refused_addresses_are_remembered_where_that_is_wanted(logged):
    with MailServer({"RCPT": "550 no\r\n"}) as server:
        matcher = matcher_for(server, refused_cache_timeout=60)
        assert [matcher.checkMatch("user@example.com") for _ in range(3)] == [1, 1, 1]
        assert server.sessions == 1
    assert logged.find("Cached recipient match found; email='user@example.com', cached='1'")


@pytest.mark.parametrize("answer", ["250 ok\r\n", "550 no\r\n", "450 later\r\n"])
def test_one_probe_at_a_time_per_address(answer):
    with MailServer({"RCPT": answer}) as server:
        server.gate.clear()
        matcher = matcher_for(server)
        results = []

        def check():
            try:
                results.append(matcher.checkMatch("user@example.com"))
            except MatcherException as problem:
                results.append(problem.detail)

        threads = [threading.Thread(target=check) for _ in range(5)]
        for thread in threads:
            thread.start()
        # all of them are waiting for the one that has connected
        deadline = time.monotonic() + 10
        while not server.sessions and time.monotonic() < deadline:
            time.sleep(0.01)
        server.gate.set()
        for thread in threads:
            thread.join(10)
    assert len(set(results)) == 1
    assert len(results) == 5
    assert server.sessions < 5


# ------------------------------------------------------------------ load time

def test_parameters_and_attributes():
    matcher = SmtpInvalidRecipientMatcher("mx", 26, 30, 0, 1, "<me@x>", "us")
    assert (matcher.server_name, matcher.server_port, matcher.force_delivery_attempt, matcher.sender_address,
            matcher.bind_name, matcher.cache.timeout) == ("mx", 26, 1, "<me@x>", "us", 30)
    with pytest.raises(ValueError, match="Invalid sender address"):
        SmtpInvalidRecipientMatcher("mx", sender_address="a@b\r\nRSET")
    with pytest.raises(MatcherException, match="Only text"):
        matcher.checkMatch(None)


@pytest.mark.parametrize(("text", "data"), [
    ("a@b", b"a@b"), ("<a@b>", b"a@b"), ('"q"@b', b'"q"@b'), ("\xfc@b", b"\xfc@b"), ("\u20ac@b", "\u20ac@b".encode()),
    ("a@b>", None), ("<>", None), ("", None),
])
def test_addresses_as_they_stand_in_a_command(text, data):
    assert recipient_probe.address_bytes(text) == data
