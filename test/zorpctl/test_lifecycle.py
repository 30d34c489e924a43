"""start, stop, restart, reload of real instances (zorpctl, observable scenarios 1 to 14, 20 to 35)."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest

from test.support.daemon import wait_until
from test.support.host import PLUG
from test.support.syslog import SyslogReceiver

BROKEN = "from Zorp.Core import *\n\ndef $name(:\n    pass\n"


def serves(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_start_and_stop(host):
    # given an instance line
    port = host.instance("intra")
    # when it is started
    started = host.zorpctl("start", "intra")
    # then a banner, a line, a pid file, and it serves
    assert started.status == 0
    assert started.out.splitlines() == ["Starting Zorp:", "intra#0: Running"]
    assert (host.pid_dir / "zorp-intra#0.pid").exists()
    assert serves(port)
    # when it is stopped
    master = host.process("intra#0").master_pid()
    stopped = host.zorpctl("stop")
    # then nothing of it is left
    assert (stopped.status, stopped.out.splitlines()) == (0, ["Stopping Zorp:", "intra#0: Stopped"])
    assert not (host.pid_dir / "zorp-intra#0.pid").exists()
    wait_until(lambda: not os.path.exists(f"/proc/{master}"), "the end of the master")
    assert not serves(port)


def test_a_second_start_changes_nothing(host):
    host.instance("intra")
    host.zorpctl("start")
    master = host.process("intra#0").master_pid()
    again = host.zorpctl("start", "intra")
    assert (again.status, "Process is already running" in again.out) == (0, True)
    assert host.process("intra#0").master_pid() == master


def test_a_broken_policy_is_reported_at_once(host):
    # given a policy with a syntax error
    host.conf("CHECK_PERMS=0\nSTART_WAIT_TIMEOUT=40\n")
    host.instance("intra", BROKEN)
    # when it is started
    before = time.monotonic()
    outcome = host.zorpctl("start", "intra")
    # then the failure names file and line, and does not cost the start timeout
    assert outcome.status == 1
    assert "intra#0: Failed to start (rc='2')" in outcome.err
    assert "intra.py:3:" in outcome.err
    assert time.monotonic() - before < 30


def test_a_port_that_is_taken_is_named_with_its_place(host):
    # given an instance whose port somebody else has
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        host.instance("intra", PLUG.replace("$port", str(port)))
        # when it is started, then the command says which dispatcher it is, and what to do
        outcome = host.zorpctl("start", "intra")
    assert outcome.status == 1
    assert (f"intra#0: {host.etc}/intra.py:10: Error binding to interface; "
            f"bind='SA(proto=1,addr=AF_INET(127.0.0.1:{port}))', error='Address already in use'; "
            "stop what listens there") in outcome.err


def test_an_address_that_is_not_there_yet(host):
    # given a policy that listens on an address which this host does not have
    host.instance("fixed", PLUG.replace('"127.0.0.1", $port', '"192.0.2.77", $port'))
    # when it is started, then the command says what follows addresses
    outcome = host.zorpctl("start", "fixed")
    assert outcome.status == 1
    assert "error='Cannot assign requested address'; bind to an address that this host has" in outcome.err
    assert 'give DBIface(INTERFACE, PORT, ip=ADDRESS)' in outcome.err
    # and with that it starts
    host.instance("following", PLUG.replace('DBSockAddr(SockAddrInet("127.0.0.1", $port), ZD_PROTO_TCP)',
                                            'DBIface("lo", $port, ip="192.0.2.77", protocol=ZD_PROTO_TCP)'))
    outcome = host.zorpctl("start", "following")
    assert (outcome.status, outcome.err) == (0, "")


def test_several_processes(host):
    # given three processes of one instance
    host.instance("intra", zorpctl_args="--num-of-processes 3")
    assert host.zorpctl("start").status == 0
    # when one of them is asked for
    one = host.zorpctl("status", "intra#1")
    # then exactly its line comes
    assert [line.split(":")[0] for line in one.out.splitlines()] == ["intra#1"]
    # and it cannot be stopped on its own
    refused = host.zorpctl("stop", "intra#1")
    assert refused.status == 1
    assert "Processes can not be stopped individualy" in refused.err
    assert host.process("intra#1").is_running()


def test_stop_where_nothing_runs(host):
    host.instance("intra")
    outcome = host.zorpctl("stop")
    assert outcome.status == 0
    assert "intra#0: Process not running" in outcome.out


def test_a_daemon_that_does_not_end_in_time(host):
    # given a master that ignores TERM because it is stopped
    host.conf("CHECK_PERMS=0\nSTOP_CHECK_TIMEOUT=1\n")
    host.instance("intra")
    host.zorpctl("start")
    master = host.process("intra#0").master_pid()
    os.kill(master, signal.SIGSTOP)
    # when it is stopped
    outcome = host.zorpctl("stop")
    # then the failure says whom we waited for
    assert outcome.status == 1
    assert f"Did not exit in time (pid='{master}', signo='15', timeout='1')" in outcome.err
    # and force-stop ends it
    forced = host.zorpctl("force-stop")
    assert (forced.status, "intra#0: Stopped" in forced.out) == (0, True)
    assert not host.process("intra#0").is_running()


def test_no_auto_start_waits_for_force_start(host):
    port = host.instance("intra", zorpctl_args="--no-auto-start")
    outcome = host.zorpctl("start")
    assert outcome.status == 0
    assert "Not started, because no-auto-start is set" in outcome.out
    assert not serves(port)
    assert host.zorpctl("force-start").status == 0
    assert serves(port)


def test_without_auto_restart_a_crash_is_not_repaired(host):
    host.instance("intra", zorpctl_args="--no-auto-restart")
    host.zorpctl("start")
    os.kill(host.process("intra#0").worker_pid(), signal.SIGKILL)
    wait_until(lambda: not host.process("intra#0").is_running(), "the end of the instance")


def test_a_changed_policy_is_not_reloaded_until_it_is(host):
    # given a running instance whose policy file changes
    host.instance("intra")
    host.zorpctl("start")
    os.utime(host.etc / "intra.py", (1, 1))
    # then status says so, until a reload
    assert "intra#0: running, policy NOT reloaded, " in host.zorpctl("status").out
    reloaded = host.zorpctl("reload")
    assert (reloaded.status, "intra#0: Reload successful" in reloaded.out) == (0, True)
    assert "NOT reloaded" not in host.zorpctl("status").out


def test_a_failed_reload_says_why_and_leaves_traffic_alone(host):
    # given a running instance whose policy is broken on disk
    port = host.instance("intra")
    host.zorpctl("start")
    host.policy("intra", BROKEN)
    # when it is reloaded
    outcome = host.zorpctl("reload")
    # then the failure has a reason and the old policy serves on
    assert outcome.status == 1
    assert "intra#0: Reload failed" in outcome.err
    assert "intra.py:3" in outcome.err
    assert serves(port)


def test_reload_or_restart_starts_what_does_not_run(host):
    port = host.instance("intra")
    outcome = host.zorpctl("reload-or-restart", "intra")
    assert outcome.status == 0
    assert serves(port)


def test_reload_or_restart_says_why_it_restarts(host):
    # given a running instance, and a policy that cannot be beside the one in force: every address of its port
    port = host.instance("intra")
    host.zorpctl("start")
    policy = (host.etc / "intra.py").read_text()
    assert '"127.0.0.1"' in policy
    (host.etc / "intra.py").write_text(policy.replace('"127.0.0.1"', '"0.0.0.0"'))
    # when it is reloaded or restarted
    outcome = host.zorpctl("reload-or-restart", "intra")
    # then it is restarted, which succeeds, and why it had to be is said
    assert (outcome.status, "intra#0: Running" in outcome.out) == (0, True)
    assert "intra#0: warning: restarting, because of: Reload failed; reason=" in outcome.err
    assert "the two cannot be open side by side" in outcome.err
    assert serves(port)


def test_restart_serves_afterwards(host):
    port = host.instance("intra")
    host.zorpctl("start")
    before = host.process("intra#0").master_pid()
    assert host.zorpctl("restart").status == 0
    assert host.process("intra#0").master_pid() != before
    assert serves(port)


def test_restart_does_not_stop_a_good_policy_for_a_broken_one(host):
    # given two instances, one of which has a broken policy on disk by now
    ports = [host.instance("good"), host.instance("bad")]
    assert host.zorpctl("start").status == 0
    good, bad = (host.process(f"{name}#0").master_pid() for name in ("good", "bad"))
    host.policy("bad", BROKEN)
    # when all are restarted
    outcome = host.zorpctl("restart")
    # then that one goes on as it is, with the reason, and the other is new
    assert outcome.status == 1
    assert "bad#0: Not restarted, the policy is not usable (rc='2')" in outcome.err
    assert "bad.py:3: " in outcome.err
    assert "good#0: Running" in outcome.out
    assert host.process("bad#0").master_pid() == bad
    assert host.process("good#0").master_pid() not in (None, good)
    assert all(map(serves, ports))
    # nor does reload-or-restart stop it
    assert host.zorpctl("reload-or-restart", "bad").status == 1
    assert host.process("bad#0").master_pid() == bad
    # unless it is forced
    forced = host.zorpctl("restart", "--force", "bad")
    assert (forced.status, "bad#0: Failed to start (rc='2')" in forced.err) == (1, True)
    assert not serves(ports[1])


def test_a_left_over_pid_file(host):
    # given a master that was killed
    port = host.instance("intra")
    host.zorpctl("start")
    pid = host.process("intra#0").worker_pid()
    master = host.process("intra#0").master_pid()
    os.kill(master, signal.SIGKILL)
    wait_until(lambda: not host.process("intra#0").is_running(), "the end of the master")
    wait_until(lambda: not serves(port), "the end of the worker")
    # then status names the stale number, and start works
    status = host.zorpctl("status")
    assert status.status == 1
    assert f"intra#0: Invalid pid file no running process with pid {pid}!" in status.err
    assert host.zorpctl("start").status == 0
    assert serves(port)


def test_a_pid_file_that_names_a_stranger_hurts_nobody(host):
    # given a pid file with the pid of an unrelated process
    host.instance("intra")
    stranger = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    (host.pid_dir / "zorp-intra#0.pid").write_text(f"{stranger.pid}\n")
    # when the instance is stopped, even with force
    assert host.zorpctl("stop").status == 0
    assert host.zorpctl("force-stop").status == 0
    # then that process lives
    assert stranger.poll() is None
    stranger.kill()
    stranger.wait()


@pytest.fixture
def full_disk(host):
    """The pid directory on a disk without a free byte."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4k", "full", host.pid_dir], check=True)
    (host.pid_dir / "filler").write_bytes(b"x" * 4096)
    yield host.pid_dir
    host.kill_all()
    subprocess.run(["umount", "-l", host.pid_dir], check=True)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can mount a disk to fill")
