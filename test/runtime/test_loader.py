"""Errors of policies: file, line, what is wrong, what to write instead; never a bare traceback."""

import pytest

from Zorp.Exceptions import PolicyError
from Zorp.runtime.loader import InstanceNames, Loader

BROKEN = {
    "syntax": ("x = 1\ny = (\n", 2, "'(' was never closed"),
    "unknown name": ("from Zorp.Core import *\n\nNoSuchThing()\n", 3, "NoSuchThing"),
    "inside the instance": ("from Zorp.Core import *\ndef intra():\n    undefined\n", 3, "undefined"),
    "missing module": ("import nosuchmodule\n", 1, "put the module beside the policy"),
    "module by another name": ("from Zorp.Smpt import *\n", 1, "did you mean 'Smtp'"),
    "module that is not built": ("from Zorp.Http import *\n", 1, "take its use out of the policy"),
    "branch by another name": ("from Zorp.Core import *\nconfig.option.language = 'hu'\n", 2, "did you mean 'options'"),
    "name of a module": ("import Zorp.Core\nZorp.Core.Servise\n", 2, "did you mean 'Service'"),
    "wrong argument": ("from Zorp.Core import *\nDBIface('eth0', 0)\n", 2, "give the port to listen on, 1 to 65535"),
    "python 2": ("from Zorp.Core import *\ndef intra():\n\ttry: pass\n\texcept ValueError, e:\n\t\tprint e\n", 4,
                 "policies are Python 3"),
    "raises": ("raise RuntimeError('by hand')\n", 1, "by hand"),
    "exits": ("import sys\nsys.exit(3)\n", 2, "SystemExit"),
    "starts a thread": ("import threading\nthreading.Thread(target=threading.Event().wait, daemon=True).start()\n"
                        "from Zorp.Core import *\ndef intra(): pass\n", 0, "started a thread"),
    "starts a thread that Python does not count": (
        "import _thread, time\n_thread.start_new_thread(time.sleep, (60,))\n"
        "from Zorp.Core import *\ndef intra(): pass\n", 0, "started a thread"),
}


@pytest.mark.parametrize(("policy", "line", "text"), BROKEN.values(), ids=BROKEN)
def test_a_broken_policy_is_reported_with_file_line_and_remedy(zorp, policy, line, text):
    # given a broken policy; when it is started
    daemon = zorp(policy, start=False)
    # then the exit status is 2, and one line says where and what
    assert daemon.run() == 2
    complaint = next(one for one in daemon.log.lines() if f"({one.session}): {daemon.policy}:{line}: " in one.raw)
    assert (complaint.tag, complaint.level) == ("core.error", 0)
    assert text in complaint.raw
    assert not [raw for raw in daemon.log.text().splitlines() if raw.startswith(("Traceback", "  File"))]


def test_an_error_in_a_helper_names_the_helper(zorp):
    # given a helper module beside the policy, with an error inside
    daemon = zorp("from zones import *\n", start=False)
    (daemon.directory / "zones.py").write_text("a = 1\nb = nothing\n")
    assert daemon.run() == 2
    assert f"{daemon.directory}/zones.py:2: NameError" in daemon.log.text()


def test_the_place_is_the_last_line_of_the_policy_before_our_code(zorp):
    policy = "from Zorp.Core import *\ndef make():\n    DBSockAddr('x', 1)\ndef intra():\n    make()\n"
    daemon = zorp(policy, start=False)
    daemon.run()
    assert f"{daemon.policy}:3: Expected SockAddr" in daemon.log.text()


def test_the_traceback_begins_in_the_policy(zorp):
    policy = "from Zorp.Core import *\ndef helper():\n    return None.foo\ndef intra():\n    helper()\n"
    daemon = zorp(policy, start=False)
    daemon.run()
    steps = [line.raw.partition("Traceback: ")[2] for line in daemon.log.find("core.error", 0)
             if "Traceback: " in line.raw]
    places = [step.strip().rpartition(",")[0] for step in steps if step.startswith("  File")]
    assert steps[0] == "Traceback (most recent call last):"
    assert places == [f'File "{daemon.policy}", line 5', f'File "{daemon.policy}", line 3']


def test_a_syntax_error_is_shown_line_by_line(zorp):
    daemon = zorp("x = 1\ny = = 2\n", start=False)
    daemon.run()
    assert "<0A>" not in daemon.log.text()
    assert "Traceback:     y = = 2" in daemon.log.text()


