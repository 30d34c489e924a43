"""What the guide says of its policies is what they do; the judge is zorp --explain."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from test.doc.test_manuals import GUIDE, check, policies
from test.support import tree
from Zorp.wire.stack_control import ControlReader

CLAIMS = {
    "intra": [
        ("tcp 192.168.1.7 172.16.40.5:22", "PERMITTED by service ssh"),
        ("tcp [fd00:1::7]:4000 [fd00:2::5]:22", "REFUSED: no rule matches"),
        ("tcp 192.168.1.200 172.16.40.5:22", "REFUSED: service no_guests denies"),
        ("tcp 192.168.1.200 172.16.40.5:80", "REFUSED: no rule matches"),
        ("tcp 192.168.1.7 172.16.40.5:443", "REFUSED: no rule matches"),
        ("tcp 203.0.113.9 172.16.40.5:22", "REFUSED: no rule matches"),
    ],
    "news": [("tcp 203.0.113.9 192.168.1.1:119", "PERMITTED by service news")],
    "web": [("tcp 203.0.113.9 198.51.100.1:443", "PERMITTED by service web")],
    "branch": [("tcp 10.1.0.7 10.1.0.1:50080",
                "REFUSED when it connects: service data may not go to servers in zone branch")],
    "mail": [("tcp 203.0.113.9 127.0.0.1:25", "PERMITTED by service mail_in")],
    "plain": [("udp 192.168.1.7 192.168.1.1:53", "PERMITTED by service dns"),
              ("tcp 192.168.1.7 192.168.1.1:43", "PERMITTED by service whois"),
              ("tcp 192.168.1.7 192.168.1.1:53", "REFUSED: the policy has no rules")],
    "scan": [("tcp 203.0.113.9 198.51.100.1:25", "PERMITTED by service mail")],
    "strict": [("tcp 203.0.113.9 198.51.100.1:25", "PERMITTED by service strict")],
}


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    directory = tmp_path_factory.mktemp("guide")

    def write(name):
        path = directory / f"{name}.py"
        path.write_text(policies(GUIDE.read_text("utf-8"))[name], "utf-8")
        return path

    return write


def explain(path, name: str, question: str) -> str:
    result = subprocess.run(
        [sys.executable, str(tree.ROOT / "sbin/zorp"), "--as", name, "--policy", str(path), "--user", str(os.getuid()),
         "--explain", question], capture_output=True, text=True, timeout=30, check=False)
    assert result.returncode == 0, result.stderr
    # the zone of partners has a host name, whose addresses nobody knows without resolving it
    return result.stdout.splitlines()[-1].removesuffix(", unless a host name has one of these addresses")


@pytest.mark.parametrize(("name", "question", "answer"),
                         [(name, *claim) for name, claims in CLAIMS.items() for claim in claims])
def test_a_policy_of_the_guide_does_what_the_guide_says(policy, name, question, answer):
    assert explain(policy(name), name, question) == answer


def test_every_policy_of_the_guide_is_asked():
    assert CLAIMS.keys() == policies(GUIDE.read_text("utf-8")).keys()


@pytest.mark.parametrize("name", CLAIMS)
def test_no_policy_of_the_guide_denies_in_vain(policy, name):
    assert "Deny rule loses" not in check(policy(name), name).stderr


def test_the_guide_is_right_that_a_denial_without_ports_is_in_vain(policy, tmp_path):
    # given the guide's policy, whose last rule says less
    text = policy("intra").read_text("utf-8")
    shorter, count = re.subn(r', dst_port=22, service="no_guests"', ', service="no_guests"', text)
    assert count == 1
    path = tmp_path / "policy.py"
    path.write_text(shorter, "utf-8")
    # then guests get what the office gets, and the check says so with both places
    assert explain(path, "intra", "tcp 192.168.1.200 172.16.40.5:22") == "PERMITTED by service ssh"
    warning = check(path, "intra").stderr
    assert re.search(rf"Deny rule loses to a permitting one;.* place='{path}:\d+'.* winner_place='{path}:\d+'", warning)


@pytest.mark.parametrize(("mail", "passes", "verdicts"), [
    (b"Subject: harmless\r\n\r\nHello\r\n", True, []),
    (b"Subject: x\r\n\r\nFORBIDDEN\r\n", False, [{"Verdict": "Z_REJECT", "Description": "Forbidden word"}]),
])
def test_the_scanner_of_the_guide_judges_mails(tmp_path, mail, passes, verdicts):
    # given the guide's program, with a file as its descriptor 3
    script, said = tmp_path / "scan", tmp_path / "control"
    script.write_text(re.search(r"```sh\n(.*?)```", GUIDE.read_text("utf-8"), re.DOTALL)[1])
    # when a mail goes through it
    result = subprocess.run(["/bin/sh", "-c", f"sh {script} 3>{said}"], input=mail, capture_output=True, timeout=10,
                            env={"PATH": os.environ["PATH"], "TMPDIR": str(tmp_path)}, check=True)
    # then it comes out whole, or not at all, and what is said of it is a request that we understand
    assert (result.stdout, result.stderr) == (mail if passes else b"", b"")
    reader = ControlReader()
    reader.feed(said.read_bytes())
    requests = list(iter(reader.next_request, None))
    assert [(request.command, request.headers) for request in requests] == [
        ("SETVERDICT", verdict) for verdict in verdicts]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["control", "scan"]