def test_a_full_disk_for_pid_files(host, full_disk):
    # given no room for a pid file; when the instance is started, then it serves, and the log says what is missing
    port = host.instance("intra", zorp_args=f"--log-socket {host.directory}/log.sock")
    with SyslogReceiver(host.directory / "log.sock") as syslog:
        assert host.zorpctl("start").status == 0
        syslog.wait_for("Cannot write pid file; file=")
        assert serves(port)
    # and it is controllable as ever, because the lock says that it runs
    assert "intra#0: running" in host.zorpctl("status").out
    assert host.zorpctl("reload").status == 0
    assert serves(port)
    assert sorted(path.name for path in full_disk.glob("*.pid*")) == ["zorp-intra#0.pid.lock"]
    assert host.zorpctl("stop").status == 0
    assert not serves(port)


def test_one_bad_line_leaves_the_others_controllable(host):
    port = host.instance("intra")
    host.instance("other", zorpctl_args="--nonsense")
    outcome = host.zorpctl("start")
    assert outcome.status == 1
    assert "instances.conf:2:" in outcome.err
    assert "intra#0: Running" in outcome.out
    assert serves(port)
    assert host.zorpctl("status", "intra").status == 0


def test_obsolete_options_of_old_lines_are_warned_of(host):
    host.instance("blue", zorp_args="-v3 --autobind-ip 169.254.0.1")
    outcome = host.zorpctl("start")
    assert outcome.status == 0
    assert "instances.conf:1: --autobind-ip is obsolete and ignored" in outcome.err


