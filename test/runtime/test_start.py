"""Starting in the foreground: what serves, what is refused, and with which exit status."""

import os
import pathlib
import re
import signal
import subprocess
import sys

import pytest

from test.runtime.policies import ECHO
from test.support.daemon import ROOT
from test.support.ports import free_port


def program(*arguments, **keywords):
    """Run the program to its end."""
    return subprocess.run([sys.executable, str(ROOT / "sbin" / "zorp"), *arguments], capture_output=True, text=True,
                          timeout=20, **keywords)


def test_an_instance_serves_and_says_how_it_started(zorp):
    # given a policy; when it is started in the foreground with the log on stderr
    daemon = zorp(ECHO, verbosity=3)
    # then the log says so, and its listener accepts
    assert daemon.log.wait_for("core.debug", 0, "Starting up").fields["verbose_level"] == "3"
    assert daemon.connect().recv(100).startswith(b"hello svc/intra/echo:0 ")


@pytest.mark.parametrize("arguments", [("-v5",), ("-v", "5"), ("--verbose=5",)])
def test_verbosity_reaches_the_log(zorp, arguments):
    daemon = zorp(ECHO, arguments=arguments)
    assert daemon.log.wait_for("core.debug", 0, "Starting up").fields["verbose_level"] == "5"


def test_a_name_that_the_policy_does_not_define(zorp):
    # given a policy with one instance; when another is started
    daemon = zorp("from Zorp.Core import *\ndef intra(): pass\ndef inter(): pass\n", instance="nosuch", start=False)
    # then it ends with 2, and the log says why
    assert daemon.run() == 2
    assert daemon.log.find("core.error", 0, "Instance definition not found in policy", instance="nosuch")
    assert (f"{daemon.policy}: No function for instance 'nosuch'; define it, or name one of these with --as: "
            "intra (line 2), inter (line 3)") in daemon.log.text()
    assert daemon.log.find("core.error", 0, "Error initializing policy")
    assert daemon.log.find("core.error", 0, "Error loading initial policy, exiting")


def test_only_the_listeners_of_the_named_instance_are_open(zorp):
    # given two instances in one file, each on its own port
    daemon = zorp('''
        from Zorp.Core import *
        from Zorp.Plug import *
        def listen(port):
            Service("s%d" % port, PlugProxy, router=DirectedRouter(SockAddrInet("127.0.0.1", 1)))
            Dispatcher(DBSockAddr(SockAddrInet("127.0.0.1", port), ZD_PROTO_TCP), service="s%d" % port)
        def intra(): listen($port)
        def extra(): listen($other)
        ''', other=(other := free_port()))
    # then only that of the started one accepts
    daemon.connect().close()
    with pytest.raises(ConnectionRefusedError):
        daemon.connect(other)


def test_also_as_calls_the_function_of_each_name(zorp):
    daemon = zorp('''
        from Zorp.Core import *
        def intra(): log(None, "my.tag", 2, "first called;")
        def extra(): log(None, "my.tag", 2, "second called;")
        ''', arguments=["--also-as", "extra"])
    called = [line.text for line in daemon.log.find("my.tag")]
    assert called == ["first called", "second called"]


OWN_INIT = {
    "three arguments": ("def init(names, virtual_name, is_master): return names == ['intra'] and is_master", None),
    "list": ("def init(names): return names[0] == 'intra'", None),
    "1.x string, returns nothing": ("def init(name):\n    assert name == 'intra' and str(name) == 'intra'", None),
    "returns FALSE": ("def init(names, virtual_name, is_master): return 0", 2),
    "returns no number": ("def init(names, virtual_name, is_master): return 'yes'", 2),
    "raises": ("def init(names): raise RuntimeError('no')", 2),
}


@pytest.mark.parametrize(("policy", "status"), OWN_INIT.values(), ids=OWN_INIT)
def test_own_init(zorp, policy, status):
    daemon = zorp(policy + "\n", start=False)
    if status is None:
        daemon.start()
        assert daemon.stop() == 0
    else:
        assert daemon.run() == status
        assert daemon.log.find("core.error", 0, "Error initializing policy")


def test_a_second_start_of_a_running_instance_is_refused(zorp):
    # given a running instance
    daemon = zorp(ECHO)
    # when it is started once more
    second = subprocess.run(daemon.command, capture_output=True, text=True, timeout=20)
    # then the second is refused, and the first keeps serving
    assert second.returncode == 1
    assert "Another process of this name is running" in second.stderr
    assert daemon.connect().recv(100)


