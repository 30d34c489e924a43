"""A real Postfix on loopback: its own configuration, queue and mailbox, gone afterwards.

    with Postfix() as mta:
        ... SMTP to ("127.0.0.1", mta.port) ...
        mail = mta.wait_for_mails(1)[0]

Mail for any recipient at example.com is delivered into one maildir, byte for byte with LF line
ends, after the trace headers that Postfix adds.  Needs root, as every Postfix does.
"""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

from test.support.ports import free_port

START_SECONDS = 20
DOMAIN = "example.com"

_MAIN = """\
compatibility_level = 3.6
queue_directory = {dir}/queue
data_directory = {dir}/data
mail_owner = postfix
setgid_group = postdrop
myhostname = origin.example.com
mydestination =
inet_interfaces = {address}
inet_protocols = all
mynetworks = 127.0.0.0/8, 10.0.0.0/8, 172.16.0.0/12, 203.0.113.0/24, [::1]/128, [fd00::]/8
maillog_file = {dir}/log/postfix.log
maillog_file_prefixes = {dir}
virtual_mailbox_domains = {domain}
virtual_mailbox_base = {dir}/mail
virtual_mailbox_maps = static:inbox/
virtual_minimum_uid = 1
virtual_uid_maps = static:{uid}
virtual_gid_maps = static:{gid}
virtual_mailbox_limit = 0
message_size_limit = 0
smtpd_delay_reject = no
smtpd_client_connection_count_limit = 0
smtpd_client_connection_rate_limit = 0
smtpd_peername_lookup = no
smtpd_recipient_restrictions = reject_unauth_destination
smtpd_timeout = 60
default_process_limit = 60
in_flow_delay = 0
{extra}
"""

_MASTER = """\
{port} inet n - n - - smtpd
cleanup unix n - n - 0 cleanup
qmgr unix n - n 300 1 qmgr
rewrite unix - - n - - trivial-rewrite
bounce unix - - n - 0 bounce
defer unix - - n - 0 bounce
trace unix - - n - 0 bounce
verify unix - - n - 1 verify
virtual unix - n n - - virtual
error unix - - n - - error
retry unix - - n - - error
proxymap unix - - n - - proxymap
anvil unix - - n - 1 anvil
postlog unix-dgram n - n - 1 postlogd
"""


class Postfix:
    """One Postfix instance; `with` starts and stops it."""

    def __init__(self, *, address: str = "127.0.0.1", port: int | None = None, extra: str = "",
                 prefix: tuple[str, ...] = ()) -> None:
        # not pytest's directory: that one is closed to everybody but its owner, and Postfix is several users
        self.directory = Path(tempfile.mkdtemp(prefix="zorp-test-postfix-"))
        self.address = address
        self.port = port or free_port(host=address)
        self._extra = extra
        self._prefix = prefix                         # e.g. ("ip", "netns", "exec", NAME)

    def __enter__(self) -> Postfix:
        self._configure()
        self._postfix("start")
        self._wait_until_it_answers()
        return self

    def __exit__(self, *exc_info) -> None:
        self._postfix("abort", check=False)
        shutil.rmtree(self.directory, ignore_errors=True)

    @property
    def log(self) -> str:
        """The mail log so far."""
        path = self.directory / "log/postfix.log"
        return path.read_text() if path.exists() else ""

    def mails(self) -> list[bytes]:
        """Return what has been delivered so far, in order of delivery."""
        new = self.directory / "mail/inbox/new"
        files = sorted(new.iterdir(), key=lambda path: path.stat().st_mtime_ns) if new.exists() else []
        return [path.read_bytes() for path in files]

    def count(self) -> int:
        """Return how many mails have been delivered so far."""
        new = self.directory / "mail/inbox/new"
        return len(os.listdir(new)) if new.exists() else 0

    def wait_for_mails(self, count: int, seconds: float = 30) -> list[bytes]:
        """Return the mails once `count` have been delivered; fails after `seconds`."""
        deadline = time.monotonic() + seconds
        while self.count() < count:
            assert time.monotonic() < deadline, f"{self.count()} of {count} mails delivered\n{self.log[-3000:]}"
            time.sleep(0.05)
        return self.mails()

    def _configure(self) -> None:
        user = pwd.getpwnam("postfix")
        self.directory.chmod(0o755)
        for name in ("queue", "data", "mail", "log"):
            (self.directory / name).mkdir()
        for name in ("data", "mail"):
            os.chown(self.directory / name, user.pw_uid, user.pw_gid)
        values = {"dir": self.directory, "domain": DOMAIN, "uid": user.pw_uid, "gid": user.pw_gid,
                  "address": self.address, "extra": self._extra, "port": self.port}
        (self.directory / "main.cf").write_text(_MAIN.format(**values))
        (self.directory / "master.cf").write_text(_MASTER.format(**values))

    def _postfix(self, command: str, check: bool = True) -> None:
        result = subprocess.run([*self._prefix, shutil.which("postfix") or "/usr/sbin/postfix", "-c",
                                 str(self.directory), command], capture_output=True, text=True, timeout=60, check=False)
        if check and result.returncode:
            raise RuntimeError(f"postfix {command} failed\n{result.stdout}{result.stderr}\n{self.log}")

    def _wait_until_it_answers(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while True:
            if f"{self.address}" in self._listening():
                return
            assert time.monotonic() < deadline, self.log
            time.sleep(0.05)

    def _listening(self) -> str:
        result = subprocess.run([*self._prefix, "ss", "-Hltn", f"sport = :{self.port}"],
                                capture_output=True, text=True, check=True)
        return result.stdout


def body_of(mail: bytes) -> bytes:
    """Return what follows the header section."""
    return mail.partition(b"\n\n")[2]
