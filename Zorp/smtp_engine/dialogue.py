"""The dialogue: greeting, one command after the other, the end.

One command, from top to bottom: read a line, understand it, may it come now, is its argument
sound, what does the policy say, forward, read the reply, what does the policy say, move the
state, copy the reply.  Refusal from any of these steps answers the client and goes on;
SessionOver, a lost side or a server that sends no replies ends the session.

A stop request (an administrator's, or the end of the instance) takes the server away and lets the
client send no more; it hears 421, in place of a greeting if need be, and the connection is closed.
"""

from __future__ import annotations

from Zorp import Log
from Zorp.engine.builtin_proxy import PolicyCallFailed
from Zorp.smtp_engine.authentication import SaslDialogue
from Zorp.smtp_engine.commands import CHECKS, FINISHES, Commands
from Zorp.smtp_engine.decisions import Decisions
from Zorp.smtp_engine.inspection import Inspection
from Zorp.smtp_engine.received import keyword
from Zorp.smtp_engine.session import INVALID, Refusal, SessionOver, SmtpSession
from Zorp.smtp_engine.sides import HIDDEN, ClientSide, ServerSide, SideLost
from Zorp.smtp_engine.transfer import MessageTransfer, bad_chunk
from Zorp.wire.errors import WireError
from Zorp.wire.limits import MAIL_BYTES_ADDED, RCPT_BYTES_ADDED, SmtpLimits
from Zorp.wire.smtp_commands import (
    Command,
    CommandError,
    command_line,
    is_sasl_line,
    may_hold_credentials,
    parse_command,
)
from Zorp.wire.smtp_replies import Reply
from Zorp.wire.smtp_states import RULES, OutOfSequence, State
from Zorp.wire.text import to_policy

WRONG_STATE = "Invalid command in this state"
NO_SERVER = "Server not available"
_AUTH, _QUIT = State.AUTH, State.QUIT      # looked at before every command
_GREETING = "Null"
_STANDARD_COMMAND_BYTES = 512           # RFC 5321 4.5.3.1.4: what extensions add is added to this
_ADDED_BYTES = {"MAIL": MAIL_BYTES_ADDED, "RCPT": RCPT_BYTES_ADDED}