def test_the_instance_can_start_again_after_kill_9(zorp):
    # given an instance killed with everything it left behind
    daemon = zorp(ECHO)
    daemon.kill(signal.SIGKILL)
    daemon.wait()
    assert daemon.pid_file().exists()
    stale = daemon.worker_pid()
    # when it is started again
    daemon.launch()
    daemon.log.wait_for("core.info", 4, "Accepting connections", count=2)
    # then it serves, under another pid
    assert daemon.connect().recv(100)
    assert daemon.worker_pid() != stale


def test_unknown_user(zorp):
    daemon = zorp(ECHO, start=False, arguments=["--user", "nobodyhere"])
    assert daemon.run() == 1
    assert "Error resolving user; user='nobodyhere'" in daemon.log.text()


def test_a_port_in_use_is_a_load_error_with_its_address(zorp):
    # given one instance on the port; when another wants it
    first = zorp(ECHO)
    second = zorp(ECHO, start=False, instance="extra", ports=first.port)
    # then the second ends with 2 and says which bind failed
    assert second.run() == 2
    line = second.log.wait_for("core.error", 3, "bind() failed")
    assert line.fields == {"bind": f"SA(proto=1,addr=AF_INET(127.0.0.1:{first.port}))",
                           "error": "Address already in use"}


def test_pidfile_option(zorp, tmp_path):
    daemon = zorp(ECHO, start=False, arguments=["--pidfile", str(tmp_path / "x.pid")])
    daemon.launch()
    daemon.log.wait_for("core.info", 4, "Accepting connections")
    assert (tmp_path / "x.pid").read_text().strip().isdigit()
    daemon.stop()
    assert not (tmp_path / "x.pid").exists()


def test_a_pidfile_where_no_directory_can_be_is_told_in_one_line(zorp):
    daemon = zorp(ECHO, start=False, arguments=["--pidfile", "/proc/nowhere/here/x.pid"])
    assert daemon.run() == 1
    assert "Cannot use the directory of pid files, create it or give another --pidfile" in daemon.log.text()
    assert "Traceback" not in daemon.log.text()


def test_obsolete_options_start_with_one_warning_each(zorp):
    daemon = zorp(ECHO, arguments=["--autobind-ip", "1.2.3.4", "-v3"])
    daemon.log.wait_for("core.error", 2, "Obsolete command line option ignored", option="--autobind-ip")
    assert daemon.log.text().count("--autobind-ip") == 2      # standard error once, the log once


def test_a_policy_quits_the_instance_with_its_number(zorp):
    # given a session; when its proxy calls quit(7)
    daemon = zorp(ECHO)
    client = daemon.connect()
    client.recv(100)
    client.sendall(b"quit\n")
    # then the instance ends with 7, and the log says who did it
    assert daemon.wait() == 7
    assert "svc/intra/echo:0" in daemon.log.wait_for("core.info", 0, "Policy ends the instance").raw


def test_version_and_help():
    version = program("--version")
    assert version.returncode == 0
    assert version.stdout.startswith("Zorp ")
    assert program("--help").stdout.startswith("Usage:")
    unknown = program("--bogus")
    assert (unknown.returncode, unknown.stderr) == (1, "zorp: Unknown option --bogus\n")


def test_check_policy_loads_and_binds_nothing(zorp):
    # given a policy whose port is taken by a running instance
    daemon = zorp(ECHO)
    # when it is checked
    good = program("--as", "intra", "--check-policy", str(daemon.policy), "--user", str(os.getuid()))
    # then it is usable all the same
    assert good.returncode == 0
    assert "core.error" not in good.stderr
    assert "Policy is usable" in good.stdout
    # and a broken one is not, with file and line
    daemon.write_policy("from Zorp.Core import *\n\nService('x')\n")
    bad = program("--as", "intra", "--check-policy", str(daemon.policy), "--user", str(os.getuid()))
    assert bad.returncode == 2
    assert f"{daemon.policy}:3: " in bad.stderr


OVERLAPPING = """
    from Zorp.Core import *
    from Zorp.Plug import *

    def intra():
        Service("plug", PlugProxy, router=DirectedRouter(SockAddrInet("127.0.0.1", 9)))
        Dispatcher(DBSockAddr(SockAddrInet("127.0.0.1", $port), ZD_PROTO_TCP), service="plug")
        Dispatcher(DBSockAddr(SockAddrInet("0.0.0.0", $port), ZD_PROTO_TCP), service="plug")
    """


