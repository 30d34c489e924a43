"""Whose word packet rules follow: what the user of the instances could forge or hold counts for nothing."""

import contextlib
import dataclasses
import fcntl
import json
import os

import pytest

from test.support.kzorpd import kzorpd
from test.support.leaks import connected
from test.support.net import SERVER, net, policy
from test.support.unprivileged import NOBODY, let_everybody_in, run_unprivileged
from Zorp.netfilter.own_files import NotOurs, check_directory, only_kzorpd, opened, prepare_directory, running_kzorpd
from Zorp.netfilter.policies import describe, read_instances
from Zorp.netfilter.store import FILE_NAME, LOCK_NAME, Store
from Zorp.rules.description import to_json

__all__ = ["kzorpd", "net"]
RULE = 'Rule(rule_id=1, service="{}", proto=6, dst_port=81)'


def forward(kzorpd) -> None:
    """Start it with a policy that forwards."""
    kzorpd.namespace.sysctl("net.ipv4.ip_forward", "1")
    kzorpd.write_policy(rules=RULE.format("fwd"))
    kzorpd.start()


# ---------------------------------------------------------------- what is ours

def give_away(path):
    os.chown(path, NOBODY, NOBODY)


def give_to_group(path):
    os.chown(path, 0, NOBODY)
    path.chmod(0o770)


def open_to_all(path):
    path.chmod(0o777)


@pytest.mark.parametrize("level", ["itself", "above"])
@pytest.mark.parametrize(("spoil", "why"), [
    (give_away, f"belongs to user {NOBODY}"), (give_to_group, f"may be written by group {NOBODY}"),
    (open_to_all, "may be written by everybody")], ids=["owner", "group", "everybody"])
def test_a_directory_that_somebody_else_may_change_is_refused(tmp_path, spoil, why, level):
    # given a directory of user 0, which is ours
    directory = tmp_path / "above" / "itself"
    directory.mkdir(parents=True)
    check_directory(str(directory))
    # when it, or the one above it, is somebody else's, then it is refused, and it is said why
    spoil(directory if level == "itself" else directory.parent)
    with pytest.raises(NotOurs, match=why):
        check_directory(str(directory))


def test_below_a_sticky_directory_nobody_moves_ours(tmp_path):
    directory = tmp_path / "above" / "itself"
    directory.mkdir(parents=True)
    directory.parent.chmod(0o1777)
    check_directory(str(directory))


def test_a_directory_that_is_missing_is_made_for_everybody_to_enter_and_ours_to_write(tmp_path):
    mask = os.umask(0o077)
    try:
        prepare_directory(str(tmp_path / "above" / "itself"))
    finally:
        os.umask(mask)
    assert (tmp_path / "above" / "itself").stat().st_mode & 0o7777 == 0o755


@pytest.mark.timeout(20)
@pytest.mark.parametrize("spoil", [
    give_away, give_to_group, open_to_all, lambda path: os.link(path, f"{path}.x"),
    lambda path: (path.rename(f"{path}.x"), os.symlink(f"{path}.x", path)), lambda path: (path.unlink(), path.mkdir()),
    lambda path: (path.unlink(), os.mkfifo(path))], ids=["owner", "group", "all", "name", "link", "directory", "pipe"])
def test_a_file_that_somebody_else_may_have_written_is_refused_and_nobody_waits(tmp_path, spoil):
    path = tmp_path / "file"
    os.close(opened(str(path), os.O_RDWR | os.O_CREAT))
    os.close(opened(str(path), os.O_RDONLY))
    spoil(path)
    with pytest.raises(OSError, match=r"belongs|written|plain file|symbolic"):
        opened(str(path), os.O_RDONLY)


def test_whether_a_kzorpd_runs_is_said_by_its_lock(tmp_path):
    directory = str(tmp_path)
    assert running_kzorpd(directory) is None
    with only_kzorpd(directory):
        assert running_kzorpd(directory) == str(os.getpid())
        with pytest.raises(OSError, match="kzorpd is running already"), only_kzorpd(directory):
            pytest.fail("two of them")
    assert running_kzorpd(directory) is None


# ---------------------------------------------------------------- the state

def forge(directory) -> None:
    """Put a state in place that the user of the instances has written: the instance has handed over a PFService."""
    path = directory / FILE_NAME
    value = json.loads(path.read_text())
    for part in value["instances"]:
        part["handed_over"] = True
        for rule in part["description"]["rules"]:
            rule["service"] = "fwd"
    path.unlink()
    path.write_text(json.dumps({**value, "settled": True}))
    give_away(path)


@pytest.mark.netns
def test_a_forged_state_is_nothing_to_a_kzorpd_that_starts(kzorpd):
    # given a policy that denies, in force once
    kzorpd.write_policy(rules=RULE.format("no"))
    kzorpd.start()
    rules = kzorpd.rules()
    kzorpd.stop()
    # when its state has been forged, and kzorpd starts
    forge(kzorpd.directory)
    mark = kzorpd.log.mark()
    kzorpd.start()
    # then it says so, and what is in force is what the policy says
    line = kzorpd.log.wait_for("core.error", 1, "State of the packet rules cannot be read", after=mark)
    assert f"belongs to user {NOBODY}" in str(line)
    assert kzorpd.rules() == rules
    assert kzorpd.say(b"RELOAD\n") == b"OK"
    assert kzorpd.rules() == rules