def test_an_unreadable_policy(zorp):
    daemon = zorp("", start=False)
    daemon.policy.unlink()
    assert daemon.run() == 2
    assert daemon.log.wait_for("core.error", 0, "Error opening policy file").fields == {"filename": str(daemon.policy)}
    assert (f": {daemon.policy}: cannot be read, No such file or directory; name the file of the policy with --policy\n"
            in daemon.log.text())


def test_a_policy_that_everybody_may_write_is_refused(zorp):
    daemon = zorp("from Zorp.Core import *\ndef intra(): pass\n", start=False)
    daemon.policy.chmod(0o666)
    assert daemon.run() == 2
    assert "take the right away with chmod o-w" in daemon.log.text()


def test_latin_1_without_coding_line_is_accepted(zorp):
    daemon = zorp("", start=False)
    daemon.policy.write_bytes(b"from Zorp.Core import *\nname = 'b\xfcro'\ndef intra(): pass\n")
    daemon.start()
    assert daemon.stop() == 0


def test_no_byte_code_is_written(zorp):
    daemon = zorp("import helper\nfrom Zorp.Core import *\ndef intra(): pass\n", start=False)
    (daemon.directory / "helper.py").write_text("")
    daemon.start()
    assert not (daemon.directory / "__pycache__").exists()


def test_old_init_functions_may_treat_their_argument_as_text_or_list():
    names = InstanceNames(["intra", "extra"])
    assert names == "intra"
    assert names != "extra"
    assert (names[0], list(names), str(names)) == ("intra", ["intra", "extra"], "intra")


def test_policy_errors_need_no_traceback():
    loader = Loader("/etc/zorp/policy.py", ["intra"], "intra", True)
    complaint = loader.explain(PolicyError("Wrong", remedy="write it right"))
    assert complaint.text == "/etc/zorp/policy.py:0: Wrong; write it right"
    assert complaint.traceback == ()


def test_the_master_has_one_thread(zorp):
    daemon = zorp("from Zorp.Core import *\ndef intra(): pass\n")
    with open(f"/proc/{daemon.pid}/status") as status:
        assert "Threads:\t1\n" in status.read()          # the master


def test_a_policy_that_imports_only_a_proxy_gets_the_rest_from_core(zorp):
    # given a policy as the papers print it, without the import of Zorp.Core
    daemon = zorp("""
        from Zorp.Plug import *

        def intra():
            Service("plug", PlugProxy, router=DirectedRouter(SockAddrInet("127.0.0.1", 9)))
            Dispatcher(DBSockAddr(SockAddrInet("127.0.0.1", $port), ZD_PROTO_TCP), service="plug")
        """)
    # then it serves, and every borrowed name is reported once
    daemon.connect().close()
    assert [line.fields["name"] for line in daemon.log.find("core.policy", 2, "Name is not imported")] == [
        "Service", "DirectedRouter", "SockAddrInet", "Dispatcher"]


def test_a_name_that_nobody_has_is_an_error_there_too(zorp):
    daemon = zorp("from Zorp.Plug import *\n\ndef intra():\n    Servise('plug', PlugProxy)\n", start=False)
    assert daemon.run() == 2
    assert "policy.py:4: NameError: name 'Servise' is not defined" in daemon.log.text()


@pytest.mark.parametrize("arguments", ["name", "names", "names, virtual_name", "names, virtual_name, is_master"])
def test_a_policy_with_its_own_init_serves(zorp, arguments):
    daemon = zorp(f"""
        from Zorp.Core import *
        from Zorp.Plug import *

        def init({arguments}):
            Service("plug", PlugProxy, router=DirectedRouter(SockAddrInet("127.0.0.1", 9)))
            Dispatcher(DBSockAddr(SockAddrInet("127.0.0.1", $port), ZD_PROTO_TCP), service="plug")
            return TRUE
        """)
    daemon.connect().close()
    assert daemon.log.wait_for("core.session", 3, "Starting proxy instance").session == "svc/intra/plug:0"


def test_a_wrong_argument_of_ours_names_those_that_there_are(zorp):
    # given a misspelt argument
    daemon = zorp("from Zorp.Core import *\ndef intra():\n    TransparentRouter(forge_address=TRUE)\n", start=False)
    # then the remedy is the list of the right ones
    assert daemon.run() == 2
    assert ("TransparentRouter takes forced_port, forge_addr, overrideable, forge_port; reference.md has what they mean"
            in daemon.log.text())
