"""An instance whose rules lead no traffic to it says so: at the start, in the status and in the log."""

import contextlib
import json
import socket
import threading

import pytest

from Zorp.wire.kzorpd import answer_line

RULES = """\
from Zorp.Core import *
from Zorp.Plug import *

Zone("all", ["0.0.0.0/0", "::/0"])
config.options.kzorp_enabled = $enabled

def $name():
    Service("plug", PlugProxy, router=TransparentRouter())
    Rule(dst_port=80, service="plug")
"""
UNATTENDED = "packet rules NOT attended: kzorpd does not run, at most what was loaded before is in force, see "


@pytest.fixture
def started(host):
    """Start an instance with a rule; return what zorpctl said."""
    def start(zorp_args: str = "", enabled: str = "TRUE"):
        host.instance("intra", RULES, zorp_args=zorp_args, enabled=enabled)
        outcome = host.zorpctl("start")
        assert (outcome.status, outcome.out) == (0, "Starting Zorp:\nintra#0: Running\n"), outcome.err
        return outcome

    return start


def test_rules_without_kzorpd_are_no_green_start(host, started):
    # given rules, and nobody who puts them in force
    outcome = started()
    # then start warns with the remedy, and succeeds, for dispatchers may serve
    assert outcome.err == (
        "intra#0: warning: packet rules are NOT attended, kzorpd does not run, at most what was loaded before is in "
        "force, see kzorp-setup status (systemctl enable --now kzorp-setup kzorpd; who does without it says "
        "--packet-rules administrator or none)\n")
    # and so does the status, until kzorpd runs
    assert UNATTENDED in host.zorpctl("status").out
    assert json.loads(host.zorpctl("status", "--json").out)[0]["packet_rules"] == "unattended"
    with socket.socket(socket.AF_UNIX) as kzorpd:
        kzorpd.bind(str(host.kzorpd_dir / "kzorpd"))
        kzorpd.listen()
        assert UNATTENDED not in host.zorpctl("status").out


@pytest.mark.parametrize(("arguments", "enabled"), [
    ("--packet-rules administrator", "TRUE"), ("--packet-rules none", "TRUE"), ("", "FALSE")])
def test_who_has_said_that_there_is_no_kzorpd_hears_nothing(host, started, arguments, enabled):
    assert started(arguments, enabled).err == ""
    assert "NOT attended" not in host.zorpctl("status").out


def test_dispatchers_need_no_packet_rules(host):
    host.instance("intra")
    assert host.zorpctl("start").err == ""
    assert "NOT attended" not in host.zorpctl("status").out


def test_kzorpd_hears_from_user_0_that_an_instance_was_stopped_and_not_of_a_restart(host, started):
    # given an instance that does not speak to kzorpd itself, and a kzorpd that says yes
    started("--packet-rules none")
    requests = []

    def serve():
        with contextlib.suppress(OSError):
            while True:
                client, _ = kzorpd.accept()
                with client, client.makefile("rb") as lines:
                    requests.append(json.loads(lines.readline()))
                    client.sendall(answer_line(None, {}, as_json=True))

    with socket.socket(socket.AF_UNIX) as kzorpd:
        kzorpd.bind(str(host.kzorpd_dir / "kzorpd"))
        kzorpd.listen()
        thread = threading.Thread(target=serve)
        thread.start()
        # when user 0 restarts it and then stops it
        assert host.zorpctl("restart").status == 0
        assert requests == []
        stopped = host.zorpctl("stop")
        kzorpd.shutdown(socket.SHUT_RDWR)
        thread.join()
    # then it was told once
    assert (stopped.status, stopped.err) == (0, "")
    assert requests == [{"request": "stopped", "instance": "intra"}]