@pytest.mark.netns
def test_a_host_that_boots_does_not_fall_back_to_a_forged_state(net):
    # given a policy that denies, in force once
    net.firewall.add_zorp(policy("PFService('fwd')\nDenyService('no')\nRule(proto=6, dst_port=81, service='no')"))
    daemon, = net.firewall.daemons
    net.firewall.setup("load")
    net.server.listen(SERVER, 81).answer_all(b"hello")
    # when the state has been forged, the policy cannot be loaded, and the host boots
    forge(net.firewall.directory)
    daemon.policy.write_text("broken(\n")
    outcome = net.firewall.setup("boot", check=False)
    # then no rules are stored, and nothing passes
    assert outcome.returncode == 1
    assert f"belongs to user {NOBODY}" in outcome.stderr
    assert "no packet rules are stored" in outcome.stderr
    assert connected(net.client, [(SERVER, 81)], within_s=0.5) == []


@pytest.mark.netns
@pytest.mark.parametrize("key", ["state_dir", "pid_dir"])
def test_kzorpd_does_not_start_where_somebody_else_may_write(kzorpd, key):
    # given a directory of the user of the instances
    directory = kzorpd.directory / "theirs"
    directory.mkdir()
    give_away(directory)
    kzorpd.configure(f"{key}: {directory}")
    # when kzorpd starts there, then it ends with one line that names the directory, the owner and the remedy
    outcome = kzorpd.command("--no-syslog")
    assert outcome.returncode == 1
    line, = (line for line in outcome.stderr.splitlines() if line.startswith("kzorpd: "))
    assert str(directory) in line
    assert f"belongs to user {NOBODY}; it must belong to user 0" in line
    # and where it would keep its state, kzorp-setup changes nothing, and closes the host when it boots
    if key == "state_dir":
        assert "belongs to user" in kzorpd.command("load", program="kzorp-setup").stderr
        assert kzorpd.rules() == []
        booted = kzorpd.command("boot", program="kzorp-setup")
        assert (booted.returncode, "closed: nothing is forwarded" in booted.stdout) == (1, True)
        assert kzorpd.rules() != []


# ---------------------------------------------------------------- locks and the socket

@pytest.mark.netns
def test_the_user_of_the_instances_holds_no_lock_and_moves_nothing(kzorpd):
    # given a kzorpd that runs, in a directory that everybody may enter
    kzorpd.start()
    let_everybody_in(kzorpd.directory)
    names = ("kzorpd", "kzorpd.pid", FILE_NAME, LOCK_NAME)

    def attempts():
        done = []
        for name in names:
            path = str(kzorpd.directory / name)
            with contextlib.suppress(PermissionError):
                os.rename(path, path + ".away")
                done.append(f"moved {name}")
            with contextlib.suppress(OSError):
                fcntl.flock(os.open(path, os.O_RDONLY), fcntl.LOCK_SH | fcntl.LOCK_NB)
                done.append(f"held {name}")
        return done

    # when the user of the instances tries to move or lock what is there, then it can do nothing
    assert all((kzorpd.directory / name).exists() for name in names)
    assert run_unprivileged(attempts) == []


@pytest.mark.netns
@pytest.mark.parametrize("command", ["load", "unload"])
def test_nothing_is_changed_beside_a_kzorpd_whose_socket_is_gone(kzorpd, command):
    # given a kzorpd that runs and cannot be asked
    forward(kzorpd)
    rules = kzorpd.rules()
    os.rename(kzorpd.socket, kzorpd.socket + ".away")
    # when the administrator wants other rules
    kzorpd.write_policy(rules=RULE.format("no"))
    outcome = kzorpd.command(command, program="kzorp-setup")
    # then nothing is done that this kzorpd would undo, and it is said who is in the way
    assert (outcome.returncode, outcome.stdout) == (1, "")
    assert f"kzorpd runs (pid {int((kzorpd.directory / 'kzorpd.pid').read_text())})" in outcome.stderr
    assert kzorpd.rules() == rules
    # and without it, it is done
    kzorpd.stop()
    assert kzorpd.command(command, program="kzorp-setup").returncode == 0
    assert kzorpd.rules() != rules


# ---------------------------------------------------------------- instances that have stopped

@pytest.mark.netns
@pytest.mark.parametrize("way", ["reload", "load", "start"])
def test_rules_of_a_stopped_instance_follow_its_policy_file(kzorpd, way):
    # given an instance that handed over what it forwards, and has stopped; its rules stay
    forward(kzorpd)
    wanted = describe(read_instances(str(kzorpd.directory)).lines)["intra"]
    kzorpd.ask("instance", description=to_json(wanted))
    rules = kzorpd.rules()
    kzorpd.ask("stopped", instance="intra")
    assert kzorpd.rules() == rules
    # when its policy file denies that, and the policies are read again
    kzorpd.write_policy(rules=RULE.format("no"))
    if way == "reload":
        assert kzorpd.say(b"RELOAD\n") == b"OK"
    elif way == "load":
        assert kzorpd.command("load", program="kzorp-setup").returncode == 0
    else:
        kzorpd.stop()
        kzorpd.start()
    # then what is in force is what the file says
    assert kzorpd.rules() != rules
    assert "Service: no\n" in kzorpd.command("-e", "tcp", "10.1.0.2", "10.2.0.2", "lo", "--dst-port", "81",
                                             program="kzorp").stdout


@pytest.mark.netns
def test_rules_of_an_instance_that_runs_do_not_follow_its_policy_file(kzorpd):
    forward(kzorpd)
    wanted = describe(read_instances(str(kzorpd.directory)).lines)["intra"]
    kzorpd.ask("instance", description=to_json(wanted))
    rules = kzorpd.rules()
    kzorpd.write_policy(rules=RULE.format("no"))
    assert kzorpd.say(b"RELOAD\n") == b"OK"
    assert kzorpd.rules() == rules
    entry, = Store(str(kzorpd.directory)).read().entries
    assert dataclasses.replace(entry, handed_over=False) != entry
