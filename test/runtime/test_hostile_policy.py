"""Policies that end the process, break the interpreter or raise what cannot be shown: always a reason."""

import os
import subprocess
import sys

import pytest

from test.runtime.policies import ECHO
from test.support.tree import ROOT

GOOD_END = "\nfrom Zorp.Core import *\ndef intra(): pass\n"
STRANGE = """
class Strange(Exception):
    def __str__(self): raise RuntimeError("no text")
    __repr__ = __str__
raise Strange
"""
HOSTILE = {
    "ends with success": ("import os\nos._exit(0)\n", "ended with status 0"),
    "ends in the function": ("import os\nfrom Zorp.Core import *\ndef intra(): os._exit(0)\n", "ended with status 0"),
    "kills itself": ("import os\nos.kill(os.getpid(), 9)\n", "ended by signal 9"),
    "has no text": (STRANGE, "Strange: its text cannot be shown"),
    "deletes a builtin": ("import builtins\ndel builtins.len\n" + GOOD_END, "replaced builtins of Python: len"),
    "breaks builtins and fails": ("import builtins\nbuiltins.isinstance = builtins.str = None\n1/0\n",
                                  "replaced builtins of Python: isinstance, str"),
    "traces": ("import sys\ndef trace(*args): raise ValueError('traced')\nsys.settrace(trace)\ndef f(): pass\nf()\n",
               "ValueError: traced"),
    "closes its output": ("import sys\nsys.stdout = sys.stderr = None\nraise KeyError('x')\n", "KeyError: 'x'"),
    "forks": ("import os\npid = os.fork()\nif pid: os.waitpid(pid, 0)\n" + GOOD_END, "made a process while"),
    "forbids recursion": ("import sys\nsys.setrecursionlimit(60)\n1/0\n", "ZeroDivisionError"),
}
ONLY_CHECKED = {
    "closes descriptors": ("import os\nos.closerange(0, 200)\n" + GOOD_END, ""),
    "leaves a thread": ("import threading, time\nthreading.Thread(target=time.sleep, args=(600,)).start()\n"
                        "raise OSError\n", "OSError"),
}


def check(directory, text, *arguments):
    path = directory / "policy.py"
    path.write_text(text)
    return subprocess.run(
        [sys.executable, str(ROOT / "sbin/zorp"), "--as", "intra", "--check-policy", str(path), "--user",
         str(os.getuid()), *arguments], capture_output=True, text=True, timeout=30, check=False)


@pytest.mark.parametrize(("text", "reason"), [*HOSTILE.values(), *ONLY_CHECKED.values()],
                         ids=[*HOSTILE, *ONLY_CHECKED])
def test_the_check_refuses_with_a_reason(tmp_path, text, reason):
    checked = check(tmp_path, text)
    assert (checked.returncode, checked.stdout) == (2, "")
    assert reason in checked.stderr
    assert not [line for line in checked.stderr.splitlines() if line.startswith(("Traceback", "  File"))]


@pytest.mark.parametrize(("text", "reason"), HOSTILE.values(), ids=HOSTILE)
def test_a_daemon_that_cannot_load_names_the_reason(zorp, text, reason):
    # given such a policy; when it is started
    daemon = zorp(text, start=False)
    assert daemon.run() in (1, 2)
    # then the log has the reason, and no bare traceback
    assert reason.replace("'", "<27>") in daemon.log.text() or reason in daemon.log.text()
    assert not [line for line in daemon.log.text().splitlines() if line.startswith(("Traceback", "  File"))]


def test_a_reload_to_such_a_policy_fails_with_the_reason(zorp):
    daemon = zorp(ECHO)
    daemon.write_policy("import os\nos._exit(0)\n")
    with daemon.control() as control:
        assert control.ask("RELOAD WAIT") == "FAIL Reload failed; reason='worker ended with status 0 while loading'"
        assert control.ask("GETVALUE info.last_error") == "worker ended with status 0 while loading"


def test_programs_may_be_started_while_a_policy_loads(tmp_path):
    text = "import os, subprocess\nsubprocess.run(['true'], check=True)\nos.system('true')\n" + GOOD_END
    checked = check(tmp_path, text)
    assert checked.returncode == 0, checked.stderr


def test_what_a_policy_prints_is_no_result(tmp_path):
    described = check(tmp_path, "print('{}')\n" + GOOD_END, "--describe")
    assert described.stdout.startswith('{"version":')
    assert "{}" in described.stderr


# ---------------------------------------------------------------- in sessions

