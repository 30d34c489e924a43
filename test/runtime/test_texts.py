"""The text that was accepted is the text that is followed, whatever becomes of the files."""

import contextlib
import fcntl
import importlib.machinery
import os
import pathlib
import py_compile
import signal
import sys
import zipfile

import pytest

from test.runtime.policies import ECHO
from test.support.daemon import wait_until
from Zorp.runtime.texts import AcceptedText, PolicyTexts

WITH_HELPERS = ECHO.replace('word = "$word"', '''
import sys
sys.path.append("$dir/own")
from zones import word as zones_word
from parts.first import word as parts_word
from bare.second import word as bare_word
from placed import word as placed_word
try:
    import absent
except ImportError:
    absent = None
word = "-".join((zones_word, parts_word, bare_word, placed_word, "with" if absent else "without"))
''')
HELPERS = {"zones.py": "zones", "parts/__init__.py": "", "parts/first.py": "parts", "bare/second.py": "bare",
           "own/placed.py": "placed"}


def write_helpers(daemon, suffix: str = "") -> None:
    for name, word in HELPERS.items():
        path = daemon.directory / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"word = {word + suffix!r}\n")


def crash(daemon, number: int = signal.SIGKILL, process: int | None = None) -> None:
    """Kill the worker and wait for its replacement."""
    before = daemon.worker_pid(process)
    os.kill(before, number)
    wait_until(lambda: daemon.worker_pid(process) != before, "the next worker; the log:\n" + daemon.log.text())


def word_of(daemon) -> str:
    with daemon.connect() as client:
        return client.recv(200).split()[0].decode()


def test_a_draft_comes_into_force_by_a_reload_and_not_by_a_crash(zorp):
    # given a policy that was changed and not reloaded
    daemon = zorp(ECHO, word="accepted")
    daemon.write_policy(ECHO, word="draft")
    os.utime(daemon.policy, (1_000_000_000, 1_000_000_000))
    with daemon.control() as control:
        stamp = control.ask("GETVALUE info.policy.file_stamp")
    # when its worker is killed, twice
    for _ in range(2):
        crash(daemon)
        # then the replacement follows the accepted text, and everybody can see that it is not the one on disk
        assert word_of(daemon) == "accepted"
    assert daemon.log.wait_for("core.info", 3, "Policy files were changed and not reloaded").fields == {
        "process": "intra", "files": str(daemon.policy)}
    with daemon.control() as control:
        assert control.ask("GETVALUE info.policy.file_stamp") == stamp
    # and a reload takes the new one, which the next crash keeps
    daemon.reload()
    assert word_of(daemon) == "draft"
    crash(daemon)
    assert word_of(daemon) == "draft"


@pytest.mark.parametrize("draft", ["broken(\n", None], ids=["broken", "gone"])
def test_a_broken_draft_does_not_keep_a_crashed_worker_from_coming_back(zorp, draft):
    daemon = zorp(ECHO)
    if draft is None:
        daemon.policy.unlink()
    else:
        daemon.write_policy(draft)
    crash(daemon, signal.SIGSEGV)
    assert word_of(daemon) == "hello"
    assert not daemon.log.find("core.error", 0, "Error")


def test_a_refused_reload_leaves_the_text_of_a_replacement_alone(zorp):
    daemon = zorp(ECHO, word="accepted")
    daemon.write_policy("broken(\n")
    with daemon.control() as control:
        assert control.ask("RELOAD WAIT").startswith("FAIL")
    crash(daemon)
    assert word_of(daemon) == "accepted"


