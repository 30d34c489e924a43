"""instances.conf and zorpctl.conf: every historical form, and what is wrong is named by line."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from Zorp.wire import instances_conf, zorpctl_conf
from Zorp.wire.zorpctl_conf import ZorpctlConf

DEFAULTS = ZorpctlConf()

LINES = {
    "blank and comment": ("\n  # intra -p x\n", []),
    "plain": ("intra -p /etc/zorp/policy.py", [("intra", ("-p", "/etc/zorp/policy.py"), {})]),
    "leading blanks, tabs": ("  intra\t-p\t/p.py", [("intra", ("-p", "/p.py"), {})]),
    "3.0 manual": ("zorp_intra -v4 -p /p.py --threads 500 -- --no-auto-restart --fd-limit 1024 --process-limit 512",
                   [("zorp_intra", ("-v4", "-p", "/p.py", "--threads", "500", "--fd-limit-min", "1024"),
                     {"auto_restart": False})]),
    "zorpctl options before the separator": (
        "zorp_intra -v4 --threads 500 --no-auto-restart --num-of-processes 2",
        [("zorp_intra", ("-v4", "--threads", "500"), {"auto_restart": False, "number_of_processes": 2})]),
    "quoted": ("a --logspec 'http.accounting:4,ftp.request:6' --policy \"/x y.py\"",
               [("a", ("--logspec", "http.accounting:4,ftp.request:6", "--policy", "/x y.py"), {})]),
    "nothing behind the separator": ("a -v3 --", [("a", ("-v3",), {})]),
    "many": ("a -v3 -- -P 3 -S -c\nb", [("a", ("-v3",), {"number_of_processes": 3, "auto_start": False,
                                                      "enable_core": True}), ("b", (), {})]),
    "2.0 with an obsolete option": ("blue -v3 -p /p.py --autobind-ip 169.254.0.1",
                                    [("blue", ("-v3", "-p", "/p.py"), {})]),
    "hash inside a line is an argument": ("a -p x#y", [("a", ("-p", "x#y"), {})]),
}


@pytest.mark.parametrize(("text", "expected"), LINES.values(), ids=LINES)
def test_line_is_read(text, expected):
    instances, problems = instances_conf.parse(text, DEFAULTS)
    assert [(line.name, line.zorp_args) for line in instances] == [(name, args) for name, args, _ in expected]
    for line, (_, _, settings) in zip(instances, expected, strict=True):
        assert {key: getattr(line, key) for key in settings} == settings
    assert not any(problem.fatal for problem in problems)


REFUSED = {
    "junk": ("a -v3 -- --nonsense", "Junk found at the end of the arg list: --nonsense"),
    "name": ("1a -v3", "Invalid instance name: 1a"),
    "quotation": ("a 'x", "close the quotation"),
    "number": ("a -- -P none", "needs a number"),
    "no number": ("a -- --num-of-processes", "needs a number"),
    "zero processes": ("a -- -P 0", "needs a number"),
    "no option": ("mail2 policy /x", "conf:2: Invalid arguments at instance mail2: 'policy' is not an option"),
}


@pytest.mark.parametrize(("line", "text"), REFUSED.values(), ids=REFUSED)
def test_a_bad_line_is_named_and_the_others_stay(line, text):
    instances, problems = instances_conf.parse(f"good -v3\n{line}\nfine -v3\n", DEFAULTS)
    assert [instance.name for instance in instances] == ["good", "fine"]
    assert [(problem.line_number, problem.fatal) for problem in problems] == [(2, True)]
    assert text in str(problems[0])


@pytest.mark.parametrize(("line", "count"), [
    ("mail-2 -p /x", 1), ("mail-2 -p /x --as mail", 0), ("mail.2 --as=mail", 0), ("mail.2 -amail", 0), ("mail_2", 0)])
def test_a_name_that_no_function_can_have_is_warned_of(line, count):
    instances, problems = instances_conf.parse(line, DEFAULTS)
    assert len(instances) == 1
    assert [(problem.fatal, "cannot be the name of a function" in problem.text) for problem in problems] == \
        [(False, True)] * count


def test_same_name_twice_refuses_both_and_names_both_lines():
    instances, problems = instances_conf.parse("a -v3\nb\na -v4\n", DEFAULTS)
    assert [instance.name for instance in instances] == ["b"]
    assert "lines 1 and 3" in str(problems[0])


def test_options_of_one_line_do_not_leak_into_the_next():
    instances, _ = instances_conf.parse("a -- --no-auto-start --enable-core\nb\n", DEFAULTS)
    assert instances[1].auto_start
    assert not instances[1].enable_core


def test_process_names():
    (instance,), _ = instances_conf.parse("a -- -P 2", DEFAULTS)
    assert instance.process_names == ("a#0", "a#1")


CONFS = {
    "3.x": "STOP_CHECK_TIMEOUT=2\nZORP_APPEND_ARGS='--verbose=6 --log-tags'\nAUTO_RESTART=0\n",
    "7.x": '[zorpctl]\nstop_check_timeout = 2\nZORP_APPEND_ARGS = "--verbose=6 --log-tags"\nAUTO_RESTART = 0\n',
}


@pytest.mark.parametrize("text", CONFS.values(), ids=CONFS)
def test_both_generations_of_zorpctl_conf_are_read(text):
    conf = zorpctl_conf.parse(text)
    assert conf.stop_check_timeout == 2
    assert conf.zorp_append_args == ("--verbose=6", "--log-tags")
    assert not conf.auto_restart
    assert conf.warnings == ()


def test_append_args_reach_every_line():
    conf = zorpctl_conf.parse("ZORP_APPEND_ARGS=--verbose=6\nZORPCTL_APPEND_ARGS=-P 2\nFD_LIMIT_MIN=4096\n")
    (instance,), _ = instances_conf.parse("a -v3", conf)
    assert instance.zorp_args == ("-v3", "--verbose=6", "--fd-limit-min", "4096")
    assert instance.number_of_processes == 2


WARNED = {
    "unknown": ("COLOUR=red", "Unknown zorpctl.conf directive at 1: COLOUR=red; zorpctl.conf(5) lists what there is"),
    "no equals": ("AUTO_RESTART", "Invalid zorpctl.conf line at 1: AUTO_RESTART; write KEY=VALUE"),
    "obsolete": ("AUTO_RESTART_DELAY=5",
                 "The use of AUTO_RESTART_DELAY in zorpctl.conf is deprecated, its value is ignored"),
    "bad number": ("STOP_CHECK_TIMEOUT=soon",
        "Invalid zorpctl.conf line at 1: STOP_CHECK_TIMEOUT=soon; "
        "STOP_CHECK_TIMEOUT takes seconds, 0 or more, like 2.5"),
    "bad mode": ("PIDFILE_DIR_MODE=0999",
        "Invalid zorpctl.conf line at 1: PIDFILE_DIR_MODE=0999; "
        "PIDFILE_DIR_MODE takes an octal mode like 770"),
    "not a number": ("STOP_CHECK_DELAY=nan",
        "Invalid zorpctl.conf line at 1: STOP_CHECK_DELAY=nan; "
        "STOP_CHECK_DELAY takes seconds, 0 or more, like 2.5"),
}


@pytest.mark.parametrize(("text", "warning"), WARNED.values(), ids=WARNED)
def test_what_zorpctl_conf_cannot_mean_is_a_warning(text, warning):
    assert zorpctl_conf.parse(text).warnings == (warning,)


@given(st.text())
def test_any_text_gives_values_and_problems(text):
    instances, problems = instances_conf.parse(text, zorpctl_conf.parse(text))
    assert len({instance.name for instance in instances}) == len(instances)
    assert all(str(problem) for problem in problems)


REFUSED_WORDS = {
    "NUL in a word": ("a --policy /etc/x\0y.py",
                      "Invalid arguments at instance a: no word can have a byte of value 0"),
    "a number of 5000 digits": (
        "a --policy x -- --process-limit " + "9" * 5000, "--process-limit needs a number from 1"),
}


@pytest.mark.parametrize(("text", "problem"), REFUSED_WORDS.values(), ids=REFUSED_WORDS)
def test_a_line_that_no_program_can_be_started_with_is_a_problem(text, problem):
    instances, problems = instances_conf.parse(f"{text}\nb --policy y\n", ZorpctlConf())
    assert [instance.name for instance in instances] == ["b"]
    assert str(problems[0]).startswith(f"instances.conf:1: {problem}")


def test_a_word_of_zorpctl_conf_that_no_program_can_be_given_is_a_problem():
    instances, problems = instances_conf.parse("a --policy x\n", zorpctl_conf.parse("APPEND_ARGS=--x\0y\n"))
    assert (instances, len(problems)) == ([], 1)
