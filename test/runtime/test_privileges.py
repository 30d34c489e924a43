"""Capabilities, users, limits: what a process may still do."""

import grp
import os
import pathlib
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile

import pytest

from test.runtime.policies import ECHO
from test.support.daemon import Daemon, wait_until
from Zorp.process import capabilities
from Zorp.runtime import privileges
from Zorp.runtime.options import Mode, Options, parse

RAW, BIND, ADMIN = 1 << 13, 1 << 10, 1 << 12

TEXTS = {
    "default of the original": ("cap_net_bind_service=p cap_net_admin,cap_net_raw=ip", RAW | BIND | ADMIN),
    "with signs": ("cap_net_raw+ep", RAW),
    "taken away again": ("cap_net_raw,cap_net_admin=p cap_net_admin-p", RAW),
    "all": ("all=p", capabilities.ALL),
    "everything": ("=ep", capabilities.ALL),
    "nothing": ("", 0),
    "empty set": ("cap_net_raw=", 0),
}


@pytest.mark.parametrize(("text", "bits"), TEXTS.values(), ids=TEXTS)
def test_texts_of_capabilities(text, bits):
    assert capabilities.parse(text) == bits


@pytest.mark.parametrize("text", ["cap_nosuch=p", "cap_net_raw", "=x", "cap_net_raw=p cap_"])
def test_bad_texts_of_capabilities(text):
    with pytest.raises(ValueError, match=r"clause '.*' is not|no capability is called"):
        capabilities.parse(text)


def test_names():
    assert capabilities.names_of(RAW | BIND) == ["cap_net_bind_service", "cap_net_raw"]


def test_nobody_gets_the_right_to_configure_the_network():
    wanted = privileges.prepare(parse(["-F", "--user", str(os.getuid()), "--caps", "cap_net_admin,cap_net_raw=ip"]))
    assert wanted.capabilities == RAW


def test_bad_capabilities_stop_the_start():
    with pytest.raises(privileges.SetupError, match="Error parsing capabilities"):
        privileges.prepare(parse(["-F", "--user", str(os.getuid()), "--caps", "x"]))


def test_users_and_groups_are_looked_up():
    root = pwd.getpwuid(0)
    wanted = privileges.prepare(Options(user=root.pw_name, group=grp.getgrgid(0).gr_name))
    assert (wanted.uid, wanted.gid, wanted.user_name) == (0, 0, root.pw_name)
    assert privileges.prepare(Options(user="12345")).uid == 12345
    with pytest.raises(privileges.SetupError, match="Error resolving group; group='nosuchgroup'"):
        privileges.prepare(Options(user="0", group="nosuchgroup"))


@pytest.mark.parametrize("mode", [Mode.FOREGROUND, Mode.SAFE_BACKGROUND])
def test_root_without_options_becomes_zorp(monkeypatch, mode):
    # given user 0 on a host without a user zorp
    monkeypatch.setattr(os, "getuid", lambda: 0)
    monkeypatch.setattr(privileges, "DEFAULT_USER", "nosuchuser")
    # then an instance does not start in any mode, and says what to do; a check goes on
    with pytest.raises(privileges.SetupError, match="There is no user 'nosuchuser' to run as; create it with"):
        privileges.prepare(Options(mode=mode))
    assert privileges.prepare(Options(mode=mode, action="check")).uid is None


def test_a_group_alone_does_not_keep_root(monkeypatch):
    # given user 0 on a host with a user to become
    monkeypatch.setattr(os, "getuid", lambda: 0)
    monkeypatch.setattr(privileges, "DEFAULT_USER", "nobody")
    # when only a group is named, then the user is the usual one all the same
    wanted = privileges.prepare(Options(group="12345"))
    assert (wanted.uid, wanted.gid) == (pwd.getpwnam("nobody").pw_uid, 12345)
    # and where there is no such user, nothing starts
    monkeypatch.setattr(privileges, "DEFAULT_USER", "nosuchuser")
    with pytest.raises(privileges.SetupError, match="There is no user 'nosuchuser'"):
        privileges.prepare(Options(group="12345"))


@pytest.mark.parametrize("kind", ["user", "group"])
@pytest.mark.parametrize("number", ["4294967295", "4294967296", "99999999999999999999", "²", "-1"])
def test_a_number_that_the_kernel_takes_for_none_is_refused(kind, number):
    options = Options(**{"user": "0", "group": "0", kind: number})
    with pytest.raises(privileges.SetupError, match=f"Error resolving {kind}; {kind}='{number}'"):
        privileges.prepare(options)