def test_instances_from_a_list_file(host):
    for name in ("a", "b", "c"):
        host.instance(name)
    (host.directory / "list").write_text("a\nb\n")
    outcome = host.zorpctl("start", f"@{host.directory}/list")
    assert outcome.status == 0
    assert [host.process(f"{name}#0").is_running() for name in "abc"] == [True, True, False]
    missing = host.zorpctl("status", "@/nonexistent")
    assert (missing.status, missing.err.splitlines()) == (1, ["Error opening instance list file: /nonexistent."])


def test_an_instance_started_by_hand_is_seen_and_stopped(host):
    # given an instance that instances.conf does not know
    policy = host.policy("extra", PLUG)
    program = subprocess.Popen([str(host.sbin / "zorp"), "--as", "extra", "--policy", str(policy), "--foreground",
                                "--no-syslog", "--pid-dir", str(host.pid_dir)], stderr=subprocess.DEVNULL)
    wait_until(lambda: host.process("extra").worker_pid(), "the pid file")
    # then zorpctl shows and stops it
    assert host.zorpctl("status").out.startswith("extra: running, ")
    assert "extra: Stopped" in host.zorpctl("stop", "extra").out
    assert program.wait(10) == 0


def test_an_instance_taken_out_of_the_file_can_still_be_stopped(host):
    host.instance("intra")
    host.zorpctl("start")
    (host.etc / "instances.conf").write_text("")
    assert "intra#0: Stopped" in host.zorpctl("stop").out


