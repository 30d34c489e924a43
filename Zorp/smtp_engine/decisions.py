"""What the policy says: the tables `request`, `response`, `extensions` and their callbacks.

    request[VERB]            exact verb, then "*"
    response[VERB, CODE]     the verb with ever shorter codes, then any verb with ever shorter codes
    extensions[KEYWORD]      exact keyword, then "*"

An entry is an action number or a sequence that begins with one.  What cannot be used ends the
session: a policy that we misunderstand must not let anything pass.  Values that a callback sets
are checked again before they go on the wire.

Added to the original
    A reply code without any entry gets a reply of its own class: a temporary failure at the
    server stays one for the client.  BDAT is decided like DATA unless the policy names it.
"""

from __future__ import annotations

import re
from typing import NoReturn

from Zorp.engine.builtin_proxy import PolicyCallFailed
from Zorp.engine.policy_hash import ActionError, parse_action, parse_policy_action
from Zorp.smtp_engine.session import INVALID, Refusal, SessionOver, SmtpSession
from Zorp.wire.errors import WireError
from Zorp.wire.smtp_commands import Command, command_line, parse_command
from Zorp.wire.smtp_extensions import EXTENSION_BITS
from Zorp.wire.smtp_replies import Reply
from Zorp.wire.smtp_states import RULES
from Zorp.wire.text import TextError, to_policy, to_wire

ACCEPT, REJECT, ABORT, POLICY = 1, 3, 4, 6

# reverse the roles, carry data of their own, or change who the client seems to be
NAMED_ONLY = frozenset({
    "TURN", "ATRN", "XCLIENT", "XFORWARD", "XEXCH50", "BURL", "VERB", "ONEX", "CHECKPOINT", "CONPERM",
})
_DECIDED_BY_ENTRY = frozenset(RULES) - {"BDAT"}
_STARTS_A_DIALOGUE = frozenset({"AUTH", "BDAT", "DATA", "STARTTLS"})
_REPLY_CODE = re.compile(r"[2-5][0-9][0-9]")
_BY_CLASS = {4: ("451", "Requested action aborted"), 5: ("550", "Requested action not taken")}
_MOST_REJECT_ITEMS = 2