def test_modules_beside_the_policy_are_part_of_its_text(zorp):
    # given a policy with modules of every kind, which were all changed, one of them added
    daemon = zorp(WITH_HELPERS, start=False)
    write_helpers(daemon)
    daemon.start()
    write_helpers(daemon, "2")
    (daemon.directory / "absent.py").write_text("")
    # when a worker crashes, then nothing of it is in force
    crash(daemon)
    assert word_of(daemon) == "zones-parts-bare-placed-without"
    # nor when all files are gone
    for name in (*HELPERS, "absent.py"):
        (daemon.directory / name).unlink()
    crash(daemon)
    assert word_of(daemon) == "zones-parts-bare-placed-without"
    # and a reload takes what is there
    write_helpers(daemon, "3")
    daemon.reload()
    assert word_of(daemon) == "zones3-parts3-bare3-placed3-without"


def write_archive(path, word: str) -> None:
    """A zip file with a module, a package, a directory without __init__, and one of byte code."""
    source = path.with_name("compiled.py")
    source.write_text(f"word = {word!r}\n")
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("zipped", "pack/__init__", "pack/inner", "bare/second"):
            archive.writestr(f"{name}.py", f"word = {word!r}\n")
        archive.write(py_compile.compile(str(source), str(path.with_name("c.pyc"))), "compiled.pyc")
    source.unlink()


def test_modules_in_a_zip_file_are_part_of_the_text(zorp):
    # given a policy whose modules are in an archive, and another archive that does not exist yet
    daemon = zorp(ECHO.replace('word = "$word"', """
import sys
sys.path[:0] = ["$dir/later.zip", "$dir/all.zip"]
import zipped, pack, pack.inner, bare.second, compiled
try:
    import absent
except ImportError:
    absent = None
words = {module.word for module in (zipped, pack, pack.inner, bare.second, compiled)}
word = "-".join(words) + ("-with" if absent else "") + "-" + os.path.relpath(zipped.__file__, "$dir")
"""), start=False)
    archive = daemon.directory / "all.zip"
    write_archive(archive, "one")
    daemon.start()
    assert word_of(daemon) == "one-all.zip/zipped.py"
    # when both are changed and a worker crashes, then the replacement has the accepted modules
    write_archive(archive, "two")
    with zipfile.ZipFile(daemon.directory / "later.zip", "w") as later:
        later.writestr("absent.py", "")
        later.writestr("zipped.py", "word = 'later'")
    crash(daemon)
    assert word_of(daemon) == "one-all.zip/zipped.py"
    line = daemon.log.wait_for("core.info", 3, "Policy files were changed and not reloaded")
    assert line.fields["files"] == str(archive)
    # also when the archive is gone; a reload takes what is there
    archive.unlink()
    crash(daemon)
    assert word_of(daemon) == "one-all.zip/zipped.py"
    write_archive(archive, "three")
    (daemon.directory / "later.zip").unlink()
    daemon.reload()
    assert word_of(daemon) == "three-all.zip/zipped.py"


def test_each_process_comes_back_with_its_own_text(zorp):
    daemon = zorp(ECHO, word="accepted", arguments=["--num-of-processes", "2"])
    wait_until(lambda: daemon.pid_file(1).exists(), "the second worker")
    daemon.write_policy(ECHO, word="draft")
    crash(daemon, process=1)
    crash(daemon, process=0)
    assert {word_of(daemon) for _ in range(10)} == {"accepted"}


def texts_held_by(pid: int) -> int:
    """How many sealed texts a process has open."""
    held = 0
    for path in pathlib.Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):     # closed meanwhile
            held += os.readlink(path).startswith("/memfd:policy")
    return held


def test_one_text_is_kept_for_each_process_and_by_the_master_alone(zorp):
    # given reloads, one of them refused, and a crash
    daemon = zorp(ECHO)
    daemon.reload()
    good = daemon.policy.read_text()
    daemon.write_policy(good.replace("for port in", "raise ValueError; for port in").replace("$", "$$"))
    with daemon.control() as control:
        assert control.ask("RELOAD WAIT").startswith("FAIL")
    crash(daemon)
    daemon.write_policy(good.replace("$", "$$"))
    daemon.reload()
    # then nothing of them is left behind
    wait_until(lambda: texts_held_by(daemon.pid) == 1, "a single text in the master")
    assert texts_held_by(daemon.worker_pid()) == 0