FORKS = """
    import multiprocessing, os, subprocess
    from Zorp.Core import *
    from Zorp.AnyPy import *

    class Forking(AnyPyProxy):
        def config(self):
            pid = self.make()
            open("$dir/status", "w").write(str(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])) + "\\n")

        def make(self):
            return os.fork()                                 # line 12

        def startup(self):
            self.client_stream.write(subprocess.run(
                ["echo", "hello"], preexec_fn=os.setsid, stdout=subprocess.PIPE, text=True).stdout)

    class Multiprocessing(Forking):
        def make(self):
            process = multiprocessing.get_context("fork").Process(target=print)
            process.start()                                  # line 21
            return process.pid

    def intra():
        Service("svc", $proxy, router=DirectedRouter(SockAddrInet("127.0.0.1", 9)))
        Dispatcher(DBSockAddr(SockAddrInet("127.0.0.1", $port), ZD_PROTO_TCP), service="svc")
    """


@pytest.mark.parametrize(("proxy", "line"), [("Forking", 12), ("Multiprocessing", 21)])
def test_a_process_forked_in_a_session_ends_at_once_and_programs_run(zorp, proxy, line):
    daemon = zorp(FORKS, proxy=proxy)
    # when a session forks, and then starts a program
    with daemon.connect() as client:
        assert client.recv(100) == b"hello\n"
    # then the child has ended, and the log has the place
    assert (daemon.directory / "status").read_text() == "1\n"
    lines = daemon.log.find("core.policy", 1, "Policy code forked, the child is ended")
    assert [found.fields["place"] for found in lines] == [f"{daemon.policy}:{line}"]


UNCAUGHT = """
import os, threading, time
tasks = len(os.listdir("/proc/self/task"))
class Thing:
    def __del__(self): raise KeyError("in\\x1b[31m __del__")
def raises(): raise ValueError("in a\\nthread")
def ends(): raise SystemExit
for work in (raises, ends):
    thread = threading.Thread(target=work, name="nightly\\x07")
    thread.start()
    thread.join()
while len(os.listdir("/proc/self/task")) > tasks:        # the kernel's thread ends after Python's
    time.sleep(0.01)
Thing()
"""
BARE = ("Traceback", "  File", "Exception", "thread", "ValueError", "KeyError")


def test_what_nobody_catches_is_lines_of_the_log(zorp):
    # given a policy whose thread raises, and whose object does when it is deleted
    daemon = zorp(ECHO + UNCAUGHT)
    # then the log has their tracebacks, escaped, and one end that is none
    daemon.log.wait_for("core.error", 2, "Exception ignored", **{"in": "Thing.__del__"})
    daemon.log.wait_for("core.error", 2, "Traceback: KeyError: 'in\\x1b[31m __del__'")
    line, = daemon.log.find("core.error", 2, "Thread ended by an exception")
    assert line.session == "nightly<07>"
    daemon.log.wait_for("core.error", 2, "Traceback: ValueError: in a", session="nightly<07>")
    daemon.log.wait_for("core.error", 2, "Traceback: thread", session="nightly<07>")
    assert not [line for line in daemon.log.text().splitlines() if line.startswith(BARE)]


def test_what_nobody_catches_while_a_policy_is_checked_is_lines_of_the_log(tmp_path):
    checked = check(tmp_path, UNCAUGHT + GOOD_END)
    assert checked.returncode == 0
    assert "core.error(2): (nightly<07>): Traceback: ValueError: in a\n" in checked.stderr
    assert not [line for line in checked.stderr.splitlines() if line.startswith(BARE)]


# ---------------------------------------------------------------- what an honest mistake is told

MISTAKES = {
    "a colon": ("def intra()\n    pass\n", "policy.py:1: expected ':'; correct this line\n"),
    "a quote": ("word = 'x\n", "; correct this line\n"),
    "Python 2": ("print 'x'\n", "; correct this line, policies are Python 3 and those of Python 2 are not translated"),
    "not built": ("from Zorp.Http import *\n", "this release has no Http module; take its use out of the policy\n"),
    "a service twice": ('from Zorp.Core import *\nfrom Zorp.Plug import *\nfor number in range(2):\n'
                        '    Service("s", PlugProxy)\n' + GOOD_END,
                        "policy.py:4: Duplicate service: s; give each service its own name, the first one is at "),
}


@pytest.mark.parametrize(("text", "answer"), MISTAKES.values(), ids=MISTAKES)
def test_the_remedy_fits_the_mistake(tmp_path, text, answer):
    checked = check(tmp_path, text)
    assert checked.returncode == 2
    assert answer in checked.stderr


def test_who_reads_no_more_of_a_description_gets_no_traceback(tmp_path):
    # given a reader that has gone
    read_end, write_end = os.pipe()
    os.close(read_end)
    (tmp_path / "policy.py").write_text(GOOD_END)
    described = subprocess.run(
        [sys.executable, str(ROOT / "sbin/zorp"), "--as", "intra", "--policy", str(tmp_path / "policy.py"), "--user",
         str(os.getuid()), "--describe"], stdout=write_end, stderr=subprocess.PIPE, text=True, timeout=30, check=False)
    os.close(write_end)
    assert (described.returncode, described.stderr) == (0, "")