def test_append_args_reach_every_instance(host):
    host.conf('CHECK_PERMS=0\nZORP_APPEND_ARGS="--verbose=6"\n')
    host.instance("intra")
    host.zorpctl("start")
    assert "verbose_level=6" in host.zorpctl("log").out


@pytest.mark.parametrize("section", ["", "[zorpctl]\n"], ids=["3.x", "7.x"])
def test_both_forms_of_zorpctl_conf(host, section):
    host.conf(f"{section}CHECK_PERMS=0\nPRODUCT_NAME=Wall\n")
    host.instance("intra")
    assert host.zorpctl("start").out.startswith("Starting Wall:")


def test_wrong_permissions_are_a_warning_unless_switched_off(host):
    # given a configuration directory with another mode than the configuration asks for
    host.conf(f"CONFIG_DIR={host.etc}\nCONFIG_DIR_MODE=0700\n")
    host.etc.chmod(0o755)
    host.instance("intra")
    outcome = host.zorpctl("status")
    assert f"Permissions not correct on sysconfdir ({host.etc}). Required user=root group=zorp mode=700." in outcome.err
    host.conf("CHECK_PERMS=0\n")
    assert "Permissions" not in host.zorpctl("status").err


def test_nothing_is_started_from_a_directory_that_anybody_can_write(host):
    host.conf(f"CONFIG_DIR={host.etc}\n")
    host.instance("intra")
    host.etc.chmod(0o777)
    outcome = host.zorpctl("start")
    assert outcome.status == 1
    assert "can be changed by others" in outcome.err
    assert not host.process("intra#0").is_running()


