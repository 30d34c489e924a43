"""zorp --check-policy runs config() of every proxy class, and never refuses a good policy for want of a client."""

import os
import re
import subprocess
import sys
import textwrap

import pytest

from test.support import tree

POLICY = """\
from Zorp.Core import *
from Zorp.Smtp import *

Zone("internet", ["0.0.0.0/0", "::/0"])
MatcherPolicy("spammers", RegexpMatcher(match_list=["x"]))

class Mail(SmtpProxy):
    def config(self):
        SmtpProxy.config(self)
        {line}

def intra():
    Service("mail", Mail, router=DirectedRouter(SockAddrInet("127.0.0.1", 25)))
"""


@pytest.fixture
def check(tmp_path):
    """Check a policy whose config() has these lines; return exit status and output."""
    def run(line, *arguments, template=POLICY, indent=8):
        path = tmp_path / "policy.py"
        path.write_text(template.format(line=textwrap.indent(textwrap.dedent(line), " " * indent).lstrip()))
        done = subprocess.run(
            [sys.executable, str(tree.ROOT / "sbin/zorp"), "--as", "intra", "--check-policy", str(path),
             "--user", str(os.getuid()), *arguments], capture_output=True, text=True, timeout=50, check=False)
        return done.returncode, done.stdout + done.stderr
    return run


WRONG = {
    "undefined name": ('self.request["VRFY"] = SMTP_REQ_ACEPT', 10, "name 'SMTP_REQ_ACEPT' is not defined"),
    "text for a number": ('self.max_message_size = "10MB"', 10,
                          "an integer is required for max_message_size, not str; give the attribute such a value"),
    "out of range": ("self.timeout = -(2 ** 40)", 10, "out of range"),
    "no such action": ('self.request["VRFY"] = 99', 10, "unknown number 99"),
    "no action at all": ('self.response["RCPT", "250"] = "accept"', 10, "an action is an int or a tuple, not str"),
    "too long an action": ('self.request["*"] = (SMTP_REQ_REJECT, "500", "no", 1)', 10, "too many items"),
    "no function": ('self.request["HELP"] = (SMTP_REQ_POLICY,)', 10, "a policy action has one function"),
    "an extension by another number": ('self.extensions["DSN"] = 99', 10, "write SMTP_EXT_ACCEPT, SMTP_EXT_DROP"),
    "unknown zone": ('self.relay_zones = ("ofice",)', 10, "No such zone in relay_zones; zone='ofice'"),
    "zones by number": ("self.relay_zones = 5", 10, "relay_zones is no list of zone names"),
    "domains by number": ("self.relay_domains = (5,)", 10, "relay_domains is no list of domains"),
    "a method by another name": ('self.request["MAIL"] = (SMTP_REQ_POLICY, self.chekMail)', 10,
                                 "'Mail' object has no attribute 'chekMail'"),
    "a base by another name": ("super().confg()", 10, "'super' object has no attribute 'confg'"),
    "unknown matcher": ('self.sender_matcher = "spamers"', 8, "No such matcher; matcher='<27>spamers"),
}


@pytest.mark.parametrize(("line", "number", "text"), WRONG.values(), ids=WRONG)
def test_what_would_cut_every_client_is_refused_with_its_place(check, line, number, text):
    status, output = check(line)
    assert status == 2
    assert f"policy.py:{number}: " in output
    assert text.replace("<27>", "") in output.replace("<27>", "")
    assert "Policy is usable" not in output


NO_METHODS = {
    "a number": ("config = 5", 11, "Event must be callable: config; class='Mail'"),
    "nothing": ("config = None", 11, "Event must be callable: config; class='Mail'"),
    "without self": ("def config():\n    pass", 8, "config() takes 0 positional arguments but 1 was given"),
    "before config": ("__pre_config__ = 5\ndef config(self):\n    pass", 9,
                      "Event must be callable: __pre_config__; class='Mail'"),
}


@pytest.mark.parametrize(("line", "number", "text"), NO_METHODS.values(), ids=NO_METHODS)
def test_a_config_that_cannot_be_called_is_refused_with_class_and_place(check, line, number, text):
    in_class = POLICY.replace("    def config(self):\n        SmtpProxy.config(self)\n", "")
    status, output = check(line, template=in_class.replace("        {line}", "    {line}"), indent=4)
    assert status == 2
    assert f"policy.py:{number}: " in output
    assert text in output
    assert "Policy is usable" not in output


def test_a_setting_that_nobody_reads_is_named_with_its_place(check):
    status, output = check('self.relay_zone = ("internet",)')
    assert status == 0
    assert re.search(r"attribute='relay_zone', similar='relay_zones', place='\S+policy.py:10'", output)


GOOD = {
    "plain": 'self.sender_matcher = "spammers"',
    "own attribute": "self.mails = 0",
    "what only a session has": "self.host = self.session.server_address.ip_s",
    "a value from the session": "self.timeout = self.session.server_zone",
    "a matcher by the session": 'self.sender_matcher = "of_" + self.session.client_address.ip_s',
    "the client's address": "self.mails = len(self.session.client_address.ip_s)",
    "a file that is elsewhere": 'self.list = open("/nonexistent/list").read()',
    "an exit": "raise SystemExit(1)",
    "a key that depends": "self.mails = {}[self.session.client_zone.getName()]",
}


@pytest.mark.parametrize("line", GOOD.values(), ids=GOOD)
def test_what_may_be_right_with_a_client_is_not_refused(check, line):
    status, output = check(line)
    assert (status, "Policy is usable" in output) == (0, True), output
    assert "accounting" not in output