def in_a_child(program: str) -> str:
    """Run a piece of Python in a process of its own, from the project's directory; return what it prints."""
    root = pathlib.Path(privileges.__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=root, timeout=20)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_limited_capabilities_are_gone_from_every_set():
    shown = in_a_child(
        "from Zorp.process import capabilities\n"
        "capabilities.limit(1 << 13)\n"
        "capabilities.forbid_new_privileges()\n"
        "print(*[line for line in open('/proc/self/status') if line.startswith(('Cap', 'NoNew'))], sep='')")
    sets = dict(line.split(":\t") for line in shown.splitlines() if line)
    for name in ("CapPrm", "CapEff", "CapInh", "CapAmb"):
        assert int(sets[name], 16) & ~RAW == 0
    assert sets["NoNewPrivs"] == "1"


def test_a_descriptor_limit_that_is_refused_is_a_message_and_not_the_end():
    shown = in_a_child(
        "import resource\n"
        "from Zorp.runtime import privileges\n"
        "print(privileges.raise_descriptor_limit(1 << 40))\n"
        "print(resource.getrlimit(resource.RLIMIT_NOFILE)[0] == resource.getrlimit(resource.RLIMIT_NOFILE)[1])")
    message, raised = shown.splitlines()
    assert message.startswith("Error setting file number limit; limit='1099511627776', error='")
    assert "', used='" in message
    assert raised == "True"


AS_ROOT = pytest.mark.skipif(os.getuid() != 0, reason="only user 0 can become another")


@pytest.fixture
def nobodys():
    """A daemon whose directory belongs to user nobody, all the way down from the root."""
    directory = pathlib.Path(tempfile.mkdtemp(prefix="zorp-test-"))
    nobody = pwd.getpwnam("nobody")
    directory.chmod(0o755)
    os.chown(directory, nobody.pw_uid, nobody.pw_gid)
    daemon = Daemon(directory, ECHO, ports="81", port=81,
                    arguments=["--user", "nobody", "--group", str(nobody.pw_gid), "--enable-core"])
    daemon.policy.write_text(daemon.policy.read_text().replace("127.0.0.1", f"127.77.{os.getpid() % 250 + 1}.1"))
    daemon.policy.chmod(0o644)
    yield daemon
    daemon.end()
    shutil.rmtree(directory)


@AS_ROOT
def test_an_instance_runs_as_the_user_and_still_binds_low_ports(nobodys):
    # given an instance started by user 0 for user nobody, with a listener on a low port of an address of its own
    daemon = nobodys.start()
    nobody = pwd.getpwnam("nobody")
    # then no process is user 0 any more, in any of its ids or groups
    for pid in (daemon.pid, daemon.worker_pid()):
        status = dict(line.split(":\t") for line in pathlib.Path(f"/proc/{pid}/status").read_text().splitlines()
                      if ":\t" in line)
        assert set(status["Uid"].split()) == {str(nobody.pw_uid)}
        assert set(status["Gid"].split()) == {str(nobody.pw_gid)}
        assert int(status["CapEff"], 16) & ~(RAW | BIND) == 0
        # and it may leave a core file, which a change of user forbids: the kernel shows it by the owner
        assert os.stat(f"/proc/{pid}/stat").st_uid == nobody.pw_uid
    # and a reloaded policy may have another low port
    before = daemon.worker_pid()
    daemon.policy.write_text(daemon.policy.read_text().replace("(81,)", "(82,)"))
    daemon.kill(signal.SIGHUP)
    wait_until(lambda: daemon.worker_pid() != before, f"the new worker\n{daemon.log.text()}")


@AS_ROOT
def test_a_new_root_directory(zorp, tmp_path):
    # given a root directory that holds nothing but the policy
    root = tmp_path / "root"
    root.mkdir()
    daemon = zorp(ECHO, start=False, arguments=["--chroot", str(root), "--policy", "/policy.py"])
    (root / "policy.py").write_text(daemon.policy.read_text())
    # then the instance lives there, with its pid file and control socket outside
    daemon.start()
    assert os.readlink(f"/proc/{daemon.worker_pid()}/root") == str(root)
    assert os.readlink(f"/proc/{daemon.worker_pid()}/cwd") == str(root)
    assert daemon.connect().recv(100)
    with daemon.control() as control:
        assert control.ask("GETVALUE info.policy.file") == "/policy.py"
    assert daemon.stop() == 0
    assert not daemon.pid_file().exists()