def test_a_text_that_loads_no_more_is_told_and_tried_again(zorp):
    # given a policy that needs a file when it is loaded, which is gone when its worker crashes
    daemon = zorp(ECHO.replace('word = "$word"', 'word = open("$dir/data").read()'), start=False)
    data = daemon.directory / "data"
    data.write_text("needed")
    daemon.start()
    data.unlink()
    daemon.kill(signal.SIGKILL, worker=True)
    # then the log says that nobody serves, and why
    line = daemon.log.wait_for("core.error", 0, "The policy in force cannot be loaded again, nobody serves")
    assert (line.fields["process"], line.fields["retried"]) == ("intra", "yes")
    assert "No such file or directory" in line.fields["error"]
    # and the instance serves as soon as it can, also who came meanwhile
    client = daemon.connect()
    data.write_text("needed")
    assert client.recv(100).startswith(b"needed")


def test_a_text_that_never_loads_again_ends_the_instance_with_its_reason(zorp):
    daemon = zorp(ECHO.replace('word = "$word"', 'word = open("$dir/data").read()'), start=False,
                  arguments=["--restart-max", "2"])
    (daemon.directory / "data").write_text("needed")
    daemon.start()
    (daemon.directory / "data").unlink()
    daemon.kill(signal.SIGKILL, worker=True)
    assert daemon.wait() == 1
    last = daemon.log.find("core.error", 0, "The policy in force cannot be loaded again")[-1]
    assert last.fields["retried"] == "no"
    assert "Daemon exited but not restarting; restart_count='2'" in daemon.log.text()


def test_processes_that_read_different_texts_do_not_come_into_force(zorp):
    # given two processes, the second of which imports a module only when a file says so
    daemon = zorp(ECHO.replace("Globals.instance_name = names[0]", '''Globals.instance_name = names[0]
    import time
    while virtual_name == "intra#1" and not os.path.exists("$dir/changed"):
        time.sleep(0.01)
    import part
    open("$dir/read", "w").close()'''), start=False, arguments=["--num-of-processes", "2"])
    (daemon.directory / "part.py").write_text("one = 1\n")
    (daemon.directory / "changed").touch()
    daemon.start()
    wait_until(lambda: daemon.pid_file(1).exists(), "the second worker")
    before = daemon.worker_pid(0), daemon.worker_pid(1)
    for name in ("changed", "read"):
        (daemon.directory / name).unlink()
    # when the module is edited after the first has read it
    with daemon.control(0) as control:
        control.send(b"RELOAD WAIT\n")
        wait_until((daemon.directory / "read").exists, "the first process to read")
        (daemon.directory / "part.py").write_text("two = 2\n")
        (daemon.directory / "changed").touch()
        # then the reload fails and says so
        answer = control.line()
    assert answer.startswith("FAIL")
    assert "the policy was changed while it was read, load it again" in answer
    assert "part.py" in answer
    assert (daemon.worker_pid(0), daemon.worker_pid(1)) == before


def test_tracebacks_show_the_lines_that_run(zorp):
    # given a policy whose callback fails, and a file with other lines
    policy = """
        from Zorp.Core import *
        from Zorp.Plug import *

        class Fails(PlugProxy):
            def config(self):
                raise KeyError("as accepted")

        def intra():
            Service("plug", Fails, router=DirectedRouter(SockAddrInet("127.0.0.1", 9)))
            Dispatcher(DBSockAddr(SockAddrInet("127.0.0.1", $port), ZD_PROTO_TCP), service="plug")
        """
    daemon = zorp(policy)
    daemon.write_policy("#\n" * 20)
    # when a client makes it fail, then the log has the line that failed
    daemon.connect().close()
    daemon.log.wait_for("core.error", 2, 'Traceback:     raise KeyError("as accepted")')


# ---------------------------------------------------------------- the parts