def test_a_missing_pid_directory_is_created(host):
    host.instance("intra")
    host.pid_dir.rmdir()
    host.conf("CHECK_PERMS=0\nPIDFILE_DIR_OWNER=root\nPIDFILE_DIR_GROUP=root\n")
    assert host.zorpctl("start").status == 0
    assert host.pid_dir.stat().st_mode & 0o777 == 0o770


def test_check_loads_policies_without_serving(host):
    port = host.instance("good")
    host.instance("bad", BROKEN)
    outcome = host.zorpctl("check")
    assert outcome.status == 1
    assert "good: Policy is usable;" in outcome.out
    assert "bad: Policy is not usable (rc='2')" in outcome.err
    assert "bad.py:3" in outcome.out + outcome.err
    assert not serves(port)


def test_explain_asks_the_policy_of_the_instance(host):
    port = host.instance("good")
    outcome = host.zorpctl("explain", "good", "tcp", "127.0.0.9", f"127.0.0.1:{port}")
    assert outcome.status == 0, outcome.err
    assert f"TCP 127.0.0.9:1024 -> 127.0.0.1:{port}, interface unknown" in outcome.out
    assert host.zorpctl("explain", "good", "service", "nosuch").status == 1
    assert host.zorpctl("explain", "good").status == 2
    assert not serves(port)


def test_reload_with_revocation_says_how_many_were_ended(host):
    host.instance("good")
    assert host.zorpctl("start").status == 0
    outcome = host.zorpctl("reload", "--revoke", "good")
    assert (outcome.status, "Reload successful; revoked='0'" in outcome.out) == (0, True)


def test_reload_with_revocation_has_a_line_for_every_process(host):
    # given an instance of two processes
    host.instance("two", zorpctl_args="--num-of-processes 2")
    # when it does not run, then both lines say so
    outcome = host.zorpctl("reload", "--revoke", "two")
    assert (outcome.status, outcome.err.splitlines()) == (
        1, ["two#0: Process not running", "two#1: Process not running"])
    # when it runs, then both have a line, and the number of sessions is said once
    assert host.zorpctl("start").status == 0
    outcome = host.zorpctl("reload", "--revoke", "two")
    assert (outcome.status, outcome.out.splitlines()[1:]) == (
        0, ["two#0: Reload successful; revoked='0'", "two#1: Reload successful"])


def test_a_missing_instances_conf(host):
    (host.etc / "instances.conf").unlink()
    outcome = host.zorpctl("start")
    assert outcome.status == 1
    assert f"No such file or directory {host.etc}/instances.conf" in outcome.err


def test_an_instance_without_pid_file_is_seen_reloaded_and_stopped(host):
    # given an instance whose service manager knows its pid, so that there is no pid file
    host.instance("intra")
    program = subprocess.Popen(
        [str(host.sbin / "zorp"), "--as", "intra", "--policy", str(host.etc / "intra.py"), "--num-of-processes", "1",
         "--process-mode", "systemd-notify", "--pid-dir", str(host.pid_dir), "--log-socket", "/nonexistent"])
    wait_until(lambda: host.zorpctl("status").status == 0, "the instance")
    assert not list(host.pid_dir.glob("*.pid"))
    # then zorpctl knows its worker, and every command finds it
    assert re.search(r"^intra#0: running, \d+ threads active, pid \d+$", host.zorpctl("status").out, re.MULTILINE)
    assert host.zorpctl("reload").out.splitlines()[1:] == ["intra#0: Reload successful"]
    assert "verbose_level=" in host.zorpctl("log").out
    assert "intra#0: Stopped" in host.zorpctl("stop").out
    assert program.wait(10) == 0


def test_who_starts_a_host_without_instances_is_told_so(host):
    outcome = host.zorpctl("start")
    assert (outcome.status, outcome.out) == (0, "Starting Zorp:\n")
    assert outcome.err == f"There is no instance; name one in {host.etc}/instances.conf\n"