UNFINISHED = {
    "a value of this host": 'self.name = re.match("x", socket.gethostname() + "y").group()',
    "a file that is elsewhere": 'self.list = open("/nonexistent/list").read()',
    "what only a session has": "self.host = self.session.server_address.ip_s",
}


@pytest.mark.parametrize("line", UNFINISHED.values(), ids=UNFINISHED)
def test_where_the_check_of_a_class_ended_is_said(check, line):
    # given a line that only works where the policy serves, and a mistake after it
    status, output = check(f"import re\n{line}\nself.sender_matcher = nosuch")
    # then nothing is refused, and the place from which on nothing was looked at is told
    assert (status, "Policy is usable" in output) == (0, True), output
    assert re.search(r"core.policy\(2\): .*what follows this line is not checked; class='Mail', "
                     r"place='\S+policy.py:11'", output)


@pytest.mark.parametrize("arguments", [[], ["--explain", "service mail"]], ids=["check", "explain"])
def test_the_instance_log_options_bring_no_noise_into_what_was_found(check, arguments):
    status, output = check("self.mails = 0", "--verbose", "8", "--log-spec", "core.*:8,*.accounting:9", *arguments)
    assert status == 0, output
    assert not re.findall(r"\w+\.\w+\(\d\): ", output)


def test_a_mistake_is_one_line_and_the_way_to_it_only_what_the_policy_has_of_it(check, tmp_path):
    policy = tmp_path / "policy.py"
    # given a mistake in the line that the engine called, and one behind a function of the policy
    _, output = check("self.nosuch")
    assert [line for line in output.splitlines() if "Traceback" in line] == []
    _, output = check("def find():\n    return nosuch\nfind()")
    steps = [line.partition("Traceback: ")[2] for line in output.splitlines() if "Traceback: " in line]
    assert [step.strip() for step in steps if "^" not in step] == [
        f'File "{policy}", line 12, in config', "find()", f'File "{policy}", line 11, in find', "return nosuch"]


PLUG = """\
from Zorp.Core import *
from Zorp.Plug import *
from Zorp.Smtp import *

class Plug(PlugProxy):
    def config(self):
        PlugProxy.config(self)
        {line}

def intra():
    Service("plug", Plug, router=DirectedRouter(SockAddrInet("127.0.0.1", 25)))
    Service("mail", SmtpProxy, router=DirectedRouter(SockAddrInet("127.0.0.1", 25)))
"""
UNSTACKABLE = {
    "a number": ("self.stack_proxy = 17", "Nothing can be stacked by this form; form='17'"),
    "no method": ("self.stack_proxy = (99, 'cat')", "No such stacking method; method='99'"),
    "no provider": ('self.stack_proxy = (Z_STACK_PROVIDER, "nosuch", "")',
                    "No such stacking provider; provider='nosuch'"),
}


@pytest.mark.parametrize(("line", "text"), UNSTACKABLE.values(), ids=UNSTACKABLE)
def test_what_no_session_could_stack_is_refused(check, line, text):
    status, output = check(line, template=PLUG)
    assert (status, "Policy is usable" in output) == (2, False), output
    assert f"policy.py:8: {text}; class='Plug'; give stack_proxy" in output


STACKABLE = {
    "a program": 'self.stack_proxy = (Z_STACK_PROGRAM, "cat")',
    "a class": "self.stack_proxy = PlugProxy",
    "nothing": "self.stack_proxy = None",
    "own requestStack": "self.stack_proxy = 17\nself.requestStack = lambda: None",
    "own backends": 'self.stack_proxy = (Z_STACK_PROVIDER, "nosuch", "")\nself.stackCustom = lambda args: None',
    "a backend": 'self.stack_proxy = (Z_STACK_CUSTOM, object(), "")',
}


@pytest.mark.parametrize("line", STACKABLE.values(), ids=STACKABLE)
def test_what_a_session_may_stack_is_not_refused(check, line):
    status, output = check(line, template=PLUG)
    assert (status, "Policy is usable" in output) == (0, True), output
    assert "stacked" not in output


@pytest.mark.parametrize(("line", "text"), [
    ("self.buffer_size = -1", "buffer_size is no size; buffer_size='-1'"),
    ("self.secondary_mask = 99", "secondary_mask has bits of no meaning; secondary_mask='99'"),
])
def test_a_number_that_cannot_be_meant_is_said_and_no_reason_to_refuse(check, line, text):
    status, output = check(line, template=PLUG)
    assert (status, "Policy is usable" in output) == (0, True), output
    assert re.search(rf"core.policy\(2\): .*{text}; class='Plug', place='\S+policy.py:8', remedy='", output)


def _with_dispatcher(service, protocol):
    return PLUG + f'    Dispatcher(DBSockAddr(SockAddrInet("127.0.0.1", 1), ZD_PROTO_{protocol}), "{service}")\n'


@pytest.mark.parametrize(("service", "line", "text"), [
    ("mail", "pass", "policy.py:12: SMTP does not go over UDP; class='SmtpProxy'; give the dispatcher a TCP bind"),
    ("plug", "self.stack_proxy = PlugProxy", "policy.py:8: Datagrams cannot go through a stacked proxy; class='Plug'"),
])
def test_what_does_not_go_over_datagrams_is_refused_there_only(check, service, line, text):
    status, output = check(line, template=_with_dispatcher(service, "UDP"))
    assert (status, "Policy is usable" in output, text in output) == (2, False, True), output
    status, output = check(line, template=_with_dispatcher(service, "TCP"))
    assert (status, "Policy is usable" in output) == (0, True), output


def test_a_plug_goes_over_datagrams(check):
    status, output = check("pass", template=_with_dispatcher("plug", "UDP"))
    assert (status, "Policy is usable" in output) == (0, True), output