def test_dispatchers_that_exclude_each_other_are_told_with_both_places(zorp):
    # given a running instance, and a policy that listens on one address and on all of the same port
    daemon = zorp(ECHO)
    daemon.write_policy(OVERLAPPING)
    complaint = re.compile(f"{re.escape(str(daemon.policy))}:8: Listening on every address leaves none for another "
                           f"dispatcher; .* other_place='{re.escape(str(daemon.policy))}:7'")
    # when it is checked, then the check refuses it
    checked = program("--as", "intra", "--check-policy", str(daemon.policy), "--user", str(os.getuid()))
    assert checked.returncode == 2
    assert complaint.search(checked.stderr)
    # and so do a reload, which changes nothing, and a start
    with daemon.control() as control:
        assert "FAIL" in control.ask("RELOAD WAIT")
    assert complaint.search(daemon.log.text())
    assert daemon.connect().recv(100)
    fresh = zorp(OVERLAPPING, start=False)
    assert fresh.run() == 2
    assert f"{fresh.policy}:8: Listening on every address" in fresh.log.text()


def test_a_reload_that_needs_the_room_of_the_old_policy_says_so(zorp):
    # given an instance that listens on one address; when a reload wants all of the same port
    daemon = zorp(ECHO)
    daemon.write_policy(ECHO.replace('"127.0.0.1", port', '"0.0.0.0", port'))
    with daemon.control() as control:
        answer = control.ask("RELOAD WAIT")
    # then it fails with what is in the way, and the old policy serves on
    assert f"the policy in force listens on 127.0.0.1:{daemon.port}, and the two cannot be open side by side" in answer
    assert daemon.connect().recv(100)


def test_a_dispatcher_that_a_proxy_makes_joins_a_listener_or_is_refused_at_once(zorp):
    # given a policy whose proxies make dispatchers while they run: on an address of the policy, and on another one
    other = free_port()
    daemon = zorp("""
        from Zorp.Core import *
        from Zorp.Plug import *
        from Zorp.Zorp import Dispatch

        class Late(PlugProxy):
            def config(self):
                PlugProxy.config(self)
                for port in ($port, $other):
                    bind = DBSockAddr(SockAddrInet("127.0.0.1", port), ZD_PROTO_TCP)
                    Dispatch("late", bind, 100, None)
                    proxyLog(self, "core.info", 3, "Made;")

        def intra():
            Service("plug", Late, router=DirectedRouter(SockAddrInet("127.0.0.1", 9)))
            Dispatcher(DBSockAddr(SockAddrInet("127.0.0.1", $port), ZD_PROTO_TCP), service="plug")
        """, other=other)
    # when a client comes
    with daemon.connect() as client:
        assert client.recv(1) == b""
    # then the first is there, the second is told at once, and so is what to do
    daemon.log.wait_for("core.policy", 1, "Policy cannot be used")
    assert len(daemon.log.find("core.info", 3, "Made")) == 1
    assert daemon.log.find("core.error", 1, "Error registering dispatch, nothing listens there",
                           dispatch=f"SA(proto=1,addr=AF_INET(127.0.0.1:{other}))")


def test_a_worker_keeps_no_rights_beyond_its_policy(zorp):
    # given a policy that forges nothing; then neither process may configure the network, nor the worker anything
    daemon = zorp(ECHO)
    master, worker = (pathlib.Path(f"/proc/{pid}/status").read_text() for pid in (daemon.pid, daemon.worker_pid()))
    net_admin = 1 << 12
    assert not int(master.split("CapPrm:")[1].split()[0], 16) & net_admin
    assert int(worker.split("CapPrm:")[1].split()[0], 16) == 0
    assert worker.split("NoNewPrivs:")[1].split()[0] == "1"


def test_rules_that_nobody_puts_in_force_are_said_at_a_level_that_everybody_sees(zorp):
    # given rules and no kzorpd, and a verbosity below the usual one
    daemon = zorp("""
        from Zorp.Core import *
        from Zorp.Plug import *
        Zone("all", ["0.0.0.0/0", "::/0"])
        def intra():
            Service("plug", PlugProxy, router=TransparentRouter())
            Rule(dst_port=80, service="plug")
        """, verbosity=2)
    # then the log has the number of rules and the remedy
    record = daemon.log.wait_for("core.error", 2, "Nobody puts the packet rules of this instance in force")
    assert record.fields["rules"] == "1"
    assert "systemctl enable --now kzorp-setup kzorpd" in daemon.log.text()