@pytest.fixture
def imports(monkeypatch):
    """Import in this process without traces."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "path_hooks", list(sys.path_hooks))
    monkeypatch.setattr(sys, "path_importer_cache", dict(sys.path_importer_cache))
    monkeypatch.setattr(sys, "modules", dict(sys.modules))


def test_a_sealed_text_is_read_as_it_was_and_cannot_be_changed():
    text = AcceptedText(17, {"/a/policy.py": bytes(range(256)), "/a/é.py": b""})
    descriptor = text.seal()
    try:
        assert AcceptedText.unseal(descriptor) == AcceptedText.unseal(descriptor) == text
        with pytest.raises(PermissionError):
            os.pwrite(descriptor, b"x", 0)
        with pytest.raises(PermissionError):
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, 0)
    finally:
        os.close(descriptor)


def test_stale_byte_code_is_not_used(tmp_path, imports):
    # given byte code of another text with the same time and size as the source
    helper = tmp_path / "stale_helper.py"
    helper.write_text("value = 'old'\n")
    os.utime(helper, (1_000_000_000, 1_000_000_000))
    py_compile.compile(str(helper))
    helper.write_text("value = 'new'\n")
    os.utime(helper, (1_000_000_000, 1_000_000_000))
    # when it is imported
    texts = PolicyTexts(str(tmp_path / "policy.py"), (str(tmp_path),))
    texts.begin()
    import stale_helper
    # then the source counts
    assert stale_helper.value == "new"
    assert texts.end().files == {str(helper): b"value = 'new'\n"}


def test_a_module_without_source_is_text_too(tmp_path, imports):
    source = tmp_path / "compiled_helper.py"
    source.write_text("value = 1\n")
    py_compile.compile(str(source), str(tmp_path / "compiled_helper.pyc"))
    source.unlink()
    texts = PolicyTexts(str(tmp_path / "policy.py"), (str(tmp_path),))
    texts.begin()
    import compiled_helper
    text = texts.end()
    assert list(text.files) == [str(tmp_path / "compiled_helper.pyc")]
    # and when the file is gone, it is still there
    (tmp_path / "compiled_helper.pyc").unlink()
    del sys.modules["compiled_helper"]
    sys.path_hooks.pop(0)
    replacement = PolicyTexts(str(tmp_path / "policy.py"), (str(tmp_path),), text)
    replacement.begin()
    import compiled_helper as again
    assert (compiled_helper.value, again.value) == (1, 1)


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x05\x06" + bytes(17), b"PK\x03\x04"])
def test_a_file_that_is_no_archive_is_no_place_of_modules(tmp_path, imports, content):
    (tmp_path / "file.zip").write_bytes(content)
    texts = PolicyTexts(str(tmp_path / "policy.py"), (str(tmp_path),))
    texts.begin()
    sys.path.insert(0, str(tmp_path / "file.zip"))
    with pytest.raises(ImportError):
        import nowhere_at_all  # noqa: F401
    assert texts.end().files == {}


def test_the_interpreters_own_modules_are_no_text(tmp_path, imports):
    texts = PolicyTexts(str(tmp_path / "policy.py"), (str(tmp_path), "/etc/zorp"))
    texts.begin()
    assert texts.is_ours(str(tmp_path / "below"))
    assert texts.is_ours("/opt/site/modules")
    assert not texts.is_ours(os.path.dirname(os.__file__))
    assert not texts.is_ours(os.path.dirname(importlib.machinery.__file__))
    assert not texts.is_ours("")


def test_a_module_first_imported_by_a_callback_is_the_one_on_disk(tmp_path, imports):
    texts = PolicyTexts(str(tmp_path / "policy.py"), (str(tmp_path),), AcceptedText(0, {}))
    texts.begin()
    (tmp_path / "late_helper.py").write_text("value = 2\n")
    with pytest.raises(ImportError):
        import late_helper
    texts.end()
    import late_helper
    assert late_helper.value == 2