class Dialogue:
    """One session from greeting to end; for one thread."""

    def __init__(self, proxy, limits: SmtpLimits) -> None:
        self._session = session = SmtpSession(proxy, limits)
        self._vars = session.vars
        self._limits = limits
        self._log = session.log
        self._trace = session.trace
        self._decisions = Decisions(session)
        self._commands = Commands(session, self._decisions)
        self._transfer = MessageTransfer(session, self._decisions)
        self._sasl: SaslDialogue | None = None          # since the last AUTH
        self._server_refused = False        # its greeting said 4xx or 5xx
        self._commands_without_server = 0

    def run(self) -> None:
        """Speak until somebody leaves."""
        session, variables, proxy = self._session, self._vars, self._session.proxy
        session.client = ClientSide(proxy._client, self._limits, require_crlf=bool(variables.require_crlf), proxy=proxy)
        try:
            if proxy._connect_server():
                session.server = ServerSide(proxy._server, self._limits, require_crlf=bool(variables.require_crlf),
                                            on_cut=session.report_cut if variables.permit_long_responses else None)
                self._greet()
            elif proxy.stop_requested:
                raise SessionOver
            else:
                session.answer(str(variables.unconnected_response_code), NO_SERVER)
            state = session.state
            while state.state is not _QUIT:
                self._step()
        except SessionOver as over:
            self._say_goodbye(over)
        except SideLost:
            self._say_goodbye(SessionOver())
        except WireError as problem:
            self._log("smtp.violation", 2, problem.text, problem.fields)
            self._say_goodbye(SessionOver())
        except PolicyCallFailed:
            self._say_goodbye(SessionOver())
            raise
        if Log.loudest >= 6:
            self._trace("Exiting SMTP loop;")

    def protocol_keyword(self) -> str:
        """Return what a Received line says behind "with"."""
        session = self._session
        return keyword(self._vars.protocol, authenticated=session.authenticated, utf8=session.transaction.utf8)

    def _say_goodbye(self, over: SessionOver) -> None:
        if not over.code:
            return
        try:
            self._session.answer(over.code, over.info, over.status)
        except SideLost:
            self._log("smtp.debug", 6, "Client has gone without waiting for the last reply;")

    # the beginning

    def _greet(self) -> None:
        session = self._session
        reply = session.read_reply()
        self._check_early_client()
        self._server_refused = reply.code >= 400
        if reply.code // 100 == 3:
            raise self._out_of_step(_GREETING, reply)
        try:
            accepted = self._decisions.reply(_GREETING, b"", reply)
        except Refusal as refusal:
            session.answer(refusal.code, refusal.info)
            return
        self._copy(accepted)

    def _check_early_client(self) -> None:
        """Wait as long as the policy wants before the greeting; a client that cannot wait may be refused."""
        variables = self._vars
        early = variables.greeting_delay and self._session.client.talks_within(variables.greeting_delay)
        if variables.refuse_early_talkers and (early or self._session.client.talks_within(0)):
            self._log("smtp.violation", 2, "Client talks before the greeting;")
            raise SessionOver("554", "Protocol error, talking before the greeting")

    # one command

    def _step(self) -> None:
        session = self._session
        self._vars.error_code, self._vars.error_info = "500", INVALID
        try:
            if session.server is None:
                self._without_server()
            elif session.state.state is _AUTH:
                self._sasl.one_line()
            else:
                self._perform(self._read_command())
        except Refusal as refusal:
            self._commands.report_refusal(refusal.code, refusal.info)
            session.answer_refusal(refusal)
        except SessionOver as over:
            self._commands.report_refusal(over.code, over.info)
            raise

    def _read_command(self) -> Command:
        """Return the client's next command; raises Refusal when it is none, SideLost when there is none."""
        session = self._session
        if Log.loudest >= 6:
            self._trace("Fetching request;")
        client = session.client
        line = client.read_line()
        if not line:
            raise Refusal
        try:
            command = parse_command(line, "SMTPUTF8" in session.active)
        except CommandError as problem:
            raise self._no_command(line, problem) from problem
        verb, parameter = command
        if client.expects_secret:
            self._refuse_late_secret(line, verb)
        if verb == "AUTH":
            client.expects_secret = True
        if len(line) > self._limits.command_bytes:
            self._check_length(verb, len(line))
        if Log.loudest >= 7:
            self._log("smtp.request", 7, "Request parsed; request='%s', param='%s'",
                      (verb, self._shown(verb, parameter)))
        return command

    def _no_command(self, line: bytes, problem: CommandError) -> Refusal | SessionOver:
        """Return what becomes of a line that is no command; the log shows it unless it may hold a secret."""
        client = self._session.client
        client.expects_secret = client.expects_secret or may_hold_credentials(line)
        self._log("smtp.violation", 2, problem.text, (HIDDEN,) if client.expects_secret else problem.fields)
        return bad_chunk() if line[:4].upper() == b"BDAT" else Refusal()

    def _refuse_late_secret(self, line: bytes, verb: str) -> None:
        """After AUTH, what is no command that we know may be an answer to a question that was never asked."""
        if verb in RULES or verb in self._vars.request:
            self._session.client.expects_secret = False
        elif is_sasl_line(line) or not self._vars.permit_unknown_command:
            self._log("smtp.violation", 2, "Invalid command verb in request; line='%s'", (HIDDEN,))
            raise Refusal

    def _check_length(self, verb: str, length: int) -> None:
        """Refuse a line longer than max_request_length unless its extensions explain that."""
        limit = self._limits.command_bytes
        if verb in _ADDED_BYTES:
            active = self._session.active
            added = sum(count for keyword, count in _ADDED_BYTES[verb].items() if keyword in active)
            limit = max(limit, _STANDARD_COMMAND_BYTES + added) if added else limit
        elif verb == "AUTH":
            limit = max(limit, self._limits.sasl_line_bytes)
        if length > limit:
            self._log("smtp.violation", 2, "Request line too long; length='%d', max='%d'", (length, limit))
            if verb == "BDAT":
                raise bad_chunk()
            raise Refusal

    def _perform(self, command: Command) -> None:
        """Do what a command wants, as far as policy and protocol permit."""
        verb, parameter = command
        variables = self._vars
        variables.request_cmd, variables.request_param = verb, parameter.decode("latin-1")
        if Log.loudest >= 6:
            self._trace("Processing request;")
        if self._server_refused and verb != "QUIT":
            self._refuse_for_the_server(verb, parameter)
        if verb in _OTHER_WAYS:
            _OTHER_WAYS[verb](self, command)
        else:
            request = self._permitted(command)
            self._conclude(verb, request, self._forward(verb, request))

    def _data(self, command: Command) -> None:
        """DATA: a message, past a stacked proxy if the policy wants that."""
        request = self._permitted(command)
        form = self._transfer.stack_form()
        if form is not None:
            Inspection(self._session, self._decisions, self._transfer).run(request, form)
            return
        reply = self._forward("DATA", request)
        accepted = self._conclude("DATA", request, reply)
        if accepted.code == 354:
            self._transfer.run()
        elif reply.code == 354:
            raise SessionOver("")                   # the policy told the client otherwise; the server waits for a body
        else:
            self._transfer.refused(accepted)

    def _chunk(self, command: Command) -> None:
        """BDAT: its octets come whatever we think of it."""
        self._transfer.chunk(command[1])

    def _auth(self, command: Command) -> None:
        """AUTH: the beginning of a dialogue of its own."""
        request = self._permitted(command)
        self._sasl = SaslDialogue(self._session, self._decisions, request[1])
        self._sasl.replied(request[1], self._forward("AUTH", request))

    def _permitted(self, command: Command) -> Command:
        """Return the request that protocol and policy let pass; raises Refusal or SessionOver."""
        verb, parameter = command
        checked = self._checked(verb, parameter)
        if checked is not parameter:
            command = verb, checked
            self._vars.request_param = checked.decode("latin-1")
        return self._decisions.request(command)

    def _checked(self, verb: str, parameter: bytes) -> bytes:
        """Return the argument as it is forwarded; raises Refusal when state or syntax forbid the command."""
        try:
            self._session.state.check(verb)
        except OutOfSequence as problem:
            self._log("smtp.violation", 4, problem.text, problem.fields)
            raise Refusal("503", WRONG_STATE) from problem
        return CHECKS[verb](self._commands, parameter) if verb in CHECKS else parameter

    def _forward(self, verb: str, request: Command) -> Reply:
        """Take a request to the server and return its reply."""
        session = self._session
        server = session.server
        request_verb, parameter = request
        line = command_line(request_verb, parameter)
        if len(line) - 2 > self._limits.command_bytes:
            self._check_length(verb, len(line) - 2)
        if server.speaks():
            session.end_unasked()
        if Log.loudest >= 6:
            self._log("smtp.debug", 6, "Copying request to server; request='%s', param='%s'",
                      (request_verb, self._shown(verb, parameter)))
        try:
            server.send(line)
        except SideLost:
            self._log("smtp.error", 3, "Error sending request; request='%s', param='%s'",
                      (request_verb, self._shown(verb, parameter)))
            raise
        reply = session.read_reply(verb == "AUTH")
        if 300 <= reply.code < 400 and (verb, reply.code) not in (("DATA", 354), ("AUTH", 334)):
            raise self._out_of_step(verb, reply)
        return reply

    def _conclude(self, verb: str, request: Command, reply: Reply) -> Reply:
        """Decide about a reply, move the state, tell the client; return what it was told."""
        try:
            accepted = self._decisions.reply(request[0], request[1], reply)
            if verb in FINISHES:
                accepted = FINISHES[verb](self._commands, accepted)
        except Refusal as refusal:
            self._told_no(verb, reply.code)
            if verb == "DATA" and reply.code == 354:
                raise SessionOver(refusal.code, refusal.info, refusal.status) from refusal
            raise
        if accepted.code >= 400 > reply.code:
            self._told_no(verb, reply.code)
        else:
            self._session.state.replied(verb, accepted.code)
        self._copy(accepted)
        return accepted

    def _told_no(self, verb: str, code: int) -> None:
        """The client was told no, the server said `code`: make both agree again."""
        session = self._session
        if code >= 300:
            session.state.replied(verb, code)
        elif verb in ("MAIL", "RCPT"):
            session.reset_server()
        elif verb in ("HELO", "EHLO"):
            session.state.ungreeted()
            session.set_active(frozenset(), 0)
            session.forget_message()
        elif verb == "RSET":
            session.state.replied(verb, code)
            session.forget_message()
        if verb == "QUIT":
            session.state.replied(verb, code)

    # the server

    def _refuse_for_the_server(self, verb: str, parameter: bytes) -> None:
        """The server's greeting refused the session; the client may only leave."""
        server = self._session.server
        if server.speaks():
            server.unasked()                        # raises SideLost when it hung up
        if verb == "BDAT":
            self._transfer.drop_chunk(parameter)
        raise Refusal("503", WRONG_STATE)

    def _out_of_step(self, verb: str, reply: Reply) -> SessionOver:
        """Return the end of the session for a reply that begins a dialogue nobody wanted."""
        self._log("smtp.violation", 2, "Invalid SMTP response; request='%s', response='%d'", (verb, reply.code))
        return SessionOver()

    def _copy(self, reply: Reply) -> None:
        if Log.loudest >= 6:
            self._trace("Copying response to client;")
        try:
            self._session.client.send(reply.wire)
        except SideLost:
            self._log("smtp.error", 3, "Error sending SMTP reply;")
            raise

    # no server

    def _without_server(self) -> None:
        """Check a command as far as that goes without asking the policy's functions, then send it away."""
        self._commands_without_server += 1
        if self._commands_without_server > self._limits.unconnected_commands:
            raise SessionOver
        verb, parameter = self._read_command()
        self._vars.request_cmd, self._vars.request_param = verb, to_policy(parameter)
        if verb == "BDAT":
            self._transfer.drop_chunk(parameter)
        parameter = self._checked(verb, parameter)
        self._decisions.request_without_callbacks(verb, parameter)
        if verb == "QUIT":
            raise SessionOver("221", "Bye")
        raise Refusal("503", NO_SERVER)

    # small things

    @staticmethod
    def _shown(verb: str, parameter: bytes) -> bytes:
        """Return what a log may hold of an argument: credentials never."""
        return parameter.partition(b" ")[0] if verb == "AUTH" else parameter


# verbs that are more than one request and one reply
_OTHER_WAYS = {"DATA": Dialogue._data, "BDAT": Dialogue._chunk, "AUTH": Dialogue._auth}
