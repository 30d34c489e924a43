"""The servers that are compared: zorp with a policy, HAProxy in TCP mode, aiosmtpd's Proxy handler."""

from __future__ import annotations

import grp
import os
import pwd
import shutil
import sys
from pathlib import Path

from bench.process import Server, free_port

UNPRIVILEGED = "nobody"
_AS_NOBODY = ("--user", UNPRIVILEGED, "--group", grp.getgrgid(pwd.getpwnam(UNPRIVILEGED).pw_gid).gr_name) \
    if os.geteuid() == 0 else ()

_HAPROXY = """\
global
    nbthread {threads}
    maxconn 6000
    {user}
defaults
    mode tcp
    timeout connect 5s
    timeout client 600s
    timeout server 600s
    option splice-auto
    option splice-request
    option splice-response
listen bench
    bind 127.0.0.1:{port}
    server origin 127.0.0.1:{origin}
"""

_AIOSMTPD = """\
import asyncio, sys
from aiosmtpd.handlers import Proxy
from aiosmtpd.smtp import SMTP
port, origin = int(sys.argv[1]), int(sys.argv[2])
async def main():
    loop = asyncio.get_running_loop()
    handler = Proxy("127.0.0.1", origin)
    server = await loop.create_server(lambda: SMTP(handler), "127.0.0.1", port, backlog=1024)
    await server.serve_forever()
asyncio.run(main())
"""


def zorp(policy: str, directory: Path, origin_port: int, *options: str, name: str = "bench") -> Server:
    """Return a zorp instance with this policy text; it finds its ports as PORT and ORIGIN."""
    port = free_port()
    path = directory / f"policy{port}.py"
    path.write_text(f"PORT, ORIGIN = {port}, {origin_port}\n{policy}")
    os.chmod(path, 0o644)
    if os.geteuid() == 0:
        shutil.chown(directory, UNPRIVILEGED)                     # pid files
    program = shutil.which("zorp", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    command = [program, "--as", name, "--policy", str(path), "--foreground", "--no-syslog", "--verbose", "3",
               "--pid-dir", str(directory), *_AS_NOBODY, *options]
    return Server("zorp", command, port, log=directory / f"{name}.log")


def haproxy(directory: Path, origin_port: int, threads: int = 1) -> Server:
    """Return HAProxy in TCP mode, splicing where it can."""
    port = free_port()
    configuration = directory / f"haproxy{port}.cfg"
    configuration.write_text(_HAPROXY.format(
        port=port, origin=origin_port, threads=threads, user=f"user {UNPRIVILEGED}" if os.geteuid() == 0 else ""))
    return Server("haproxy", ["haproxy", "-db", "-f", str(configuration)], port)


def aiosmtpd_proxy(origin_port: int) -> Server:
    """Return aiosmtpd with its Proxy handler: the same job, an inspected SMTP relay, in Python."""
    port = free_port()
    return Server("aiosmtpd Proxy", [sys.executable, "-c", _AIOSMTPD, str(port), str(origin_port)], port)
