"""The log of tools (logging 13)."""

import logging

import pytest

from Zorp import Common
from Zorp.Common import LogFilter, Logger, LoggerSingleton, LogSpecItem


@pytest.mark.parametrize(("item", "tag", "level", "is_enabled"), [
    ("core.debug:6", "core.debug", 6, True), ("core.debug:6", "core.debug", 7, False),
    ("core.*:6", "core.error", 3, True), ("*.error:2", "http.error", 2, True), ("*.error:2", "http.info", 2, False),
    ("*.*:10", "pop3.request", 10, True), (" core.debug:0 ", "core.debug", 1, False),
])
def test_items(item, tag, level, is_enabled):
    assert LogSpecItem(item).is_log_enabled(tag, level) is is_enabled


@pytest.mark.parametrize("item", ["core:3", "core.debug.x:3", "core.debug", "core.debug:11", "core.debug:x", ":3", ""])
def test_what_is_no_item_is_refused(item):
    with pytest.raises(ValueError, match="Invalid log specification item"):
        LogSpecItem(item)


def test_any_item_lets_a_message_through():
    wanted = LogFilter(3, "core.debug:1,*.error:5,core.debug:7")
    assert wanted.is_log_enabled("core.debug", 7)
    assert wanted.is_log_enabled("http.error", 5)
    assert wanted.is_log_enabled("http.info", 3)
    assert not wanted.is_log_enabled("http.info", 4)
    wanted.verbosity = 4
    assert wanted.is_log_enabled("http.info", wanted.verbosity)


def test_the_filter_understands_records_of_the_logging_package():
    wanted = LogFilter(3, "")
    for text, is_wanted in (("core.error(3): (nosession): x", True), ("tool[1]: core.error(4): (s): x", False),
                            ("no tag", True)):
        assert wanted.filter(logging.LogRecord("n", 1, "f", 1, text, (), None)) is is_wanted


def test_lines_go_to_standard_error_in_the_shape_of_the_daemon(capsys):
    tool = Logger()
    tool.init("kzorpd", 3, "core.debug:6", use_syslog=False)
    tool.log(None, "core.info", 3, "Started; name='%s'", ("x\ny",))
    tool.log("session", "core.debug", 6, "100% done")
    tool.log(None, "core.info", 4, "not wanted")
    tool.verbosity = 4
    tool.log(None, "core.info", 4, "wanted now")
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition("]: ")[2] for line in lines] == [
        r"core.info(3): (nosession): Started; name='x\x0ay'", "core.debug(6): (session): 100% done",
        "core.info(4): (nosession): wanted now"]
    assert all(line.startswith("kzorpd[") for line in lines)
    assert (tool.use_syslog, tool.verbosity) == (False, 4)


def test_without_a_system_log_lines_go_to_standard_error(monkeypatch, capsys):
    monkeypatch.setattr(Common, "_SYSTEM_LOG", "/nonexistent/log")
    tool = Logger()
    tool.init("kzorpd")
    tool.log(None, "core.info", 3, "x")
    assert "core.info(3): (nosession): x" in capsys.readouterr().err


def test_there_is_one_log_of_a_tool():
    assert LoggerSingleton() is LoggerSingleton()
    assert Logger() is not Logger()