class Decisions:
    """The policy of one session; for one thread."""

    def __init__(self, session: SmtpSession) -> None:
        self._session = session
        self._vars = session.vars
        self._log = session.log

    # requests

    def request(self, command: Command) -> Command:
        """Return the request that the policy lets pass; raises Refusal or SessionOver."""
        verb, parameter = command
        entry = self._vars.request.search(verb)
        if entry is None or verb not in _DECIDED_BY_ENTRY:
            entry = self._entry_or_default(verb, parameter, entry)
        if type(entry) is int and entry == ACCEPT:
            return command
        if _is_function_entry(entry):
            return self._ask_about_request(command, entry[1])
        try:
            action = parse_action(entry)
        except ActionError:
            raise self._unusable("Invalid request policy type; request='%s'", verb) from None
        if action.verdict == ACCEPT:
            return command
        if action.verdict == POLICY:
            return self._ask_about_request(command, self._function_of(action, verb))
        if action.verdict == REJECT:
            self._set_error(action, "Error in request policy; request='%s'", verb)
            self._refuse_request(verb, REJECT)
        if action.verdict == ABORT:
            self._refuse_request(verb, ABORT)
        raise self._unusable("Invalid request policy type; request='%s'", verb)

    def request_without_callbacks(self, verb: str, parameter: bytes) -> None:
        """The same while there is no server: whatever the policy would have to be asked about passes."""
        entry = self._entry_or_default(verb, parameter, self._vars.request.search(verb))
        try:
            action = parse_action(entry)
        except ActionError:
            raise self._unusable("Invalid request policy type; request='%s'", verb) from None
        if action.verdict == REJECT:
            self._set_error(action, "Error in request policy; request='%s'", verb)
        if action.verdict not in (ACCEPT, POLICY):
            self._refuse_request(verb, action.verdict)

    def _entry_or_default(self, verb: str, parameter: bytes, entry):
        """Return what decides about a request, given what the table has for it, None for nothing."""
        table = self._vars.request
        if entry is not None and verb in _DECIDED_BY_ENTRY:
            return entry
        if verb in NAMED_ONLY and verb not in table:
            self._unknown(verb)
            self._log("smtp.policy", 2, "Request not allowed by policy; request='%s', verdict='%d'", (verb, REJECT))
            raise Refusal("502", "Command not implemented")
        if verb == "BDAT" and verb not in table and "CHUNKING" in self._session.active:
            entry = table.search("DATA")
        if entry is not None:
            return entry
        if self._vars.permit_unknown_command and verb not in RULES and parameter.isascii():
            return ACCEPT
        return REJECT

    def _function_of(self, action, verb: str):
        try:
            return parse_policy_action(action)
        except ActionError:
            raise self._unusable("Error in request policy; request='%s'", verb) from None

    def _ask_about_request(self, command: Command, callback) -> Command:
        variables, (verb, _) = self._vars, command
        before = variables.request_cmd, variables.request_param
        verdict = self._call(callback, before)
        if not isinstance(verdict, int):
            raise self._no_verdict("The verdict returned by the policy is not an int; request='%s'", verb)
        if verdict != ACCEPT:
            self._refuse_request(verb, REJECT if verdict == REJECT else ABORT)
        after = variables.request_cmd, variables.request_param
        if after == before:
            return command
        return self._changed_request(verb, *after)

    def _changed_request(self, verb: str, new_verb: str, new_parameter: str) -> Command:
        """Return what the policy made of a request; an unusable value ends the session."""
        session = self._session
        try:
            line = command_line(to_wire(new_verb).decode("ascii"), to_wire(new_parameter))[:-2]
            changed = parse_command(line, utf8="SMTPUTF8" in session.active)
        except (TextError, UnicodeError, WireError):
            changed = None
        if changed is None or changed[0] != new_verb.upper() or (
                changed[0] != verb and changed[0] in _STARTS_A_DIALOGUE):
            self._log("smtp.policy", 1, "Invalid request set by policy; request='%s', new_request='%s'",
                      (verb, new_verb))
            raise self._aborted()
        return changed

    def _refuse_request(self, verb: str, verdict: int) -> NoReturn:
        """Say no to the client, in the words that error_code and error_info hold."""
        self._log("smtp.policy", 2, "Request not allowed by policy; request='%s', verdict='%d'", (verb, verdict))
        self._unknown(verb)
        if verdict != REJECT:
            raise self._aborted()
        raise Refusal(self._vars.error_code, self._vars.error_info)

    def _unknown(self, verb: str) -> None:
        if verb not in RULES and not self._vars.permit_unknown_command:
            self._log("smtp.violation", 2, "Unknown command; request='%s'", (verb,))

    # replies

    def reply(self, verb: str, parameter: bytes, reply: Reply) -> Reply:
        """Return a reply to `verb` as the client may get it; raises Refusal or SessionOver.

        Sets response_code and response_param.
        """
        variables = self._vars
        code = variables.response_code = reply.digits
        variables.response_param = reply.text
        entry = variables.response.search(verb, code)
        if entry is None and verb == "BDAT":
            entry = variables.response.search("DATA", code)
        if type(entry) is int and entry == ACCEPT:
            return reply
        if entry is None:
            variables.error_code, variables.error_info = _BY_CLASS.get(reply.code // 100, ("500", INVALID))
            raise self._refused_reply(verb, reply)
        try:
            action = parse_action(entry)
        except ActionError:
            raise self._unusable("Invalid response policy; request='%s', response='%s'", verb, code) from None
        if action.verdict == ACCEPT:
            return reply
        if action.verdict == POLICY:
            return self._ask_about_reply(verb, parameter, reply, action)
        if action.verdict == REJECT:
            self._set_error(action, "Error in response policy; request='%s', response='%s'", verb, code)
            raise self._refused_reply(verb, reply)
        if action.verdict == ABORT:
            self._log("smtp.policy", 2, "Response not allowed by policy; request='%s', response='%s'", (verb, code))
            raise self._aborted()
        raise self._unusable("Invalid response policy; request='%s', response='%s'", verb, code)

    def _ask_about_reply(self, verb: str, parameter: bytes, reply: Reply, action) -> Reply:
        variables = self._vars
        try:
            callback = parse_policy_action(action)
        except ActionError:
            raise self._unusable("Error in response policy; request='%s', response='%s'",
                                 verb, reply.digits) from None
        before = variables.response_code, variables.response_param
        verdict = self._call(callback, (verb, to_policy(parameter), *before))
        if not isinstance(verdict, int):
            raise self._no_verdict("The verdict returned by the policy is not an int; request='%s', response='%s'",
                                   verb, before[0])
        if verdict == REJECT:
            raise self._refused_reply(verb, reply)
        if verdict != ACCEPT:
            self._log("smtp.policy", 2, "Response not allowed by policy; request='%s', response='%s'",
                      (verb, before[0]))
            raise self._aborted()
        after = variables.response_code, variables.response_param
        return reply if after == before else self._changed_reply(verb, reply, *after)

    def _changed_reply(self, verb: str, reply: Reply, code: str, text: str) -> Reply:
        """Return what the policy made of a reply; an unusable value ends the session."""
        try:
            first = to_wire(text)
        except TextError:
            first = None
        becomes_a_dialogue = code[:1] == "3" and code != reply.digits
        if first is None or not _REPLY_CODE.fullmatch(code) or becomes_a_dialogue:
            self._log("smtp.policy", 1,
                      "Invalid response set by policy; request='%s', response='%d', new_response='%s'",
                      (verb, reply.code, code))
            raise self._aborted()
        return Reply(int(code), (first, *reply.texts[1:]))

    def _refused_reply(self, verb: str, reply: Reply) -> Refusal:
        self._log("smtp.policy", 2, "Response not allowed by policy; request='%s', response='%d'", (verb, reply.code))
        return Refusal(self._vars.error_code, self._vars.error_info)

    # extensions

    def extension(self, keyword: str) -> bool:
        """Tell whether the client may see a keyword of the server's EHLO reply."""
        variables = self._vars
        bit = EXTENSION_BITS.get(keyword, 0)
        if bit & variables.permit_extensions:
            return True
        if not bit and keyword not in variables.extensions:
            return False                            # "*" means the extensions that we understand
        try:
            return parse_action(variables.extensions.search(keyword)).verdict == ACCEPT
        except ActionError:
            return False

    # endings

    def _call(self, callback, arguments: tuple):
        try:
            return self._session.proxy._call_policy(callback, *arguments)
        except PolicyCallFailed as problem:         # logged, and the policy was told
            raise SessionOver from problem

    def _set_error(self, action, problem: str, *fields) -> None:
        """Take code and text of a REJECT entry; what is not given keeps its default."""
        if len(action.args) > _MOST_REJECT_ITEMS:
            raise self._unusable(problem, *fields) from None
        variables = self._vars
        values = [to_policy(item) if isinstance(item, bytes) else str(item) for item in action.args]
        variables.error_code = values[0] if values else "500"
        variables.error_info = values[1] if len(values) > 1 else INVALID

    def _no_verdict(self, text: str, *fields) -> SessionOver:
        self._log("smtp.policy", 1, text, fields)
        return self._aborted()

    def _unusable(self, text: str, *fields) -> SessionOver:
        """Return the end of the session for a malformed entry: nobody knows what the administrator wanted."""
        self._log("smtp.policy", 1, text, fields)
        self._session.proxy._invalid_policy_call()
        return SessionOver()

    def _aborted(self) -> SessionOver:
        """Return the end of the session that the policy wants."""
        self._session.proxy._closed_by_abort()
        return SessionOver()


def _is_function_entry(entry) -> bool:
    """Tell whether an entry is (POLICY, function), as nearly every entry with a function is."""
    return (type(entry) is tuple and len(entry) == 2 and type(entry[0]) is int and entry[0] == POLICY
            and callable(entry[1]))
